"""What stages 1 and 2 share: TRL's trainers, told our keys, tracked and saved our way."""

import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from pipeline import checkpoint, models
from pipeline.errors import UserError
from pipeline.progress import track
from pipeline.schema import Optimisation, StageConfig
from pipeline.tracking import Tracker


def arguments(config: StageConfig, examples: int, work: Path) -> dict[str, Any]:
    """Our keys as keyword arguments of `trl.SFTConfig` / `trl.RewardConfig`.

    `batch_size` is global: it is divided over processes and micro-batches, exactly or not at all.
    """
    assert isinstance(config, Optimisation)
    processes = _world_size()
    micro, accumulate = micro_batches(config.batch_size, config.micro_batch_size, processes)
    steps = config.max_steps or math.ceil(examples / config.batch_size * config.epochs)
    return {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": config.learning_rate,
        # transformers' own "constant" would ignore the warm-up
        "lr_scheduler_type": "constant_with_warmup"
        if config.schedule == "constant"
        else config.schedule,
        "warmup_steps": int(config.warmup_ratio * steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": config.precision == "bf16",
        "fp16": False,
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": config.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # the default hides a NaN loss
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def quiet() -> None:
    """Silence the libraries' own progress bars and remarks; ours show what matters."""
    datasets.disable_progress_bars()
    models.quiet()


def micro_batches(batch: int, micro: int | None, processes: int) -> tuple[int, int]:
    """(examples per forward pass, passes per optimizer step) of one process."""
    share, rest = divmod(batch, processes)
    micro = min(micro or share, share)
    if rest or share % micro:
        raise UserError(
            f"batch_size {batch} does not divide by {processes} processes x micro_batch_size {micro}"
        )
    return micro, share // micro


def _world_size() -> int:

    return int(os.environ.get("WORLD_SIZE", "1"))


class Recorder(TrainerCallback):
    """Writes the trainer's log lines to the tracker, moves the progress bar, seals checkpoints."""

    def __init__(self, tracker: Tracker, names: dict[str, str]):
        self.tracker, self.names = tracker, names
        self.bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = track(state.max_steps, self.tracker.stage)
            self.bar.__enter__()
            self.bar.advance(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.advance(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in (logs or {}):
            return  # the summary at the end, which a run that goes on after its last save has not
        if self.bar and logs and "loss" in logs:
            self.bar.advance(0, loss=logs["loss"])
        named = {new: logs[old] for old, new in self.names.items() if old in (logs or {})}
        if any(not math.isfinite(value) for value in named.values()):
            raise UserError(
                f"{self.tracker.stage}: step {state.global_step}: not finite: {named}; "
                "lower learning_rate or look at the data"
            )
        if named and state.is_world_process_zero:
            self.tracker.log(state.global_step, named)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            checkpoint.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.__exit__(None, None, None)


def train(
    trainer: Trainer, work: Path, recorder: Recorder, before: dict[str, float] | None = None
) -> None:
    """Train from the newest whole checkpoint in `work`, or from the start, recording as it goes.

    `before` is what was measured before the first step; a run that goes on has recorded it already.
    """
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries; the recorder shows a bar
    trainer.add_callback(recorder)
    newest = checkpoint.newest(work, "checkpoint-")
    if newest is None:
        if before:
            recorder.tracker.log(0, before)
        trainer.train()
        return
    step = checkpoint.step_of(newest)
    recorder.tracker.truncate(step)
    if step < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=str(newest))
    else:  # cut off after the last save: transformers would train one step too many
        trainer._load_from_checkpoint(str(newest))
        trainer.state = TrainerState.load_from_json(str(newest / "trainer_state.json"))


def peak_memory_mb() -> float:
    """Peak memory of the accelerator, or of this process without one, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
