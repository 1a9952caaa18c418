"""Models in an engine's wrapper, from within and as a whole."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.engines.start import asked
from pipeline.errors import UserError

T = TypeVar("T")


def check_wrapped(model: nn.Module) -> None:
    """UserError unless a model that is about to be trained is in the wrapper of the engine that was asked for."""
    if asked() == "DDP" and not isinstance(model, DistributedDataParallel):
        raise UserError(
            f"{type(model).__name__} is in no engine's wrapper: each process would train alone"
        )


def within(model: nn.Module, run: Callable[[Any], T]) -> T:
    """`run` of a model, which may pass through any part of it, as the forward pass of its wrapper: what is
    outside of one no engine sees, and would not sum the gradients of."""
    if not isinstance(model, DistributedDataParallel):
        return run(model)
    bare = model.module
    own = vars(bare).get("forward")

    def once() -> T:
        del bare.forward
        if own is not None:
            bare.forward = own
        return run(bare)

    bare.forward = once
    return model()
