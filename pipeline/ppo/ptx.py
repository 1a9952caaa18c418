"""PPO-ptx: pretraining text whose likelihood is kept up while the score rises (InstructGPT eq. 2)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

Ptx = Callable[[int, int], tuple[Tensor, Tensor]]
"""(optimizer step, examples) -> right-padded ids and their mask, both (n, L)."""


@dataclass
class PtxBatch:
    """Pretraining text that goes with the episodes of a minibatch."""

    ids: Tensor  # (n, L)
    mask: Tensor  # (n, L)
    tokens: Tensor  # predicted tokens in it, over all processes and micro-batches
    ratio: int  # examples per episode

    def rows(self, episodes: slice) -> "PtxBatch":
        """The examples that go with these episodes."""
        mine = slice(episodes.start * self.ratio, episodes.stop * self.ratio)
        return replace(self, ids=self.ids[mine], mask=self.mask[mine])
