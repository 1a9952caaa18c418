"""PPO beside what else the same SFT model, rankings and prompts could be used for: `make compare RUN=tiny`.

Best-of-n by the reward model, SFT on the best-ranked responses, DPO (arXiv 2305.18290) and RLOO (arXiv
2402.14740), judged alike. DPO's beta is chosen on validation prompts. What has been made is not made
again. Writes RUN/compare/compare.{json,md}; the report shows them. With --seeds the runs are RUN-seedN.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.cli import reporting_errors
from pipeline.config.evaluation import EvalConfig, Split
from pipeline.config.load import load_config
from pipeline.config.schema import Data, RMConfig
from pipeline.data.messages import message
from pipeline.data.rankings import Ranking, load_rankings
from pipeline.data.splits import split_by_prompt
from pipeline.errors import UserError
from pipeline.evaluation import calls as steps
from pipeline.evaluation.judges import load_judge
from pipeline.evaluation.rivals import Judges, Policy, Row, judged, markdown, medians
from pipeline.evaluation.rm import Scorer
from pipeline.handoff.artifacts import MANIFEST, installed_packages
from pipeline.handoff.found import Stage, find_stages, fresh_stages, read_json
from pipeline.handoff.remembered import command
from pipeline.process.files import jsonl, read_jsonl, remove, write_atomically
from pipeline.process.progress import say
from pipeline.steps import overrides


def main(argv: list[str] | None = None) -> None:
    """Command line of `make compare`."""
    args = parser().parse_intermixed_args(argv)
    recipe, run, settings = steps.asked(args)
    runs = [steps.sibling(run, f"seed{seed}") for seed in args.seeds] or [run]
    config = load_config(EvalConfig, recipe / "eval.yaml", overrides("eval", settings))
    asked = (args.n, args.samples, args.betas, args.judge_models)
    studies = [Study(recipe, each, config, *asked) for each in runs]
    tables = [study.table(args.split) for study in studies]
    if args.seeds:
        text = markdown(medians(tables), f"{run.name}: medians of {len(runs)} seeds")
        write_atomically(run.with_name(f"{run.name}-compare.md"), text)
        print(text)


def parser() -> argparse.ArgumentParser:
    """Arguments of `make compare`."""
    out = steps.parser("compare", __doc__)
    out.add_argument("--seeds", type=int, nargs="*", default=[], help="runs RUN-seedN")
    out.add_argument("--split", choices=["test", "validation"], default="test")
    out.add_argument("--n", type=steps.count, default=4, help="of best-of-n")
    judges = "held-out reward models that judge as well: folders or hub ids"
    out.add_argument("--judge-models", nargs="*", default=[], metavar="PATH", help=judges)
    out.add_argument("--samples", type=steps.count, default=4, help="RLOO's, of each prompt")
    out.add_argument("--betas", type=float, nargs="+", default=[0.03, 0.1, 0.3], help="DPO's")
    return out


class Study:
    """One run and its rivals."""

    def __init__(
        self,
        recipe: Path,
        run: Path,
        config: EvalConfig,
        n: int,
        samples: int,
        betas: list[float],
        judge_models: Sequence[str] = (),
    ):
        self.recipe, self.run, self.config = recipe, run, config
        self.n, self.samples, self.betas = n, samples, betas
        self.stages, _ = fresh_stages(find_stages(run))
        if missing := {"sft", "rm", "ppo"} - self.stages.keys():
            remedy = command(run, "ppo") if run.is_dir() else "make seeds or make ppo, with RECIPE="
            raise UserError(f"{run}: needs {', '.join(sorted(missing))} first: {remedy}")
        self.left_out: dict[str, str] = {}
        if read_json(self.stages["sft"].path / "config.json").get("is_encoder_decoder"):
            self.left_out["DPO"] = "TRL's trainer takes causal models alone"
        if not self.left_out and len(betas) > 1 and config.validation_prompts is None:
            raise UserError(
                f"{recipe / 'eval.yaml'}: validation_prompts: DPO's beta is chosen on them; or give one "
                "beta: ARGS='--betas 0.1'"
            )
        self.judge_models = {path: _held(path) for path in judge_models}
        for path, held in self.judge_models.items():
            if held == self.stages["rm"].manifest_sha256:
                raise UserError(f"{path}: {run} optimised this very model; a judge is another one")
        self.judge = load_judge(config.judge)
        self.out = run / "compare"
        self.made_from = {name: stage.manifest_sha256 for name, stage in self.stages.items()}

    def table(self, split: Split) -> dict[str, Row]:
        """Make what is missing, judge everything and write it down."""
        path = self.out / "compare.json"
        asked: dict[str, Any] = {
            "split": split,
            "eval": self.config.of_split(split).model_dump(mode="json"),
            "n": self.n,
            "samples": self.samples,
            "betas": self.betas,
            "made_from": self.made_from,
            "judge_models": self.judge_models,
        }
        before = read_json(path)
        if all(before.get(key) == value for key, value in asked.items()):
            say(f"compare: up to date ({path})")
            return before["rows"]
        for (
            judge_model
        ) in self.judge_models:  # what is wrong with one is told before a rival trains
            Scorer(judge_model)
        sft, ppo = self.stages["sft"].path, self.stages["ppo"].path
        of_rm = minutes(self.stages["rm"].path)
        policies = {
            "SFT": Policy(sft, 0.0),
            "PPO": Policy(ppo, of_rm + minutes(ppo)),
            f"best of {self.n}": Policy(sft, of_rm, self.n),
            "SFT on the best-ranked": self._best_ranked(),
            "RLOO": self._rloo(of_rm),
        }
        tried: dict[str, float] = {}
        for name, reason in self.left_out.items():
            say(f"compare: {name} is left out: {reason}")
        if "DPO" not in self.left_out:
            by_beta = self._dpo()
            chosen, tried = self._choice(by_beta)
            policies[f"DPO, beta {chosen}"] = by_beta[chosen]
        rows = self._judged(split, policies)
        judge = None if self.judge is None else self.judge.name
        facts = {"judge": judge, "dpo_on_validation": tried, "left_out": self.left_out}
        text = markdown(rows, f"{self.run.name}, {split} prompts")
        write_atomically(path.with_suffix(".md"), text)
        whole = {**asked, **facts, "packages": installed_packages(), "rows": rows}
        write_atomically(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        print(text)
        return rows

    def _stage(self, stage: str, name: str, **changes: Any) -> Path:
        """A stage of a run of its own, with this run's config but for the changes."""
        run = steps.sibling(self.run, f"compare-{name}")
        config = {k: v for k, v in self.stages[stage].config.items() if k not in ("run", "stage")}
        file = self.out / f"{name}.yaml"
        text = yaml.safe_dump(config | changes, sort_keys=False, allow_unicode=True)
        write_atomically(file, text)
        borrow = None if stage == "sft" else self.run
        steps.stage(stage, self.recipe, run, borrow=borrow, config=file)
        return run / stage

    def _best_ranked(self) -> Policy:
        rows = []
        for r in self._rankings():
            best = r.responses[min(range(len(r.ranks)), key=r.ranks.__getitem__)]
            if best.strip():  # there is nothing to learn in an empty one
                rows.append({"messages": [*r.messages, message("assistant", best)]})
        write_atomically(self.out / "best.jsonl", jsonl(rows))
        data, sft = {"path": str(self.out / "best.jsonl")}, str(self.stages["sft"].path)
        made = self._stage("sft", "best", model=sft, chat_template=None, data=data)
        return Policy(made, minutes(made))

    def _rloo(self, of_rm: float) -> Policy:
        no_critic = dict.fromkeys(("value_lora", "value_learning_rate"))
        ours = {"advantages": "rloo", "samples_per_prompt": self.samples, "shared_base": False}
        made = self._stage("ppo", "rloo", **ours | no_critic | {"value": "separate"})
        return Policy(made, of_rm + minutes(made))

    def _rankings(self) -> list[Ranking]:
        """Those that the reward model was trained on."""
        rm, config = (
            self.stages["rm"].path,
            RMConfig.model_validate_json(json.dumps(self.stages["rm"].config)),
        )
        ranked = rm / "rankings.jsonl"
        source = Data(path=str(ranked)) if ranked.is_file() else config.data
        if source is None:
            raise UserError(f"{rm}: its rankings came in memory and are not there to compare with")
        rankings = load_rankings(source, seed=config.seed)
        return list(split_by_prompt(rankings, config.validation_fraction, config.seed)[0])

    def _dpo(self) -> dict[str, Policy]:
        """DPO's policies by beta."""
        out = {}
        for beta in (f"{beta:g}" for beta in self.betas):
            folder = self.out / f"dpo-{beta}"
            begun, done = (
                {"made_from": self.made_from, "done": is_done} for is_done in (False, True)
            )
            facts = folder / "made_from.json"
            if (before := read_json(facts)) != done:
                from pipeline.evaluation.dpo import train_dpo  # imports torch and TRL

                if before != begun:  # states of another SFT model are not to go on from
                    remove(folder)
                    write_atomically(facts, json.dumps(begun))
                train_dpo(self.stages, self._rankings(), float(beta), folder)
                write_atomically(facts, json.dumps(done))
            out[beta] = Policy(folder, minutes(folder))
        return out

    def _judged(self, split: Split, policies: dict[str, Policy]) -> dict[str, Row]:
        judges = Judges(self.judge, self.stages["rm"].path, list(self.judge_models))
        return judged(self.config, split, self.stages["sft"].path, judges, policies)

    def _choice(self, policies: dict[str, Policy]) -> tuple[str, dict[str, float]]:
        """The name of the best by the judge (without one, by the reward model) on validation, and all grades."""
        by = "rm_score" if self.judge is None else "judge"
        if len(policies) == 1:
            return next(iter(policies)), {}
        tried = {name: row[by] for name, row in self._judged("validation", policies).items()}
        return max(tried, key=tried.__getitem__), tried


def _held(model: str) -> str:
    """Hash of what a model of ours holds; "" of another one."""
    path = Path(model)
    return Stage(path.name, path, read_json(path / MANIFEST)).manifest_sha256


def minutes(folder: Path) -> float:
    """Wall-clock minutes between the first and the last row of a record."""
    times = [row["time"] for row in read_jsonl(folder / "metrics.jsonl")]
    return (times[-1] - times[0]) / 60


if __name__ == "__main__":
    with reporting_errors():
        main()
