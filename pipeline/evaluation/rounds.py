"""Collect, evaluate, adjust, repeat: `make round RUN=a` makes the next round of a run.

Round N is a run of its own, RUN-roundN, on RUN's SFT model. The newest policy answers prompts that nobody
has ranked; the labeler of rm.yaml ranks the answers, or people do: then the round waits, and the same
command goes on when their ranks are there. A reward model learns from the rankings of all rounds, PPO runs
against it, and what comes of it is judged beside the round before. Writes RUN/rounds/rounds.{json,md}.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.cli import reporting_errors
from pipeline.config.evaluation import EvalConfig, Split
from pipeline.config.schema import RMConfig
from pipeline.errors import UserError
from pipeline.evaluation import calls as steps
from pipeline.evaluation.judges import load_judge
from pipeline.feedback.exchange import fill
from pipeline.feedback.store import Store
from pipeline.handoff.artifacts import is_published
from pipeline.handoff.found import read_json
from pipeline.handoff.remembered import command
from pipeline.process.files import read_jsonl, write_atomically
from pipeline.process.progress import say
from pipeline.steps import load, overrides

Row = dict[str, Any]
"""Of one round: its run, rankings so far, and what was measured of it."""

COLUMNS = {
    "rankings": "rankings so far",
    "accuracy": "RM, held-out pairs",
    "wins": "wins over SFT",
    "wins_before": "over the round before",
    "judge": "judge",
    "kl": "KL to SFT",
}


def main(argv: list[str] | None = None) -> None:
    """Command line of `make round`."""
    args = parser().parse_intermixed_args(argv)
    recipe, run, settings = steps.asked(args)
    asked = args.prompts, args.start, args.unsure, args.judge
    study = Rounds(recipe, run, args.borrow, settings, *asked)
    study.check()
    first = study.finished() + 1
    numbers = range(first, args.to + 1 if args.to else first + 1)
    for number in numbers:
        study.make(number)
        print(study.write())
    if not numbers:
        say(f"round: {args.to} is made already\n\n{study.write()}")


def parser() -> argparse.ArgumentParser:
    """Arguments of `make round`."""
    out = steps.parser("rounds", __doc__)
    out.add_argument("--from", type=Path, dest="borrow", metavar="OTHER", help="its SFT model")
    out.add_argument("--to", type=steps.count, help="make all rounds up to this one")
    out.add_argument("--prompts", type=steps.count, default=500, help="that are new in each round")
    start = "where each round's PPO starts: at the SFT model, or at the last policy"
    out.add_argument("--start", choices=["sft", "policy"], default="sft", help=start)
    unsure = "prompts that the last reward model is least sure of, not random ones"
    out.add_argument("--unsure", action="store_true", help=unsure)
    judge = "one of eval.yaml's judges that ranks, in the labeler's place"
    out.add_argument("--judge", metavar="NAME", help=judge)
    return out


@dataclass
class Rounds:
    """All rounds of one run."""

    recipe: Path
    run: Path
    borrow: Path | None
    settings: list[str]
    prompts: int
    start: str
    unsure: bool
    judge: str | None = None

    def round(self, number: int) -> Path:
        """The run of a round; number 0 is the run that they started from."""
        return steps.sibling(self.run, f"round{number}") if number else self.run

    def check(self) -> None:
        """UserError for what would end a round, if only after its training."""
        configs = {
            name: load(name, self.recipe / f"{name}.yaml", overrides(name, self.settings))
            for name in ("sft", "rm", "ppo", "eval")
        }
        self.rm, self.eval = configs["rm"], configs["eval"]
        assert isinstance(self.rm, RMConfig) and isinstance(self.eval, EvalConfig)
        if self.rm.sampling is None:
            raise UserError(
                f"{self.recipe / 'rm.yaml'}: sampling: a round samples what is ranked; name its prompts: "
                'SET="rm.sampling.prompts.path=FILE" (and rm.sampling.labeler=MODULE, or people rank)'
            )
        load_judge(self.eval.judge)
        named = [judge.title() for judge in self.eval.judges]
        if self.judge is not None and self.judge not in named:
            known = ", ".join(named) or "none yet"
            raise UserError(
                f"--judge {self.judge}: {self.recipe / 'eval.yaml'} has no such judge ({known})"
            )
        self.split: Split = "validation" if self.eval.validation_prompts else "test"

    def finished(self) -> int:
        """The last round that was evaluated."""
        return next(n for n in range(10_000) if not self._result(n + 1).is_file())

    def _result(self, number: int) -> Path:
        return self.round(number) / "eval" / f"{self.split}.json"

    def make(self, number: int) -> None:
        """Sample, have ranked, train and evaluate, from where it was interrupted."""
        own = self.round(number)
        say(f"\nround {number} in {own}")
        steps.ensure_base(self.recipe)
        lender = self.borrow or self.run
        if not is_published(lender / "sft"):
            steps.stage("sft", self.recipe, lender, *self.settings)
        policies = [self.round(n) / "ppo" for n in range(number)]
        policy = next((path for path in reversed(policies) if is_published(path)), None)
        self._reward_model(own, lender, self.rm_words(number, policy))
        words = [f"ppo.policy={policy}"] if policy and self.start == "policy" else []
        steps.stage("ppo", self.recipe, own, *self.settings, *words, borrow=lender)
        words = overrides("eval", self.settings)
        if is_published(self.run / "ppo") and not self._result(0).is_file():
            steps.evaluation(self.recipe, self.run, self.split, *words)
        steps.evaluation(self.recipe, own, self.split, *words)

    def _reward_model(self, own: Path, lender: Path, words: list[str]) -> None:
        """Sample, have ranked and train; UserError while people have not ranked."""
        waiting = own / "to_rank.jsonl"
        words = [*self.settings, *words]
        try:
            steps.stage("rm", self.recipe, own, *words, borrow=lender)
        except steps.StepFailed:
            if not waiting.is_file() or not self._ranked(waiting):
                raise
            steps.stage("rm", self.recipe, own, *words, borrow=lender)

    def _ranked(self, waiting: Path) -> bool:
        """Whether all that waits has ranks, by the judge or what people said on the page; UserError when not."""
        if self.judge is None:
            labels, lacking = waiting.with_name("labels.db"), 1
            if labels.is_file():
                filled, lacking = fill(Store(labels), waiting)
                say(f"round: people have ranked {filled} more, {lacking} are left")
            if not lacking:
                return True
            raise UserError(
                f"{waiting.parent.name} waits for people: {command(waiting.parent, 'label')}, or ranks in "
                f"{waiting}; then the same command goes on"
            )
        from pipeline.evaluation.panel import panel  # imports torch
        from pipeline.evaluation.ranked import rank_by

        assert isinstance(self.eval, EvalConfig)
        count = rank_by(panel(self.eval)[self.judge], waiting)
        say(f"round: {self.judge} has ranked the responses to {count} prompts")
        return count > 0

    def rm_words(self, number: int, policy: Path | None) -> list[str]:
        """Settings of a round's reward model: whom it asks, and what it knows."""
        assert isinstance(self.rm, RMConfig) and self.rm.sampling
        words = [] if policy is None else [f"rm.sampling.model={policy}"]
        if self.rm.sampling.count is None:
            words.append(f"rm.sampling.count={self.prompts}")
        if self.rm.sampling.prompts.limit is not None and not self._sets("sampling.prompts.limit"):
            words.append("rm.sampling.prompts.limit=null")  # a round has its count
        if self.judge is not None:
            words.append("rm.sampling.labeler=null")
        before = [self.round(n) / "rm" for n in range(number)]
        files: list[Any] = [rm / "rankings.jsonl" for rm in before]
        files = [{"path": str(file)} for file in files if file.is_file()]
        data = self.rm.data and self.rm.data.model_dump(mode="json", exclude_unset=True)
        if data:
            own = data["path"] if isinstance(data["path"], list) else [data["path"]]
            files = [*own, *({**file, "columns": {}, "only": {}} for file in files)]
        if files:
            words.append(f"rm.data.path={json.dumps(files)}")
        if self.unsure and (judge := next(filter(is_published, reversed(before)), None)):
            words.append(f"rm.sampling.unsure={judge}")
        return words

    def _sets(self, key: str) -> bool:
        words = overrides("rm", self.settings)
        return any(word.startswith(f"{key}=") for word in words)

    def rows(self) -> Iterator[Row]:
        """What is known of every round, and of the run that they started from where it has PPO."""
        known = [n for n in range(self.finished() + 1) if is_published(self.round(n) / "ppo")]
        total = 0
        for before, number in pairwise([None, *known]):
            assert number is not None
            run = self.round(number)
            made, result = read_json(run / "rm" / "manifest.json"), read_json(self._result(number))
            total += len(read_jsonl(run / "rm" / "rankings.jsonl"))
            ppo = (result.get("models") or {}).get("ppo") or {}
            yield {
                "round": number,
                "run": str(run),
                "rankings": total,
                "accuracy": (made.get("metrics") or {}).get("accuracy"),
                "wins": ((result.get("comparisons") or {}).get("ppo_vs_sft") or {}).get("rate"),
                "wins_before": None if before is None else self._wins(number, before),
                "judge": ppo.get("judge"),
                "kl": (result.get("kl") or {}).get("ppo_vs_sft"),
            }

    def _wins(self, number: int, before: int) -> float | None:
        """Share of the prompts on which a round's answer is better to the judge, ties half."""
        now, then = (
            {row["prompt"]: row["answers"]["ppo"].get("judge") for row in read_jsonl(file)}
            for n in (number, before)
            if (file := self.round(n) / "eval" / f"{self.split}_samples.jsonl").is_file()
        )
        pairs = [(grade, then.get(prompt)) for prompt, grade in now.items()]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        return statistics.fmean((a > b) + (a == b) / 2 for a, b in both) if both else None

    def write(self) -> str:
        """RUN/rounds/rounds.json and .md; returns the table."""
        rows = list(self.rows())
        out = self.run / "rounds" / "rounds.json"
        facts = {"split": self.split, "start": self.start, "unsure": self.unsure, "rows": rows}
        write_atomically(out, json.dumps(facts, indent=1) + "\n")
        text = markdown(rows, f"{self.run.name}: rounds, {self.split} prompts")
        write_atomically(out.with_suffix(".md"), text)
        return text


def table(rows: list[Row]) -> list[list[str]]:
    """Titles, and the cells of each round; [] without a round."""
    cells = [[str(row["round"]), *(shown(row[key]) for key in COLUMNS)] for row in rows]
    return [["round", *COLUMNS.values()], *cells] if rows else []


def markdown(rows: list[Row], title: str) -> str:
    """A table with a row a round."""
    head, *cells = (f"| {' | '.join(line)} |" for line in table(rows))
    return "\n".join([f"# {title}", "", head, "|-|" + "-:|" * len(COLUMNS), *cells]) + "\n"


def shown(value: float | int | None) -> str:
    """A number as a cell of the table."""
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    with reporting_errors():
        main()
