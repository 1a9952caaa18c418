"""Training state in numbered directories, each sealed by hashes, so that a torn one is never used."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.progress import say

SEAL = "seal.json"


def seal(directory: Path) -> None:
    """Write the hashes of every file in `directory`; its presence says that all were written."""
    sums = {
        str(p.relative_to(directory)): _sha256(p)
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name != SEAL
    }
    temporary = directory / (SEAL + ".tmp")
    temporary.write_text(json.dumps(sums, indent=1))
    _sync(temporary)
    os.replace(temporary, directory / SEAL)


def fault(directory: Path) -> str | None:
    """Why a sealed directory cannot be used, naming the file; None when it is whole."""
    try:
        sums = json.loads((directory / SEAL).read_text())
    except (OSError, ValueError):
        return "it was not completely written"
    for name, digest in sums.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} is corrupt"
    return None


def newest(work: Path, prefix: str = "step-") -> Path | None:
    """The newest whole state, or None when nothing was ever saved whole.

    Unfinished states (no seal: killed while saving) are removed. Corrupt ones are named and passed
    over; when only corrupt ones are left it is an error, never a silent start from the beginning.
    """
    corrupt = []
    for directory in sorted(work.glob(f"{prefix}*"), key=step_of, reverse=True):
        if not (directory / SEAL).is_file():
            shutil.rmtree(directory)
            continue
        reason = fault(directory)
        if reason is None:
            return directory
        corrupt.append(f"{directory}: {reason}")
        say(f"{directory}: not used, {reason}")
    if corrupt:
        raise UserError(
            "no saved state is whole:\n  "
            + "\n  ".join(corrupt)
            + f"\nRemove {work} to start again."
        )
    return None


def step_of(directory: Path) -> int:
    """The number a state directory ends in."""
    return int(directory.name.rsplit("-", 1)[1])


def save(work: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write `state` as work/step-NNNNNN, whole or not at all, and prune to the last `keep`."""
    final = work / f"step-{step:06d}"
    temporary = work / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save({"state": state, "random": random_state()}, temporary / "state.pt")
    _sync(temporary / "state.pt")
    seal(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(work)
    for old in sorted(work.glob("step-*"), key=step_of)[:-keep]:
        shutil.rmtree(old)
    return final


def load(directory: Path) -> dict:
    """State saved by `save`, with every random generator put back; loads tensors, never code."""
    saved = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
    restore_random_state(saved["random"])
    return saved["state"]


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
