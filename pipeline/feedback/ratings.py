"""What a person says of responses in a chat: `RUN/ratings.jsonl` and `rated.jsonl`, added to and never rewritten."""

import os
from pathlib import Path
from typing import Any

from pipeline.data.messages import Message
from pipeline.process.files import jsonl


def keep(run: Path, messages: list[Message], responses: list[str], **said: Any) -> Path:
    """Add a row, on the disk when this returns: `ranks` of the responses to a prompt (1 the best), as the rm
    stage reads rankings; the `rating` of a single one, which compares nothing, into `rated.jsonl`. What a killed
    process cut short is closed off first.
    """
    path = run / ("rated.jsonl" if "rating" in said else "ratings.jsonl")
    row = jsonl([{"prompt": messages, "responses": responses, **said}])
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            row = row if file.read() == b"\n" else "\n" + row
        file.write(row.encode())
        file.flush()
        os.fsync(file.fileno())
    return path
