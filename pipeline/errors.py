"""The one exception that means "the user can fix this"."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in a config, a data file or an artifact.

    The message names the file, the line or the key, and the remedy. Command lines print it
    without a traceback and exit with code 2 (see `pipeline.cli`).
    """


@contextmanager
def at(where: str) -> Iterator[None]:
    """A UserError raised within says `where` (file:line) it comes from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error
