"""Asks base, SFT and PPO policies the same held-out prompts and has the answers graded."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.config.evaluation import EvalConfig, Split
from pipeline.data.forms import load_prompts
from pipeline.data.messages import Message, prompt_text
from pipeline.data.template import encode_prompt, scored_ids, without_thinking
from pipeline.errors import UserError
from pipeline.evaluation import metrics, tallies
from pipeline.evaluation.judges import Judge, load_judge
from pipeline.evaluation.likelihoods import (
    check_texts,
    demonstrations,
    kl_to_sft,
    perplexity,
    room,
    texts,
)
from pipeline.evaluation.panel import Contest, judged, panel
from pipeline.evaluation.rankings import Scored, measure, read_scored
from pipeline.evaluation.tallies import Answers
from pipeline.handoff.found import Stage
from pipeline.models import device
from pipeline.models.forward import score_sequences
from pipeline.models.generation import Response, generate
from pipeline.models.loading import load_policy, load_reward, load_tokenizer, prepare_cpu, quiet
from pipeline.models.tokens import pad_id
from pipeline.process.progress import say
from pipeline.steps import policies


@dataclass
class Asked:
    """P held-out prompts: messages, token ids, text as judges read it, and rows of the data."""

    messages: list[list[Message]]
    ids: list[list[int]]
    texts: list[str]
    rows: list[dict]

    def at(self, places: Sequence[int]) -> "Asked":
        """Some of them."""
        return Asked(*([xs[i] for i in places] for xs in vars(self).values()))


def evaluate(
    config: EvalConfig, split: Split, stages: dict[str, Stage]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results as eval/SPLIT.json holds them, and one row per prompt for eval/SPLIT_samples.jsonl."""
    started = time.perf_counter()
    quiet()
    prepare_cpu(config.threads)
    if config.reference is not None:
        from pipeline.evaluation import chrf  # its package may be missing, which is told at once
    tokenizer = load_tokenizer(stages["sft"].path)
    judge, others = load_judge(config.judge), panel(config)
    asked = ask(config, split, tokenizer)
    for key in config.groups():
        if all(row.get(key) is None for row in asked.rows):
            raise UserError(f"eval: group_by: no prompt of the split {split} has a {key!r}")
    models = load_policies(stages, tokenizer, "eval")
    check_texts(config, models)
    asked = _that_fit(asked, models, config.max_new_tokens)
    reward = load_reward(stages["rm"].path).to(device.device()) if "rm" in stages else None
    exam = Exam(config, tokenizer, judge, reward)
    generated = {name: exam.answers(name, model, asked) for name, model in models.items()}
    answers = {name: exam.graded(asked, responses) for name, responses in generated.items()}
    groups = tallies.memberships(asked.rows, config.groups())
    result: dict[str, Any] = {
        "prompts": len(asked.texts),
        "judge_about": None if judge is None else judge.about,
        "models": {name: tallies.summary(answer, groups) for name, answer in answers.items()},
        "comparisons": _comparisons(answers, groups),
    }
    for key, read in (("perplexity", demonstrations), ("text_perplexity", texts)):
        pairs = read(config, tokenizer, models)
        for name, model in models.items() if pairs else ():
            result["models"][name][key] = perplexity(model, pairs, pad_id(tokenizer))
    if config.reference is not None:
        wanted = references(asked.rows, config.reference)
        for name, answer in answers.items():
            chrf.add(result["models"][name], answer.texts, wanted, groups)
    if "ppo" in models and config.temperature:
        result["kl"] = kl_to_sft(config, models, tokenizer, asked.ids, generated["ppo"])
    if reward is not None and judge is not None and config.candidates > 1:
        result["rm"] = _reward_model(config, asked.rows, *exam.candidates(models["sft"], asked))
    if reward is not None and (held_out := read_scored(stages["rm"].path)):
        result["labels"] = labels(held_out, judge)
    samples = _samples(config, asked, answers)
    if config.judges and len(answers) > 1:
        before, after = list(answers)[-2:]
        contest = Contest(asked.messages, asked.rows, answers[after], answers[before])
        result["judges"] = {f"{after}_vs_{before}": judged(contest, others, samples)}
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result, samples


