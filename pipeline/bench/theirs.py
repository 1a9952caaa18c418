"""TRL's side of the benchmark, a worker: `python -m pipeline.bench.theirs SIZE CASE`.

PPO is that of trl 1.12, the last with `trl.experimental.ppo`; it is found before the environment's
own TRL because `pipeline.bench.overlay` comes first on the path. The other stages use the
environment's TRL, the one our stages use. Nothing here belongs to the product's own path.

What was needed to run the old PPO on today's transformers:
- autocast: `bf16=True` does not reach its `Accelerator()` any more; the environment variable does.
- its micro-batches of `gradient_accumulation_steps` are no optimizer steps; minibatches come from
  `num_mini_batches` alone, so that both sides take as many steps.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LogitsProcessor, LogitsProcessorList

from pipeline.bench import shapes, shared
from pipeline.bench.shapes import EOS, PAD, STEPS, Case, Size
from pipeline.bench.turns import Turns
from pipeline.config.schema import Lora


def main(size: str, case: str) -> None:
    """Prepare, then take a step whenever asked."""
    turns = Turns(shared.wait)
    tasks: dict[str, Callable[[Size, Case, Turns], None]] = {"ppo": ppo, "rm": rm, "sft": sft}
    tasks[shapes.CASES[case].task](shapes.size_of(size), shapes.CASES[case], turns)


def ppo(size: Size, case: Case, turns: Turns) -> None:
    """Iterations of TRL's PPO; its loop is entered once and waits at the end of each iteration."""
    if case.theirs == "autocast":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    work = shapes.draw(size, case.full)
    dtype = torch.bfloat16 if case.theirs == "weights" else torch.float32
    policy = shared.policy(size).to(dtype)
    trainer = PPOTrainer(
        args=PPOConfig(
            **_plain(),
            bf16=case.theirs == "autocast",
            per_device_train_batch_size=size.episodes,
            gradient_accumulation_steps=1,
            num_mini_batches=size.minibatches,
            num_ppo_epochs=size.epochs,
            local_rollout_forward_batch_size=size.episodes,
            total_episodes=size.episodes * STEPS,
            response_length=size.response,
            temperature=1.0,
            stop_token="eos",
            missing_eos_penalty=1.0,
            num_sample_generations=0,
        ),
        processing_class=shared.tokenizer(size),
        model=policy,
        ref_model=None if case.lora else shared.policy(size).to(dtype),
        reward_model=shared.reward(size, seed=2).to(dtype),
        value_model=shared.reward(size).to(dtype),
        train_dataset=Dataset.from_dict({"input_ids": work.prompts}),
        callbacks=[shared.TakesTurns(turns)],
        peft_config=_peft() if case.lora else None,
    )
    _force_lengths(policy, ForcedLengths(work.lengths, max(map(len, work.prompts))), turns)
    _time(ppo_trainer, turns)
    trainer.train()


def _plain() -> dict[str, Any]:
    """Arguments of every trainer: nothing saved, reported or recomputed."""
    return {
        "output_dir": shared.scratch(),
        "learning_rate": shapes.LEARNING_RATE,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _peft() -> LoraConfig:
    lora = Lora()
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _time(ppo_trainer: Any, turns: Turns) -> None:
    """Phases by the functions that its loop calls; after the last reward comes optimisation.

    The log-softmax of its rollouts, which ours counts as generation and reference, is in none.
    """
    turns.timed(ppo_trainer, "batch_generation", "generation")
    turns.timed(ppo_trainer, "get_reward", "reward and value")
    forward, get_reward = ppo_trainer.forward, ppo_trainer.get_reward

    def reference_or_update(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with turns.phase("reference"):
            return forward(*args, **kwargs)

    def then_optimise(*args: Any, **kwargs: Any) -> Any:
        scored = get_reward(*args, **kwargs)
        turns.rest("optimisation")
        return scored

    ppo_trainer.forward, ppo_trainer.get_reward = reference_or_update, then_optimise


class ForcedLengths(LogitsProcessor):
    """EOS at the drawn length of each row and not before; padding never, which TRL would cut at."""

    def __init__(self, lengths: list[int], prompt_width: int):
        self.lengths, self.prompt_width = torch.tensor(lengths), prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        last = self.lengths.to(scores.device) == input_ids.shape[1] - self.prompt_width + 1
        scores[:, [PAD, EOS]] = -torch.inf
        scores[last] = -torch.inf
        scores[last, EOS] = 0.0
        return scores


def _force_lengths(policy: Any, forced: ForcedLengths, turns: Turns) -> None:
    """Have the policy generate so, and answers tell how many tokens came of it."""
    generate = policy.generate

    def with_lengths(**kwargs: Any) -> Any:
        out = generate(**kwargs, logits_processor=LogitsProcessorList([forced]))
        turns.noted = {"tokens": int((out.sequences[:, forced.prompt_width :] != PAD).sum())}
        return out

    policy.generate = with_lengths


# --- stages 1 and 2 -----------------------------------------------------------------------------------


def rm(size: Size, case: Case, turns: Turns) -> None:
    """TRL's reward trainer on all C(K, 2) pairs of the prompts, two forward passes a pair."""
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": better, "rejected_ids": worse}
        for row in shapes.ranked(size, case.batch, case.k)
        for better, worse in row.pairs
    ]
    trainer = RewardTrainer(
        model=shared.reward(size),
        args=RewardConfig(**_steps_of(len(rows)), max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=shared.tokenizer(size),
    )
    shared.train(trainer, turns)


def sft(size: Size, case: Case, turns: Turns) -> None:
    """TRL's SFT trainer on the same tokenised rows."""
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=shared.policy(size),
        args=SFTConfig(**_steps_of(case.batch), max_length=512),
        train_dataset=Dataset.from_list(shapes.demonstrations(size, case.batch)),
        processing_class=shared.tokenizer(size),
    )
    shared.train(trainer, turns)


def _steps_of(batch: int) -> dict[str, Any]:
    """Arguments of a trainer whose steps see so many rows."""
    steps = {"max_steps": STEPS, "per_device_train_batch_size": batch}
    return {**_plain(), **steps, "bf16": False}


if __name__ == "__main__":
    main(*sys.argv[1:])
