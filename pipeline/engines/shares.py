"""Who has which rows: the shares that processes have of batches, and what a share without rows is."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from pipeline.engines.start import rank, world_size

T = TypeVar("T")


class Shares(BatchSampler):
    """Micro-batches of one process out of batches that are the same for any number of them.

    Each batch of `size` rows, in the sampler's order, is cut into `processes` neighbouring shares; the last
    one of an epoch may be short. All processes have as many micro-batches of a batch, of at most `micro`
    rows; one whose share is smaller has empty ones.
    """

    def __init__(self, sampler: Sampler, size: int, micro: int, process: int, processes: int):
        self.sampler, self.size, self.micro = sampler, size, micro
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.size)  # type: ignore[arg-type]
        return whole * self._turns(self.size) + self._turns(rest)

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in self.sampler:
            batch.append(index)
            if len(batch) == self.size:
                yield from self._mine(batch)
                batch = []
        yield from self._mine(batch)

    def _turns(self, rows: int) -> int:
        """Micro-batches of a batch of so many rows."""
        return math.ceil(math.ceil(rows / self.processes) / self.micro)

    def _mine(self, batch: list[int]) -> Iterator[list[int]]:
        first, end = share(len(batch), self.process, self.processes)
        for turn in range(self._turns(len(batch))):
            yield batch[first + turn * self.micro : min(first + (turn + 1) * self.micro, end)]


class OrNothing:
    """A collator that makes of no rows a batch of `row` in which `blank` leaves nothing to be learnt: every
    process has to take part in every step."""

    def __init__(self, collate: Callable, row: Any, blank: Callable[[dict[str, Tensor]], None]):
        self.collate, self.row, self.blank = collate, row, blank

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        batch = self.collate(rows or [self.row])
        if not rows:
            self.blank(batch)
        return batch


def share(count: int, process: int, processes: int) -> tuple[int, int]:
    """Where a process's share of so many rows begins and ends; shares differ by one row at most."""
    return count * process // processes, count * (process + 1) // processes


def from_all(items: list[T]) -> list[T]:
    """Those of all processes, in order."""
    return items if world_size() == 1 else gather_object(items)


def worked_on(rows: Sequence[T], work: Callable[[Sequence[T]], list]) -> list:
    """What `work` makes of rows, each process of a share of them."""
    if world_size() == 1:
        return work(rows)
    first, end = share(len(rows), rank(), world_size())
    return gather_object(work(rows[first:end]))
