"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in a config, a data file or an artifact.

    The message names the file, the line or the key, and the remedy. Command lines print it
    without a traceback and exit with code 2 (see `pipeline.cli`).
    """
