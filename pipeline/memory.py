"""What to say when memory is out, in whichever library's words that arrives; nothing is retried."""

import contextlib
from collections.abc import Iterator

_PHRASES = ("DefaultCPUAllocator: can't allocate", "CUDA out of memory", "CUBLAS_STATUS_ALLOC")


def is_out(error: BaseException) -> bool:
    """Whether an error says that an accelerator's or this machine's memory did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # torch's, which is not imported here
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _PHRASES)


@contextlib.contextmanager
def relieved_by(key: str) -> Iterator[None]:
    """Name the config key that makes what happens within smaller."""
    try:
        yield
    except Exception as error:
        if is_out(error):
            error.add_note(key)
        raise


def message(error: BaseException) -> str:
    """The library's first line, and the key to make smaller."""
    first = (str(error).strip() or "out of memory").splitlines()[0]
    keys = getattr(error, "__notes__", None) or ["micro_batch_size"]
    return f"{first}\nTry a smaller {keys[0]}: less memory, the same numbers. Nothing was changed."
