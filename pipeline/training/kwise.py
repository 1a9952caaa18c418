"""InstructGPT's K-wise ranking loss, its batches, and TRL's reward trainer with it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import RewardTrainer

from pipeline.engines.shares import from_all
from pipeline.engines.whole import within
from pipeline.models.forward import final_scores
from pipeline.models.sequences import Sequences
from pipeline.training.checked import Checked


def kwise_loss(
    scores: Tensor,
    ranks: Tensor,
    groups: Tensor,
    prompts: int | None = None,
    strengths: Tensor | None = None,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """-log sigmoid(better - worse), averaged over each prompt's pairs, then over prompts.

    scores, ranks, groups (N,): the responses of all prompts of a batch, `groups` telling which
    prompt each belongs to; rank 1 = best. All C(K,2) pairs of a prompt are one element, ties give
    no pair (arXiv 2203.02155 eq. 1). `prompts`: how many with a pair the average is over; of a
    micro-batch, those of its whole batch; none = those given. Returns the loss and a bool (N, N),
    True where row beats column. Without any pair the loss is 0, still connected to the graph.

    `strengths` (N,): what is believed of the ranks: a pair is the right way round with probability
    p = sigmoid(strength - strength), and its loss the cross-entropy with p. `margin`: by how much a score should
    be above one that is ranked a place lower (arXiv 2307.09288 eq. 2), twice that two places, and so on.
    """
    better = _better(ranks, groups)
    same = groups[:, None] == groups[None, :]
    pairs_of_prompt = (same * better.sum(dim=1)[None, :]).sum(dim=1)  # (N,), equal within a prompt
    if prompts is None:
        prompts = prompts_with_pairs(ranks, groups)
    differences = scores[:, None] - scores[None, :]
    if strengths is not None:
        right = torch.sigmoid(strengths[:, None] - strengths[None, :])
        losses = -right * logsigmoid(differences) - (1 - right) * logsigmoid(-differences)
    else:
        places = ranks[None, :] - ranks[:, None]
        losses = -logsigmoid(differences - margin * places if margin else differences)
    weights = better / pairs_of_prompt.clamp(min=1)[:, None]
    return (losses * weights).sum() / max(prompts, 1), better


def prompts_with_pairs(ranks: Tensor, groups: Tensor) -> int:
    """How many prompts of a batch have responses of different rank."""
    return groups[_better(ranks, groups).any(dim=1)].unique().numel()


def _better(ranks: Tensor, groups: Tensor) -> Tensor:
    """Bool (N, N), True where row beats column: of the same prompt, and of a lower rank."""
    return (groups[:, None] == groups[None, :]) & (ranks[:, None] < ranks[None, :])


@dataclass
class KwiseCollator:
    """Prompts with K tokenised responses each -> one batch of all responses, each beside its prompt.

    Each row holds a `prompt` (ids), its `responses` (K lists of ids), `ranks` (K) and maybe `strengths` (K);
    K may differ from row to row.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        prompts = [row["prompt"] for row in rows for _ in row["responses"]]
        responses = [ids for row in rows for ids in row["responses"]]
        sizes = torch.tensor([len(row["responses"]) for row in rows])
        believed = [s for row in rows for s in row.get("strengths") or ()]
        return {
            **({"strengths": torch.tensor(believed)} if believed else {}),
            **vars(Sequences.of(prompts, responses, self.pad_token_id)),
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
            "groups": torch.repeat_interleave(torch.arange(len(rows)), sizes),
        }


class KwiseTrainer(Checked, RewardTrainer):
    """TRL's reward trainer with InstructGPT's loss: all pairs of a prompt are one batch element.

    Rows as `KwiseCollator` takes them; one forward pass per response.
    """

    loss_is_scaled_for_ga = True  # by the prompts of the whole batch, however it is cut up
    held_out: Callable[[], dict[str, float]]
    """Measures the model on held-out rankings."""
    margin = 0.0
    """See `kwise_loss`."""

    def evaluate(self, *args, **kwargs):
        metrics = self.held_out()
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # tokenised by us, the same way in every stage

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step: list[tuple[Tensor, Tensor]] = []  # margins and scores of each micro-batch
        prompts = sum(prompts_with_pairs(b["ranks"], b["groups"]) for b in batches)
        return batches, int(*self.total([prompts]))

    def blank(self, batch):
        batch["ranks"].fill_(1)
        batch["groups"].fill_(-1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        s = Sequences.within(inputs)
        # which only the model's own forward would enter by itself
        with self.accelerator.autocast():
            scores = within(model, lambda bare: final_scores(bare, s))
        of_pairs = inputs["ranks"], inputs["groups"], num_items_in_batch
        loss, better = kwise_loss(scores, *of_pairs, inputs.get("strengths"), self.margin)
        if num_items_in_batch is not None:  # engines average gradients over processes
            loss = loss * self.args.world_size
        seen = scores.detach()
        own = (seen[:, None] - seen[None, :])[better], seen[inputs["groups"] >= 0]
        self._step += from_all([own])
        margins, seen = map(torch.cat, zip(*self._step, strict=True))
        right = (margins > 0).float() + 0.5 * (margins == 0)  # a tie is half right
        means = {"accuracy": right, "margin": margins, "mean_reward": seen}
        # of the step so far, in place of what its micro-batches before this one left
        self._metrics["train"].update({n: [v.mean().item()] for n, v in means.items()})
        return (loss, {"scores": scores}) if return_outputs else loss
