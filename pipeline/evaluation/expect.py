"""A run against what healthy runs of its recipe look like: `make expect RUN=tiny`.

configs/RECIPE/expect.yaml holds a band for each stage, metric and step. Says of every metric at which step the run
left its band first and what that usually means, and ends with code 1 when it left any; a stage that still trains is
looked at as it is. `--write` makes the file from the runs RUN-seedN of --seeds.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.config.load import checkpoints_root, differences, load_config, portable
from pipeline.errors import UserError
from pipeline.evaluation import bands, calls
from pipeline.evaluation.bands import Band, Expected, Left
from pipeline.handoff.artifacts import work_path
from pipeline.handoff.found import Stage, check_there, find_stages, read_json
from pipeline.handoff.remembered import EXPECTED, command
from pipeline.process.files import write_atomically
from pipeline.process.progress import say
from pipeline.run import IDENTITY

PACKAGES = ("torch", "transformers", "trl")


def main(argv: list[str] | None = None) -> None:
    """Command line of `make expect`."""
    args = parser().parse_args(argv)
    recipe = calls.recipe_folder(args.recipe)
    run, file = args.run or checkpoints_root() / recipe.name, recipe / EXPECTED
    runs = [calls.sibling(run, f"seed{seed}") for seed in args.seeds] or [run]
    if args.write:
        write(file, args.seeds, runs)
    elif (expected := load(file)) is None:
        raise UserError(
            f"{file}: not there; runs that you know to be healthy make it: make seeds RECIPE={recipe.name} "
            f'SEEDS="1 2 3 4 5", then make expect RECIPE={recipe.name} SEEDS="1 2 3 4 5" ARGS=--write'
        )
    else:
        within = [inside(each, expected, file) for each in runs]
        sys.exit(0 if all(within) else 1)


def parser() -> argparse.ArgumentParser:
    """Arguments of `make expect`."""
    out = argparse.ArgumentParser(prog="python -m pipeline.evaluation.expect", description=__doc__)
    out.add_argument("--recipe", default="tiny", help="a folder of configs/ (or its path)")
    out.add_argument("--run", type=Path, help="default: checkpoints/RECIPE")
    out.add_argument("--seeds", type=int, nargs="*", default=[], help="the runs RUN-seedN")
    out.add_argument("--write", action="store_true", help="make the recipe's file from those runs")
    return out


def load(file: Path) -> Expected | None:
    """The bands of a recipe, None where there are none; UserError for a file that is not one."""
    return load_config(Expected, file) if file.is_file() else None


# --- a run against its bands ----------------------------------------------------------------------


class Departure(NamedTuple):
    """A metric that left its band, and what that usually means."""

    metric: str
    left: Left
    meaning: str

    def __str__(self) -> str:
        at = f"from step {self.left.step} on" if "/" in self.metric else "in the end"
        side = "above" if self.left.above else "below"
        return (
            f"{self.metric} is {side} its band {at}: {self.left.value:.4g}, healthy runs had "
            f"{self.left.low:.4g} to {self.left.high:.4g}. {self.meaning}"
        )


def inside(run: Path, expected: Expected, file: Path) -> bool:
    """Say what there is to say of a run; whether it stayed within all its bands."""
    stages = under_way(run)
    if not stages:
        check_there(run)
        raise UserError(f"{run}: nothing to look at yet; begin with: {command(run, 'sft')}")
    seeds = " ".join(map(str, expected.seeds))
    say(f"expect: {run} and what healthy runs look like ({file}, seeds {seeds})")
    well = True
    for name, stage in stages.items():
        for line in caveats(expected, stage):
            say(f"  {name}: {line}")
        found = departures(expected, stage)
        looked_at = len(expected.bands.get(name, {}))
        if not found:
            last = f", up to step {curve[-1]['step']}" if (curve := stage.curve()) else ""
            say(f"  {name}: within its bands ({looked_at} curves{last})")
        for departure in found:
            say(f"  {name}: {departure}")
        well = well and not found
    return well


def under_way(run: Path) -> dict[str, Stage]:
    """Stages of a run; of one that is being made, what there is of it."""
    found = find_stages(run)
    for name in steps.stages():
        work = work_path(run / name)
        if (work / "metrics.jsonl").is_file():
            found[name] = Stage(name, work, {"config": read_json(work / IDENTITY).get("config")})
    return {name: found[name] for name in steps.stages() if name in found}


def departures(expected: Expected, stage: Stage) -> list[Departure]:
    """What left its band, the first to do so first."""
    out = []
    for metric, band in expected.bands.get(stage.name, {}).items():
        if left := bands.left(points(stage, metric), band):
            below, above = _meanings(stage.name).get(metric, ("", ""))
            out.append(Departure(metric, left, above if left.above else below))
    return sorted(out, key=lambda one: one.left.step or float("inf"))


def points(stage: Stage, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a curve; of a number that the stage has once in its manifest, at step 0."""
    once = stage.metrics.get(metric)
    curve = [(row["step"], row[metric]) for row in stage.curve() if row.get(metric) is not None]
    return curve or ([] if once is None else [(0, float(once))])


