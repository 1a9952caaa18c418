"""What the evaluation's answers are worth to the rule, to a held-out reward model and at equal length.

    python -m configs.e2e.judged --run checkpoints/e2e-seed1 --judge checkpoints/e2e-judge --best checkpoints/e2e-seed1-best

Reads RUN/eval/SPLIT_samples.jsonl (`make eval`), adds best-of-4 by the run's reward model and the answers of SFT on the
best-ranked texts, writes RUN/judged-SPLIT.json. Intervals are bootstrapped over attribute lists, whose texts hang together.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from configs.e2e import rule
from pipeline.cli import reporting_errors
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import checkpoints_root, load_config
from pipeline.config.schema import Data
from pipeline.data.messages import Message, message
from pipeline.data.rankings import load_rankings
from pipeline.errors import UserError
from pipeline.evaluation.card import card
from pipeline.evaluation.evaluate import Exam, ask
from pipeline.evaluation.rankings import Scored
from pipeline.evaluation.rm import Scorer, scored, text
from pipeline.evaluation.wins import at_equal_length, interval, of_scores
from pipeline.handoff.found import read_json
from pipeline.models.loading import load_policy, load_tokenizer, prepare_cpu, quiet
from pipeline.process.files import jsonl, read_jsonl, write_atomically

CLOSE = 2
"""Tokens by which two texts may differ in length and count as equally long."""


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument(
        "--judge", type=Path, required=True, help="run of the held-out reward model"
    )
    parser.add_argument("--best", type=Path, help="run of SFT on the best-ranked texts")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--config", type=Path, default=Path("configs/e2e/eval.yaml"))
    args = parser.parse_args(argv)
    config = load_config(EvalConfig, args.config, [])
    quiet()
    prepare_cpu(config.threads)
    result = judged(args, config)
    out = args.run / f"judged-{args.split}.json"
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    for name, row in result["policies"].items():
        print(f"{name:24}", *(f"{key} {value:.3f}" for key, value in row.items()))
    for name, row in result["over_sft"].items():
        wins = (f"{by} {v['value']:.3f} ({v['low']:.3f}-{v['high']:.3f})" for by, v in row.items())
        print(f"{name:24} wins over sft:", *wins)
    for name, found in result["rankings"].items():
        print(f"\non people's rankings: {name}\n{text(found)}")


def judged(args: argparse.Namespace, config: EvalConfig) -> dict:
    """Everything that is reported of a run."""
    own, held_out = (Scorer(run / "rm") for run in (args.run, args.judge))
    ranked = checkpoints_root() / "data/e2e" / f"{args.split}_rm.jsonl"
    rankings = load_rankings(Data(path=str(ranked)))
    of_rm = scored(str(args.run / "rm"), rankings)
    answers = collected(args, config, own)
    samples = args.run / f"judged-{args.split}_samples.jsonl"
    write_atomically(samples, jsonl(row for rows in answers.values() for row in rows))
    graded = {name: grades(rows, own, held_out) for name, rows in answers.items()}
    lists = [row["prompt"] for row in answers["sft"]]
    found = read_json(args.run / "eval" / f"{args.split}.json")
    models = found["models"]
    return {
        "lists": len(set(lists)),
        "answers": len(lists),
        "kl": found["kl"],
        "text_perplexity": {name: models[name].get("text_perplexity") for name in models},
        "policies": {
            name: {key: statistics.fmean(values) for key, values in columns.items()}
            for name, columns in graded.items()
        },
        "over_sft": {
            name: {
                "rule": versus(columns, graded["sft"], "rule", lists),
                "held_out_rm": versus(columns, graded["sft"], "held_out_rm", lists),
                "rm": versus(columns, graded["sft"], "rm", lists),
            }
            for name, columns in graded.items()
            if name != "sft"
        },
        "gain_over_best_of_4": interval(
            np.subtract(graded["ppo"]["complete"], graded["best of 4"]["complete"]), lists
        ),
        "rankings": {
            "rm": card(of_rm),
            "held_out_rm": card(scored(str(args.judge / "rm"), rankings)),
            "rule": card([by_rule(item) for item in of_rm]),
        },
    }


def collected(args: argparse.Namespace, config: EvalConfig, own: Scorer) -> dict[str, list[dict]]:
    """Policy -> an answer to each prompt: prompt, policy, response, ended, maybe rm."""
    samples = read_jsonl(args.run / "eval" / f"{args.split}_samples.jsonl")
    out = {
        name: [_answer(s["prompt"], name, **s["answers"][name]) for s in samples]
        for name in ("sft", "ppo")
    }
    tokenizer = load_tokenizer(args.run / "sft")
    asked, exam = ask(config, args.split, tokenizer), Exam(config, tokenizer, None, None)
    if asked.texts != [s["prompt"] for s in samples]:
        raise UserError(f"{args.run}: evaluated on other prompts: make eval again")

    def answers(name: str, run: Path, n: int) -> list[dict]:
        many = asked.at([i for i in range(len(asked.ids)) for _ in range(n)])
        given = exam.answers(name, load_policy(run / "sft", tokenizer), many)
        told = zip(many.texts, given, strict=True)
        return [_answer(prompt, name, response=r.text, ended=r.ended) for prompt, r in told]

    four = answers("best of 4", args.run, 4)
    scores = own.of_answers(*asked_of(four))
    places = [max(range(i, i + 4), key=scores.__getitem__) for i in range(0, len(four), 4)]
    out["best of 4"] = [four[i] | {"rm": scores[i]} for i in places]
    if args.best:
        out["sft on the best-ranked"] = answers("sft on the best-ranked", args.best, 1)
    return out


def _answer(
    prompt: str, policy: str, response: str, ended: bool, rm_score: float | None = None, **_
) -> dict:
    known = {} if rm_score is None else {"rm": rm_score}
    return {"prompt": prompt, "policy": policy, "response": response, "ended": ended, **known}


def asked_of(rows: list[dict]) -> tuple[list[list[Message]], list[str]]:
    """Messages and responses of answers."""
    return [[message("user", row["prompt"])] for row in rows], [row["response"] for row in rows]


def grades(rows: list[dict], own: Scorer, held_out: Scorer) -> dict[str, list[float]]:
    """Name of a grade -> one for each answer."""
    prompts, texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
    verdicts = [rule.read(*pair) for pair in zip(prompts, texts, strict=True)]
    messages, _ = asked_of(rows)
    return {
        "rule": rule.score(prompts, texts, [], [row["ended"] for row in rows]),
        "said": [len(v.said) / v.slots for v in verdicts],
        "complete": [float(v.complete) for v in verdicts],
        "faithful": [float(v.faithful) for v in verdicts],
        "wrong": [float(len(v.wrong)) for v in verdicts],
        "ended": [float(row["ended"]) for row in rows],
        "tokens": [
            float(len(own.encode(asked, [said])[1][0]))
            for asked, said in zip(messages, texts, strict=True)
        ],
        "rm": [row["rm"] for row in rows] if "rm" in rows[0] else own.of_answers(messages, texts),
        "held_out_rm": held_out.of_answers(messages, texts),
    }


def versus(ours: dict, theirs: dict, grade: str, lists: Sequence[str]) -> dict:
    """Wins by a grade, ties half: all, at equal length, and among pairs that are about as long."""
    verdicts = np.array(of_scores(ours[grade], theirs[grade]))
    longer = np.subtract(ours["tokens"], theirs["tokens"])
    close = np.abs(longer) <= CLOSE
    return {
        **interval(verdicts, lists),
        "ties": float(np.mean(verdicts == 0.5)),
        "at_equal_length": at_equal_length(verdicts, longer, lists),
        "close": {
            "pairs": int(close.sum()),
            "rate": float(verdicts[close].mean()) if close.any() else None,
        },
    }


def by_rule(item: Scored) -> Scored:
    """A ranking with the rule's scores."""
    k = len(item.responses)
    return replace(item, scores=rule.score([item.prompt] * k, item.responses, [{}] * k))


if __name__ == "__main__":
    with reporting_errors():
        main()
