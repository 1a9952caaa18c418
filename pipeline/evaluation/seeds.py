"""The whole recipe over several seeds: `python -m pipeline.evaluation.seeds --recipe tiny --seeds 1 2 3`.

Each seed gets its own run RUN-seedN (the base model is shared). What is up to date is not made
again, so an interrupted study goes on where it was. Writes RUN-seeds.json and RUN-seeds.md.

A variant of PPO on the same SFT and reward models: `--run checkpoints/other --from checkpoints/tiny
--ppo other.yaml` makes PPO alone, seed by seed, from what tiny-seedN has.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cli import reporting_errors
from pipeline.config.evaluation import EvalConfig, Split
from pipeline.errors import UserError
from pipeline.evaluation import calls as steps
from pipeline.evaluation.judges import load_judge
from pipeline.handoff.found import read_json
from pipeline.process.files import write_atomically
from pipeline.process.progress import say
from pipeline.steps import load, overrides

Values = dict[str, dict[int, float]]
"""Name of a quantity -> seed -> value."""

OF_POLICY = {
    "judge": "judge",
    "chrf": "chrF",
    "exact": "exact",
    "ended": "ends by itself",
    "text_perplexity": "perplexity of pretraining text",
}
"""What a policy is compared by, and its name."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `make seeds`; ends with code 1 when a seed failed."""
    args = parser().parse_intermixed_args(argv)
    recipe, run, settings = steps.asked(args)
    _refuse_seed(settings)
    study = Study(recipe, run, args.split, settings, args.ppo, args.borrow)
    study.check()
    steps.ensure_base(recipe)
    failed = [seed for seed in args.seeds if not study.make(seed)]
    made = [seed for seed in args.seeds if seed not in failed]
    if made:
        say(f"seeds: {write(run, made, failed, args.split)}")
    sys.exit(1 if failed else 0)


def parser() -> argparse.ArgumentParser:
    """Arguments of `make seeds`."""
    out = steps.parser("seeds", __doc__)
    out.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    out.add_argument("--split", choices=["test", "validation"], default="test")
    out.add_argument("--ppo", type=Path, help="another config file for PPO")
    borrowed = "RUN-seedN borrows the sft and rm of OTHER-seedN"
    out.add_argument("--from", type=Path, dest="borrow", metavar="OTHER", help=borrowed)
    return out


def _refuse_seed(settings: list[str]) -> None:
    for word in settings:
        *prefix, key = word.partition("=")[0].split(".")
        if key == "seed" and prefix != ["eval"]:
            raise UserError(f"{word}: the seeds are those of --seeds (make: SEEDS=)")


@dataclass
class Study:
    """What is the same for every seed."""

    recipe: Path
    run: Path
    split: Split
    settings: list[str]
    ppo: Path | None = None
    """A config file in the place of the recipe's."""
    borrow: Path | None = None
    """Another study's run, whose seeds' sft and rm are used."""

    def check(self) -> None:
        """UserError for what would end every seed, if only after its training."""
        names = [*(("sft", "rm") if self.borrow is None else ()), "ppo", "eval"]
        files = {name: self.recipe / f"{name}.yaml" for name in names}
        files |= {} if self.ppo is None else {"ppo": self.ppo}
        configs = {n: load(n, file, overrides(n, self.settings)) for n, file in files.items()}
        config = configs["eval"]
        assert isinstance(config, EvalConfig)
        if config.data(self.split) is None:
            raise UserError(f"{files['eval']}: no prompts for the split {self.split}")
        load_judge(config.judge)

    def make(self, seed: int) -> bool:
        """All stages that this study makes and the evaluation with one seed; False if one failed."""
        own = steps.sibling(self.run, f"seed{seed}")
        say(f"\nseeds: seed {seed} in {own}")
        other = None if self.borrow is None else steps.sibling(self.borrow, f"seed{seed}")
        words = (*self.settings, f"seed={seed}")
        try:
            for name in ("sft", "rm") if other is None else ():
                steps.stage(name, self.recipe, own, *words)
            steps.stage("ppo", self.recipe, own, *words, borrow=other, config=self.ppo)
            settings = overrides("eval", self.settings)
            steps.evaluation(self.recipe, own, self.split, *settings)
        except steps.StepFailed as error:
            say(f"seeds: seed {seed} failed: {error}")
            return False
        return True


