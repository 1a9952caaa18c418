"""What a person looks at while PPO runs: fixed prompts answered again and again, and distributions.

Nothing here touches PPO's randomness, its weights or its record.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.ppo import PPOConfig
from pipeline.data.forms import load_prompts
from pipeline.engines.start import anywhere
from pipeline.engines.whole import on_whole
from pipeline.models.device import placed
from pipeline.models.forward import response_logprobs
from pipeline.models.generation import generate
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import pad_id
from pipeline.ppo import maths
from pipeline.ppo.advantages import token_rewards_of
from pipeline.ppo.networks import autocast
from pipeline.ppo.rollout import Query, Rollout
from pipeline.ppo.trainer import PPO
from pipeline.tracking.tracker import Tracker, read_rows

EPISODES = 6
"""Of an iteration, best and worst ones whose tokens are recorded."""


class Watch:
    """Answers fixed prompts every `sample_every` iterations, and looks at that iteration's batch."""

    def __init__(self, config: PPOConfig, ppo: PPO, queries: Sequence[Query], tracker: Tracker):
        self.config, self.ppo, self.tracker = config, ppo, tracker
        self.queries = list(queries[:8])
        if config.sample_prompts is not None:
            self.queries = list(ppo.queries(load_prompts(config.sample_prompts)))
        self.last = -1
        self.sft: dict[str, dict[str, Any]] = {}  # prompt -> the sample before the first step

    def samples(self, last: bool = False) -> None:
        """Sample, score and record, when it is time: at the start, every so often, at the end."""
        at = self.ppo.iteration
        due = at % self.config.sample_every == 0 or last
        if not due or at == self.last:
            return
        self.last = at
        with torch.random.fork_rng():  # watching must not change what is watched
            torch.manual_seed(self.config.seed)
            main = self.ppo.accelerator.is_main_process
            rows = on_whole(
                self.ppo.networks, lambda _: self._beside_sft(self._rows()) if main else []
            )
        self.tracker.samples(at, rows)

    def histograms(self, rollout: Rollout) -> None:
        """Distributions of an iteration that has been trained on, as often, for the mirror alone: scores,
        lengths, values of tokens, and each token's ratio after all of its steps. Of this process's share."""
        at = self.ppo.iteration
        if at % self.config.sample_every or not anywhere(self.tracker.mirrored):
            return
        mirrored, mask = self.tracker.mirrored, rollout.response_mask
        ratios = on_whole(self.ppo.networks, lambda _: self._ratios(rollout) if mirrored else [])
        if not mirrored:
            return
        found = {
            "scores": rollout.scores,
            "lengths": mask.sum(dim=1),
            "ratios": torch.cat(ratios),
            **({"values": rollout.values[mask]} if self.config.critic() else {}),
        }
        self.tracker.histograms(at, {n: x.float().cpu().numpy() for n, x in found.items()})

    def tokens(self, rollout: Rollout, kl_coef: float) -> None:
        """Every token of the best and the worst episodes of an iteration that has been trained on, as often:
        its reward, KL to SFT, advantage before whitening and value. Of this process's share."""
        ppo, config, at = self.ppo, self.config, self.ppo.iteration
        due = at % config.sample_every == 0 or at == config.iterations
        if not due or not ppo.accelerator.is_main_process:
            return
        scores, advantages = ppo.judged
        values = {
            "reward": token_rewards_of(rollout, scores, kl_coef, config),
            "kl": maths.kl_estimate(
                rollout.old_logprobs, rollout.ref_logprobs, config.kl_estimator
            ),
            "advantage": advantages,
            **({"value": rollout.values} if config.critic() else {}),
        }
        order = rollout.scores.argsort(descending=True).tolist()
        chosen = order if len(order) < 2 * EPISODES else order[:EPISODES] + order[-EPISODES:]
        ids = rollout.response_ids()
        self.tracker.tokens(
            at,
            [
                {
                    "prompt": (rollout.prompts or [])[row],
                    "score": round(rollout.scores[row].item(), 4),
                    "ended": bool(rollout.ended[row]),
                    "tokens": pieces(ppo.tokenizer, ids[row]),
                    **{
                        name: [round(x, 4) + 0.0 for x in table[row][: len(ids[row])].tolist()]
                        for name, table in values.items()
                    },
                }
                for row in chosen
            ],
        )

    def _ratios(self, rollout: Rollout) -> list[Tensor]:
        ratios = []
        with torch.no_grad(), torch.random.fork_rng():
            for rows in self.ppo.slices(len(rollout), self.ppo.at_once(len(rollout))):
                part = rollout.rows(rows)
                ratios.append((self._logprobs(part) - part.old_logprobs)[part.response_mask].exp())
        return ratios

    def _logprobs(self, s: Sequences) -> Tensor:
        with autocast(self.config, self.ppo.device):
            return response_logprobs(self.ppo.networks.policy, s, self.config.temperature)

    @torch.no_grad()
    def _kl(self, responses: list[list[int]]) -> list[float]:
        """KL to SFT of each response, in nats, by the estimator of `objective/kl`."""
        ppo, kl = self.ppo, []
        pad = pad_id(ppo.tokenizer)
        s = Sequences.of([q.ids for q in self.queries], responses, pad).to(ppo.device)
        with placed(ppo.reference, ppo.device, self.config.offload):
            for rows in ppo.slices(len(s), ppo.at_once(self.config.batch_size)):
                part = s.rows(rows)
                with autocast(self.config, ppo.device):
                    reference = ppo.reference_logprobs(part)
                each = maths.kl_estimate(self._logprobs(part), reference, self.config.kl_estimator)
                kl += torch.where(part.response_mask, each, 0.0).sum(dim=1).tolist()
        return [round(nats, 4) for nats in kl]

    def _beside_sft(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each with what the SFT model answered, which the policy was before its first step."""
        if not self.sft:
            first = read_rows(self.tracker.samples_path) if self.last else rows
            self.sft = {row["prompt"]: row for row in first if row.get("step", 0) == 0}
        before = [self.sft.get(row["prompt"], {}) for row in rows]
        return [
            {
                "prompt": row["prompt"],
                "sft_response": sft.get("response"),
                "sft_score": sft.get("score"),
                **row,
            }
            for row, sft in zip(rows, before, strict=True)
        ]

    def _rows(self) -> list[dict[str, Any]]:
        responses = generate(
            self.ppo.networks.policy,
            self.ppo.tokenizer,
            [q.ids for q in self.queries],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            stop_tokens=tuple(self.config.stop_tokens),
        )
        episodes = self.ppo.episodes(self.queries, [r.ids for r in responses])
        scores = self.ppo.score(episodes)
        if self.ppo.token_score is not None:
            sums = map(sum, self.ppo.token_score(episodes))
            scores = [score + more for score, more in zip(scores, sums, strict=True)]
        nats = self._kl([r.ids for r in responses])
        return [
            {
                "prompt": q.text,
                "response": r.text,
                "score": s,
                "kl": kl,
                "length": len(r.ids),
                "ended": r.ended,
            }
            for q, r, s, kl in zip(self.queries, responses, scores, nats, strict=True)
        ]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens stands with its last."""
    out, shown = [], 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        whole = not text.endswith("\ufffd") or count == len(ids)
        out.append(text[shown:] if whole else "")
        shown = len(text) if whole else shown
    return out
