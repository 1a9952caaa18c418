"""Fifty people at once, each faster than people are: how long they wait, and that nothing is lost."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
import uuid

import httpx
import psutil
import pytest

from pipeline.feedback.store import Candidate, Store, Task

pytest.importorskip("starlette", reason="make label installs it")
pytest.importorskip("uvicorn", reason="make label installs it")

PEOPLE, SECONDS = 50, 10.0
SERVER = """
import sys, uvicorn
from pathlib import Path
from pipeline.commands.label import bound
from pipeline.feedback.server import Site, build
from pipeline.feedback.store import Store
listening = bound("127.0.0.1", 0)
print(listening.getsockname()[1], flush=True)
app = build(Site(Store(Path(sys.argv[1])), None))
uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listening])
"""


class Crowd:
    """People at a server: seconds that each request took, and the labels that were called saved."""

    def __init__(self, url: str, tokens: list[str], seconds: float, bare: bool = False):
        self.url, self.bare = url, bare
        self.waited: list[float] = []
        self.said: list[str] = []
        asyncio.run(self.come(tokens, seconds))
        self.waited.sort()

    async def come(self, tokens: list[str], seconds: float) -> None:
        limits, headers = httpx.Limits(max_connections=None), {"origin": self.url}
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=60, limits=limits
        ) as client:
            until = time.monotonic() + seconds
            await asyncio.gather(*(self.person(client, token, until) for token in tokens))

    async def person(self, client: httpx.AsyncClient, token: str, until: float) -> None:
        """Takes a task, thinks for about a second, ranks it; `bare`: asks for what is not there instead."""

        async def timed(method: str, path: str, body=None):
            began, cookie = time.monotonic(), {"cookie": f"label={token}"}
            answer = await client.request(method, path, json=body, headers=cookie)
            self.waited.append(time.monotonic() - began)
            assert answer.is_success or self.bare, answer.text
            return None if self.bare else answer.json()

        await asyncio.sleep(random.random())
        while time.monotonic() < until:
            told = await timed("GET", "/nothing" if self.bare else "/api/next")
            await asyncio.sleep(0.5 + random.random())
            if self.bare:
                await timed("GET", "/nothing")
                continue
            task, name = told["task"], str(uuid.uuid4())
            k = len(task["responses"])
            body = {"uuid": name, "task": task["id"], "seconds": 1.0, "guideline": 0}
            body |= {"ranks": random.choices(range(1, k + 1), k=k), "overall": [None] * k}
            await timed("POST", "/api/label", body | {"flags": [[]] * k})
            self.said.append(name)

    def wait(self, share: float) -> float:
        return self.waited[int(share * len(self.waited))]


@pytest.mark.slow
def test_fifty_people_wait_for_less_than_a_tenth_of_a_second_and_lose_nothing(tmp_path):
    store = Store(tmp_path / "labels.db")
    texts = [Candidate(f"response {i} " * 40) for i in range(4)]
    store.add(
        (Task([{"role": "user", "content": f"prompt {i}"}], texts) for i in range(2000)), 0.2, 3
    )
    tokens = [store.invite(f"person {i}") for i in range(PEOPLE)]
    command = [sys.executable, "-c", SERVER, str(store.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            Crowd(url, tokens[:2], 2.0)  # imports, caches
            bare = Crowd(url, tokens, SECONDS, bare=True)
            before = sum(psutil.Process(server.pid).cpu_times()[:2])
            people = Crowd(url, tokens, SECONDS)
            spent = sum(psutil.Process(server.pid).cpu_times()[:2]) - before
        finally:
            server.send_signal(signal.SIGKILL)
    print(
        f"{len(people.waited)} requests, {len(people.said)} labels, "
        f"{1000 * spent / len(people.waited):.1f} ms CPU of the server each, load "
        f"{os.getloadavg()[0]:.1f}: p50 {1000 * people.wait(0.5):.1f} ms, p95 {1000 * people.wait(0.95):.1f} "
        f"ms; requests that do nothing: p50 {1000 * bare.wait(0.5):.1f} ms, p95 {1000 * bare.wait(0.95):.1f} ms"
    )
    there = {label.uuid for label in store.labels()}
    assert set(people.said) <= there and len(people.said) > PEOPLE
    assert people.wait(0.95) < max(0.1, 3 * bare.wait(0.95))  # where all wait for other programs
