"""Our side of the benchmark, a worker: `python -m pipeline.bench.ours SIZE CASE`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig
from trl import SFTConfig as TRLConfig

from pipeline.bench import shapes, shared
from pipeline.bench.shapes import LEARNING_RATE, PAD, STEPS, Case, Size
from pipeline.bench.turns import Turns
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Lora, RMConfig, SFTConfig
from pipeline.models.adapters import ADAPTER, add_lora, save_adapter, scorers_on
from pipeline.models.loading import disable_dropout, prepare_cpu
from pipeline.models.packing import pack_if_possible
from pipeline.ppo.rewards import model_reward
from pipeline.ppo.rollout import Query
from pipeline.ppo.sampler import PolicySampler
from pipeline.ppo.trainer import PPO
from pipeline.training.kwise import KwiseCollator, KwiseTrainer
from pipeline.training.supervised import TokenTrainer
from pipeline.training.trainers import arguments, quiet


def main(size: str, case: str) -> None:
    """Prepare, then take a step whenever asked."""
    turns = Turns(shared.wait)
    quiet()
    prepare_cpu(None)  # OMP_NUM_THREADS says how many
    tasks: dict[str, Callable[[Size, Case, Turns], None]] = {"ppo": ppo, "rm": rm, "sft": sft}
    tasks[shapes.CASES[case].task](shapes.size_of(size), shapes.CASES[case], turns)


def ppo(size: Size, case: Case, turns: Turns) -> None:
    """Iterations of PPO, for ever."""
    work = shapes.draw(size, case.full)
    trainer = ppo_of(size, case)
    assert isinstance(trainer.sampler, PolicySampler)
    trainer.sampler.forced_lengths = torch.tensor(work.lengths, device=trainer.device)
    turns.timed(trainer, "sampler", "generation")
    turns.timed(trainer, "reference_logprobs", "reference")
    turns.timed(trainer, "_scores", "reward and value")
    turns.timed(trainer, "_evaluate", "reward and value")
    turns.timed(trainer, "update", "optimisation")
    queries = [Query(ids) for ids in work.prompts]
    turns()
    while True:
        rollout = trainer.rollout(queries)
        trainer.update(rollout)
        turns(tokens=int(rollout.response_mask.sum()))


def ppo_of(size: Size, case: Case) -> PPO:
    """Four separate networks, or adapters of policy, reward and value on one base."""
    config = PPOConfig(
        batch_size=size.episodes,
        minibatches=size.minibatches,
        ppo_epochs=size.epochs,
        max_new_tokens=size.response,
        iterations=STEPS,
        learning_rate=LEARNING_RATE,
        kl_coef=0.05,
        precision=case.precision,
        lora=Lora() if case.lora else None,
    )
    policy = add_lora(disable_dropout(shared.policy(size)), config.lora, "CAUSAL_LM")
    judge: Any
    if config.lora is not None:
        judge, value = scorers_on(policy, _reward_adapter(size, config.lora), config.lora)
    else:
        judge = disable_dropout(shared.reward(size, seed=2)).eval().requires_grad_(False)
        value = disable_dropout(shared.reward(size))
        pack_if_possible(judge)
    trainer = PPO(
        config,
        shared.tokenizer(size),
        policy=policy,
        reference=None if case.lora else shared.policy(size).eval(),
        value=value,
        score=model_reward(judge, PAD, size.episodes),
    )
    judge.to(trainer.device)
    return trainer


def _reward_adapter(size: Size, lora: Lora) -> Path:
    """What a reward model's stage with LoRA publishes, of random weights."""
    folder = Path(shared.scratch())
    save_adapter(add_lora(shared.reward(size), lora, "SEQ_CLS"), folder / ADAPTER)
    return folder


# --- stages 1 and 2: their own trainers, as `stages/` sets them up ----------------------------------


def rm(size: Size, case: Case, turns: Turns) -> None:
    """Optimizer steps of the reward model's stage: one forward pass a response."""
    rows = [
        {**vars(row), "ranks": list(range(1, case.k + 1))}
        for row in shapes.ranked(size, case.batch, case.k)
    ]
    config = RMConfig(batch_size=case.batch, max_steps=STEPS, learning_rate=LEARNING_RATE)
    model = disable_dropout(shared.reward(size))
    pack_if_possible(model)
    trainer = KwiseTrainer(
        model=model,
        args=RewardConfig(**_arguments(config, rows), max_length=None, remove_unused_columns=False),
        data_collator=KwiseCollator(PAD),
        train_dataset=Dataset.from_list(rows),
        processing_class=shared.tokenizer(size),
    )
    shared.train(trainer, turns)


def sft(size: Size, case: Case, turns: Turns) -> None:
    """Optimizer steps of the first stage."""
    rows = shapes.demonstrations(size, case.batch)
    config = SFTConfig(
        model="", batch_size=case.batch, max_steps=STEPS, learning_rate=LEARNING_RATE
    )
    policy = disable_dropout(shared.policy(size))
    pack_if_possible(policy)
    trainer = TokenTrainer(
        model=policy,
        args=TRLConfig(**_arguments(config, rows), max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=shared.tokenizer(size),
    )
    shared.train(trainer, turns)


def _arguments(config: RMConfig | SFTConfig, rows: list) -> dict[str, Any]:
    return arguments(config, len(rows), Path(shared.scratch())) | {"save_strategy": "no"}


if __name__ == "__main__":
    main(*sys.argv[1:])
