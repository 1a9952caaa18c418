"""What a module is made of, found without running it: its names, its file, those it imports, their packages.

Installed packages and Python's own modules do not count, nor does this program around a module of its
own; what is imported by a computed name is not seen.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from pipeline.config.load import did_you_mean

_INSTALLED = ("site-packages", "dist-packages")
_OURS = "pipeline stages".split()
_TOLD_BY_RUNNING = {"*", "__getattr__", "globals", "vars", "exec", "setattr"}
"""What a module that defines names in other ways than by its lines has among them."""


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


def problem(name: str, function: bool) -> str | None:
    """Why a module, or a function as `module:function`, will not be there to import; None when it may be.

    Nothing is run: a name that only running the module can tell counts as there.
    """
    module, _, wanted = name.partition(":")
    if not all(module.split(".")) or bool(wanted) != function or name.endswith(":"):
        return f"{name}: write it as package.module{':function' * function}"
    if module in sys.modules:
        return None
    spec, inside, part = None, None, ""
    for last in module.split("."):
        part = f"{part}.{last}".removeprefix(".")
        if spec is None:
            spec = find_spec(part)
        else:  # `find_spec` would import what it is in; by its whole name, look for that as imported
            spec = PathFinder.find_spec(last, inside) if inside is not None else None
        if spec is None:
            hint = did_you_mean(last, (near.name for near in iter_modules(inside)))
            return f"{name}: no module {part} in {Path.cwd()} or on PYTHONPATH{hint}"
        inside = spec.submodule_search_locations
    origin = spec.origin if spec else None
    if origin and not origin.endswith(".py"):
        return None
    try:
        names = _names(ast.parse(Path(origin).read_bytes())) if origin else set()
    except (SyntaxError, ValueError) as error:
        return f"{name}: {origin} is broken: {error}"
    if not function or wanted in names or names & _TOLD_BY_RUNNING:
        return None
    return f"{name}: {origin or part} has no `{wanted}`{did_you_mean(wanted, names)}"


def _names(tree: ast.Module) -> set[str]:
    """What a module's own lines define or import, and built-in functions that they mention."""
    names: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        pending += ast.iter_child_nodes(node)
    return names


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
