"""Any models on any file of rows: `make eval MODEL="PATH-OR-HUB-ID ..." DATA=FILE` (`python -m pipeline.evaluation.anything`).

Causal models, encoder-decoders and adapters of peft, each with its own tokenizer and template. A row's reply, or
the column `reference`, is what an answer should have been. Prints a table and writes CKPT/eval/MODEL-DATA.json and
MODEL-DATA_samples.jsonl; nothing before all is measured. Settings are those of eval.yaml.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli import reporting_errors
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import AddSettings, checkpoints_root, load_config
from pipeline.data.messages import prompt_text
from pipeline.errors import UserError
from pipeline.evaluation import classification, tallies
from pipeline.evaluation.questions import Question, labels_of, questions
from pipeline.evaluation.summary import judge_tables
from pipeline.handoff import artifacts
from pipeline.handoff.lineage import inputs_of
from pipeline.process.files import jsonl, write_atomically
from pipeline.process.progress import say
from pipeline.steps import overrides, split_settings

FORMAT_VERSION = 1
CONFIG = Path("configs/eval.yaml")

OF_A_RUN = {
    *(
        "judge",
        "validation_prompts",
        "demonstrations",
        "demonstrations_limit",
        "pretraining",
        "samples",
    ),
    *("pretraining_limit", "pretraining_max_length", "candidates", "candidate_prompts"),
}
"""Keys that nothing reads here."""

ROWS = {
    "perplexity": ("Perplexity of the references, per token", "{:.3f}"),
    "byte_perplexity": ("… per byte", "{:.4f}"),
    "accuracy": ("Accuracy", "{:.1%}"),
    "macro_precision": ("Precision, mean of labels", "{:.3f}"),
    "macro_recall": ("Recall, mean of labels", "{:.3f}"),
    "macro_f1": ("F1, mean of labels", "{:.3f}"),
    "unmatched": ("Answers without a label", "{:.1%}"),
    "exact": ("Exact match", "{:.1%}"),
    "token_f1": ("Token F1", "{:.3f}"),
    "rouge1": ("ROUGE-1", "{:.3f}"),
    "rouge2": ("ROUGE-2", "{:.3f}"),
    "rougeL": ("ROUGE-L", "{:.3f}"),
    "bleu": ("BLEU", "{:.1f}"),
    "chrf": ("chrF", "{:.1f}"),
    "distinct_1": ("distinct-1", "{:.3f}"),
    "distinct_2": ("distinct-2", "{:.3f}"),
    "self_bleu": ("self-BLEU", "{:.1f}"),
    "repetition": ("Repeated 4-grams", "{:.1%}"),
    "length": ("Length, tokens", "{:.1f}"),
    "ended": ("Ends by itself", "{:.1%}"),
}
"""Measured quantity, its name, its format."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `make eval MODEL= DATA=`."""
    args = parser().parse_intermixed_args(argv)
    words = overrides("eval", [*split_settings(args.set), *args.settings])
    words += [f"prompts.path={json.dumps(args.data)}", *([f"task={args.task}"] * bool(args.task))]
    config = load_config(EvalConfig, args.config, words)
    if unread := sorted(config.model_fields_set & OF_A_RUN):
        raise UserError(
            f"{args.config} and SET: {', '.join(unread)}: of a run's evaluation alone (make eval RUN=); leave it out"
            + (
                "; a judge of models stands in judges: [{module: NAME}]"
                if "judge" in unread
                else ""
            )
        )
    result, samples = measured(config, args.model)
    parts = ["+".join(result["models"]), Path(args.data).name.partition(".")[0]]
    name = "-".join([*parts, *([config.task] * (config.task != "text"))])
    name = re.sub(r"[^\w.+-]+", "-", name)
    out = checkpoints_root() / "eval" / f"{name}.json"
    write_atomically(out.with_name(f"{name}_samples.jsonl"), jsonl(samples))
    write_atomically(out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    show(result, Console())
    say(f"eval: {out} ({result['seconds']:.0f} s)")


def parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    out = argparse.ArgumentParser(
        prog="python -m pipeline.evaluation.anything", description=__doc__
    )
    out.add_argument("--model", required=True, nargs="+", help="folders or hub ids")
    out.add_argument("--data", required=True, help="a file of rows, a folder or a hub id")
    out.add_argument("--task", help="text, classification or likelihood (eval.task)")
    out.add_argument("--config", type=Path, default=CONFIG, help="its other settings")
    out.add_argument("--set", action=AddSettings, default="", help="the words of SET")
    out.add_argument("settings", nargs="*", metavar="eval.key=value", help="override a key")
    return out


def measured(
    config: EvalConfig, paths: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result as its file holds it, and a row for each prompt."""
    started = time.perf_counter()
    asked = questions(config)
    labels, inputs = labels_of(config, asked), inputs_of(config)
    from pipeline.evaluation.panel import panel  # these import torch
    from pipeline.evaluation.subjects import answered, contests, loaded, that_fit

    others = panel(config)
    subjects = loaded(config, dict(zip(_names(paths), paths, strict=True)))
    asked = that_fit(config, subjects, asked)
    found = {subject.name: answered(config, subject, asked, labels) for subject in subjects}
    groups = tallies.memberships([question.row for question in asked], config.groups())
    samples = [_sample(config, i, question, found) for i, question in enumerate(asked)]
    result = {
        "format_version": FORMAT_VERSION,
        "data": config.prompts.path,
        "prompts": len(asked),
        "task": config.task,
        "config": config.model_dump(mode="json"),
        "inputs": inputs,
        "models": {
            subject.name: {
                "path": subject.path,
                "manifest_sha256": subject.manifest_sha256,
                **found[subject.name].numbers(range(len(asked))),
                "groups": tallies.by_group(groups, found[subject.name].numbers),
            }
            for subject in subjects
        },
        **({"judges": contests(found, asked, others, samples)} if others else {}),
        "packages": artifacts.installed_packages(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return result, samples


def _sample(
    config: EvalConfig, i: int, question: Question, found: dict[str, Any]
) -> dict[str, Any]:
    """A prompt as a line of the samples file."""
    return {
        "prompt": prompt_text(question.messages),
        "reference": question.reference,
        "groups": {key: question.row.get(key) for key in config.groups()},
        "answers": {name: one.row(i) for name, one in found.items()},
    }


def _names(paths: Sequence[str]) -> list[str]:
    """`tiny-ppo` for checkpoints/tiny/ppo; whole paths where that would be one name for two."""
    short = ["-".join(Path(path).parts[-2:]) for path in paths]
    if len(set(paths)) < len(paths):
        raise UserError("eval: MODEL names a model twice")
    return short if len(set(short)) == len(short) else [path.replace("/", "-") for path in paths]


# --- what is printed --------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console) -> None:
    """A table of everything, one for each group, and confusion matrices."""
    models = result["models"]
    shown = {k: row for k, row in ROWS.items() if any(k in found for found in models.values())}
    console.print(_table(f"{result['prompts']} rows", shown, models), "")
    for key, values in next(iter(models.values()))["groups"].items():
        for value, one in values.items():
            parts = {name: found["groups"][key][value] for name, found in models.items()}
            console.print(_table(f"{key} {value}, {one['n']} rows", shown, parts), "")
    for table in judge_tables(result):
        console.print(table, "")
    for name, found in models.items():
        if "confusion" in found:
            console.print(_confusion(name, found), "")


def _table(title: str, shown: dict[str, tuple[str, str]], models: dict[str, Any]) -> Table:
    out = Table(show_edge=False, pad_edge=False)
    out.add_column(Text(title))
    for name in models:
        out.add_column(Text(name), justify="right")
    for key, (what, form) in shown.items():
        cells = [
            form.format(m[key]) if math.isfinite(m.get(key, math.nan)) else "–"
            for m in models.values()
        ]
        out.add_row(what, *cells)
    return out


def _confusion(name: str, found: dict[str, Any]) -> Table:
    """Rows are what was right, columns what was answered."""
    labels = list(found["labels"])
    answered = [*labels, *([classification.NONE] if found["unmatched"] else [])]
    out = Table(show_edge=False, pad_edge=False)
    out.add_column(Text(f"{name}: right / answered"))
    for label in [*(a or "none" for a in answered), "precision", "recall", "F1"]:
        out.add_column(Text(label), justify="right")
    for label in labels:
        cells = [str(found["confusion"][label].get(a, 0)) for a in answered]
        of_label = found["labels"][label]
        cells += [f"{of_label[key]:.3f}" for key in ("precision", "recall", "f1")]
        out.add_row(Text(label), *cells)
    return out


if __name__ == "__main__":
    with reporting_errors():
        main()
