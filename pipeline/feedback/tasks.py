"""Tasks for people: responses of one or several models to the same prompts, sampled ahead of time."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.schema import Data
from pipeline.data.forms import Prompt, load_prompts
from pipeline.data.kept import pick
from pipeline.data.template import encode_responses
from pipeline.feedback.comparisons import answers, columns_of
from pipeline.feedback.exchange import shuffled
from pipeline.feedback.store import Candidate, Store, Task
from pipeline.handoff.artifacts import is_published, manifest_hash
from pipeline.handoff.lineage import inputs_of
from pipeline.models.device import device
from pipeline.models.forward import score_sequences
from pipeline.models.loading import load_policy, load_reward, load_tokenizer, quiet
from pipeline.models.tokens import pad_id
from pipeline.process.progress import say, tracked

BATCH = 16
"""Prompts that are answered, and saved, at once."""
CHECK = "Please put this answer last: it is here to see that all are read. 请把这个回答排在最后。"


@dataclass
class Wanted:
    """What is sampled."""

    models: dict[str, Path]
    """Name -> folder; each answers its share of K."""
    prompts: Data
    number: int
    """Prompts, drawn by the seed."""
    k: int
    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 1
    reward: Path | None = None
    """A reward model that scores them, for what to ask first."""
    checks: float = 0.0
    """Share of the prompts whose task is an attention check."""

    @property
    def origin(self) -> str:
        """Hash of all that decides what is sampled."""
        told = [manifest_hash(p) if is_published(p) else str(p) for p in self.models.values()]
        data = [self.prompts.model_dump(mode="json") | {"path": inputs_of(self.prompts)}]
        sizes = [self.number, self.k, self.max_new_tokens, self.temperature, self.seed, self.checks]
        whole = json.dumps([list(self.models), told, data, sizes], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def share(self, model: int, prompt: int) -> int:
        """How many of the K responses to a prompt are a model's; all add up to K, none is favoured."""
        each, more = divmod(self.k, len(self.models))
        return each + ((model - prompt) % len(self.models) < more)


def sample(store: Store, wanted: Wanted, overlap: float = 0.0, votes: int = 1) -> int:
    """Add what is wanted and not there yet, a batch at a time; the number of tasks added. Killed, the same
    call goes on after the last whole batch and adds what it would have added."""
    every = load_prompts(wanted.prompts, seed=wanted.seed)
    drawn = random.Random(wanted.seed).sample(range(len(every)), min(wanted.number, len(every)))
    prompts: Sequence[Prompt] = pick(every, drawn)
    origin = wanted.origin
    done = {number // BATCH * BATCH for number in store.origins(origin)}
    starts = [at for at in range(0, len(prompts), BATCH) if at not in done]
    if not starts:
        return 0
    quiet()
    policies = [_Policy(name, path) for name, path in wanted.models.items()]
    reward = _Reward(wanted.reward) if wanted.reward else None
    columns, added = columns_of(prompts), 0
    for start in tracked(starts, "sampling responses"):
        batch = prompts[start : start + BATCH]
        tasks = []
        for at, task in enumerate(_batch(policies, batch, start, wanted), start):
            task.row = {name: prompts[at].row.get(name) for name in columns}
            task.origin = f"{origin}:{at}"
            if reward is not None:
                reward.score(task)
            tasks.append(_check(task) if _is_check(at, wanted.checks) else shuffled(task))
        added += store.add([t for t in tasks if len(t.candidates) > 1], overlap, votes)
    if same := len(prompts) - len(store.origins(origin)):
        say(f"label: {same} of {len(prompts)} prompts got the same response each time; left out")
    return added


class _Policy:
    """A model and its own tokenizer."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        self.model: PreTrainedModel = load_policy(path, self.tokenizer).to(device())


class _Reward:
    """A reward model, which reads texts in its own template."""

    def __init__(self, path: Path):
        self.tokenizer = load_tokenizer(path)
        self.model = load_reward(path).to(device())

    def score(self, task: Task) -> None:
        texts = [one.text for one in task.candidates]
        prompt, read = encode_responses(self.tokenizer, task.prompt, texts)
        scores = score_sequences(self.model, [prompt] * len(read), read, pad_id(self.tokenizer))
        for one, score in zip(task.candidates, scores, strict=True):
            one.score = round(score, 4) if math.isfinite(score) else None


def _batch(
    policies: list[_Policy], batch: Sequence[Prompt], start: int, wanted: Wanted
) -> list[Task]:
    """A task for each prompt; the random numbers are the batch's and the model's own."""
    tasks = [Task(prompt.messages, []) for prompt in batch]
    for number, policy in enumerate(policies):
        torch.manual_seed(hash((wanted.seed, start, number)))
        counts = [wanted.share(number, at) for at in range(start, start + len(batch))]
        prompts, limits = [p.messages for p in batch], (wanted.max_new_tokens, wanted.temperature)
        if sum(counts):
            several = answers(policy.model, policy.tokenizer, prompts, counts, *limits)
            for task, own in zip(tasks, several, strict=True):
                task.candidates += [Candidate(r.text, policy.name, None, r.ended) for r in own]
    return tasks


def _is_check(number: int, share: float) -> bool:
    """A share of the prompts, evenly: those where the count so far passes a whole number."""
    return int((number + 1) * share) > int(number * share)


def _check(task: Task) -> Task:
    """An attention check: the last response gives way to one that asks to be put last."""
    task.candidates[-1] = Candidate(CHECK, "check")
    task.last = len(task.candidates) - 1
    return shuffled(task)
