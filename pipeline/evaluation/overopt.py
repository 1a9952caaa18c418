"""Over-optimisation on purpose: `python -m pipeline.evaluation.overopt --recipe tiny` (make overopt).

PPO without a KL penalty, against the run's reward model and against a deliberately small one (its head
alone is trained). Responses to fixed validation prompts, kept along the way, are judged afterwards, and
best-of-n stands beside them: gold and proxy against the square root of KL, as in Gao et al. (arXiv
2210.10760). Writes RUN/overopt/overopt.json, which the report shows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.cli import reporting_errors
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import load_config
from pipeline.config.ppo import PPOConfig
from pipeline.data.forms import Prompt, load_prompts
from pipeline.data.messages import prompt_text
from pipeline.errors import UserError
from pipeline.evaluation import calls as steps
from pipeline.evaluation.judges import Judge, load_judge
from pipeline.evaluation.record import values
from pipeline.handoff.found import find_stages, fresh_stages, read_jsonl
from pipeline.handoff.remembered import command
from pipeline.process.files import jsonl, write_atomically
from pipeline.process.progress import say
from pipeline.steps import load, overrides

Point = dict[str, float]
"""kl in nats per response, judge = mean gold, rm_score = mean proxy; and step or n."""
Samples = dict[int, list[dict[str, Any]]]
"""Step -> its lines of samples.jsonl."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `make overopt`."""
    args = parser().parse_intermixed_args(argv)
    recipe, run, settings = steps.asked(args)
    study = Study(recipe, run, args.prompts, args.n, settings)
    curves = study.curves(args.iterations, args.points)
    say(f"overopt: {write(study.run, study.judge.name, curves)}; make report shows it")


def parser() -> argparse.ArgumentParser:
    """Arguments of `make overopt`."""
    out = steps.parser("overopt", __doc__)
    for name, default, what in (
        ("iterations", None, "of PPO; default: twice the recipe's"),
        ("points", 12, "of each curve, about"),
        ("prompts", 200, "validation prompts judged at each point"),
        ("n", 16, "largest n of best-of-n"),
    ):
        out.add_argument(f"--{name}", type=steps.count, default=default, help=what)
    return out


