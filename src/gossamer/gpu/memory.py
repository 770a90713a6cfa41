"""What is said when a GPU's memory ends."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
    """MemoryError where the memory ends meanwhile; `what` goes on after "while"."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU's memory ended while {what}: {error}") from error
