"""The least time that an iteration can take: its matrix products over real tokens, at full speed.

Counted are the products that no implementation can leave out, two operations a multiply-add; padding,
optimizer, sampling and memory traffic are not. Embeddings are look-ups and cost nothing here.
"""

from pipeline.bench.shapes import Size, Work


def linear(size: Size) -> int:
    """One token through the trunk's weights: attention's four products, a gated MLP's three."""
    shared = (size.kv_heads or size.heads) / size.heads  # keys and values, fewer than queries
    attention = int((2 + 2 * shared) * size.hidden**2)
    return 2 * size.layers * (attention + 3 * size.hidden * size.feed_forward)


def attention(size: Size, length: int) -> int:
    """Causal attention over a sequence: a token's scores and their sum over all tokens up to it."""
    return size.layers * 2 * (2 * size.hidden) * (length * (length + 1) // 2)


def trunk(size: Size, lengths: list[int]) -> int:
    """Sequences of these lengths through all layers."""
    return sum(length * linear(size) + attention(size, length) for length in lengths)


def head(size: Size, positions: int) -> int:
    """Logits over the vocabulary at so many positions."""
    return 2 * positions * size.hidden * size.vocabulary


def of_ppo(size: Size, work: Work, lora: bool = False) -> dict[str, int]:
    """One iteration by phase. What predicts tokens never reads the last one; the reward model does.

    Old logprobs are the sampler's. A backward pass costs two forward passes, and one where the
    weights are frozen (LoRA, whose own products are small and left out).
    """
    whole = [len(ids) + length for ids, length in zip(work.prompts, work.lengths, strict=True)]
    reading = trunk(size, [length - 1 for length in whole])
    policy = reading + head(size, work.response_tokens)
    return {
        "generation": policy,
        "reference": policy,
        "reward and value": trunk(size, whole) + reading,
        "optimisation": size.epochs * (2 if lora else 3) * (policy + reading),
    }
