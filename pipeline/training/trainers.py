"""What stages 1 and 2 share: TRL's trainers, told our keys, tracked and saved our way."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from pipeline.config.schema import Optimisation, StageConfig
from pipeline.engines.start import anywhere, asked, together, world_size
from pipeline.engines.whole import whole
from pipeline.errors import UserError
from pipeline.handoff import checkpoint, sealed
from pipeline.models import loading as models
from pipeline.models.causal import places
from pipeline.models.device import device
from pipeline.models.dtypes import check_dtype
from pipeline.models.forward import layout
from pipeline.process import faults, stopping
from pipeline.process.files import write_atomically
from pipeline.process.progress import say, track, tracked
from pipeline.tracking.tracker import Tracker
from pipeline.training.best import Best
from pipeline.training.checked import refuse

SCRATCH = "trainer"
"""Folder of `work` in which transformers writes a checkpoint, before it is sealed and put in its place."""
_RECORDER = "recorder.json"
_LATEST = ("grad_norm", "learning_rate")  # recorded as they are; other values as means over steps


def arguments(config: StageConfig, examples: int, work: Path) -> dict[str, Any]:
    """Our keys as keyword arguments of `trl.SFTConfig` / `trl.RewardConfig`; `examples`: rows of
    the training set, packed ones if they are packed."""
    assert isinstance(config, Optimisation)
    share = config.batch_size // world_size()
    micro = min(config.micro_batch_size or share, share)
    steps = config.max_steps or steps_of(config.epochs, examples, config.batch_size)
    return {
        "output_dir": str(work / SCRATCH),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
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
        "use_cpu": device().type == "cpu",
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": 1,  # the recorder averages over `log_every` of them, a resumed one too
        "logging_nan_inf_filter": False,  # the default hides a NaN loss
        "save_steps": config.save_every,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def quiet() -> None:
    """Silence the libraries' own progress bars and remarks; ours show what matters."""
    datasets.disable_progress_bars()
    models.quiet()


def one_gpu(args: Any) -> Any:
    """Training arguments for one accelerator a process, whatever this machine has.

    Without a launcher Trainer would put each batch on all of them by `nn.DataParallel`, having made it as
    many times larger: `batch_size` would not be what the config says.
    """
    args._n_gpu = min(args.n_gpu, 1)
    return args


def check(config: Any, kind: type[StageConfig]) -> None:
    """UserError for what no data could make right, before anything slow."""
    if not isinstance(config, kind):
        name = kind.__name__
        raise UserError(f"{kind.stage}: run() takes a {name}, not a {type(config).__name__}")
    assert isinstance(config, Optimisation)
    check_dtype(config.dtype)
    processes, batch = world_size(), config.batch_size
    share, rest = divmod(batch, processes)
    if rest:
        raise UserError(f"batch_size {batch} does not divide by the {processes} processes")
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        of = f" of {processes} processes" if processes > 1 else ""
        raise UserError(f"batch_size {batch}{of} does not divide by micro_batch_size {micro}")


def dataset_of(rows: Sequence[dict], told: Callable[[dict], dict], work: Path) -> Dataset:
    """What `told` makes of the rows, as trl's trainers take them; of rows on the disk in a file too, which is
    mapped into memory."""
    if isinstance(rows, list):
        return Dataset.from_list([told(row) for row in rows])
    (work / SCRATCH).mkdir(exist_ok=True)
    path = str(work / SCRATCH / f"{id(rows)}.arrow")
    with ArrowWriter(path=path) as writer:
        for row in tracked(rows, "writing rows"):
            writer.write(told(row))
        writer.finalize()
    return Dataset.from_file(path)


def check_length(model: Any, pairs: Iterable[tuple[list[int], list[int]]]) -> None:
    """UserError for a prompt and response that are longer than the model has places for."""
    room, limit = layout(model).room, places(model)
    for prompt, response in ((len(prompt), len(response)) for prompt, response in pairs):
        if response > room(model, prompt):
            raise UserError(
                f"max_length: an example has {prompt} and {response} tokens, {type(model).__name__} "
                f"was made for {limit}; set max_length: {limit}"
            )


def steps_of(epochs: float, examples: int, batch: int) -> int:
    """Optimizer steps of so many passes over the data, to within half a batch.

    An epoch's last batch may be short, and so each epoch takes a whole number of steps.
    """
    per_epoch = math.ceil(examples / batch)
    whole, part = divmod(epochs * examples - min(batch, examples) / 2, examples)
    return max(
        math.ceil(examples / batch * epochs), int(whole) * per_epoch + math.ceil(part / batch)
    )


