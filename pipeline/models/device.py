"""Where models compute, and where they wait."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def device() -> torch.device:
    """This process's accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextlib.contextmanager
def placed(model: nn.Module | None, at: torch.device, home: str | None) -> Iterator[None]:
    """Within, a model is `at` a device, and afterwards at its home, if it has one elsewhere."""
    if model is None or home is None:
        yield
        return
    model.to(at)
    try:
        yield
    finally:
        model.to(home)
