"""The hub that models and data are fetched from, looked for once before its library is asked."""

import functools
from pathlib import Path

from pipeline.process.progress import say

_SECONDS = 5.0


def look(name: str | Path) -> None:
    """Before `name` is fetched: where the hub does not answer at once, keep to what was fetched before."""
    if not Path(name).exists():
        _ask_once()


@functools.cache
def _ask_once() -> None:
    from huggingface_hub import constants  # slow to import
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # of whichever library it asks through
        say(
            f"{constants.ENDPOINT} does not answer ({error}): only what was fetched before is there"
        )
        constants.HF_HUB_OFFLINE = True
