"""Policies on the same prompts and random numbers, judged alike, and the table of what came of it."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.evaluation import EvalConfig, Split
from pipeline.evaluation import metrics
from pipeline.evaluation.judges import Judge
from pipeline.evaluation.rm import Scorer
from pipeline.evaluation.tallies import Answers
from pipeline.evaluation.wins import at_equal_length, of_scores

Row = dict[str, Any]
"""Of one policy: judge, wins over SFT with an interval, rm_score, KL to SFT, ended, length, minutes."""

WINS = {"judge": "wins", "rm_score": "wins_by_rm"}
"""Grade -> key of its win rate; of a held-out reward model both are `by NAME`."""
EVEN = "_even"
"""After the key of a win rate: at equal length."""
COLUMNS = {
    "judge": "judge",
    "wins": "wins over SFT",
    f"wins{EVEN}": "at equal length",
    "wins_by_rm": "by the reward model",
    "rm_score": "its score",
}
MEASURES = {
    "kl": "KL to SFT",
    "ended": "ends",
    "length": "tokens",
    "minutes": "minutes of training",
}


@dataclass
class Policy:
    """A model to judge, and the minutes of training that it took after SFT."""

    path: Path
    minutes: float
    best_of: int = 1
    """Answers of which the reward model picks one."""


@dataclass
class Judges:
    """Who judges."""

    judge: Judge | None
    reward: Path
    """The reward model that was optimised."""
    held_out: list[str]
    """Other reward models."""


def judged(
    config: EvalConfig, split: Split, sft: Path, judges: Judges, policies: dict[str, Policy]
) -> dict[str, Row]:
    """All policies on the same prompts and random numbers."""
    from pipeline.evaluation.evaluate import Exam, ask  # these import torch
    from pipeline.evaluation.likelihoods import kl_to_sft
    from pipeline.models import device
    from pipeline.models.loading import load_policy, load_reward, load_tokenizer, prepare_cpu, quiet

    quiet()
    prepare_cpu(config.threads)
    tokenizer = load_tokenizer(sft)
    start = load_policy(sft, tokenizer).to(device.device())
    asked = ask(config, split, tokenizer)
    reward = load_reward(judges.reward).to(device.device())
    exam = Exam(config, tokenizer, judges.judge, reward)
    scorers = {f"by {title(path)}": Scorer(path) for path in judges.held_out}

    def graded(answers: Answers) -> Answers:
        for name, scorer in scorers.items():
            answers.grades[name] = scorer.of_answers(asked.messages, answers.texts)
        return answers

    rows, before = {}, graded(exam.graded(asked, exam.answers("SFT", start, asked)))
    for name, policy in policies.items():
        model = load_policy(policy.path, tokenizer).to(device.device())
        if policy.best_of == 1:
            responses = exam.answers(name, model, asked)
            now = graded(exam.graded(asked, responses))
            models = {"ppo": model, "sft": start}
            kl = kl_to_sft(config, models, tokenizer, asked.ids, responses)["ppo_vs_sft"]
        else:
            now = graded(_picked(exam, model, asked, policy.best_of))
            kl = metrics.kl_of_best_of_n(policy.best_of)
        means = {key: statistics.fmean(values) for key, values in now.columns().items()}
        rows[name] = {**means, "kl": kl, "minutes": policy.minutes, **wins(now, before)}
    return rows


def wins(now: Answers, before: Answers) -> dict[str, float]:
    """Win rates by every grade that compares, with intervals, all and at equal length."""
    longer = [a - b for a, b in zip(now.lengths, before.lengths, strict=True)]
    out: dict[str, float] = {}
    for grade, values in now.grades.items():
        if key := WINS.get(grade, grade if grade.startswith("by ") else None):
            plain = metrics.win_rate(values, before.grades[grade])
            out |= {key: plain.rate, f"{key}_low": plain.low, f"{key}_high": plain.high}
            verdicts = of_scores(values, before.grades[grade])
            even = at_equal_length(verdicts, longer, range(len(longer)))
            for end, name in (("", "value"), ("_low", "low"), ("_high", "high")):
                out[f"{key}{EVEN}{end}"] = even[name]
    return out


def title(model: str) -> str:
    """What a judge model is called in the table: `other` of checkpoints/other/rm."""
    path = Path(model)
    return path.parent.name if path.name == "rm" else path.name


def _picked(exam: Any, model: Any, asked: Any, n: int) -> Answers:
    """What the reward model likes best of n answers to each prompt."""
    many = asked.at([i for i in range(len(asked.ids)) for _ in range(n)])
    found = exam.graded(many, exam.answers(f"best of {n}", model, many))
    scores = found.grades["rm_score"]
    return found.at(
        [max(range(i, i + n), key=scores.__getitem__) for i in range(0, len(scores), n)]
    )


def columns(rows: dict[str, Row]) -> dict[str, str]:
    """Keys of the rows that a table shows, with their titles."""
    there = {key for row in rows.values() for key in row}
    held_out = sorted(key for key in there if key.startswith("by ") and f"{key}_low" in there)
    wins = {key: key.replace(EVEN, ", at equal length") for key in held_out}
    return {key: name for key, name in (COLUMNS | wins | MEASURES).items() if key in there}


def medians(tables: list[dict[str, Row]]) -> dict[str, Row]:
    """Of all seeds; a policy is one whatever beta was chosen for it."""
    merged: dict[str, list[Row]] = {}
    for table in tables:
        for name, row in table.items():
            merged.setdefault(name.partition(",")[0], []).append(row)
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in merged.items()
    }


def markdown(rows: dict[str, Row], title: str) -> str:
    """A table with a row a policy."""
    keys = columns(rows)
    lines = [f"# {title}", "", "| | " + " | ".join(keys.values()) + " |", "|-|" + "-:|" * len(keys)]
    for name, row in rows.items():
        lines += [f"| {name} | " + " | ".join(f"{row[key]:.3f}" for key in keys) + " |"]
    return "\n".join(lines) + "\n"