def ask(config: EvalConfig, split: Split, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """The first `n` prompts of a split."""
    data = config.data(split)
    if data is None:
        raise UserError(f"eval: no prompts for the split {split}; set validation_prompts")
    prompts = list(load_prompts(data)[: config.n])
    return Asked(
        [p.messages for p in prompts],
        [encode_prompt(tokenizer, p.messages) for p in prompts],
        [prompt_text(p.messages) for p in prompts],
        [p.row for p in prompts],
    )


def _that_fit(asked: Asked, models: dict[str, nn.Module], new: int) -> Asked:
    """Prompts that leave room for `new` tokens and their end; the others are said and left out."""
    fit = [i for i, ids in enumerate(asked.ids) if room(models, len(ids)) > new]
    left = f"among the models' places beside max_new_tokens {new}"
    if not fit:
        raise UserError(f"eval: no prompt fits {left}")
    if long := len(asked.ids) - len(fit):
        say(f"eval: {long} of {len(asked.ids)} prompts are left out, they do not fit {left}")
    return asked.at(fit)


def load_policies(
    stages: dict[str, Stage], tokenizer: PreTrainedTokenizerBase, who: str
) -> dict[str, Any]:
    """Policies that exist. A base model on a hub that cannot be reached is said and left out."""
    models = {}
    for name in (n for n in policies() if n in stages):
        try:
            models[name] = load_policy(stages[name].path, tokenizer).to(device.device())
        except UserError as error:
            if name != "base":
                raise
            say(f"{who}: the base model is left out: {error}")
    return models


def sampled(
    config: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    model: nn.Module,
    prompts: list[list[int]],
) -> list[Response]:
    """A model's responses to prompts' ids, from the random numbers of the config's seed."""
    torch.manual_seed(config.seed)
    return generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature or 1.0,
        greedy=config.temperature == 0,
        stop_tokens=tuple(config.stop_tokens),
        batch_size=config.batch_size,
        progress=f"eval: {name} answers",
    )


@dataclass
class Exam:
    """How policies are asked, and those who grade what they answer."""

    config: EvalConfig
    tokenizer: PreTrainedTokenizerBase
    judge: Judge | None
    reward: nn.Module | None

    def answers(self, name: str, model: nn.Module, asked: Asked) -> list[Response]:
        """A policy's responses, from the same random numbers as every other one's."""
        return sampled(self.config, self.tokenizer, name, model, asked.ids)

    def graded(self, asked: Asked, responses: list[Response]) -> Answers:
        """Responses with every grade that somebody can give."""
        texts, ended = [r.text for r in responses], [r.ended for r in responses]
        answers = Answers(texts, [len(r.ids) for r in responses], ended)
        exact = None
        if self.judge is not None:
            answers.grades["judge"] = self.judge.score(asked.texts, texts, asked.rows, ended)
            exact = self.judge.exact(asked.texts, texts, asked.rows)
        if self.config.reference is not None:
            wanted = references(asked.rows, self.config.reference)
            found = metrics.against(texts, wanted)
            answers.grades |= found
            exact = exact or list(map(bool, found["exact"]))
        if exact is not None:
            answers.grades["exact"] = exact
        if self.reward is not None:
            answers.grades["rm_score"] = self._scores(asked, responses)
        return answers

    def _scores(self, asked: Asked, responses: list[Response]) -> list[float]:
        pairs = zip(asked.messages, responses, strict=True)
        replies = [scored_ids(self.tokenizer, messages, r.ids) for messages, r in pairs]
        pad = pad_id(self.tokenizer)
        scores = score_sequences(self.reward, asked.ids, replies, pad, 256, "eval: scoring")
        if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
            raise UserError(
                f"eval: the reward model gives {scores[bad[0]]} ({len(bad)} of {len(scores)} scores are "
                f"not finite), first to {responses[bad[0]].text!r}; make it again: FORCE=rm"
            )
        return scores

    def candidates(self, sft: nn.Module, asked: Asked) -> list[list[list[float]]]:
        """K SFT responses to each of P prompts: reward model's scores, judge's grades, lengths; (P, K)."""
        k = self.config.candidates
        places = range(min(self.config.candidate_prompts, len(asked.ids)))
        few = asked.at([i for i in places for _ in range(k)])
        found = self.graded(few, self.answers("sft", sft, few)).columns()
        columns = (found[name] for name in ("rm_score", "judge", "length"))
        return [[list(c[i : i + k]) for i in range(0, len(c), k)] for c in columns]


