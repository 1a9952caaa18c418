"""Evaluation and report as runs of their own in Weights & Biases, so that its table of runs compares them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import steps
from pipeline.evaluation.about import Verdict
from pipeline.evaluation.record import Record
from pipeline.handoff.found import Stage
from pipeline.tracking.contents import settings_of
from pipeline.tracking.mirror import Mirror


def evaluation(
    run: Path, stages: dict[str, Stage], result: dict[str, Any], samples: list[dict[str, Any]]
) -> None:
    """All numbers of a result as the summary, its config, and the answers that the report shows."""
    name = "eval" if result["split"] == "test" else f"eval-{result['split']}"
    mirror = _mirror(name, run, stages, {"split": result["split"], **result["config"]})
    mirror.start([])
    measured = {k: v for k, v in result.items() if k not in ("config", "artifacts", "packages")}
    mirror.summary(dict(flat(measured)))
    shown = samples[: result["config"]["samples"]]
    if rows := [_row(sample) for sample in shown]:
        mirror.samples(0, rows)
    mirror.finish(code=0)


def report(record: Record, verdicts: list[Verdict], conclusion: str, page: Path) -> None:
    """Verdicts and headline metrics of every stage; the page itself where uploads are asked for."""
    trained = {name: record.stages[name] for name in steps.stages() if name in record.stages}
    mirror = _mirror("report", record.run, record.stages, {n: s.config for n, s in trained.items()})
    mirror.start([])
    headline = {name: stage.metrics for name, stage in trained.items()}
    told = {f"verdict/{verdict.stage}": verdict.level for verdict in verdicts}
    mirror.summary({**dict(flat(headline)), **told, "conclusion": conclusion})
    if mirror.wandb.upload:
        mirror.page(page)
    mirror.finish(code=0)


def _mirror(name: str, run: Path, stages: dict[str, Stage], config: dict[str, Any]) -> Mirror:
    """As the last stage that was made is mirrored; the artifacts are its parents."""
    run = run.resolve() if not run.name else run
    made = [stage for stage in stages.values() if stage.manifest]
    work = run / ".work" / name
    work.mkdir(parents=True, exist_ok=True)
    (work / "wandb_id").unlink(missing_ok=True)  # another result is another run
    parents = {stage.name: stage.path for stage in made}
    return Mirror(work, name, run, settings_of(stages), config, parents)


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and words of nested groups by `group/key`; lists and what is missing are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}/")
        elif isinstance(value, int | float | str):
            yield f"{before}{key}", value


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    answers = sample["answers"].items()
    return {"prompt": sample["prompt"]} | {
        f"{name}: {key}": value for name, answer in answers for key, value in answer.items()
    }
