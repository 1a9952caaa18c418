"""Models in an engine's wrapper: passes through it, and what its processes hold in parts as a whole."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from pipeline.engines.start import asked, rank
from pipeline.errors import UserError

T = TypeVar("T")
_WRAPPERS = {"DDP": DistributedDataParallel, "FSDP": FSDPModule}


def wrapped(model: nn.Module) -> bool:
    """Whether a model is in the wrapper of the engine that was asked for, if any was."""
    return isinstance(model, _WRAPPERS.get(asked(), nn.Module))


def check_wrapped(model: nn.Module) -> None:
    """UserError unless a model that is about to be trained is `wrapped`."""
    if not wrapped(model):
        raise UserError(
            f"{type(model).__name__} is not in the wrapper of {asked()}: each process would train alone"
        )


@contextlib.contextmanager
def one_unit(model: Any) -> Iterator[None]:
    """Within, accelerate gives a model's embeddings no FSDP unit of their own where more than its head shares
    them: no parameter can be in two."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    held = sum(
        p is table for module in model.modules() for p in vars(module)["_parameters"].values()
    )
    if asked() != "FSDP" or held <= 1 + (head is not None and head.weight is table):
        yield
        return
    names = ("get_input_embeddings", "get_output_embeddings")
    vars(model).update({name: lambda: None for name in names})
    try:
        yield
    finally:
        for name in names:
            del vars(model)[name]


def within(model: nn.Module, run: Callable[[Any], T]) -> T:
    """`run` of a model, which may pass through any part of it, as the forward pass of its wrapper: what is
    outside of one no engine sees, and would not gather the weights or sum the gradients of."""
    if not isinstance(model, tuple(_WRAPPERS.values())):
        return run(model)
    bare: Any = model.module if isinstance(model, DistributedDataParallel) else model
    own = vars(bare).get("forward")

    def once() -> T:
        del bare.forward
        if own is not None:
            bare.forward = own
        return run(bare)

    bare.forward = once
    return model()


def on_whole(model: nn.Module, run: Callable[[Any], T]) -> T:
    """`run` of a model of which this process has all the weights meanwhile, gathered once: what it does needs no
    other process, and each may do something else. Without gradients; all have to call it."""

    def gathered(bare: Any) -> T:
        units = [unit for unit in bare.modules() if isinstance(unit, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            return run(bare)
        finally:
            for unit in units:
                again = AcceleratorState().fsdp_plugin.reshard_after_forward
                unit.set_reshard_after_forward(again, recurse=False)
                unit.reshard()

    with torch.no_grad():
        return within(model, gathered)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of one that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(values: T) -> T:
    """The same in which every tensor that processes hold in parts is whole, on the CPU; all have to ask."""
    return tree_map(lambda x: x.full_tensor().cpu() if isinstance(x, DTensor) else x, values)


def in_parts(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this process holds `like`."""
    if not isinstance(like, DTensor):
        return tensor
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(optimizer: Any, state: dict) -> None:
    """Go on from what was `whole`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {name: in_parts(x, parameters[number]) if x.dim() else x for name, x in of.items()}
        for number, of in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def plain(model: nn.Module, make: Callable[[], Any]) -> Any:
    """A trained model as it would be without an engine, in the first process: itself, or the model of its
    kind that `make` gives, with its weights. None in the others where that took gathering; all have to ask."""
    if isinstance(model, DistributedDataParallel):
        return model.module
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    device = next(model.parameters()).device
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank() != 0:
        return None
    made = make()
    made.load_state_dict(weights)
    return made.to(device).train(model.training)
