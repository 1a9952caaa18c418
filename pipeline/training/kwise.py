"""InstructGPT's K-wise ranking loss and what is measured on rankings."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.models.tokens import right_pad


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
        flat = [ids for row in rows for ids in row["sequences"]]
        ids, mask = right_pad(flat, self.pad_token_id)
        sizes = torch.tensor([len(row["sequences"]) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
            "groups": torch.repeat_interleave(torch.arange(len(rows)), sizes),
        }
