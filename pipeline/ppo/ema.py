"""Exponential moving average of the policy (InstructGPT: decay 0.992)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.engines.whole import in_parts


class Ema:
    """Averaged copies of parameters, updated after every optimizer step; idle when decay is None."""

    def __init__(self, parameters: list[nn.Parameter], decay: float | None):
        self.decay = decay
        self.shadow: list[Tensor] = (
            [] if decay is None else [p.detach().clone() for p in parameters]
        )

    @torch.no_grad()
    def update(self, parameters: list[nn.Parameter]) -> None:
        """shadow = decay * shadow + (1 - decay) * parameter."""
        if self.decay is not None:
            torch._foreach_lerp_(self.shadow, [p.detach() for p in parameters], 1 - self.decay)

    def load(self, shadow: list[Tensor], parameters: list[nn.Parameter]) -> None:
        """Go on from a saved average, on the devices of the parameters."""
        pairs = zip(shadow, parameters, strict=bool(shadow))
        self.shadow = [in_parts(average.to(p.device), p) for average, p in pairs]

    @contextlib.contextmanager
    def swapped_in(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Within, the parameters hold the average."""
        held = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, average in zip(parameters, self.shadow, strict=True):
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, last in zip(parameters, held, strict=True):
                    p.copy_(last)
