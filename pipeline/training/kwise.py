"""InstructGPT's K-wise ranking loss and what is measured on rankings; torch alone."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def kwise_loss(scores: Tensor, ranks: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """-log sigmoid(better - worse), averaged over each prompt's pairs, then over prompts.

    scores, ranks, groups (N,): the responses of all prompts of a batch, `groups` telling which
    prompt each belongs to; rank 1 = best. All C(K,2) pairs of a prompt are one element, ties give
    no pair (arXiv 2203.02155 eq. 1). Returns the loss and a bool (N, N), True where row beats
    column. A batch without any pair has loss 0, still connected to the graph.
    """
    same = groups[:, None] == groups[None, :]
    better = same & (ranks[:, None] < ranks[None, :])
    pairs_of_prompt = (same * better.sum(dim=1)[None, :]).sum(dim=1)  # (N,), equal within a prompt
    prompts = groups[pairs_of_prompt > 0].unique().numel()
    losses = -logsigmoid(scores[:, None] - scores[None, :])
    weights = better / pairs_of_prompt.clamp(min=1)[:, None]
    return (losses * weights).sum() / max(prompts, 1), better


@dataclass
class KwiseCollator:
    """Prompts with K tokenised responses each -> one right-padded batch of all responses.

    Each row holds `sequences` (K lists of ids) and `ranks` (K); K may differ from row to row.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        sequences = [torch.tensor(ids) for row in rows for ids in row["sequences"]]
        lengths = torch.tensor([len(ids) for ids in sequences])
        sizes = torch.tensor([len(row["sequences"]) for row in rows])
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(sequences, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
            "groups": torch.repeat_interleave(torch.arange(len(rows)), sizes),
        }
