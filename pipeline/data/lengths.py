"""Examples longer than a stage reads: dropped and counted; refused when they are many."""

import math
from collections.abc import Sequence

from pipeline.errors import UserError
from pipeline.process.progress import say


def over_limit(
    what: str, lengths: Sequence[int], key: str, limit: int, allowed: float | None
) -> int:
    """How many of `lengths` (tokens) are over the limit that `key` sets; told in a line.

    UserError when their share is over `allowed`, with the limit that would do; None allows all.
    """
    over = sum(length > limit for length in lengths)
    told = f"{what}: {over} of {len(lengths)} are over {key} {limit}"
    if allowed is not None and over > allowed * len(lengths):
        enough = sorted(lengths)[math.ceil((1 - allowed) * len(lengths)) - 1]
        raise UserError(
            f"{told} tokens, more than the share too_long={allowed:g} that may be dropped; "
            f"{key}={enough} is enough, or raise too_long"
        )
    if over:
        say(f"{told} tokens and are dropped")
    return over