class Recorder(TrainerCallback):
    """Writes means of the trainer's numbers to the tracker, shows progress, publishes its states.

    A row of the record is the mean over the steps since the row before; the last step has one. What has
    been summed up for the next row is part of a training state, so that a resumed run writes the same rows.
    """

    def __init__(
        self, tracker: Tracker, names: dict[str, str], every: int, best: Best | None = None
    ):
        self.tracker, self.names, self.every, self.best = tracker, names, every, best
        self.bar: Any = None
        self.sums: dict[str, list[float]] = {}  # name -> [sum, number of steps]
        self.measured: tuple[int, dict[str, float]] = (0, {})  # the latest, on held-out data

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = track(state.max_steps, self.tracker.stage, state.global_step)
            self.bar.__enter__()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        # clipped already: a gradient that was infinite is NaN by now
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        if not torch.isfinite(norm := whole(norm)):
            refuse(state.global_step + 1, "a gradient", float(norm))

    def on_step_end(self, args, state, control, **kwargs):
        faults.at("step", state.global_step)
        if self.bar:
            self.bar.advance(1)
        if anywhere(stopping.asked()):
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history.clear()  # the record is ours; theirs would grow with every saved state
        logs = logs or {}
        named = {new: logs[old] for old, new in self.names.items() if old in logs}
        if not named or not state.is_world_process_zero:
            return
        if "loss" not in logs:  # validation
            self.tracker.log(state.global_step, named)
            self.measured = (state.global_step, named)
            return
        self.bar.advance(0, loss=logs["loss"])
        latest = {new for old, new in self.names.items() if old in _LATEST}
        for name, value in named.items():
            total, count = self.sums.get(name, (0.0, 0)) if name not in latest else (0.0, 0)
            self.sums[name] = [total + value, count + 1]
        edge = state.global_step in (1, state.max_steps)
        if edge or state.global_step % self.every == 0:
            self.tracker.log(state.global_step, {n: t / c for n, (t, c) in self.sums.items()})
            self.sums = {}

    def on_save(self, args, state, control, **kwargs):
        together()  # the others may still be writing their random states
        if state.is_world_process_zero:
            self._publish(args, state)
        together()

    def _publish(self, args, state) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
        write_atomically(written / _RECORDER, json.dumps([self.sums, self.measured]))
        if self.best:
            self.best.save(written)
        self.tracker.sync()
        sealed.publish(written, Path(args.output_dir).parent, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.__exit__(None, None, None)

    def load(self, directory: Path) -> None:
        """Go on from the state in `directory`."""
        self.sums, self.measured = json.loads((directory / _RECORDER).read_text())
        if self.best:
            self.best.load(directory)
        self.tracker.truncate(sealed.step_of(directory))
        if self.measured[0] == sealed.step_of(
            directory
        ):  # before the save, unlike what ends a stage
            self.tracker.log(*self.measured)


class ShowsEvaluation(TrainerCallback):
    """Progress of a held-out loss that takes long."""

    def __init__(self, description: str):
        self.description = description
        self.steps: Iterator[int] | None = None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.steps is None:
            self.steps = tracked(range(len(eval_dataloader)), self.description)
        next(self.steps)

    def on_evaluate(self, args, state, control, **kwargs):
        for _ in self.steps or ():
            pass  # the last one is told when it is asked for another
        self.steps = None


def train(
    trainer: Trainer, work: Path, recorder: Recorder, before: dict[str, float] | None = None
) -> None:
    """Train from the newest whole state in `work`, or from the start, recording as it goes.

    `before` is what was measured before the first step; a run that goes on has recorded it already.
    After a SIGTERM or Ctrl-C the state is saved and the process ends here.
    """
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries; the recorder shows a bar
    trainer.add_callback(recorder)
    if recorder.best:
        trainer.add_callback(recorder.best)
    stage = recorder.tracker.stage
    newest = sealed.newest(work)
    step = 0 if newest is None else sealed.step_of(newest)
    faults.at("load", step)
    if newest is not None:
        _check_engine(newest)
        say(f"{stage}: goes on after step {step}")
        recorder.load(newest)
    elif before:
        recorder.tracker.log(0, before)
    ended = step == trainer.args.max_steps or (recorder.best is not None and recorder.best.ended)
    if newest is not None and ended:
        # cut off after the last save: transformers would train one step too many
        trainer._load_from_checkpoint(str(newest))
        trainer.state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
    else:
        _go_on(trainer, work, newest, stage)
    if recorder.best:
        recorder.best.restore(trainer.model)
        trainer.remove_callback(recorder.best)  # what is measured from now on is itself


def _check_engine(state: Path) -> None:
    """UserError for a state that another engine has saved in its own way."""
    sharded = any(state.glob("pytorch_model_fsdp*"))
    if sharded != (asked() == "FSDP"):
        by, now = (
            ("fsdp2", "without it") if sharded else ("ddp, or one process,", "with ENGINE=fsdp2")
        )
        raise UserError(f"{state}: saved by ENGINE={by} and cannot go on {now}; go on as it began")


def _go_on(trainer: Trainer, work: Path, newest: Path | None, stage: str) -> None:
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    faults.watch_gradient(weight, lambda: trainer.state.global_step + 1)
    with stopping.deferred(), checkpoint.refusing_code(newest or work):
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        if anywhere(stopping.asked()):
            stopping.leave(stage, trainer.state.global_step)
