"""What our trainers add to transformers': losses that are numbers, and batches shared among processes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.engines.shares import OrNothing, Shares
from pipeline.engines.whole import check_wrapped, one_unit, wrapped
from pipeline.errors import UserError
from pipeline.handoff import checkpoint


class Checked:
    """Mixed into a transformers Trainer: a loss that is no number ends the run before it is stepped, and
    several processes train on the batches that one would."""

    def training_step(self, *args, **kwargs):
        if args:
            check_wrapped(args[0])
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            refuse(self.state.global_step + 1, "the loss", float(loss))  # type: ignore[attr-defined]
        return loss

    def create_model_card(self, *args, **kwargs) -> None:
        """None beside a checkpoint that nobody publishes."""

    def _send_telemetry(self) -> None:
        """None: TRL would tell its makers what is trained here."""

    def blank(self, batch: dict[str, Tensor]) -> None:
        """Take out of a batch all that is learnt from it."""
        raise NotImplementedError

    def total(self, numbers: list[float]) -> list[float]:
        """Sums over processes."""
        args, accelerator = self.args, self.accelerator  # type: ignore[attr-defined]
        if args.world_size == 1:
            return numbers
        kind = torch.float32 if args.device.type == "mps" else torch.float64
        return accelerator.reduce(torch.tensor(numbers, device=args.device, dtype=kind)).tolist()

    def evaluate(self, *args, **kwargs):
        if wrapped(self.model_wrapped):  # type: ignore[attr-defined]
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        # before the first step: accelerate would wrap the model as one that is not to be trained, and leave it so
        self.accelerator._models.append(self.model.to(self.args.device))  # type: ignore[attr-defined]
        with self.accelerator.autocast():  # type: ignore[attr-defined]
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_for_training(self, *args, **kwargs):
        with one_unit(self.model):  # type: ignore[attr-defined]
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]

    def _load_rng_state(self, saved):
        processes = len(list(Path(saved or "").glob("rng_state*.pth")))
        if saved is None or processes == self.args.world_size:  # type: ignore[attr-defined]
            super()._load_rng_state(saved)  # type: ignore[misc]
        else:
            checkpoint.reseed(Path(saved), processes, self.args.seed)  # type: ignore[attr-defined]

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs):
        """accelerate would have processes take turns with batches, and use rows twice to make them even."""
        rest: Any = super()
        told, collate = self.args, self.data_collator  # type: ignore[attr-defined, has-type]
        if told.world_size == 1:
            return rest._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        self.data_collator = OrNothing(collate, dataset[0], self.blank)
        loader = rest._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        self.data_collator = collate
        turns = told.gradient_accumulation_steps if kwargs.get("is_training") else 1
        size, shard = batch_size * turns * told.world_size, loader.batch_sampler
        shard.batch_sampler = Shares(
            shard.batch_sampler.sampler, size, batch_size, told.process_index, told.world_size
        )
        # they are this process's own; as transformers does with shares that it made itself
        shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        shard.batch_size = None
        return loader


def refuse(step: int, what: str, value: float) -> None:
    """UserError for a number that is none."""
    raise UserError(
        f"step {step}: {what} is {value}; nothing was stepped and the last saved state is good. "
        "Lower learning_rate, or look at the data"
    )