def write(run: Path, seeds: list[int], failed: list[int], split: str) -> Path:
    """Collect the evaluations into RUN-seeds.json and .md, print the table, return the .md's path."""
    file = f"eval/{split}.json"
    values = collect({n: read_json(steps.sibling(run, f"seed{n}") / file) for n in seeds})
    text = f"# {run.name}: {len(seeds)} seeds, split {split}\n\n{markdown(values, seeds)}"
    if failed:
        text += f"\nFailed: seed {', '.join(map(str, failed))}\n"
    out = run.with_name(f"{run.name}-seeds.md")
    write_atomically(out, text)
    whole = {"split": split, "seeds": seeds, "failed": failed, "values": values}
    write_atomically(out.with_suffix(".json"), json.dumps(whole, indent=1) + "\n")
    print(text)
    return out


def collect(results: dict[int, dict[str, Any]]) -> Values:
    """Quantities of every seed's evaluation, whole and by group."""
    out: Values = {}
    for seed, result in results.items():
        for name, value in quantities(result).items():
            out.setdefault(name, {})[seed] = value
    return out


def quantities(result: dict[str, Any]) -> dict[str, float]:
    """What one evaluation is compared by; quantities it lacks are left out."""
    models, kl = result.get("models") or {}, result.get("kl") or {}
    base, sft, ppo = (models.get(name) or {} for name in ("base", "sft", "ppo"))
    labels, rm = result.get("labels") or {}, result.get("rm") or {}
    versus = (result.get("comparisons") or {}).get("ppo_vs_sft") or {}
    found = {
        f"{policy}: {what}": model.get(key)
        for policy, model in (("base", base), ("sft", sft), ("ppo", ppo))
        for key, what in OF_POLICY.items()
    }
    for key in ("chrf", "exact", "judge", "length"):
        found[f"ppo: {OF_POLICY.get(key, key)}, change"] = _change(ppo, sft, key)
    before, after = sft.get("text_perplexity"), ppo.get("text_perplexity")
    found |= {
        "ppo: perplexity of pretraining text, ratio to sft": after and before and after / before,
        "ppo: win rate over sft": versus.get("rate"),
        "ppo: KL to sft": kl.get("ppo_vs_sft"),
        "rm: agrees with judge": rm.get("accuracy"),
        "rm: length baseline there": rm.get("length_baseline"),
        "rm: accuracy on noisy labels": labels.get("accuracy"),
        "rm: ceiling of noisy labels": labels.get("ceiling"),
        "rm: length baseline on labels": labels.get("length_baseline"),
    }
    for key, members in (ppo.get("groups") or {}).items():
        for value, part in members.items():
            before = sft["groups"][key][value]
            rate = versus.get("groups", {}).get(key, {}).get(value, {}).get("rate")
            found[f"{key} {value}: win rate"] = rate
            for grade in ("chrf", "exact", "judge"):
                found[f"{key} {value}: {OF_POLICY[grade]}, change"] = _change(part, before, grade)
    return {name: value for name, value in found.items() if value is not None}


def _change(after: dict[str, Any], before: dict[str, Any], key: str) -> float | None:
    return after[key] - before[key] if key in after and key in before else None


def markdown(values: Values, seeds: list[int]) -> str:
    """A table with one row per quantity: min, median, max, then each seed."""
    head = ["", "min", "median", "max", *(f"seed {seed}" for seed in seeds)]
    lines = [_row(head), "|" + "-|" + "-:|" * (len(head) - 1)]
    for name, by_seed in values.items():
        numbers = list(by_seed.values())
        middle = [min(numbers), statistics.median(numbers), max(numbers)]
        cells = [f"{by_seed[seed]:.3f}" if seed in by_seed else "-" for seed in seeds]
        lines.append(_row([name, *(f"{number:.3f}" for number in middle), *cells]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    with reporting_errors():
        main()
