"""Evaluate a run: `python -m pipeline.evaluation --run checkpoints/tiny --config configs/tiny/eval.yaml`.

Writes RUN/eval/SPLIT.json and RUN/eval/SPLIT_samples.jsonl for whatever stages the run has.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.cli import reporting_errors
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import AddSettings, load_config, split_settings, stage_overrides
from pipeline.errors import UserError
from pipeline.evaluation.judges import load_judge
from pipeline.handoff.artifacts import installed_packages, read
from pipeline.handoff.found import find_stages, fresh_stages, read_json
from pipeline.handoff.lineage import data_fingerprint
from pipeline.process.files import sha256, write_atomically
from pipeline.process.progress import say

FORMAT_VERSION = 1


def main(argv: list[str] | None = None) -> None:
    """Command line of `make eval`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation", description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--force", action="store_true", help="even if nothing changed since")
    parser.add_argument(
        "--set", action=AddSettings, default="", help='words of SET that begin with "eval."'
    )
    parser.add_argument("settings", nargs="*", help="key=value of the evaluation's own keys")
    args = parser.parse_args(argv)
    words = stage_overrides("eval", split_settings(args.set))
    config = load_config(EvalConfig, args.config, [*words, *args.settings])
    run_evaluation(args.run, config, args.split, args.force)


def run_evaluation(
    run: Path, config: EvalConfig, split: str = "test", force: bool = False
) -> dict[str, Any]:
    """Evaluate what a run has, unless that was done before, and return the result."""
    out = run / "eval" / f"{split}.json"
    stages, problems = fresh_stages(find_stages(run))
    if "sft" not in stages:
        raise UserError(
            f"{run}: nothing to evaluate; make its first stage: make sft RUN={run.name}"
        )
    for problem in problems:
        say(f"eval: left out: {problem}")
    identity = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "artifacts": {
            name: {"path": str(stage.path), "manifest_sha256": stage.manifest_sha256}
            for name, stage in stages.items()
        },
        "inputs": _inputs(config, split),
        "packages": installed_packages(),
    }
    done = read_json(out)
    if not force and {key: done.get(key) for key in identity} == identity:
        say(f"eval: up to date ({out})")
        return done
    for name, stage in stages.items():
        if stage.manifest:
            read(stage.path, name)  # every file is what its manifest says

    from pipeline.evaluation.evaluate import evaluate  # imports torch

    result, samples = evaluate(config, split, stages)  # type: ignore[arg-type]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    write_atomically(out.with_name(f"{split}_samples.jsonl"), lines)
    whole = {**identity, **result}
    write_atomically(out, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    say(f"eval: {out} ({result['seconds']:.0f} s)")
    return whole


def _inputs(config: EvalConfig, split: str) -> dict[str, str]:
    """Hashes of the data files and of the judge."""
    sources = [
        config.prompts if split == "test" else config.validation_prompts,
        config.demonstrations,
        config.pretraining,
    ]
    inputs: dict[str, str] = {}
    for source in sources:
        inputs |= {} if source is None else data_fingerprint(source)
    judge = load_judge(config.judge)  # a judge that cannot be imported ends it here, at once
    if judge is not None and judge.file is not None:
        inputs[judge.name] = sha256(judge.file)
    return inputs


if __name__ == "__main__":
    with reporting_errors():
        main()
