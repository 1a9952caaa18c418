"""The PPO object: `rollout(queries)` then `update(rollout)`; prompt to loss, top-down.

Source of the recipe: arXiv 2203.02155 (InstructGPT) appendix C.4 and openai/lm-human-preferences
(LMHP). Every number is over real tokens of the global batch.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import PPOConfig
from pipeline.data.forms import Prompt
from pipeline.data.template import encode_prompt
from pipeline.models.adapters import adapter_off
from pipeline.models.generation import Sampled, joined, left_pad, sample, stops
from pipeline.models.loading import response_logprobs
from pipeline.models.packing import pack_if_possible
from pipeline.ppo import gates, maths, measures
from pipeline.ppo.ema import Ema
from pipeline.ppo.losses import Minibatch, Sums, losses
from pipeline.ppo.networks import Outputs, PolicyAndValue
from pipeline.ppo.ptx import Ptx, PtxBatch
from pipeline.ppo.rewards import Episodes, RunningScale, Score, TokenScore
from pipeline.ppo.rollout import Query, Rollout, generator, prompt_text
from pipeline.process.progress import tracked

Sampler = Callable[[list[list[int]]], Sampled]
"""Responses to tokenised prompts, one each."""


class PPO:
    """Proximal policy optimisation of a causal language model against a score.

    policy, value: see `PolicyAndValue`; reference: a frozen causal model, or None when the policy
    has LoRA adapters (it is then its own reference with them off); `ptx` draws pretraining text;
    `sampler` gives the responses in the place of the policy's own decoding.
    Deterministic given torch's seed, thread count and config.
    """

    def __init__(
        self,
        config: PPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        policy: nn.Module,
        reference: nn.Module | None,
        value: nn.Module | None,
        score: Score,
        token_score: TokenScore | None = None,
        ptx: Ptx | None = None,
        accelerator: Accelerator | None = None,
        sampler: Sampler | None = None,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.score, self.token_score, self.ptx = score, token_score, ptx
        self.sampler = sampler or self._decode
        self.accelerator = accelerator or Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no"
        )
        self.device = self.accelerator.device
        self.stop = stops(tokenizer, config.stop_tokens)
        self.pad_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.reference = (
            None if reference is None else reference.requires_grad_(False).to(self.device)
        )
        for model in (policy, reference, value):
            if model is not None:
                pack_if_possible(model)
        networks = PolicyAndValue(policy, value).eval()
        groups = [
            {"params": networks.policy_parameters(), "lr": config.learning_rate},
            {"params": networks.value_parameters(), "lr": self._value_lr()},
        ]
        optimizer = torch.optim.AdamW(
            groups, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
        )
        self.networks = networks.to(self.device)
        *self.passes, self.optimizer = self.accelerator.prepare(*networks.passes(), optimizer)
        self.total_steps = config.iterations * config.ppo_epochs * config.minibatches
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        self.ema = Ema(self.networks.policy_parameters(), config.ema_decay)
        self.iteration, self.optimizer_steps = 0, 0
        self.kl_coef, self.scale = config.kl_coef, RunningScale()
        self.forced_lengths: Tensor | None = None
        """(B,) lengths that all responses get, to time equal work."""

    def queries(self, prompts: list[Prompt] | list[str]) -> list[Query]:
        """Prompts, or plain user texts, tokenised as in every stage."""
        as_prompts = [
            Prompt([{"role": "user", "content": p}], {}, "") if isinstance(p, str) else p
            for p in prompts
        ]
        return [
            Query(
                encode_prompt(self.tokenizer, p.messages),
                prompt_text(p.messages),
                p.row,
                p.messages,
            )
            for p in tracked(as_prompts, "ppo: encoding prompts")
        ]

    # --- rollout: queries → generate → score → logprobs and values -----------------------------

    def rollout(self, queries: list[Query]) -> Rollout:
        """Sample one response to each query and record all that the update needs."""
        rollout = self._generate(queries)
        gates.mask_is_prefix(
            rollout.response_mask,
            rollout.responses,
            rollout.ended,
            self.stop.ids,
            strings=bool(self.stop.strings),
        )
        self._score(rollout, queries)
        self._evaluate(rollout)
        if self.iteration == 0:
            gates.starts_at_reference(
                rollout.old_logprobs, rollout.ref_logprobs, rollout.response_mask, self._tolerance
            )
        return rollout

    @torch.no_grad()
    def _generate(self, queries: list[Query]) -> Rollout:
        """Sampled responses with the sampler's logprobs; the rest is blank."""
        prompts = [query.ids for query in queries]
        ids, mask = left_pad(prompts, self.pad_id)
        sampled = self.sampler(prompts)
        blank = torch.zeros_like(sampled.logprobs)
        return Rollout(
            queries=ids.to(self.device),
            query_mask=mask.to(self.device),
            responses=sampled.responses,
            response_mask=maths.mask_from_lengths(sampled.lengths, blank.shape[1]),
            ended=sampled.ended,
            scores=blank[:, 0],
            sampler_logprobs=sampled.logprobs,
            old_logprobs=blank,
            ref_logprobs=blank,
            values=blank,
        )

    def _decode(self, prompts: list[list[int]]) -> Sampled:
        """The policy's own responses, in rollout batches."""
        uniforms = self._uniforms(len(prompts))
        parts = []
        for rows in self._slices(len(prompts), self.config.rollout_batch_size):
            ids, mask = left_pad(prompts[rows], self.pad_id)
            with self.accelerator.autocast():
                parts.append(
                    sample(
                        self.networks.policy,
                        ids.to(self.device),
                        mask.to(self.device),
                        max_new_tokens=self.config.max_new_tokens,
                        temperature=self.config.temperature,
                        stop=self.stop,
                        pad_id=self.pad_id,
                        uniforms=uniforms[rows],
                        lengths=None if self.forced_lengths is None else self.forced_lengths[rows],
                    )
                )
        return joined(parts, self.pad_id)

    def _uniforms(self, episodes: int) -> Tensor:
        """Random numbers (B, T) for this process's episodes.

        Every process draws those of all and takes its share, so that neither their number nor the
        rollout batches change a response.
        """
        processes, mine = self.accelerator.num_processes, self.accelerator.process_index
        drawn = torch.rand(episodes * processes, self.config.max_new_tokens)
        return drawn[mine * episodes : (mine + 1) * episodes]

    def _score(self, rollout: Rollout, queries: list[Query]) -> None:
        """Fill in scores, one per response, and token scores where a reward gives them."""
        episodes = self.episodes(queries, rollout.response_ids())
        with self.accelerator.autocast():
            scores = torch.tensor(self.score(episodes), dtype=torch.float32, device=self.device)
        gates.finite_scores(scores, self.iteration, episodes.prompts, episodes.responses)
        rollout.scores, rollout.prompts, rollout.texts = (
            scores,
            episodes.prompts,
            episodes.responses,
        )
        if self.token_score is not None:
            rows = [torch.tensor(row) for row in self.token_score(episodes)]
            dense = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            width = rollout.responses.shape[1]
            rollout.token_scores = nn.functional.pad(dense, (0, width - dense.shape[1]))
            sums = rollout.token_scores.sum(dim=1)
            gates.finite_scores(sums, self.iteration, episodes.prompts, episodes.responses)

    def episodes(self, queries: list[Query], responses: list[list[int]]) -> Episodes:
        """Queries and the real tokens of their responses, as rewards look at them."""
        return Episodes(
            sequences=[q.ids + ids for q, ids in zip(queries, responses, strict=True)],
            prompts=[q.text for q in queries],
            responses=[self.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses],
            rows=[q.row for q in queries],
            messages=[q.messages for q in queries],
            tokens=[[self.tokenizer.decode(i) for i in ids] for ids in responses]
            if self.token_score is not None
            else [],
        )

    @torch.no_grad()
    def _evaluate(self, rollout: Rollout) -> None:
        """Fill in reference logprobs, values, and old logprobs by the forward pass of the update,
        or as the sampler gave them."""
        parts = defaultdict(list)
        ids, mask = rollout.inputs()
        width, temperature = rollout.responses.shape[1], self.config.temperature
        recompute = self.config.recompute()
        for rows in self._slices(len(rollout), self._at_once(len(rollout))):
            batch = ids[rows], mask[rows], width
            with self.accelerator.autocast():
                if recompute:
                    out: Outputs = self.networks(*batch, temperature)
                    assert out.logprobs is not None and out.values is not None
                    parts["old"].append(out.logprobs)
                    parts["values"].append(out.values)
                else:
                    parts["values"].append(self.networks.values(*batch))
                parts["ref"].append(self._reference_logprobs(*batch))
        rollout.old_logprobs = torch.cat(parts["old"]) if recompute else rollout.sampler_logprobs
        rollout.ref_logprobs = torch.cat(parts["ref"])
        rollout.values = torch.cat(parts["values"])

    def _reference_logprobs(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        if self.reference is not None:
            return response_logprobs(self.reference, ids, mask, width, self.config.temperature)
        with adapter_off(self.networks.policy):
            return response_logprobs(
                self.networks.policy, ids, mask, width, self.config.temperature
            )

    # --- update: token rewards → advantages → minibatches → losses → step ----------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Optimise on one rollout; returns this iteration's metrics."""
        config = self.config
        scores = self._shaped_scores(rollout)
        kl = maths.kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, config.kl_penalty)
        rewards = maths.token_rewards(scores, kl, rollout.response_mask, self.kl_coef)
        if rollout.token_scores is not None:
            rewards = rewards + rollout.token_scores
        if config.whiten_rewards:
            rewards = maths.masked_whiten(
                rewards, rollout.response_mask, keep_mean=True, all_sum=self._all_sum
            )
        advantages, returns = maths.gae(
            rewards, rollout.values, rollout.response_mask, config.gamma, config.lam
        )
        metrics: dict[str, float] = measures.of_rollout(
            rollout, scores, advantages, returns, config, self.kl_coef, self._all_sum
        )
        metrics["episode"] = (self.iteration + 1) * config.batch_size
        if config.whiten_advantages:
            advantages = maths.masked_whiten(
                advantages, rollout.response_mask, all_sum=self._all_sum
            )
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        self.networks.train()  # for gradient checkpointing alone; dropout is off
        for number, indices in enumerate(self._minibatches(len(rollout))):
            step = self._step(
                rollout.rows(indices), advantages[indices], returns[indices], number == 0
            )
            for name, value in step.items():
                totals[name] = totals[name] + value
            if config.kl_stop and step["approxkl"] / step["tokens"] > config.kl_stop:
                break
        self.networks.eval()
        metrics |= measures.of_update({name: total.item() for name, total in totals.items()})
        metrics["eps"] = self.optimizer_steps / self.total_steps
        metrics["lr"] = float(self.schedule.get_last_lr()[0])
        self.iteration += 1
        if config.kl_target:
            self.kl_coef = maths.adapted_kl_coef(
                self.kl_coef,
                metrics["objective/kl"],
                config.kl_target,
                config.batch_size,
                config.kl_horizon,
            )
        return metrics

    def _shaped_scores(self, rollout: Rollout) -> Tensor:
        """Scores (B,) after scaling, clipping, the missing-EOS rule and the length penalty."""
        config, scores = self.config, rollout.scores
        if config.scale_scores:
            moments = torch.stack([torch.ones_like(scores), scores, scores.square()]).double()
            self.scale.update(*self._all_sum(moments.sum(dim=1)).tolist())
            scores = scores / self.scale.std
        if config.clip_scores is not None:
            scores = scores.clamp(-config.clip_scores, config.clip_scores)
        scores = maths.missing_eos_scores(
            scores, rollout.ended, config.missing_eos, config.missing_eos_penalty
        )
        return scores - config.length_penalty * rollout.response_mask.sum(dim=1)

    def _minibatches(self, episodes: int):
        """Index tensors; each epoch is a permutation drawn from (seed, iteration, epoch) alone."""
        size = episodes // self.config.minibatches
        for epoch in range(self.config.ppo_epochs):
            key = (self.config.seed, self.iteration, epoch)
            order = torch.randperm(episodes, generator=generator(*key)).to(self.device)
            yield from order[: size * self.config.minibatches].split(size)

    def _step(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, first: bool
    ) -> dict[str, Tensor]:
        """One optimizer step over a minibatch in micro-batches; returns summed statistics.

        `first`: of its iteration, when the policy is still the one that sampled."""
        tokens = self._all_sum(rollout.response_mask.sum()).clamp(min=1)
        ptx = self._ptx_batch(len(rollout))
        minibatch = Minibatch(rollout, advantages, returns, tokens, ptx, first)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        slices = self._slices(len(rollout), self.config.micro_batch_size)
        for number, rows in enumerate(slices):
            for networks in self.passes:
                last = number == len(slices) - 1
                hold = contextlib.nullcontext() if last else self.accelerator.no_sync(networks)
                with hold:
                    loss, sums = self._losses(networks, minibatch.rows(rows))
                    # engines average gradients over processes; the loss is a share of the global mean
                    self.accelerator.backward(loss * self.accelerator.num_processes)
                for name, value in sums.items():
                    totals[name] = totals[name] + value
        summed = {name: self._all_sum(value) for name, value in totals.items()}
        summed["tokens"] = tokens
        norms = {
            "policy/grad_norm": clip_grad_norm_(
                self.networks.policy_parameters(), self.config.max_grad_norm
            ),
            "value/grad_norm": clip_grad_norm_(
                self.networks.value_parameters(), self.config.max_grad_norm
            ),
        }
        seen = {"policy loss": summed["policy_loss"], "value loss": summed["value_loss"]}
        gates.finite_step(seen, norms, self.optimizer_steps)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.update(self.networks.policy_parameters())
        self.optimizer_steps += 1
        return {**summed, **norms, "steps": torch.ones((), device=self.device)}

    def _ptx_batch(self, episodes: int) -> PtxBatch | None:
        """The pretraining text that goes with a minibatch, `ptx_ratio` examples an episode."""
        if self.ptx is None:
            return None
        ids, mask = self.ptx(self.optimizer_steps, episodes * self.config.ptx_ratio)
        return PtxBatch(ids, mask, self._all_sum(mask[:, 1:].sum()), self.config.ptx_ratio)

    def _losses(self, networks: nn.Module, batch: Minibatch) -> tuple[Tensor, Sums]:
        """A micro-batch through the policy, the value network, or both."""
        rollout, ptx = batch.rollout, batch.ptx
        with self.accelerator.autocast():
            outputs: Outputs = networks(
                *rollout.inputs(),
                rollout.response_mask.shape[1],
                self.config.temperature,
                entropy_grad=self.config.entropy_coef > 0,
                ptx=None if ptx is None else (ptx.ids, ptx.mask),
            )
        if batch.first and outputs.logprobs is not None:
            gates.ratio_is_one(
                outputs.logprobs.detach(),
                rollout.old_logprobs,
                rollout.response_mask,
                self._tolerance,
                self.iteration,
            )
        return losses(outputs, batch, self.config)

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """All that the next iteration depends on, beside the random generators."""
        return {
            "networks": self.networks.trained(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.shadow,
            "iteration": self.iteration,
            "optimizer_steps": self.optimizer_steps,
            "kl_coef": self.kl_coef,
            "scale": vars(self.scale).copy(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.networks.load_state_dict(state["networks"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.ema.shadow = state["ema"]
        self.iteration, self.optimizer_steps = state["iteration"], state["optimizer_steps"]
        self.kl_coef = state["kl_coef"]
        vars(self.scale).update(state["scale"])

    # --- small things ---------------------------------------------------------------------------

    def _all_sum(self, x: Tensor) -> Tensor:
        """Sum over processes, leaving `x` as it is."""
        return self.accelerator.reduce(x.clone(), reduction="sum")

    @staticmethod
    def _slices(count: int, size: int | None) -> list[slice]:
        size = size or count
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _at_once(self, episodes: int) -> int:
        """Episodes per forward pass where no gradient is kept: no more than in the update."""
        return self.config.micro_batch_size or max(1, episodes // self.config.minibatches)

    @property
    def _tolerance(self) -> float:
        return 1e-3 if self.config.precision == "fp32" else 0.25

    def _value_lr(self) -> float:
        lr = self.config.value_learning_rate
        return self.config.learning_rate if lr is None else lr

    def _lr_factor(self, step: int) -> float:
        warmup = int(self.config.warmup_ratio * self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(self.total_steps - warmup, 1)
        if self.config.schedule == "linear":
            return max(1 - done, 0.0)
        if self.config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return 1.0
