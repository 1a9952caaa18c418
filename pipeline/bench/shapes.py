"""What is timed: model sizes, prompts and response lengths that are drawn once, and the cases."""

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

PAD, EOS, FIRST_WORD = 0, 1, 3  # token ids; 2 stands for unknown words
LEARNING_RATE = 3e-6  # random networks stay close to what they were, on both sides
STEPS = 1000  # that a schedule is told of; more than anybody times


@dataclass(frozen=True)
class Size:
    """A Llama and the rollouts of one iteration."""

    name: str
    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocabulary: int
    prompt: int  # most tokens of a prompt
    response: int  # most tokens of a response
    hazard: float  # chance of an end at each token
    episodes: int = 64
    minibatches: int = 4
    epochs: int = 4
    kv_heads: int = 0  # 0 = heads
    tied: bool = False  # the head's weights are the embeddings'
    iterations: int = 5  # that are timed
    cases: tuple[str, ...] = ()  # that are timed unless others are asked for; none = all


SIZES = {
    size.name: size
    for size in (
        Size("XS", 2, 32, 2, 64, 64, 8, 10, 1 / 5, episodes=8),  # for tests
        Size("S", 4, 256, 4, 704, 4096, 32, 48, 1 / 24),
        Size("M", 6, 384, 6, 1024, 16384, 32, 64, 1 / 32),
        Size(  # SmolLM2-135M's shape
            *("L", 30, 576, 9, 1536, 49152, 32, 32, 1 / 16, 8, 2, 2),
            kv_heads=3,
            tied=True,
            iterations=2,
            cases=("lora",),
        ),
        Size("grows", 2, 128, 2, 352, 2**14, 16, 32, 1 / 16, episodes=16, epochs=1),
    )
}
GROWTH = {
    "response": (32, 64, 128, 256, 512),
    "episodes": (16, 32, 64, 128),
    "vocabulary": (2**14, 2**15, 2**16, 152_064),
}
"""What grows while the rest of the size `grows` stays; the first of each is its own."""


def size_of(name: str) -> Size:
    """`M`, or `grows response=512`, which differs in that."""
    base, _, change = name.partition(" ")
    key, _, value = change.partition("=")
    changed: dict[str, Any] = {key: int(value)} if change else {}
    return replace(SIZES[base], name=name, **changed)


@dataclass(frozen=True)
class Work:
    """Prompts as token ids, and how long the response to each of them is."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def response_tokens(self) -> int:
        """Real tokens that are sampled."""
        return sum(self.lengths)


def draw(size: Size, full: bool = False, seed: int = 0) -> Work:
    """The same work for every side: prompts of a quarter to the whole of their longest, and lengths
    that are geometric and truncated; or all of the longest when `full`."""
    rng = random.Random(seed)
    lengths = [size.response if full else _length(rng, size) for _ in range(size.episodes)]
    prompts = [
        words(rng, size, rng.randint(size.prompt // 4, size.prompt)) for _ in range(size.episodes)
    ]
    return Work([words(rng, size, size.prompt), *prompts[1:]], lengths)


def _length(rng: random.Random, size: Size) -> int:
    for length in range(1, size.response):
        if rng.random() < size.hazard:
            return length
    return size.response


def words(rng: random.Random, size: Size, count: int) -> list[int]:
    """So many token ids, none of them special."""
    return [rng.randrange(FIRST_WORD, size.vocabulary) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """One comparison. `theirs` says what TRL is told beyond the plain case."""

    name: str
    title: str
    task: Literal["ppo", "rm", "sft"] = "ppo"
    precision: Literal["fp32", "bf16"] = "fp32"
    theirs: Literal["", "autocast", "weights"] = ""
    full: bool = False
    busy: bool = False  # another program computes on one core
    lora: bool = False
    k: int = 0  # responses of a prompt
    batch: int = 16  # prompts of a reward model's step, rows of an SFT step


CASES = {
    case.name: case
    for case in (
        Case("fp32", "TRL as shipped, float32"),
        Case("full", "all responses of full length", full=True),
        Case("busy", "float32, beside a program that computes on one core", busy=True),
        Case("lora", "LoRA: ours all four on one base, TRL's value and reward apart", lora=True),
        Case("autocast", "TRL under bf16 autocast", precision="bf16", theirs="autocast"),
        Case("weights", "TRL with bf16 weights", precision="bf16", theirs="weights"),
        Case("rm-4", "reward model, K = 4", "rm", k=4, batch=8),
        Case("rm-9", "reward model, K = 9", "rm", k=9, batch=2),
        Case("sft", "supervised fine-tuning", "sft"),
    )
}


@dataclass(frozen=True)
class Ranked:
    """A prompt with K responses, the best first."""

    prompt: list[int]
    responses: list[list[int]]  # each ends with EOS

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """All C(K, 2) (better, worse) sequences, as a trainer on pairs reads them."""
        sequences = [self.prompt + response for response in self.responses]
        return list(itertools.combinations(sequences, 2))


def ranked(size: Size, prompts: int, k: int, seed: int = 0) -> list[Ranked]:
    """`prompts` prompts with K responses each, of lengths as in PPO."""
    rng = random.Random(seed)
    return [
        Ranked(
            words(rng, size, rng.randint(size.prompt // 4, size.prompt)),
            [[*words(rng, size, _length(rng, size) - 1), EOS] for _ in range(k)],
        )
        for _ in range(prompts)
    ]


def demonstrations(size: Size, count: int) -> list[dict[str, list[int]]]:
    """Rows of an SFT step, with the loss on the response alone."""
    return [
        {
            "input_ids": row.prompt + row.responses[0],
            "labels": [-100] * len(row.prompt) + row.responses[0],
        }
        for row in ranked(size, count, k=1)
    ]
