"""The card of any reward model: `python -m pipeline.evaluation.rm --model PATH --data FILES`.

MODEL is a folder or hub id of a sequence classifier with one score, with its own tokenizer; FILES hold
rankings or pairs in any form that the stage rm reads (`prompt`, `chosen`, `rejected`, `subset` of
RewardBench among them). Prints the card, and writes it with --out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.cli import reporting_errors
from pipeline.config.schema import Data
from pipeline.data.messages import Message
from pipeline.data.rankings import Ranking, load_rankings
from pipeline.errors import UserError, at
from pipeline.evaluation.card import card
from pipeline.evaluation.rankings import Scored
from pipeline.process.files import write_atomically
from pipeline.process.progress import say, tracked


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation.rm", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a reward model")
    parser.add_argument("--data", required=True, nargs="+", help="files or hub ids of rankings")
    parser.add_argument("--split", default="train", help="of a hub id")
    parser.add_argument(
        "--max-length", type=int, help="prompt and response in tokens; longer ones are left out"
    )
    parser.add_argument("--out", type=Path, help="file for the card as JSON")
    args = parser.parse_args(argv)
    rankings = list(load_rankings(Data(path=args.data, split=args.split)))
    found = card(scored(args.model, rankings, args.max_length))
    if args.out is not None:
        write_atomically(args.out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(text(found))


class Scorer:
    """Any sequence classifier with one score, by its own tokenizer and template."""

    def __init__(self, model: str | Path):
        from pipeline.models import device  # these import torch
        from pipeline.models.causal import places
        from pipeline.models.loading import fit_tokenizer, load_reward, load_tokenizer

        self.tokenizer, network = load_tokenizer(model), load_reward(model)
        fit_tokenizer(network, self.tokenizer)
        self.places, self.network = places(network), network.to(device.device())

    def encode(
        self, messages: list[Message], responses: list[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of a prompt and of the responses to it, without their thinking."""
        from pipeline.data.template import encode_responses, without_thinking

        return encode_responses(self.tokenizer, messages, list(map(without_thinking, responses)))

    def scores(
        self, prompts: list[list[int]], replies: list[list[int]], progress: str
    ) -> list[float]:
        """One score for each pair of ids."""
        from pipeline.models.forward import score_sequences
        from pipeline.models.tokens import pad_id

        pad = pad_id(self.tokenizer)
        return score_sequences(self.network, prompts, replies, pad, progress=progress)

    def of_answers(self, asked: list[list[Message]], answers: list[str]) -> list[float]:
        """Scores of one answer to each conversation; UserError for one that is too long."""
        pairs = [
            self.encode(messages, [text]) for messages, text in zip(asked, answers, strict=True)
        ]
        longest = max(len(prompt) + len(reply) for prompt, [reply] in pairs)
        if longest > self.places:
            raise UserError(f"a judge model has {self.places} places, an answer needs {longest}")
        prompts, replies = [prompt for prompt, _ in pairs], [reply for _, [reply] in pairs]
        return self.scores(prompts, replies, "judging")


def scored(model: str, rankings: list[Ranking], max_length: int | None = None) -> list[Scored]:
    """Rankings with a reward model's scores, by its own tokenizer and template.

    Responses over `max_length`, or over what the model has places for, are left out and said; UserError
    when no pair is left.
    """
    from pipeline.models.loading import prepare_cpu, quiet  # these import torch

    quiet()
    prepare_cpu(None)
    scorer = Scorer(model)
    limit = min(scorer.places, max_length or scorer.places)
    items, prompts, replies, left = list[Scored](), list[list[int]](), list[list[int]](), 0
    for ranking in tracked(rankings, "rm: encoding"):
        with at(ranking.where):
            prompt, encoded = scorer.encode(ranking.messages, ranking.responses)
        fit = [i for i, ids in enumerate(encoded) if len(prompt) + len(ids) <= limit]
        left += len(encoded) - len(fit)
        ranks = [ranking.ranks[i] for i in fit]
        if len(set(ranks)) < 2:
            continue
        responses, own = [ranking.responses[i] for i in fit], [encoded[i] for i in fit]
        question = ranking.messages[-1]["content"]
        items.append(Scored(question, responses, ranks, list(map(len, own)), [], ranking.row))
        prompts += [prompt] * len(own)
        replies += own
    if left:
        say(f"rm: {left} responses are over {limit} tokens and left out")
    if not items:
        raise UserError("rm: no pair of ranked responses is left to score")
    scores = iter(scorer.scores(prompts, replies, "rm: scoring"))
    for item in items:
        item.scores = [next(scores) for _ in item.ranks]
    return items


def text(found: dict[str, Any]) -> str:
    """A card as lines to read."""
    rows = [("all pairs", found), ("lengths alike", found["length_matched"])]
    rows += [("with the prompt's best", found["with_best"]), ("without", found["without_best"])]
    for key, name in (("by_k", "K = "), ("by_distance", "ranks apart: "), ("by_subset", "")):
        rows += [(f"{name}{value}", part) for value, part in found[key].items()]
    lines = [
        f"{name:28} {part['accuracy']:.3f}  ({part['low']:.3f} to {part['high']:.3f}, {part['pairs']} pairs)"
        for name, part in rows
        if part["pairs"]
    ]
    above, errors = found["above_length"], found["errors"]
    lines += [
        f"{'the longer one wins':28} {found['longer_wins']:.3f}",
        f"{'above the better of both':28} {above['margin']:+.3f}  ({above['low']:+.3f} to {above['high']:+.3f})",
        f"{'scores follow length, r':28} {found['score_length_correlation']:+.2f}",
        f"{'calibration error':28} {found['calibration_error']:.3f}",
    ]
    if errors["pairs"]:
        lines.append(f"{'errors for the longer one':28} {errors['longer_taken']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    with reporting_errors():
        main()
