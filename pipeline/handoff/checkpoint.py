"""Training state and every random generator, as tensors and plain values in numbered directories."""

import contextlib
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.engines.start import rank, world_size
from pipeline.errors import UserError
from pipeline.handoff import sealed
from pipeline.handoff.sealed import newest, step_of
from pipeline.process.progress import say

__all__ = ["load", "newest", "random_state", "reseed", "save", "seed_everything", "step_of"]


def save(
    work: Path, step: int, state: dict, states: list[dict] | None = None, keep: int = 2
) -> Path:
    """Write `state`, and the `random_state` of every process (by default this one), as work/step-NNNNNN, whole or not at all, and
    prune to the last `keep`."""
    temporary = sealed.temporary(work, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save({"state": state, "random": states or [random_state()]}, temporary / "state.pt")
    return sealed.publish(temporary, work, step, keep)


def load(directory: Path, seed: int = 0) -> dict:
    """State saved by `save`, with every random generator put back; loads tensors, never code. `seed`: of the
    run, for other processes than it was saved by."""
    with refusing_code(directory):
        saved = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    if len(saved["random"]) == world_size():
        restore_random_state(saved["random"][rank()])
    else:
        reseed(directory, len(saved["random"]), seed)
    return saved["state"]


def reseed(directory: Path, processes: int, seed: int) -> None:
    """New random numbers, of (seed, step, process), for a run that so many `processes` have begun."""
    say(
        f"{directory}: saved by {processes} processes, and now there are {world_size()}: it goes on from the same "
        "weights with other random numbers, and will not be exactly the run that was interrupted"
    )
    seed_everything(hash((seed, step_of(directory), rank())) % 2**63)


@contextlib.contextmanager
def refusing_code(directory: Path) -> Iterator[None]:
    """Within, a file of a state, hashes right, that is more than tensors and plain values is a UserError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory}: refused, it may carry code: {reason}") from None


def random_state() -> dict:
    """Every global random generator, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ],
    }


def restore_random_state(state: dict) -> None:
    """Undo everything drawn since `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
