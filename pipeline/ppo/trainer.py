"""The PPO object: `rollout(queries)` then `update(rollout)`; prompt to loss, top-down.

Source of the recipe: arXiv 2203.02155 (InstructGPT) appendix C.4 and openai/lm-human-preferences
(LMHP). Every number is over real tokens of the global batch.
"""

import contextlib
import functools
from collections import abc, defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerBase

from pipeline.config.ppo import PPOConfig
from pipeline.data.forms import Prompt
from pipeline.data.template import response_text, scored_ids
from pipeline.engines import start
from pipeline.engines.whole import check_wrapped, load_optimizer, on_whole, whole, within
from pipeline.models.device import placed
from pipeline.models.forward import response_logprobs
from pipeline.models.generation import stops
from pipeline.models.packing import pack_if_possible
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import left_pad, mask_from_lengths, pad_id
from pipeline.ppo import gates, maths, measures
from pipeline.ppo.advantages import advantages_and_returns
from pipeline.ppo.ema import Ema
from pipeline.ppo.losses import Minibatch, Sums, losses
from pipeline.ppo.networks import Outputs, PolicyAndValue, autocast
from pipeline.ppo.ptx import Ptx, PtxBatch
from pipeline.ppo.rewards import Episodes, RunningScale, Score, TokenScore, shaped_scores
from pipeline.ppo.rollout import Query, Rollout, everywhere, generator, queries_of, real_rows
from pipeline.ppo.sampler import PolicySampler, Sampler


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
        self.accelerator = accelerator or start.accelerator()
        self.device = self.accelerator.device
        self.stop = stops(tokenizer, config.stop_tokens)
        self.sampler = sampler or PolicySampler(config, policy, tokenizer, self.accelerator)
        self.reference = reference
        if reference is not None:
            reference.requires_grad_(False).to(config.offload or self.device)
        for model in (policy, reference, value):
            if model is not None:
                pack_if_possible(model)
        networks = PolicyAndValue(policy, value, critic=config.critic()).eval()
        gates.something_to_train(networks.trained_by_network())
        rates = {"policy": config.learning_rate, "value": config.value_lr()}
        groups = [
            {"params": parameters, "lr": rates[name]}
            for name, parameters in networks.trained_by_network().items()
        ]
        optimizer = torch.optim.AdamW(
            groups, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
        )
        self.networks = networks.to(self.device)
        passes = networks.passes(self.accelerator.num_processes)
        *self.passes, self.optimizer = self.accelerator.prepare(*passes, optimizer)
        list(map(check_wrapped, self.passes))
        self.total_steps = steps = config.iterations * config.ppo_epochs * config.minibatches
        rate = functools.partial(maths.lr_factor, steps, config.warmup_ratio, config.schedule)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        self.ema = Ema(self.networks.policy_parameters(), config.ema_decay)
        self.iteration, self.optimizer_steps = 0, 0
        self.kl_coef, self.scale = config.kl_coef, RunningScale()

    def queries(self, prompts: abc.Sequence[Prompt | str]) -> abc.Sequence[Query]:
        """Prompts, or plain user texts, tokenised as in every stage."""
        return queries_of(self.tokenizer, prompts)

    # --- rollout: queries → generate → score → logprobs and values -----------------------------

    @torch.no_grad()
    def rollout(self, queries: list[Query]) -> Rollout:
        """Sample one response to each query and record all that the update needs."""
        prompts = [query.ids for query in queries]
        sampled = on_whole(self.networks, lambda _: self.sampler(prompts))
        width = sampled.responses.shape[1]
        ids, query_mask = left_pad(prompts, pad_id(self.tokenizer))
        mask = mask_from_lengths(sampled.lengths, width)
        s = Sequences(ids, query_mask, sampled.responses, mask).to(self.device)
        strings = bool(self.stop.strings)
        gates.mask_is_prefix(mask, sampled.responses, sampled.ended, self.stop.ids, strings)
        episodes = self.episodes(queries, real_rows(sampled.responses, mask))
        with placed(self.reference, self.device, self.config.offload):
            old, reference, values = self._evaluate(s, sampled.logprobs)
        rollout = Rollout(
            **vars(s),
            ended=sampled.ended,
            scores=self._scores(episodes),
            sampler_logprobs=sampled.logprobs,
            old_logprobs=old,
            ref_logprobs=reference,
            values=values,
            token_scores=self._token_scores(episodes, width),
            prompts=episodes.prompts,
            texts=episodes.responses,
        )
        gates.sampler_is_the_policy(rollout, self.sampler, self.iteration, self._all_sum)
        if self.iteration == 0 and self.config.policy is None:
            rounded = self.config.dtype != "fp32" or self.config.rounds()
            gates.starts_at_reference(old, reference, mask, rounded)
        return rollout

    def episodes(self, queries: list[Query], responses: list[list[int]]) -> Episodes:
        """Queries and the real tokens of their responses, as rewards look at them.

        Reward models read every response closed by one EOS, as they were trained, one that was cut off
        too: what it means that it did not end is the missing-EOS rule's to say.
        """
        pairs = zip(queries, responses, strict=True)
        return Episodes(
            queries=[q.ids for q in queries],
            response_ids=[scored_ids(self.tokenizer, q.messages, ids) for q, ids in pairs],
            prompts=[q.text for q in queries],
            responses=[response_text(self.tokenizer, ids) for ids in responses],
            rows=[q.row for q in queries],
            messages=[q.messages for q in queries],
            tokens=[[self.tokenizer.decode(i) for i in ids] for ids in responses]
            if self.token_score is not None
            else [],
        )

    def _scores(self, episodes: Episodes) -> Tensor:
        """(B,) one score a response."""
        with autocast(self.config, self.device):
            scores = torch.tensor(self.score(episodes), dtype=torch.float32, device=self.device)
        gates.finite_scores(scores, self.iteration, episodes.prompts, episodes.responses)
        return scores

    def _token_scores(self, episodes: Episodes, width: int) -> Tensor | None:
        """(B, T) where a reward scores tokens, 0 on padding; None without such a reward."""
        if self.token_score is None:
            return None
        rows = [torch.tensor(row) for row in self.token_score(episodes)]
        dense = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        dense = nn.functional.pad(dense, (0, width - dense.shape[1]))
        sums = dense.sum(dim=1)
        gates.finite_scores(sums, self.iteration, episodes.prompts, episodes.responses)
        return dense

    def _evaluate(self, s: Sequences, sampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Old logprobs, by the forward pass of the update or as the sampler gave them, reference logprobs
        and values; (B, T) each."""
        old, reference, values = [], [], []
        for rows in self.slices(len(s), self.at_once(len(s))):
            batch = s.rows(rows)
            with autocast(self.config, self.device):
                if self.config.recompute():
                    out: Outputs = self.networks(batch, self.config.temperature)
                    assert out.logprobs is not None and out.values is not None
                    old.append(out.logprobs)
                    values.append(out.values)
                else:
                    run = functools.partial(PolicyAndValue.values, s=batch)
                    values.append(within(self.networks, run))
                reference.append(self.reference_logprobs(batch))
        return torch.cat(old) if old else sampled, torch.cat(reference), torch.cat(values)

    def reference_logprobs(self, s: Sequences) -> Tensor:
        """(B, T) under the model that KL is measured to."""
        if self.reference is not None:
            return response_logprobs(self.reference, s, self.config.temperature)
        return within(self.networks, lambda n: n.base_logprobs(s, self.config.temperature))

    # --- update: token rewards → advantages → minibatches → losses → step ----------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Optimise on one rollout; returns this iteration's metrics."""
        config, mask = self.config, rollout.response_mask
        scores = shaped_scores(rollout, config, self.scale, self._all_sum)
        advantages, returns = advantages_and_returns(
            rollout, scores, self.kl_coef, config, self._all_sum
        )
        self.judged = scores, advantages  # of this process's episodes, for who looks on
        metrics: dict[str, float] = measures.of_rollout(
            rollout, scores, advantages, returns, config, self.kl_coef, self._all_sum
        )
        metrics["episode"] = (self.iteration + 1) * config.batch_size
        metrics["lr"] = float(self.schedule.get_last_lr()[0])  # of the first step
        if config.whitens():
            advantages = maths.masked_whiten(advantages, mask, all_sum=self._all_sum)
        rollout, advantages, returns = everywhere(self.accelerator, rollout, advantages, returns)
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
        self.iteration += 1
        if config.kl_target:
            kl_now, size = metrics["objective/kl"], config.batch_size
            self.kl_coef = maths.adapted_kl_coef(
                self.kl_coef, kl_now, config.kl_target, size, config.kl_horizon
            )
        return metrics

    def _minibatches(self, episodes: int):
        """Index tensors, this process's share of each minibatch of the `episodes` of all processes.

        Each epoch is a permutation drawn from (seed, iteration, epoch) alone.
        """
        size = episodes // self.config.minibatches
        share, mine = size // self.accelerator.num_processes, self.accelerator.process_index
        for epoch in range(self.config.ppo_epochs):
            key = (self.config.seed, self.iteration, epoch)
            order = torch.randperm(episodes, generator=generator(*key)).to(self.device)
            for minibatch in order[: size * self.config.minibatches].split(size):
                yield minibatch[mine * share : (mine + 1) * share]

    def _step(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, first: bool
    ) -> dict[str, Tensor]:
        """One optimizer step over a minibatch in micro-batches; returns summed statistics.

        `first`: of its iteration, when the policy is still the one that sampled."""
        tokens = self._all_sum(rollout.response_mask.sum()).clamp(min=1)
        ptx = self._ptx_batch(len(rollout))
        kl_coef = self.kl_coef if self.config.kl_in_loss() else 0.0
        minibatch = Minibatch(rollout, advantages, returns, tokens, ptx, first, kl_coef)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        slices = self.slices(len(rollout), self.config.micro_batch_size)
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
        trained = self.networks.trained_by_network()
        norms = {
            f"{name}/grad_norm": whole(clip_grad_norm_(parameters, self.config.max_grad_norm))
            for name, parameters in trained.items()
        }
        seen = {f"{name} loss": summed[f"{name}_loss"] for name in trained}
        gates.finite_step(seen, norms, self.optimizer_steps)
        with gates.moves(trained, self.optimizer, self.optimizer_steps):
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
        texts = self.ptx(self.optimizer_steps, episodes * self.config.ptx_ratio)
        return PtxBatch(texts, self._all_sum(texts.response_mask.sum()), self.config.ptx_ratio)

    def _losses(self, networks: nn.Module, batch: Minibatch) -> tuple[Tensor, Sums]:
        """A micro-batch through the policy, the value network, or both."""
        rollout, ptx = batch.rollout, batch.ptx
        with autocast(self.config, self.device):
            outputs: Outputs = networks(
                rollout,
                self.config.temperature,
                entropy_grad=self.config.entropy_coef > 0,
                ptx=None if ptx is None else ptx.texts,
            )
        if batch.first and outputs.logprobs is not None:
            gates.ratio_is_one(
                outputs.logprobs.detach(),
                rollout.old_logprobs,
                rollout.response_mask,
                self.iteration,
                self.config.rounds(),
            )
        return losses(outputs, batch, self.config)

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """All that the next iteration depends on, beside the random generators; whole, so all processes ask."""
        return {
            "networks": whole(self.networks.trained()),
            "optimizer": whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "ema": whole(self.ema.shadow),
            "iteration": self.iteration,
            "optimizer_steps": self.optimizer_steps,
            "kl_coef": self.kl_coef,
            "scale": vars(self.scale).copy(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.networks.load_trained(state["networks"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.ema.load(state["ema"], self.networks.policy_parameters())
        self.iteration, self.optimizer_steps = state["iteration"], state["optimizer_steps"]
        self.kl_coef = state["kl_coef"]
        vars(self.scale).update(state["scale"])

    # --- small things ---------------------------------------------------------------------------

    def _all_sum(self, x: Tensor) -> Tensor:
        """Sum over processes, leaving `x` as it is."""
        return self.accelerator.reduce(x.clone(), reduction="sum")

    @staticmethod
    def slices(count: int, size: int | None) -> list[slice]:
        """`count` rows, so many at a time."""
        size = size or count
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def at_once(self, episodes: int) -> int:
        """Episodes per forward pass where no gradient is kept: no more than in the update."""
        return self.config.micro_batch_size or max(1, episodes // self.config.minibatches)
