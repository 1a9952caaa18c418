"""A language model behind an OpenAI-compatible URL: asked once for each text, within a budget, answers kept on disk.

The key comes from the environment and goes into one header: no message, log or file has it.
"""

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.config.evaluation import JudgeConfig
from pipeline.errors import UserError
from pipeline.process.files import read_if_whole, write_atomically
from pipeline.process.progress import say, track

AT_ONCE = 4
"""Requests under way."""
TRIES = 5
BACKOFF = 1.0
"""Seconds before the second try; twice as many before each further one, or what the server says."""
MOST_WAIT = 60.0
MOST_BYTES = 2**22
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_REFUSED = (401, 403)
_NO_ANSWER = (OSError, http.client.HTTPException)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another server would get the key."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class Service:
    """`answers(texts)` of the model that a judge's config names; UserError tells what is wrong in a line."""

    def __init__(self, config: JudgeConfig, cache: Path):
        self.url, self.model = str(config.url).rstrip("/"), str(config.model)
        if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./~-]*)?", self.url):
            raise UserError(
                f"judges: url {self.url.partition('?')[0].rpartition('@')[2]}: write it as https://host/v1, "
                "without a name, a key or a query in it"
            )
        self._key = _key(config.key)
        self._timeout, self._calls, self._sent = config.timeout, config.calls, 0
        self._lock, self._failed = threading.Lock(), threading.Event()
        self._kept = cache / _digest(self.url, self.model)[:16]

    def check(self) -> None:
        """UserError where nobody answers or the key is refused; said, where answers of before may do."""
        try:
            with _OPENER.open(self._request("models"), timeout=min(self._timeout, 10)):
                pass
        except urllib.error.HTTPError as error:  # a server without such a list is one
            if error.code in _REFUSED:
                raise UserError(self._told(self._reason(error))) from None
        except _NO_ANSWER as error:
            told = self._told(f"cannot be reached ({error})")
            if not any(self._kept.glob("*.json")):
                raise UserError(told) from None
            say(f"eval: {told}; answers that were kept may do")

    def answers(self, texts: Sequence[str]) -> list[str]:
        """The model's answer to each text, as a user's message, "" where it has none; those known are not asked for
        again."""
        places = [self._kept / f"{_digest(text)}.json" for text in texts]
        new = {p: text for p, text in zip(places, texts, strict=True) if not _known(p)}
        if len(new) > self._calls - self._sent:
            spent = f", {self._sent} of which are spent" if self._sent else ""
            raise UserError(
                self._told(
                    f"{len(new)} requests, and calls: {self._calls}{spent}; raise it, or ask less (n)"
                )
            )
        self._failed.clear()
        with ThreadPoolExecutor(AT_ONCE) as pool, track(len(new), f"eval: {self.model}") as bar:
            for _ in pool.map(self._keep, new, new.values()):
                bar.advance()
        return list(map(_known, places))

    def _keep(self, place: Path, text: str) -> None:
        if self._failed.is_set():  # whoever met the error tells it
            return
        try:
            answer = self._ask(text)
        except UserError:
            self._failed.set()
            raise
        if answer:  # one that was cut off in its thinking may be whole another time
            kept = {"model": self.model, "asked": text, "answer": answer}
            write_atomically(place, json.dumps(kept, ensure_ascii=False) + "\n")

    def _ask(self, text: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
        }
        request = self._request("chat/completions", json.dumps(body).encode())
        for attempt in range(TRIES):
            wait = BACKOFF * 2**attempt
            self._spend()
            try:
                with _OPENER.open(request, timeout=self._timeout) as answer:
                    return self._read(answer.read(MOST_BYTES))
            except urllib.error.HTTPError as error:
                told = f"HTTP {error.code}"
                if error.code not in _AGAIN:
                    raise UserError(self._told(self._reason(error))) from None
                wait = _seconds(error.headers.get("Retry-After")) or wait
            except _NO_ANSWER as error:
                told = f"no answer ({error})"
            if attempt + 1 < TRIES:
                time.sleep(min(wait, MOST_WAIT))
        raise UserError(self._told(f"{told}, {TRIES} times; what was answered is kept"))

    def _spend(self) -> None:
        with self._lock:
            if self._sent >= self._calls:
                raise UserError(
                    self._told(
                        f"all {self._calls} requests (calls) are spent; what was answered is kept"
                    )
                )
            self._sent += 1

    def _read(self, raw: bytes) -> str:
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            shown = self._shown(raw, 100)
            raise UserError(self._told(f"no chat completion: {shown!r}")) from None
        return self._clean(content if isinstance(content, str) else "")

    def _request(self, what: str, body: bytes | None = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return urllib.request.Request(f"{self.url}/{what}", body, headers)

    def _reason(self, error: urllib.error.HTTPError) -> str:
        if error.code in _REFUSED:  # their words quote parts of the key
            return f"HTTP {error.code}: the key is refused"
        return f"HTTP {error.code}: {self._shown(error.read(2**16), 300)}"

    def _shown(self, raw: bytes, length: int) -> str:
        """How a server's words begin, in a line; of a key that is cut off in them nothing is left."""
        text = self._clean(" ".join(raw.decode(errors="replace").split()))[:length]
        cut = next((n for n in range(len(self._key), 0, -1) if text.endswith(self._key[:n])), 0)
        return text[: len(text) - cut]

    def _told(self, what: str) -> str:
        return self._clean(f"judges: {self.url}: {what}")

    def _clean(self, text: str) -> str:
        """Without the key, which a server may send back."""
        return text.replace(self._key, "(key)") if self._key else text


def _key(variable: str | None) -> str:
    """What an environment variable holds; UserError when it is not set, or no header could hold it."""
    key = "" if variable is None else os.environ.get(variable, "").strip()
    if variable is not None and not key:
        raise UserError(
            f"judges: {variable} is not set: export the key in it, or key: null for a server without one"
        )
    if not re.fullmatch(r"[!#-\[\]-~]*", key):
        raise UserError(f"judges: what {variable} holds is no key: it has blanks or other letters")
    return key


def _known(place: Path) -> str:
    """An answer that was kept; "" without one, or where its file is damaged."""
    answer = read_if_whole(place).get("answer")
    return answer if isinstance(answer, str) else ""


def _seconds(text: str | None) -> float:
    return float(text) if text and re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()
