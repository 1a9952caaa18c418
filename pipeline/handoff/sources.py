"""What a module is made of, found without running it: its file, those it imports, their packages.

Installed packages and Python's own modules do not count, nor does this program around a module of its
own; what is imported by a computed name is not seen.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_INSTALLED = ("site-packages", "dist-packages")
_OURS = ("pipeline", "stages")


def files_of(name: str) -> dict[str, Path]:
    """Name below the import path -> file, of `package.module` and of all of the user's own that it
    imports; nothing when there is no such module."""
    found: dict[str, Path] = {}
    pending = [name]
    allowed = name.rpartition(".")[0] if name.split(".")[0] in _OURS else ""
    while pending:
        for place, path in _files(pending.pop(), first=not found):
            if place not in found:
                found[place] = path
                pending += [n for n in _imports(path, place) if _follows(n, allowed)]
    return found


def _follows(name: str, allowed: str) -> bool:
    """Of this program's own modules only those beside the first one count."""
    return name.split(".")[0] not in _OURS or (
        bool(allowed) and f"{name}.".startswith(f"{allowed}.")
    )


def _files(name: str, first: bool) -> Iterator[tuple[str, Path]]:
    """The file of a module and the `__init__` of every package above it."""
    parts = name.split(".")
    for folder in map(Path, [entry or "." for entry in sys.path]):
        if not first and (set(folder.parts) & {*_INSTALLED} or str(folder) == _STANDARD):
            continue
        base = folder.joinpath(*parts)
        own = [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
        if own:
            above = [folder.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts))]
            for path in [own[0], *(path for path in above if path.is_file())]:
                yield path.relative_to(folder).as_posix(), path
            return


def _imports(path: Path, place: str) -> Iterator[str]:
    """Absolute names that a file imports, anywhere in it; of a broken one, none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = place.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (source, *(f"{source}.{alias.name}" for alias in node.names))


_STANDARD = sysconfig.get_path("stdlib")
