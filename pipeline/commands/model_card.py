"""A model card (README.md of a hub's page) for what a run exports, written from its manifests and evaluation."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import steps
from pipeline.errors import UserError
from pipeline.evaluation.about import verdicts
from pipeline.evaluation.record import Record
from pipeline.evaluation.report import comparison_rows
from pipeline.evaluation.summary import summary_rows
from pipeline.handoff.found import Stage

TO_FILL = "**to be filled in**"
SETTINGS = (
    "model epochs max_steps batch_size learning_rate iterations ppo_epochs kl_coef kl_penalty advantages "
    "temperature max_length max_new_tokens missing_eos rewards lora head_only dtype precision"
).split()
"""Keys of a config that a card names; the rest is in the configs beside it."""


def write_card(record: Record, name: str, folder: Path, **about: Any) -> None:
    """Write README.md into `folder`; what hub's own classes do not read is an error.

    `about` is what the template asks besides: how to use this very export.
    """
    stage, base, task = record.stages[name], _base(record), _task(name, about["plain"])
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        datasets=sorted(source for source, _, kind in _data(record) if kind == "hub") or None,
        library_name="transformers",
        license="unknown",
        model_name=f"{record.run.name} {name}",
        eval_results=_results(record, name, task) or None,
        pipeline_tag=task,
        tags=["rlhf", "rlhf-pipeline", name, *(["reward-model"] if name == "rm" else [])],
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("model_card.md.jinja").render(
        head=data.to_yaml(),
        record=record,
        stage=stage,
        name=name,
        base=shown(base),
        to_fill=TO_FILL,
        stages={n: s for n, s in record.stages.items() if n in steps.stages()},
        settings=_settings,
        data=_data(record),
        summary=summary_rows(record),
        models=record.policies(),
        comparisons=comparison_rows(record),
        limits=[
            f.text for v in verdicts(record) for f in v.findings if f.level in ("watch", "bad")
        ],
        table=steps.TABLE,
        length=stage.config.get("max_new_tokens") or 128,
        **about,
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    if ModelCard(text).data.to_dict() != data.to_dict():
        raise UserError(f"{folder}: the card's head does not read back as it was written")
    (folder / "README.md").write_text(text, encoding="utf-8")


def shown(name: str) -> str:
    """A path as others may read it: its last part alone where it lies outside of the project."""
    return Path(name).name if re.match(r"[/\\~]|\.\.|\w:", name) else name


def _base(record: Record) -> str:
    """What the first stage began with: a hub id, or a folder here."""
    return str(record.stages["sft"].config.get("model", ""))


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not Path(name).exists()


def _data(record: Record) -> list[tuple[str, str, str]]:
    """(name, SHA-256 or "", "file" or "hub") of all that the stages were made from."""
    made = {
        n: h
        for stage in record.stages.values()
        for n, h in (stage.manifest.get("inputs") or {}).items()
        if not n.endswith(".py")  # of labelers and rewards
    }
    return [(shown(n), "" if h == n else h, "hub" if h == n else "file") for n, h in made.items()]


def _settings(stage: Stage) -> str:
    config = {key: stage.config.get(key) for key in SETTINGS}
    words = [
        f"`{key}: {_word(value)}`"
        for key, value in config.items()
        if value not in (None, [], False)
    ]
    return ", ".join(words)


def _word(value: Any) -> str:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_word(v)}" for k, v in value.items() if v is not None) + "}"
    return "[" + ", ".join(map(_word, value)) + "]" if isinstance(value, list) else str(value)


def _task(name: str, plain: bool) -> str:
    """The hub's word for what a model does."""
    if not steps.TABLE[name].policy:
        return "text-classification"
    return "text-generation" if plain else "text2text-generation"


def _results(record: Record, name: str, task: str) -> list[EvalResult]:
    """Headline figures for the hub's own table."""
    found: list[tuple[str, float, str]] = []
    if name == "rm" and record.card:
        found = [("pairwise accuracy", record.card["accuracy"], "held-out rankings")]
    for row in comparison_rows(record) if steps.TABLE[name].policy else ():
        if row["name"].startswith(f"{name} over "):
            found.append(
                (f"win rate, {row['name']}, by {row['by']}", row["rate"], "held-out prompts")
            )
    return [
        EvalResult(
            task_type=task,
            dataset_type=where.replace(" ", "-"),
            dataset_name=where,
            metric_type=metric.partition(",")[0].replace(" ", "_"),
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for metric, value, where in found
    ]
