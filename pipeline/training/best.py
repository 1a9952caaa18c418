"""`keep: best`: the weights of the step that did best on held-out data, kept with the training state."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.engines.whole import in_parts, whole
from pipeline.process.files import write_atomically
from pipeline.process.progress import say

_WEIGHTS, _FACTS = "best.safetensors", "best.json"


class Best(TrainerCallback):
    """Measures every `eval_every` steps and at the end, and keeps the weights that did best; stops training
    after `patience` measurements that were no better.

    `metric`: of the trainer's evaluation, "eval_loss" (lower is better) or "eval_accuracy".
    """

    # transformers' own early stopping looks for its best checkpoint where ours have been sealed and pruned

    def __init__(self, config: SFTConfig | RMConfig, metric: str):
        self.config, self.metric = config, metric
        self.weights: dict[str, Tensor] = {}
        self.value, self.step, self.worse = float("inf"), 0, 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.config.eval_every == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        value = metrics[self.metric] * (1 if self.metric == "eval_loss" else -1)
        if value < self.value:
            self.value, self.step, self.worse = value, state.global_step, 0
            self.weights = {n: whole(p.detach()).cpu().clone() for n, p in _trained(model)}
        else:
            self.worse += 1
        if self.ended:
            control.should_training_stop = control.should_save = True

    @property
    def ended(self) -> bool:
        """Whether patience is at its end."""
        return self.config.patience is not None and self.worse >= self.config.patience

    def save(self, directory: Path) -> None:
        """Put it into a training state that is being written."""
        if self.weights:
            save_file(self.weights, directory / _WEIGHTS)
        facts = {"value": self.value, "step": self.step, "worse": self.worse}
        write_atomically(directory / _FACTS, json.dumps(facts))

    def load(self, directory: Path) -> None:
        """Go on from a training state."""
        facts = json.loads((directory / _FACTS).read_text())
        self.value, self.step, self.worse = facts["value"], facts["step"], facts["worse"]
        self.weights = load_file(directory / _WEIGHTS) if self.step else {}

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Give the model its best weights back."""
        for name, weight in _trained(model):
            weight.copy_(in_parts(self.weights[name], weight))
        say(f"{self.config.stage}: the best of what was measured: step {self.step}")


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
