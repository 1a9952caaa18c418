"""Direct preference optimisation (arXiv 2305.18290) by TRL's trainer, to compare PPO with."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig
from pipeline.data.rankings import Ranking
from pipeline.data.template import encode_responses, without_thinking
from pipeline.evaluation.metrics import untied_pairs
from pipeline.handoff import checkpoint
from pipeline.handoff.found import Stage
from pipeline.models.adapters import add_lora, merged
from pipeline.models.device import device
from pipeline.models.loading import load_policy, load_tokenizer, prepare_cpu
from pipeline.process.progress import say
from pipeline.tracking.tracker import Tracker
from pipeline.training.checked import Checked
from pipeline.training.trainers import Recorder, arguments, one_gpu, quiet, train

PAIRS = 4
"""Of each prompt in a pass over the rankings: prompts weigh the same, however many pairs they have."""
LOGGED = {"loss": "train/loss", "rewards/accuracies": "train/accuracy", "learning_rate": "lr"}


class TokenDPOTrainer(Checked, DPOTrainer):
    """TRL's trainer on rows that are token ids already, by the templates of the stages."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def train_dpo(stages: dict[str, Stage], rankings: list[Ranking], beta: float, out: Path) -> None:
    """Train the run's SFT model and save it in `out`; one that was killed goes on from its newest state.

    Batch size, passes and length are those of the reward model on the same rankings, learning rate and
    adapters PPO's.
    """
    sft = stages["sft"].path
    rm = RMConfig.model_validate_json(json.dumps(stages["rm"].config))
    ppo = PPOConfig.model_validate_json(json.dumps(stages["ppo"].config))
    silent = rm.wandb.model_copy(update={"mode": "disabled"})
    config = rm.model_copy(update={"learning_rate": ppo.learning_rate, "wandb": silent})
    quiet()
    prepare_cpu(config.threads)
    checkpoint.seed_everything(config.seed)
    tokenizer = load_tokenizer(sft)
    policy = add_lora(load_policy(sft, tokenizer).to(device()), ppo.lora, "CAUSAL_LM")
    rows = pairs(rankings, tokenizer, config.max_length, config.seed)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    trainer: Any = TokenDPOTrainer(
        model=policy,
        ref_model=None if ppo.lora else load_policy(sft, tokenizer).to(device()),
        args=one_gpu(DPOConfig(**arguments(config, len(rows), work), beta=beta, max_length=None)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    say(f"compare: DPO, beta {beta:g}: {len(rows)} pairs of {len(rankings)} prompts")
    train(trainer, work, Recorder(Tracker(work, config), LOGGED, config.log_every))
    merged(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copyfile(work / "metrics.jsonl", out / "metrics.jsonl")
    shutil.rmtree(work)


def pairs(
    rankings: list[Ranking], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> list[dict[str, Any]]:
    """`PAIRS` rows of ids a prompt, drawn from its untied pairs that fit; prompts without one are left out."""
    draw, rows = random.Random(seed), []
    for ranking in rankings:
        said = [without_thinking(text) for text in ranking.responses]
        prompt, encoded = encode_responses(tokenizer, ranking.messages, said)
        fits = [len(prompt) + len(ids) <= max_length for ids in encoded]
        found = [
            (better, worse)
            for better, worse in untied_pairs(ranking.ranks)
            if fits[better] and fits[worse] and encoded[better] != encoded[worse]
        ]
        draw.shuffle(found)
        for i in range(PAIRS if found else 0):
            better, worse = found[i % len(found)]
            chosen, rejected = encoded[better], encoded[worse]
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows
