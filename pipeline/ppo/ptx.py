"""PPO-ptx: pretraining text whose likelihood is kept up while the score rises (InstructGPT eq. 2)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from pipeline.models.sequences import Sequences

Ptx = Callable[[int, int], Sequences]
"""(optimizer step, examples of this process) -> texts, all but their first token to be predicted."""


@dataclass
class PtxBatch:
    """Pretraining text that goes with the episodes of a minibatch."""

    texts: Sequences
    tokens: Tensor  # predicted tokens in it, over all processes and micro-batches
    ratio: int  # examples per episode

    def rows(self, episodes: slice) -> "PtxBatch":
        """The examples that go with these episodes."""
        mine = slice(episodes.start * self.ratio, episodes.stop * self.ratio)
        return replace(self, texts=self.texts.rows(mine))
