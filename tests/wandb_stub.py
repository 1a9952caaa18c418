"""A W&B server on loopback that knows enough to keep runs and artifacts, and then behaves as it is told to.

`python wandb_stub.py HOW FILE` prints its port and writes down what it is sent. HOW: good, wrong-key,
silent (never answers), dies (once a run has begun, connections are closed), hangs (nothing is answered).
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROJECT = {
    "id": "project",
    "internalId": "project",
    "name": "rlhf-pipeline",
    "entity": {"id": "entity", "name": "me"},
}
RUNS: dict[str, dict[str, Any]] = {}
ARTIFACTS: dict[str, dict[str, Any]] = {}
VIEWS: list[str] = []


def bucket(name: str, **more: Any) -> dict[str, Any]:
    found = {"id": name, "name": name, "displayName": name, "description": None, "config": "{}"}
    lines = {f"{kind}LineCount": 0 for kind in ("history", "events", "log")}
    tails = {
        "historyTail": "[]",
        "eventsTail": "[]",
        "summaryMetrics": "{}",
        "wandbConfig": '{"t": 1}',
    }
    return {**found, **lines, **tails, "sweepName": None, "project": PROJECT, "tags": [], **more}


def upsert(asked: dict[str, Any]) -> dict[str, Any]:
    inserted = asked["name"] not in RUNS
    RUNS.setdefault(asked["name"], bucket(asked["name"]))
    return {"upsertBucket": {"bucket": RUNS[asked["name"]], "inserted": inserted}}


def resume(asked: dict[str, Any]) -> dict[str, Any]:
    found = RUNS.get(asked["name"])
    return {"model": found and {**PROJECT, "bucket": found}}


def create(asked: dict[str, Any]) -> dict[str, Any]:
    about = asked["input"]
    name = about["artifactCollectionName"]
    collection = {"__typename": "ArtifactSequence", "id": name, "name": name, "project": PROJECT}
    aliases = [
        {
            "__typename": "ArtifactAlias",
            "id": a["alias"],
            "alias": a["alias"],
            "artifactCollection": collection,
        }
        for a in about["aliases"] or []
    ]
    made = {
        "__typename": "Artifact",
        "id": f"{name}:{about['digest'][:6]}",
        "artifactSequence": {**collection, "latestArtifact": None},
        "versionIndex": 0,
        "artifactType": {"name": about["artifactTypeName"]},
        "ttlDurationSeconds": -2,
        "ttlIsInherited": True,
        "tags": [],
        "state": "COMMITTED",
        "size": 1,
        "digest": about["digest"],
        "fileCount": 1,
        "createdAt": "2026-01-01T00:00:00Z",
        "aliases": aliases,
        **dict.fromkeys(("description", "metadata", "historyStep", "commitHash", "updatedAt")),
    }
    ARTIFACTS[made["id"]] = made
    return {"createArtifact": {"artifact": made}}


def member(made: dict[str, Any], name: str) -> dict[str, Any]:
    kind = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": 0}
    collection = {"__typename": "ArtifactSequence", "name": name, "project": PROJECT}
    held = {"artifactCollection": collection, "aliases": made["aliases"], "artifact": made}
    return {**kind, "createdAt": made["createdAt"], **held}


def link(asked: dict[str, Any]) -> dict[str, Any]:
    about = asked["input"]
    found = member(ARTIFACTS[about["artifactID"]], about["artifactPortfolioName"])
    return {"result": {"versionIndex": 0, "artifactMembership": found}}


def membership(asked: dict[str, Any]) -> dict[str, Any]:
    name, _, alias = asked["name"].partition(":")
    for made in ARTIFACTS.values():
        own = [a["alias"] for a in made["aliases"]]
        if made["artifactSequence"]["name"] == name and alias in own:
            return {"project": {"artifactCollectionMembership": member(made, name)}}
    return {"project": {"artifactCollectionMembership": None}}


def view(asked: dict[str, Any]) -> dict[str, Any]:
    VIEWS.append(asked["displayName"])
    made = {
        "id": "view",
        "name": asked["name"],
        "displayName": asked["displayName"],
        "spec": asked["spec"],
    }
    return {"upsertView": {"view": made, "inserted": True}}


def views(asked: dict[str, Any]) -> dict[str, Any]:
    edges = [{"node": {"displayName": name}} for name in VIEWS]
    return {"project": {"allViews": {"edges": edges}}}


ME = {
    "id": "me",
    "username": "me",
    "entity": "me",
    "email": "",
    "flags": "{}",
    "teams": {"edges": []},
}
ANSWERS: dict[str, Any] = {  # a word of the query -> data, of its variables
    "UpsertBucket": upsert,
    "RunResumeStatus": resume,
    "erverInfo": {"serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "9.9.9"}}},
    "ServerFeatures": {"serverInfo": {"features": []}},
    "query Viewer": {"viewer": ME},
    "GetDefaultEntity": {"viewer": ME},
    "mutation CreateArtifact (": create,
    "ArtifactMembershipByName": membership,
    "ArtifactByID": lambda asked: {"artifact": ARTIFACTS[asked["id"]]},
    "UseArtifact": lambda asked: {
        "useArtifact": {"artifact": {"id": asked.get("input", asked)["artifactID"]}}
    },
    "LinkArtifact": link,
    "query ArtifactType": {"project": {"artifact": None}},
    "UpsertView2": view,
    "query Views": views,
}


class Handler(BaseHTTPRequestHandler):
    """Answers each request as `how` says."""

    how, seen, begun = "good", Path(), False
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.seen.open("ab") as file:
            file.write(self.path.encode() + b" " + body + b"\n")
        if self.how == "silent" or (self.how == "hangs" and Handler.begun):
            time.sleep(600)
        if self.how == "dies" and Handler.begun:
            self.close_connection = True
            self.connection.close()
            return
        if self.how == "wrong-key":
            self._answer({"errors": [{"message": "invalid api key"}]}, 401)
            return
        self._answer(self._data(body) if "graphql" in self.path else {})

    do_GET = do_PUT = do_POST

    def _data(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        query, variables = asked.get("query", ""), asked.get("variables") or {}
        Handler.begun |= "UpsertBucket" in query
        if "CreateRunFiles" in query:
            host = f"http://{self.headers['Host']}/upload/{variables['run']}"
            files = [{"name": n, "uploadUrl": f"{host}/{n}"} for n in variables["files"]]
            made = {"runID": variables["run"], "uploadHeaders": [], "files": files}
            return {"data": {"createRunFiles": made}}
        found = [data for word, data in ANSWERS.items() if word in query]
        answer = found[0] if found else {}
        return {"data": answer(variables) if callable(answer) else answer}

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Not on the terminal."""


if __name__ == "__main__":
    Handler.how, Handler.seen = sys.argv[1], Path(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
