"""`large_data.py STAGE MB FOLDER`: peak memory, in MB, of a stage's way from rows to its batches.

Rows of that many megabytes are written to FOLDER, read, split, encoded and handed to the stage's data set,
as if MB were more than memory should hold; then the file is removed. The peak is of the process's own
memory (RssAnon), sampled: pages of mapped files, which the system takes back, are no part of it.
"""

import contextlib
import io
import json
import sys
import threading
import time
from pathlib import Path

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Data, RMConfig, SFTConfig
from pipeline.data import kept
from pipeline.data.forms import load_demonstrations, load_prompts
from pipeline.data.rankings import load_rankings
from pipeline.data.splits import split_by_prompt
from pipeline.handoff.lineage import inputs_of
from pipeline.ppo.rollout import PromptStream, queries_of
from pipeline.training.supervised import _joined
from pipeline.training.trainers import dataset_of
from stages import ppo, rm, sft


def write(path: Path, stage: str, megabytes: int) -> None:
    """Rows of about 8 kB."""
    words = " ".join(f"w{n % 50}" for n in range(1000))
    with path.open("w") as file:
        number = 0
        while file.tell() < megabytes * 1_000_000:
            answers = (
                {"completion": words} if stage != "rm" else {"chosen": words, "rejected": "w1"}
            )
            file.write(json.dumps({"prompt": f"w{number} {words}", **answers}) + "\n")
            number += 1


def data_path(stage: str, data: Data, work: Path) -> int:
    """The stage's own steps; returns how many rows there are to train on."""
    tokenizer = tiny_models.tokenizer()
    limits = {"max_length": 10_000}
    if stage == "rows":  # no tokens: reading, converting and splitting alone
        inputs_of(SFTConfig(model="m/m", data=data))
        return sum(map(len, split_by_prompt(load_demonstrations(data), 0.01, 1)))
    if stage == "ppo":
        config = PPOConfig(prompts=data, max_prompt_length=10_000)
        inputs_of(config)
        queries = ppo._short_enough(queries_of(tokenizer, load_prompts(data)), config)
        return len(PromptStream(queries, 64, 1).batch(3)) and len(queries)
    if stage == "sft":
        config = SFTConfig(model="m/m", data=data, **limits)
        inputs_of(config)
        training, held_out = split_by_prompt(load_demonstrations(data), 0.01, 1)
        rows, _ = sft._encode(tokenizer, training, config, 0.1)
        sft._encode(tokenizer, held_out, config)
        return len(dataset_of(rows, _joined, work)[:8]["input_ids"]) and len(rows)
    config = RMConfig(data=data, **limits)
    inputs_of(config)
    training, held_out = split_by_prompt(load_rankings(data), 0.01, 1)
    rows, _ = rm._encode(tokenizer, training, config, 0.1)
    rm._encode(tokenizer, held_out, config)
    return len(dataset_of(rows, rm._ranked_ids, work)[:8]["prompt"]) and len(rows)


class Peak:
    """The most memory of its own that this process has had since it began to be watched."""

    def __init__(self):
        self.most, self.done = 0.0, False
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self):
        while not self.done:
            status = Path("/proc/self/status").read_text()
            kilobytes = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.most = max(self.most, int(kilobytes.split()[1]) / 1000)
            time.sleep(0.02)


if __name__ == "__main__":
    stage, megabytes, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    path = folder / f"{stage}.jsonl"
    try:
        write(path, stage, megabytes)
        kept.MOST = 0
        watch, began = Peak(), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            rows = data_path(stage, Data(path=str(path)), folder)
        watch.done = True
        took = time.monotonic() - began
        print(f"{stage}: {rows} rows, {took:.0f} s", file=sys.stderr)
        print(f"{watch.most:.0f}")
    finally:
        path.unlink(missing_ok=True)
