"""All that a run recorded, read once for the summary and the report; no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluation import metrics
from pipeline.evaluation.rankings import Scored, read_scored
from pipeline.handoff.found import Stage, find_stages, fresh_stages, read_json, read_jsonl


@dataclass
class Record:
    """Stages, their curves, and the evaluation of a run; what is missing is empty."""

    run: Path
    stages: dict[str, Stage]
    problems: list[str]  # stages made from other artifacts than those found beside them
    curves: dict[str, list[dict[str, Any]]]
    result: dict[str, Any]  # eval/test.json, else eval/validation.json
    samples: list[dict[str, Any]]
    held_out: list[Scored]  # the reward model's held-out rankings with its scores
    overopt: dict[str, Any]

    def model(self, name: str) -> dict[str, Any]:
        """Evaluation of one policy."""
        return (self.result.get("models") or {}).get(name) or {}

    def comparison(self, name: str) -> dict[str, Any]:
        """Evaluation of one policy against another, e.g. `ppo_vs_sft`."""
        return (self.result.get("comparisons") or {}).get(name) or {}


def load_record(run: Path) -> Record:
    """Read a run's directory. An evaluation of artifacts that were replaced since is left out."""
    stages, problems = fresh_stages(find_stages(run))
    result, samples = _evaluation(run, stages)
    if (run / "eval").is_dir() and not result:
        problems.append("the evaluation is of earlier artifacts: run make eval")
    return Record(
        run=run,
        stages=stages,
        problems=problems,
        curves={name: stage.curve() for name, stage in stages.items()},
        result=result,
        samples=samples,
        held_out=_held_out(stages),
        overopt=read_json(run / "overopt" / "overopt.json"),
    )


def _evaluation(run: Path, stages: dict[str, Stage]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Result and samples of the split test, else validation, if they are of these very stages."""
    current = {name: stage.manifest_sha256 for name, stage in stages.items()}
    for split in ("test", "validation"):
        result = read_json(run / "eval" / f"{split}.json")
        seen = {n: a["manifest_sha256"] for n, a in (result.get("artifacts") or {}).items()}
        if seen and seen.items() <= current.items():
            return result, read_jsonl(run / "eval" / f"{split}_samples.jsonl")
    return {}, []


def _held_out(stages: dict[str, Stage]) -> list[Scored]:
    path = stages["rm"].path / "held_out.jsonl" if "rm" in stages else None
    return read_scored(path) if path is not None and path.is_file() else []


@dataclass
class Rankings:
    """What the reward model's scores say about held-out rankings."""

    prompts: int
    accuracy: metrics.Share
    interval: metrics.Interval
    length_baseline: float
    by_k: dict[int, metrics.Share]
    calibration: list[metrics.CalibrationRow]
    calibration_error: float
    pearson: float
    spearman: float
    points: list[tuple[int, float]]  # (length in tokens, score) of every response


def rankings(items: list[Scored]) -> Rankings | None:
    """Measure scored rankings; None without an untied pair."""
    margins = [i.scores[b] - i.scores[w] for i in items for b, w in metrics.untied_pairs(i.ranks)]
    if not margins:
        return None
    scores, ranks, lengths = zip(*((i.scores, i.ranks, i.lengths) for i in items), strict=True)
    accuracy = metrics.pair_accuracy(scores, ranks)
    table = metrics.calibration(margins)
    points = [pair for i in items for pair in zip(i.lengths, i.scores, strict=True)]
    x, y = zip(*points, strict=True)
    return Rankings(
        prompts=len(items),
        accuracy=accuracy,
        interval=metrics.wilson(accuracy.share * accuracy.pairs, accuracy.pairs),
        length_baseline=metrics.pair_accuracy(lengths, ranks).share,
        by_k=metrics.pair_accuracy_by_k(scores, ranks),
        calibration=table,
        calibration_error=metrics.calibration_error(table),
        pearson=metrics.pearson(x, y),
        spearman=metrics.spearman(x, y),
        points=points,
    )


def values(curve: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of one metric; lines without it or with null are left out."""
    return [(row["step"], row[name]) for row in curve if row.get(name) is not None]


def ends(curve: list[dict[str, Any]], name: str, last: int = 5) -> tuple[float, float] | None:
    """First value of a metric and the mean of its last few; None when it was not logged."""
    series = [value for _, value in values(curve, name)]
    if not series:
        return None
    tail = series[-last:]
    return series[0], sum(tail) / len(tail)
