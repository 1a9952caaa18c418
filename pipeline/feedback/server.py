"""The labelling page's server: what a person may see and say, and what keeps others out.

Every request is of somebody: whoever holds an invitation's token (kept in a cookie that scripts cannot read) or, where
the page is on loopback alone, the person at the machine. Sources of responses are never sent.
"""

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import UserError
from pipeline.feedback import admin
from pipeline.feedback.exchange import rows
from pipeline.feedback.said import Named, Preferred, Ranked, Skipped, Token
from pipeline.feedback.store import Conflict, Store
from pipeline.process import disk
from pipeline.process.files import jsonl

PAGE = Path(__file__).parent / "page"
LARGEST = 64 * 1024
"""Bytes that a request may send."""
RATE, BURST = 10.0, 60.0
"""Requests of one person a second, and at once."""
GUESSES = 10.0
"""Wrong tokens from one address at once; one more every ten seconds."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Problem(Exception):
    """A status and a sentence."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status, self.text = status, text


@dataclass
class Person:
    """Somebody who may label."""

    number: int
    name: str
    admin: bool


@dataclass
class Site:
    """A store, and who may come to it."""

    store: Store
    local: Person | None
    """Who comes without a token; nobody unless the page is on loopback."""
    public: str = ""
    """The address that people type, where another server stands in front."""
    _buckets: dict[Any, tuple[float, float]] = field(default_factory=dict)

    def person(self, request: Request) -> Person:
        """Who asks. Problem 401 for nobody."""
        token = request.cookies.get("label")
        if token and (found := self.store.who(token)):
            return Person(*found)
        if token is None and self.local is not None:
            return self.local
        raise Problem(401, "Open the link of your invitation: this page does not know you.")

    def limit(self, key: Any, rate: float, burst: float) -> None:
        """Problem 429 when one key asks too often (a bucket that fills at `rate`)."""
        if len(self._buckets) > 10_000:
            self._buckets.clear()
        now = time.monotonic()
        left, at = self._buckets.get(key, (burst, now))
        left = min(burst, left + rate * (now - at))
        self._buckets[key] = (max(left - 1, 0.0), now)
        if left < 1:
            raise Problem(429, "Too many requests; wait a moment.")

    def session(self, said: Token, client: str) -> Person:
        """Whose token this is."""
        found = self.store.who(said.token)
        if found is None:
            self.limit(("guess", client), 0.1, GUESSES)
            raise Problem(401, "This invitation is not known, or has ended; ask for a new one.")
        return Person(*found)

    # --- what a person sees and says --------------------------------------------------------------

    def next(self, who: Person) -> dict[str, Any]:
        """The task to put before them, with where they stand."""
        number = self.store.take(who.number)
        done, left = self.store.counts(who.number)
        version, text = self.store.guideline()
        told = {"name": who.name, "admin": who.admin, "done": done, "left": left}
        told |= {"guideline": {"version": version, "text": text}}
        return told | {"task": None if number is None else self.shown(who, number)}

    def shown(self, who: Person, number: int) -> dict[str, Any]:
        """A task without its sources, and the person's own judgement of it."""
        task, own = self.store.task(number), self.store.labels(who.number, number)
        if task is None:
            raise Problem(404, "There is no such task.")
        mine = [{"event": one.event, "kind": one.kind, **one.body} for one in own]
        responses = [{"text": one.text, "ended": one.ended} for one in task.candidates]
        told = {"id": number, "prompt": task.prompt, "responses": responses}
        return told | {"mine": mine[0] if mine else None}

    def again(self, who: Person, number: str) -> dict[str, Any]:
        """A task that they have judged, to edit. Problem 404 for others' tasks."""
        known = number.isdecimal() and len(number) < 19  # SQLite's numbers
        if not known or not self.store.labels(who.number, int(number)):
            raise Problem(404, "This task is not in your history.")
        return self.shown(who, int(number))

    def history(self, who: Person) -> list[dict[str, Any]]:
        """What they have judged, the newest first."""
        tasks, own = self.store.tasks(), self.store.labels(who.number)
        return [
            {
                "task": one.task,
                "time": one.time,
                "kind": one.kind,
                "ranks": one.body.get("ranks"),
                "prompt": tasks[one.task].prompt[-1]["content"][:200],
            }
            for one in reversed(own)
        ]

    def save(self, who: Person, said: Ranked | Skipped) -> dict[str, Any]:
        """Save a judgement; answered when it is on the disk."""
        task = self.store.task(said.task)
        if task is None:
            raise Problem(404, "There is no such task.")
        if isinstance(said, Ranked):
            k = len(task.candidates)
            if {len(said.ranks), len(said.overall), len(said.flags)} != {k}:
                raise Problem(422, f"This task has {k} answers; each has one rank.")
        kind = "label" if isinstance(said, Ranked) else "skip"
        body = said.model_dump(exclude={"uuid", "task", "after"})
        event = self.store.save(who.number, said.task, kind, body, said.uuid, said.after)
        return {"saved": event}

    # --- what an admin sees and does --------------------------------------------------------------

    def invite(self, said: Named) -> dict[str, Any]:
        """A new token; it is shown once."""
        return {"name": said.name, "token": self.store.invite(said.name, said.admin)}

    def revoke(self, said: Named) -> dict[str, Any]:
        """End a token."""
        self.store.revoke(said.name)
        return {"name": said.name}

    def prefer(self, said: Preferred) -> dict[str, Any]:
        """Ask first what is worth most; 0 tasks: go back to the usual order."""
        chosen = admin.worth_labelling(self.store, said.by)[: said.number]
        self.store.prefer({number: worth + 1 for number, worth in chosen})
        return {"preferred": len(chosen)}