def references(rows: Sequence[dict], key: str) -> list[str]:
    """The right answers that rows hold under `key`."""
    for i, row in enumerate(rows):
        if not isinstance(row.get(key), str):
            raise UserError(
                f"eval: reference: prompt {i + 1} has no text under the key {key!r}; "
                f"it has {', '.join(map(str, row))}"
            )
    return [without_thinking(row[key]) for row in rows]


def _comparisons(answers: dict[str, Answers], groups: tallies.Groups) -> dict[str, Any]:
    """Each policy against the one before it, by the judge and by the reward model."""
    out = {}
    for grade, suffix in (("judge", ""), ("rm_score", "_by_rm")):
        graded = {n: a.grades[grade] for n, a in answers.items() if grade in a.grades}
        for before, after in pairwise(policies()):
            if before in graded and after in graded:
                key = f"{after}_vs_{before}{suffix}"
                out[key] = tallies.comparison(graded[after], graded[before], groups)
    return out


def labels(items: list[Scored], judge: Judge | None) -> dict[str, Any]:
    """A reward model against the labels of the rankings it was not trained on.

    `ceiling` is the judge's own accuracy on these labels: what is missing to 1 is their noise. It is
    left out where the rankings are not what the judge can read.
    """
    own = measure(items)
    found: dict[str, Any] = {
        "prompts": own.prompts,
        "pairs": own.accuracy.pairs,
        "accuracy": own.accuracy.share,
        "length_baseline": own.length_baseline,
    }
    if judge is not None:
        try:
            grades = [_grades(item, judge) for item in items]
        except UserError as error:
            say(f"eval: the judge's own accuracy on the held-out rankings is left out: {error}")
        else:
            found["ceiling"] = metrics.pair_accuracy(grades, [item.ranks for item in items]).share
    return found


def _grades(item: Scored, judge: Judge) -> list[float]:
    if item.row is None:
        raise UserError("this reward model was published without their rows")
    k, texts = len(item.responses), [without_thinking(text) for text in item.responses]
    told = item.row.get("ended")  # of sampled ones, as their labeler knew it
    known = zip(item.row["responses"], told, strict=False) if isinstance(told, list) else ()
    cut = [text for text, ended in known if not ended]
    ended = [text not in cut for text in item.responses]
    return judge.score([item.prompt] * k, texts, [item.row] * k, ended)


def _reward_model(
    config: EvalConfig, rows: list[dict], *columns: list[list[float]]
) -> dict[str, Any]:
    """Agreement with the judge on K candidates per prompt, whole and by group, and best-of-n.

    columns: scores, grades and lengths, (P, K) each.
    """
    scores, grades, _ = columns

    def agreement(rows: Sequence[int]) -> dict[str, Any]:
        return tallies.agreement(*([column[i] for i in rows] for column in columns))

    groups = tallies.memberships(rows[: len(scores)], config.groups())
    return {
        "prompts": len(scores),
        "candidates": config.candidates,
        **agreement(range(len(scores))),
        "groups": tallies.by_group(groups, agreement),
        "best_of_n": tallies.best_of(scores, grades),
    }


def _samples(config: EvalConfig, asked: Asked, answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """One row per prompt with every model's answer."""
    return [
        {
            "prompt": asked.texts[i],
            "groups": {key: asked.rows[i].get(key) for key in config.groups()},
            "answers": {name: answer.row(i) for name, answer in answers.items()},
        }
        for i in range(len(asked.texts))
    ]