def _meanings(stage: str) -> dict[str, tuple[str, str]]:
    about = steps.about(stage)
    return getattr(about, "EXPECTED", {})


def caveats(expected: Expected, stage: Stage) -> list[str]:
    """Why a stage need not look like those that the bands were made from."""
    if stage.name not in expected.made_with:
        return ["there are no bands of it"]
    before, now = portable(expected.made_with[stage.name]), made_with(stage)
    defaults = steps.config_class(stage.name).model_construct().model_dump(mode="json")
    known = {key: defaults.get(key) for key in [*before, *now]}
    told = differences(known | before, known | now)
    out = [f"made with another {line} (the bands need not fit)" for line in told]
    versions = stage.manifest.get("packages") or {}
    for name, version in expected.packages.items():
        if (own := versions.get(name)) not in (version, None):
            out.append(f"{name} {own}, the bands are of {version}: not known to fit")
    if stage.manifest.get("created") and not versions:
        out.append("its packages' versions are not known")
    return out


def made_with(stage: Stage) -> dict[str, Any]:
    """Keys that decide a stage's result, where they are not the defaults; the seed apart."""
    kind = steps.config_class(stage.name)
    own = {k: v for k, v in stage.config.items() if k not in {"seed", *kind.cosmetic}}
    with contextlib.suppress(ValidationError):  # of a version that had other keys: as it is
        whole = kind.model_validate_json(json.dumps(own | {"run": ""}))
        own = whole.model_dump(mode="json", exclude_defaults=True, exclude={"run"})
    return portable(own)


# --- bands from runs ------------------------------------------------------------------------------


def write(file: Path, seeds: list[int], runs: list[Path]) -> None:
    """Make a recipe's bands from runs of at least three seeds; UserError when they are not alike."""
    if len(seeds) < 3:
        raise UserError("expect: --write takes the runs of three seeds or more: --seeds 1 2 3 ...")
    found = {run: find_stages(run) for run in runs}
    first = found[runs[0]]
    for run, stages in found.items():
        for name in steps.stages():
            if name not in stages:
                raise UserError(f"{run}: has no {name} yet: {command(run, name)}")
            if unlike := differences(made_with(first[name]), made_with(stages[name])):
                raise UserError(f"{run}: its {name} is not made as that of {runs[0]}: {unlike[0]}")
    versions = first["ppo"].manifest.get("packages") or {}
    expected = Expected(
        seeds=seeds,
        packages={name: versions[name] for name in PACKAGES if name in versions},
        made_with={name: made_with(first[name]) for name in steps.stages()},
        bands={name: dict(_bands([s[name] for s in found.values()])) for name in steps.stages()},
    )
    head = (
        "What healthy runs of this recipe look like, for `make expect`: [step, low, high] of each curve; step 0",
        "alone: a number of the manifest. Made by `make expect SEEDS=... ARGS=--write`, not by hand.",
    )
    write_atomically(file, bands.text(expected, head))
    say(f"expect: {file}: bands of {len(seeds)} seeds")


def _bands(stages: list[Stage]) -> Iterator[tuple[str, Band]]:
    """Metric and band of one stage of all seeds; metrics that a seed lacks are left out."""
    for metric in _meanings(stages[0].name):
        curves = [points(stage, metric) for stage in stages]
        if all(curves):
            yield metric, bands.band(curves)


if __name__ == "__main__":
    with reporting_errors():
        main()
