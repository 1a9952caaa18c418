"""Evaluate a run: `python -m pipeline.evaluation --run checkpoints/tiny --config configs/tiny/eval.yaml`.

Writes RUN/eval/SPLIT.json and RUN/eval/SPLIT_samples.jsonl for whatever stages the run has.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline import steps
from pipeline.cli import add_arguments, reporting_errors, request
from pipeline.config.evaluation import EvalConfig, Split
from pipeline.errors import UserError
from pipeline.evaluation import mirrored
from pipeline.evaluation.judges import load_judge
from pipeline.handoff.artifacts import installed_packages, read
from pipeline.handoff.found import find_stages, fresh_stages, need_first, read_json
from pipeline.handoff.lineage import identity, recorded
from pipeline.handoff.remembered import note
from pipeline.process.files import jsonl, write_atomically
from pipeline.process.progress import say

FORMAT_VERSION = 1


def main(argv: list[str] | None = None) -> None:
    """Command line of `make eval`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--force", action="store_true", help="even if nothing changed since")
    args = parser.parse_intermixed_args(argv)
    asked = request("eval", args)
    made = asked.of("eval")
    config = steps.load("eval", made.config, made.settings)
    assert isinstance(config, EvalConfig)
    run_evaluation(asked.run, config, args.split, args.force)
    note(asked.run, "eval", made, asked.recipe, None)


def run_evaluation(
    run: Path, config: EvalConfig, split: Split = "test", force: bool = False
) -> dict[str, Any]:
    """Evaluate what a run has, unless that was done before, and return the result."""
    out = run / "eval" / f"{split}.json"
    stages, problems = fresh_stages(find_stages(run))
    need_first(run, stages, "nothing to evaluate")
    if config.task != "text":
        raise UserError(
            f"eval: task {config.task} is for make eval MODEL={run / 'ppo'} DATA=FILE; a run's is text"
        )
    for problem in problems:
        say(f"eval: left out: {problem}")
    load_judge(config.judge)  # one that cannot be imported ends it here, at once
    made_from = identity("eval", config.of_split(split), run)
    facts = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "seed": config.seed,
        "config": made_from.config,
        "artifacts": {
            name: {"path": str(stage.path), "manifest_sha256": stage.manifest_sha256}
            for name, stage in stages.items()
        },
        "inputs": made_from.inputs,
        "packages": installed_packages(),
    }
    before = recorded("eval", run, out)
    if not force and before is not None and not before.differs(made_from):
        say(f"eval: up to date ({out})")
        return read_json(out)
    for name, stage in stages.items():
        if stage.manifest:
            read(stage.path, name)  # every file is what its manifest says

    from pipeline.evaluation.evaluate import evaluate  # imports torch

    result, samples = evaluate(config, split, stages)
    write_atomically(out.with_name(f"{split}_samples.jsonl"), jsonl(samples))
    whole = {**facts, **result}
    write_atomically(out, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    say(f"eval: {out} ({result['seconds']:.0f} s)")
    mirrored.evaluation(run, stages, whole, samples)
    return whole


if __name__ == "__main__":
    with reporting_errors():
        main()
