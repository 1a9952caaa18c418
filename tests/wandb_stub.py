"""A W&B server on loopback that knows enough to begin a run, and then behaves as it is told to.

`python wandb_stub.py HOW FILE` prints its port and writes down what it is sent. HOW: good, wrong-key,
silent (never answers), dies (once a run has begun, connections are closed), hangs (nothing is answered).
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROJECT = {"id": "project", "name": "rlhf-pipeline", "entity": {"id": "entity", "name": "me"}}
BUCKET = {
    "id": "bucket",
    "name": "run",
    "displayName": "run",
    "description": None,
    "config": "{}",
    "sweepName": None,
    "project": PROJECT,
    "historyLineCount": 0,
}
ANSWERS = {  # a word of the query -> data
    "upsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
    "RunResumeStatus": {"model": None},
    "serverInfo": {"serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "9.9.9"}}},
    "viewer": {"viewer": {"id": "me", "username": "me", "entity": "me", "teams": {"edges": []}}},
    "createArtifact": {
        "createArtifact": {
            "artifact": {
                "id": "artifact",
                "state": "COMMITTED",
                "artifactSequence": {"id": "sequence", "latestArtifact": None},
            }
        }
    },
    "ArtifactType": {"project": {"artifact": None}},
    "createRunFiles": {"createRunFiles": {"runID": "bucket", "uploadHeaders": [], "files": []}},
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
        query = json.loads(body).get("query", "")
        Handler.begun |= "upsertBucket" in query
        found = [data for word, data in ANSWERS.items() if word in query]
        return {"data": found[0] if found else {}}

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
