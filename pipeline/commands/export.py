"""A run's models as folders for others: `python -m pipeline.commands.export --run checkpoints/tiny`.

RUN/export/{sft,ppo,rm}: what plain transformers loads, its adapter if it was trained with one, the resolved
configs, and a model card written from the manifests. Nothing that people gave as data goes along.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.commands.model_card import write_card
from pipeline.data.messages import message
from pipeline.data.template import encode_responses
from pipeline.errors import UserError
from pipeline.evaluation.record import Record, load_record
from pipeline.handoff import artifacts
from pipeline.handoff.artifacts import Lock, Manifest, Parent
from pipeline.handoff.found import need_first
from pipeline.models.adapters import ADAPTER
from pipeline.models.forward import fold_bias, reward_bias
from pipeline.models.loading import config_of, load_reward, load_tokenizer, quiet
from pipeline.process.files import remove
from pipeline.process.progress import say

FOLDER = "export"
EMA = "ema"
"""Folder of a policy's moving average, beside its weights."""
_OURS = ("card.json", "made_from.json")
"""Records of a stage, as are its .jsonl files: rows of data, samples, curves."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `make export`."""
    args = parser().parse_args(argv)
    quiet()
    record = load_record(args.run)
    for name in [args.stage] if args.stage else exported(record):
        say(f"export: {export(record, name, args.ema and name != 'rm')}")


def parser() -> argparse.ArgumentParser:
    """Arguments of `python -m pipeline.commands.export`."""
    out = argparse.ArgumentParser(prog="python -m pipeline.commands.export", description=__doc__)
    out.add_argument("--run", type=Path, required=True)
    default = "default: the last policy, and the reward model"
    out.add_argument("--stage", choices=list(steps.stages()), help=default)
    out.add_argument("--ema", action="store_true", help="the policy's moving average of weights")
    return out


def exported(record: Record) -> list[str]:
    """The last policy that was trained, and the reward model."""
    need_first(record.run, record.stages, "nothing to hand over yet")
    made = [name for name in steps.stages() if name in record.stages]
    policies = [name for name in made if steps.TABLE[name].policy]
    return [policies[-1], *(name for name in made if not steps.TABLE[name].policy)]


def export(record: Record, name: str, ema: bool = False) -> Path:
    """Write RUN/export/NAME and return it; UserError for a stage that is not there or not sound, and
    where a person has changed what was exported before."""
    if name not in record.stages:
        told = "\n".join(record.problems) or f"not made yet; make it: {record.command(name)}"
        raise UserError(f"{record.run / name}: {told}")
    source = record.stages[name].path
    manifest = artifacts.read(source)
    if ema and not (source / EMA).is_dir():
        raise UserError(f"{source}: no moving average was kept; it is of a run with ppo.ema_decay")
    final = record.run / FOLDER / (f"{name}-{EMA}" if ema else name)
    with Lock(artifacts.lock_path(final)):
        _as_it_was(final)
        staging = artifacts.work_path(final)
        remove(staging)
        staging.mkdir(parents=True)
        _copy(source / EMA if ema else source, staging)
        adapter = not ema and _adapter(source, staging, record)
        _configs(record, staging)
        about = {"plain": not config_of(staging).is_encoder_decoder, "ema": ema, "adapter": adapter}
        if not steps.TABLE[name].policy:
            about |= _centre(staging, about["plain"])
        write_card(record, name, staging, **about)
        link = Parent(
            path=str(source), manifest_sha256=artifacts.content_hash(manifest.model_dump())
        )
        made = Manifest(stage=FOLDER, parents={name: link}, packages=manifest.packages)
        return artifacts.publish(staging, final, made)


def _as_it_was(final: Path) -> None:
    """UserError for an export that was edited, its card filled in perhaps: it stays."""
    if not artifacts.is_published(final):
        return
    try:
        artifacts.read(final, FOLDER)
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{reason}: changed since it was exported; move it away first") from None


def _copy(source: Path, staging: Path) -> None:
    """Weights, config and tokenizer; no records."""
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        kept = file.suffix != ".jsonl" and file.name not in (*_OURS, artifacts.MANIFEST)
        if kept and not file.name.startswith("."):
            shutil.copyfile(file, staging / file.name)


def _adapter(source: Path, staging: Path, record: Record) -> bool:
    """The adapter, its base named as whoever has the export knows it; whether there is one."""
    if not (source / ADAPTER).is_dir():
        return False
    folder = staging / ADAPTER
    shutil.copytree(source / ADAPTER, folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    base = record.stages["sft"].config["model"] if source.name == "sft" else "../sft"
    told["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(told, indent=2) + "\n")
    return True


def _centre(folder: Path, plain: bool) -> dict[str, Any]:
    """Fold a reward model's bias into its weights where it can be; what its card says of using it."""
    model, tokenizer = load_reward(folder), load_tokenizer(folder)
    bias = reward_bias(model.config)
    if folded := plain and fold_bias(model):
        model.save_pretrained(folder)
    said = [message("user", "a b"), message("assistant", "c d")]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    ends = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
    prompt, [reply] = encode_responses(tokenizer, said[:1], ["c d"])
    same = tokenizer(ends, add_special_tokens=False)["input_ids"] == prompt + reply
    return {"folded": folded, "bias": bias, "same_ids": same}


def _configs(record: Record, staging: Path) -> None:
    """Resolved configs of all stages, to make them again with."""
    (staging / "configs").mkdir()
    for name in (stage for stage in steps.stages() if stage in record.stages):
        text = yaml.safe_dump(record.stages[name].config, sort_keys=False, allow_unicode=True)
        (staging / "configs" / f"{name}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with reporting_errors():
        main()