class Study:
    """PPO runs without KL penalty beside a run, and best-of-n by their reward models."""

    def __init__(self, recipe: Path, run: Path, prompts: int, n: int, settings: list[str]):
        self.recipe, self.run, self.n, self.settings = recipe, run, n, settings
        self.config = load_config(EvalConfig, recipe / "eval.yaml", overrides("eval", settings))
        judge = load_judge(self.config.judge)
        if judge is None:
            raise UserError(f"{recipe / 'eval.yaml'}: judge: this study needs one")
        self.judge: Judge = judge
        for name in ("rm", "ppo"):  # what is wrong there is told before the first of them trains
            load(name, recipe / f"{name}.yaml", overrides(name, settings))
        stages, _ = fresh_stages(find_stages(run))
        if not {"sft", "rm"} <= stages.keys():
            raise UserError(f"{run}: needs sft and rm first: {command(run, 'sft', 'rm')}")
        source = self.config.validation_prompts or self.config.prompts
        self.asked = list(load_prompts(source)[:prompts])
        self.prompts = run / "overopt" / "prompts.jsonl"  # answered along the way
        write_atomically(self.prompts, jsonl(prompt.row for prompt in self.asked))

    def curves(self, iterations: int | None, points: int) -> dict[str, list[Point]]:
        """Run what has not been run yet and measure it."""
        full, small = steps.sibling(self.run, "overopt"), steps.sibling(self.run, "overopt-small")
        # the same rankings, but the SFT trunk stays as it is and only the head learns
        words = [*self.settings, "head_only=true", "lora=null"]
        ranked = self.run / "rm" / "rankings.jsonl"
        if ranked.is_file():
            words += ["sampling=null", f"data={json.dumps({'path': str(ranked)})}"]
        steps.stage("rm", self.recipe, small, *words, borrow=self.run)
        studies = {"PPO": full, "PPO, small reward model": small}
        out = {name: self._ppo(run, iterations, points) for name, run in studies.items()}
        rewards = {"best of n": self.run / "rm", "best of n, small reward model": small / "rm"}
        return out | best_of_n(self, rewards)

    def _ppo(self, run: Path, iterations: int | None, points: int) -> list[Point]:
        """Run PPO, unless it has run and answered these prompts at these points; its points."""
        config = load_config(PPOConfig, self.recipe / "ppo.yaml", overrides("ppo", self.settings))
        iterations = iterations or 2 * config.iterations
        every = max(1, iterations // points)
        words = [
            "kl_coef=0",
            "kl_target=null",
            "schedule=constant",
            "gates=warn",  # a reward model that is bad on purpose is what is studied
            *self.settings,
            "kl_limit=null",
            f"iterations={iterations}",
            f"sample_every={every}",
            f"sample_prompts={json.dumps({'path': str(self.prompts)})}",
        ]
        wanted = {*range(0, iterations, every), iterations}
        for again in ((), ("--force",)):  # what was watched makes no finished stage out of date
            steps.stage("ppo", self.recipe, run, *words, *again, borrow=self.run)
            if wanted <= (found := answers(run / "ppo", self.asked)).keys():
                break
        kept = {step: found[step] for step in sorted(wanted & found.keys())}
        return trajectory(run / "ppo", kept, self.asked, self.judge)


def answers(ppo: Path, asked: list[Prompt]) -> Samples:
    """Samples of a PPO artifact at each step where they answer these prompts."""
    out: Samples = {}
    for sample in read_jsonl(ppo / "samples.jsonl"):
        out.setdefault(sample["step"], []).append(sample)
    texts = [prompt_text(prompt.messages) for prompt in asked]
    return {step: own for step, own in out.items() if [s["prompt"] for s in own] == texts}


def trajectory(ppo: Path, found: Samples, asked: list[Prompt], judge: Judge) -> list[Point]:
    """One point for each step at which a PPO artifact's samples answer the prompts.

    The KL of the policy after s iterations is that of iteration s + 1's rollouts, or of the next that
    was logged; after the last iteration there is none, so the last point takes the last one's.
    """
    kl = values(read_jsonl(ppo / "metrics.jsonl"), "objective/kl")
    if not kl:
        raise UserError(f"{ppo}/metrics.jsonl: no KL was logged")
    rows, points = [prompt.row for prompt in asked], []
    for step, samples in found.items():
        grades = judge.score(
            [s["prompt"] for s in samples],
            [s["response"] for s in samples],
            rows,
            [s["ended"] for s in samples],
        )
        points.append(
            {
                "step": step,
                "kl": next((value for at, value in kl if at > step), kl[-1][1]),
                "judge": sum(grades) / len(grades),
                "rm_score": sum(s["score"] for s in samples) / len(samples),
            }
        )
    return points


def best_of_n(study: Study, rewards: dict[str, Path]) -> dict[str, list[Point]]:
    """Best-of-n of the SFT model by each reward model, on validation prompts."""
    from pipeline.evaluation import tallies  # these import torch
    from pipeline.evaluation.evaluate import Exam, ask
    from pipeline.models.loading import load_policy, load_reward, load_tokenizer, prepare_cpu, quiet

    split = "test" if study.config.validation_prompts is None else "validation"
    config = study.config.model_copy(update={"candidates": study.n})
    quiet()
    prepare_cpu(config.threads)
    sft = study.run / "sft"
    tokenizer = load_tokenizer(sft)
    policy, asked = load_policy(sft, tokenizer), ask(config, split, tokenizer)  # type: ignore[arg-type]
    out = {}
    for name, path in rewards.items():
        exam = Exam(config, tokenizer, study.judge, load_reward(path))
        scores, grades, _ = exam.candidates(policy, asked)
        out[name] = tallies.best_of(scores, grades)
    return out


def write(run: Path, judge: str, curves: dict[str, list[Point]]) -> Path:
    """RUN/overopt/overopt.json; returns its path."""
    out = run / "overopt" / "overopt.json"
    write_atomically(out, json.dumps({"judge": judge, "studies": curves}, indent=1) + "\n")
    return out


if __name__ == "__main__":
    with reporting_errors():
        main()
