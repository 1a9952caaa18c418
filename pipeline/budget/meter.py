"""What a pass would cost: it is run for real on tensors that have shapes and no data, and counted."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.budget.machines import Machine


class Meter(TorchDispatchMode):
    """Counts operations in its phases: seconds on a machine, by the slower of matrix products and memory
    traffic, and the bytes that are alive at a time of what was made in any phase.

    `numbers` has `PHASE seconds`, `PHASE flops`, `PHASE peak`, and `PHASE logits`: the part of the bytes, at
    their most, that has a column a word.
    """

    def __init__(self, machine: Machine, vocabulary: int):
        super().__init__()
        self.machine, self.vocabulary = machine, vocabulary
        self.numbers = Counter[str]()
        self._live, self._known = Counter[bool](), set[int]()
        self._phase = ""

    @contextmanager
    def phase(self, name: str, times: float = 1.0) -> Iterator[None]:
        """Count what happens within, and its seconds so many times."""
        self._phase, self._times = name, times
        self._most()
        with self:
            yield

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if op.namespace != "prim" and not op.is_view:
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self._time(op, args, kwargs, out, made)
            for tensor in made:
                self._keep(tensor)
        return out

    def _time(self, op: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor]) -> None:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        flops, rate = 0.0, self.machine.float32
        if (formula := flop_registry.get(op.overloadpacket)) is not None:
            flops = formula(*args, **kwargs, out_val=out)
            rate = self.machine.bf16 if given[0].itemsize == 2 else rate
        moved = sum(x.numel() * x.itemsize for x in [*given, *made])
        seconds = self.machine.launch + max(flops / rate, moved / self.machine.bandwidth)
        self.numbers[f"{self._phase} seconds"] += seconds * self._times  # type: ignore[assignment]
        self.numbers[f"{self._phase} flops"] += flops * self._times  # type: ignore[assignment]

    def _keep(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is gone."""
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        wide, size = tensor.shape[-1:] == (self.vocabulary,), storage.nbytes()
        self._live[wide] += size
        self._most()
        weakref.finalize(storage, self._gone, id(storage), wide, size).atexit = False

    def _gone(self, key: int, wide: bool, size: int) -> None:
        self._known.discard(key)
        self._live[wide] -= size

    def _most(self) -> None:
        for name, size in (("peak", self._live.total()), ("logits", self._live[True])):
            key = f"{self._phase} {name}"
            self.numbers[key] = max(self.numbers[key], size)
