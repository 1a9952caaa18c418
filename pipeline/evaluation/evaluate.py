"""Asks base, SFT and PPO policies the same held-out prompts and has the answers graded."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.config.evaluation import EvalConfig, Split
from pipeline.data.forms import Prompt, load_demonstrations, load_prompts, load_texts
from pipeline.data.messages import prompt_text
from pipeline.data.template import encode_demonstration, encode_prompt
from pipeline.errors import UserError
from pipeline.evaluation import metrics, tallies
from pipeline.evaluation.judges import Judge, load_judge
from pipeline.evaluation.rankings import Scored, read_scored
from pipeline.evaluation.tallies import Answers
from pipeline.handoff.found import Stage
from pipeline.models.forward import response_logprobs, score_sequences
from pipeline.models.generation import Response, generate
from pipeline.models.loading import (
    load_policy,
    load_reward,
    load_tokenizer,
    prepare_cpu,
    quiet,
)
from pipeline.models.sequences import Sequences
from pipeline.process.progress import say, tracked
from pipeline.steps import policies

LOGITS_AT_ONCE = 2**25
"""Floats of logits in memory at once when log-likelihoods are read (128 MiB)."""


@dataclass
class Asked:
    """P held-out prompts: token ids, text as judges read it, and rows of the data."""

    ids: list[list[int]]
    texts: list[str]
    rows: list[dict]

    def first(self, count: int, repeat: int) -> "Asked":
        """The first prompts, each `repeat` times in a row."""
        return Asked(
            *([x for x in xs[:count] for _ in range(repeat)] for xs in vars(self).values())
        )


def evaluate(
    config: EvalConfig, split: Split, stages: dict[str, Stage]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results as eval/SPLIT.json holds them, and one row per prompt for eval/SPLIT_samples.jsonl."""
    started = time.perf_counter()
    quiet()
    prepare_cpu(config.threads)
    judge = load_judge(config.judge)
    tokenizer = load_tokenizer(stages["sft"].path)
    asked = ask(config, split, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = _load_policies(stages, tokenizer, device)
    reward: nn.Module | None = load_reward(stages["rm"].path) if "rm" in stages else None
    if reward is not None:
        reward.to(device)

    generated = {
        name: _generate(config, name, model, tokenizer, asked) for name, model in models.items()
    }
    answers = {
        name: _graded(config, asked, responses, judge, reward, tokenizer)
        for name, responses in generated.items()
    }
    groups = tallies.memberships(asked.rows, config.groups())
    result: dict[str, Any] = {
        "prompts": len(asked.texts),
        "judge_about": None if judge is None else judge.about,
        "models": {name: tallies.summary(answer, groups) for name, answer in answers.items()},
        "comparisons": _comparisons(answers, groups),
    }
    for name, value in _perplexities(config, models, tokenizer).items():
        result["models"][name]["perplexity"] = value
    for name, value in _text_perplexities(config, models, tokenizer).items():
        result["models"][name]["text_perplexity"] = value
    if "ppo" in models:
        result["kl"] = _kl(config, models, tokenizer, asked, generated["ppo"])
    if reward is not None and judge is not None and config.candidates > 1:
        found = candidates(config, models["sft"], reward, judge, tokenizer, asked)
        result["rm"] = _reward_model(config, asked.rows, *found)
    if reward is not None and (held_out := stages["rm"].path / "held_out.jsonl").is_file():
        result["labels"] = labels(read_scored(held_out), judge)
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result, _samples(config, asked, answers)


def ask(config: EvalConfig, split: Split, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """The first `n` prompts of a split."""
    data = config.data(split)
    if data is None:
        raise UserError(f"eval: no prompts for the split {split}; set validation_prompts")
    prompts: list[Prompt] = load_prompts(data)[: config.n]
    return Asked(
        [encode_prompt(tokenizer, p.messages) for p in prompts],
        [prompt_text(p.messages) for p in prompts],
        [p.row for p in prompts],
    )


def _load_policies(
    stages: dict[str, Stage], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, nn.Module]:
    """Policies that exist. A base model on a hub that cannot be reached is said and left out."""
    models: dict[str, nn.Module] = {}
    for name in (n for n in policies() if n in stages):
        try:
            models[name] = load_policy(stages[name].path, tokenizer)
            models[name].to(device)
        except UserError as error:
            if name != "base":
                raise
            say(f"eval: the base model is left out: {error}")
    return models


def _generate(
    config: EvalConfig,
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
) -> list[Response]:
    torch.manual_seed(config.seed)
    return generate(
        model,
        tokenizer,
        asked.ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_tokens=tuple(config.stop_tokens),
        batch_size=config.batch_size,
        progress=f"eval: {name} answers",
    )


def _graded(
    config: EvalConfig,
    asked: Asked,
    responses: list[Response],
    judge: Judge | None,
    reward: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Answers:
    """Responses with every grade that somebody can give."""
    answers = Answers(
        [r.text for r in responses], [len(r.ids) for r in responses], [r.ended for r in responses]
    )
    if judge is not None:
        answers.judge = judge.score(asked.texts, answers.texts, asked.rows, answers.ended)
        answers.exact = judge.exact(asked.texts, answers.texts, asked.rows)
    if config.reference is not None:
        wanted = references(asked.rows, config.reference)
        pairs = list(zip(answers.texts, wanted, strict=True))
        overlaps = [metrics.token_overlap(text, want) for text, want in pairs]
        if answers.exact is None:
            answers.exact = [metrics.exact_match(text, want) for text, want in pairs]
        for name in metrics.Overlap._fields:
            answers.extra[f"token_{name}"] = [getattr(overlap, name) for overlap in overlaps]
    if reward is not None:
        answers.rm_score = _scores(reward, asked, responses, tokenizer)
    return answers


def references(rows: Sequence[dict], key: str) -> list[str]:
    """The right answers that rows hold under `key`."""
    for i, row in enumerate(rows):
        if not isinstance(row.get(key), str):
            raise UserError(f"eval: reference: prompt {i + 1} has no text under the key {key!r}")
    return [row[key] for row in rows]


def _scores(
    reward: nn.Module, asked: Asked, responses: list[Response], tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    replies = [r.ids for r in responses]
    return score_sequences(reward, asked.ids, replies, _pad(tokenizer), 256, "eval: scoring")


def _comparisons(
    answers: dict[str, Answers], groups: dict[str, dict[str, list[int]]]
) -> dict[str, Any]:
    """Each policy against the one before it, by the judge and by the reward model."""
    out = {}
    for grade in ("judge", "rm_score"):
        graded = {n: getattr(a, grade) for n, a in answers.items() if getattr(a, grade) is not None}
        for before, after in (("base", "sft"), ("sft", "ppo")):
            if before in graded and after in graded:
                key = f"{after}_vs_{before}" + ("" if grade == "judge" else "_by_rm")
                out[key] = tallies.comparison(graded[after], graded[before], groups)
    return out


# --- log-likelihoods ------------------------------------------------------------------------------


def _kl(
    config: EvalConfig,
    models: dict[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    responses: list[Response],
) -> dict[str, float]:
    """KL(ppo || sft) in nats per response: mean of log pi - log pi_sft over samples of pi (k1)."""
    ids = [r.ids for r in responses]
    args = (asked.ids, ids, _pad(tokenizer), config.temperature)
    policy = sequence_logprobs(models["ppo"], *args)
    reference = sequence_logprobs(models["sft"], *args)
    ratios = torch.tensor(policy) - torch.tensor(reference)
    spread = ratios.std().item() if len(ratios) > 1 else 0.0
    return {"ppo_vs_sft": ratios.mean().item(), "std_error": spread / len(ratios) ** 0.5}


def _perplexities(
    config: EvalConfig, models: dict[str, nn.Module], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Perplexity of held-out demonstrations' last turns under each policy, at temperature 1."""
    if config.demonstrations is None:
        return {}
    prompts, responses = [], []
    for item in load_demonstrations(config.demonstrations)[: config.demonstrations_limit]:
        prompt, response = encode_demonstration(tokenizer, item.messages)
        prompts.append(prompt)
        responses.append(response)
    return _perplexity_of(models, prompts, responses, _pad(tokenizer))


def _text_perplexities(
    config: EvalConfig, models: dict[str, nn.Module], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Perplexity of held-out pretraining text and its EOS under each policy, at temperature 1.

    Tokenised as PPO-ptx does it: without BOS, so the first token is given and not predicted.
    """
    if config.pretraining is None:
        return {}
    texts = load_texts(config.pretraining)[: config.pretraining_limit]
    encoded = [
        [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id][
            : config.pretraining_max_length
        ]
        for text in texts
    ]
    rows = [ids for ids in encoded if len(ids) > 1]
    if not rows:
        raise UserError("eval: pretraining: no text has two tokens")
    return _perplexity_of(
        models, [ids[:1] for ids in rows], [ids[1:] for ids in rows], _pad(tokenizer)
    )


def _perplexity_of(
    models: dict[str, nn.Module],
    prompts: list[list[int]],
    responses: list[list[int]],
    pad_id: int,
) -> dict[str, float]:
    """exp of the mean nats per response token, by model."""
    count = sum(len(ids) for ids in responses)
    return {
        name: metrics.perplexity(-sum(sequence_logprobs(model, prompts, responses, pad_id)), count)
        for name, model in models.items()
    }


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    pad_id: int,
    temperature: float = 1.0,
) -> list[float]:
    """Sum over each response's tokens of log pi(token | before), in nats; lists of ids."""
    device = next(model.parameters()).device
    width = max(len(ids) for ids in responses)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator,union-attr]
    size = max(1, LOGITS_AT_ONCE // (width * vocabulary))
    out: list[float] = []
    for start in tracked(range(0, len(prompts), size), "eval: likelihoods"):
        rows = slice(start, start + size)
        s = Sequences.of(prompts[rows], responses[rows], pad_id).to(device)
        out += response_logprobs(model, s, temperature).sum(dim=1).tolist()
    return out


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id)  # type: ignore[arg-type]


# --- the reward model against the judge -----------------------------------------------------------


def candidates(
    config: EvalConfig,
    sft: nn.Module,
    reward: nn.Module,
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
) -> tuple[list[list[float]], list[list[float]], list[list[int]]]:
    """K SFT responses to each of P prompts: reward model's scores, judge's grades, lengths; (P, K)."""
    k = config.candidates
    few = asked.first(config.candidate_prompts, k)
    responses = _generate(config, "sft", sft, tokenizer, few)
    graded = _graded(config, few, responses, judge, reward, tokenizer)
    assert graded.judge is not None
    assert graded.rm_score is not None
    return _rows_of(graded.rm_score, k), _rows_of(graded.judge, k), _rows_of(graded.lengths, k)


def labels(items: list[Scored], judge: Judge | None) -> dict[str, Any]:
    """A reward model against the labels of the rankings it was not trained on.

    `ceiling` is the judge's own accuracy on these labels: what is missing to 1 is their noise.
    """
    scores, ranks = [item.scores for item in items], [item.ranks for item in items]
    lengths = [[float(n) for n in item.lengths] for item in items]
    found: dict[str, Any] = {
        "prompts": len(items),
        "pairs": metrics.pair_accuracy(scores, ranks).pairs,
        "accuracy": metrics.pair_accuracy(scores, ranks).share,
        "length_baseline": metrics.pair_accuracy(lengths, ranks).share,
    }
    if judge is not None:
        grades = [
            judge.score([i.prompt] * (k := len(i.responses)), i.responses, [{}] * k, [True] * k)
            for i in items
        ]
        found["ceiling"] = metrics.pair_accuracy(grades, ranks).share
    return found


def _reward_model(
    config: EvalConfig,
    rows: list[dict],
    scores: list[list[float]],
    grades: list[list[float]],
    lengths: list[list[int]],
) -> dict[str, Any]:
    """Agreement with the judge on K candidates per prompt, whole and by group, and best-of-n."""
    groups = tallies.memberships(rows[: len(scores)], config.groups())
    return {
        "prompts": len(scores),
        "candidates": config.candidates,
        **tallies.agreement(scores, grades, lengths),
        "groups": {
            key: {
                value: tallies.agreement(
                    [scores[i] for i in members],
                    [grades[i] for i in members],
                    [lengths[i] for i in members],
                )
                for value, members in values.items()
            }
            for key, values in groups.items()
        },
        "best_of_n": tallies.best_of(scores, grades),
    }


def _rows_of(flat: Sequence, k: int) -> list[list]:
    """(P * K,) -> (P, K)."""
    return [list(flat[i : i + k]) for i in range(0, len(flat), k)]


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