def build(site: Site) -> Starlette:
    """The application."""

    def endpoint(
        function: Callable, kind: type[BaseModel] | None = None, admins: bool = False
    ) -> Callable:
        """A request as a call of a method with who asks, the number in its path and what was sent."""

        async def answer(request: Request) -> Response:
            def work(body: bytes) -> Any:
                who = site.person(request)
                site.limit(who.number, RATE, BURST)
                if admins and not who.admin:
                    raise Problem(403, "This is for admins.")
                said = [kind.model_validate_json(body)] if kind else []
                return function(*([] if admins else [who]), *request.path_params.values(), *said)

            body = (
                await request.body()
            )  # what labels is quicker than another thread's turn would be
            told = await run_in_threadpool(work, body) if admins else work(body)
            return told if isinstance(told, Response) else JSONResponse(told)

        return answer

    async def session(request: Request) -> Response:
        said = Token.model_validate_json(await request.body())
        client = request.client.host if request.client else ""
        who = site.session(said, client)
        response = JSONResponse({"name": who.name})
        secure = urlsplit(site.public).scheme == "https"
        lasts = 180 * 24 * 3600
        response.set_cookie(
            "label", said.token, lasts, httponly=True, samesite="strict", secure=secure
        )
        return response

    def page(name: str) -> Callable:
        async def answer(request: Request) -> Response:
            return FileResponse(PAGE / name)

        return answer

    def exported() -> Response:
        name = {"content-disposition": 'attachment; filename="labels.jsonl"'}
        return Response(jsonl(rows(site.store)), headers=name, media_type="application/jsonl")

    overview = admin.Overview(site.store)
    post = ["POST"]
    routes = [
        Route("/", page("label.html")),
        Route("/admin", page("admin.html")),
        Mount("/static", StaticFiles(directory=PAGE)),
        Route("/api/session", session, methods=post),
        Route("/api/next", endpoint(site.next)),
        Route("/api/history", endpoint(site.history)),
        Route("/api/task/{number}", endpoint(site.again)),
        Route("/api/label", endpoint(site.save, Ranked), methods=post),
        Route("/api/skip", endpoint(site.save, Skipped), methods=post),
        Route("/api/admin", endpoint(overview.told, admins=True)),
        Route("/api/admin/labels.jsonl", endpoint(exported, admins=True)),
        Route("/api/admin/invite", endpoint(site.invite, Named, admins=True), methods=post),
        Route("/api/admin/revoke", endpoint(site.revoke, Named, admins=True), methods=post),
        Route("/api/admin/prefer", endpoint(site.prefer, Preferred, admins=True), methods=post),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, site=site)],
        exception_handlers=dict.fromkeys(_TOLD, _told),
        max_body_size=LARGEST,
    )


_TOLD = (Problem, Conflict, ValidationError, UserError, sqlite3.OperationalError)


async def _told(request: Request, error: Exception) -> Response:
    """An error as a status and a sentence; where nothing was saved it says so."""
    status, text = 500, "Not saved: the server failed; what you did stays on this page."
    if isinstance(error, Problem):
        status, text = error.status, error.text
    elif isinstance(error, Conflict):
        status, text = 409, "You have judged this in another window meanwhile; that is kept."
    elif isinstance(error, ValidationError):
        first = error.errors()[0]
        status, text = 422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    elif isinstance(error, UserError):
        status, text = 409, str(error)
    elif disk.is_full(error):
        status, text = 507, "Not saved: the disk is full. Keep this page open, and try again."
    return JSONResponse({"error": text}, status)


def _parts(address: str) -> SplitResult:
    """Of an address; none of what is not one."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


class Guard:
    """What holds for every request: whose page sends it, and what the browser may do with the answer."""

    def __init__(self, app: ASGIApp, site: Site):
        self.app, self.site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif told := self._refused(scope["method"], Headers(scope=scope)):
            await JSONResponse({"error": told}, 403)(scope, receive, sending)
        else:
            await self.app(scope, receive, sending)

    def _refused(self, method: str, headers: Headers) -> str | None:
        """Why not: a name that leads here from elsewhere, or another site's page that posts."""
        public, host = urlsplit(self.site.public).netloc, headers.get("host", "")
        if self.site.local and host != public and _parts(f"//{host}").hostname not in LOOPBACK:
            return f"This page is at localhost, not at {host[:80]!r}."
        if method == "POST":
            origin = _parts(headers.get("origin", "")).netloc
            if not origin or origin not in (host, public):
                return "Another site's page may not send this."
            if headers.get("content-type", "").partition(";")[0] != "application/json":
                return "What is sent is JSON."
        return None
