"""A labeler for fault tests: the longer response is better, ties stay."""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--samples", "--out", "--seed"):
    parser.add_argument(name)
args = parser.parse_args()
rows = [json.loads(line) for line in Path(args.samples).read_text().splitlines()]
for row in rows:
    row.pop("ended")
    sizes = sorted({len(r.split()) for r in row["responses"]}, reverse=True)
    row["ranks"] = [1 + sizes.index(len(r.split())) for r in row["responses"]]
Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
