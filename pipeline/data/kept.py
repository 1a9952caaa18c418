"""Items of sources that are larger than memory should be asked to hold: on the disk, read as they are used."""

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

from pipeline.config.schema import Data
from pipeline.handoff import datafiles

Item = TypeVar("Item")

MOST = 200_000_000
"""Bytes of files whose items are held in memory."""


def is_large(source: Any) -> bool:
    """Whether a source's items are kept on the disk; of a hub's data set nobody knows the size before."""
    if not isinstance(source, Data):
        return False
    paths = [source.path] if isinstance(source.path, str) else source.path
    names = [path if isinstance(path, str) else path.path for path in paths]
    if any(datafiles.is_hub_id(name) for name in names):
        return True
    files = [file for name in names for file in datafiles.files(name)[0]]
    return sum(f.stat().st_size * (4 if f.suffix.lower() == ".gz" else 1) for f in files) > MOST


class Items(Sequence[Item]):
    """A sequence that says how one of its items is read."""

    def item(self, place: int) -> Item:
        """The one at a place from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> Item: ...

    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...

    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self.item(place) for place in range(len(self))[at]]
        return self.item(range(len(self))[at])  # IndexError beyond the end


class OnDisk(Items[Item]):
    """A list that only grows, in a file that goes with it, below TMPDIR: eight bytes of memory an item.

    Items are texts, lists, dicts or dataclasses, written as JSON: what it has no word for, a date, becomes text.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it is open as long as this lives
        self._ends = array("Q", [0])
        self._kind: Any = dict
        self._flushed = True

    def append(self, item: Item) -> None:
        """Add one at the end."""
        self._kind = type(item)
        fields = getattr(self._kind, "__dataclass_fields__", None)
        plain: Any = {name: getattr(item, name) for name in fields} if fields else item
        text = json.dumps(plain, ensure_ascii=False, default=_plain)
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))
        self._flushed = False

    def __len__(self) -> int:
        return len(self._ends) - 1

    def item(self, place: int) -> Item:
        if not self._flushed:
            self._file.flush()
            self._flushed = True
        start, end = self._ends[place], self._ends[place + 1]
        value = json.loads(os.pread(self._file.fileno(), end - start, start))
        return value if self._kind in (dict, list, str) else self._kind(**value)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else str(value)


class Picked(Items[Item]):
    """Some items of a sequence, in an order of their own; the same one may be there several times."""

    def __init__(self, items: Sequence[Item], places: Iterable[int]):
        self.items, self.places = items, array("q", places)

    def __len__(self) -> int:
        return len(self.places)

    def item(self, place: int) -> Item:
        return self.items[self.places[place]]


def like(items: Sequence[Any]) -> Any:
    """Something empty to append to, kept where `items` are."""
    return [] if isinstance(items, list | tuple) else OnDisk()


def pick(items: Sequence[Item], places: Iterable[int]) -> Any:
    """`Picked`, or a list of a list's items."""
    if isinstance(items, list | tuple):
        return [items[place] for place in places]
    if isinstance(items, Picked):
        return Picked(items.items, (items.places[place] for place in places))
    return Picked(items, places)


def once(items: Sequence[Item]) -> Any:
    """The items without those that are there a second time."""
    if isinstance(items, Picked):
        return Picked(items.items, dict.fromkeys(items.places))
    return list({id(item): item for item in items}.values()) if isinstance(items, list) else items
