"""Two runs side by side, a thread each: small models gain little from the second thread."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gossamer.errors import GossamerError


@contextmanager
def beside(function: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Run `function` in another process while the block runs in this one, both on one thread.

    The process is a spawned one, because torch's threads do not survive a fork. At the end of the block it is
    waited for; if the block fails, it is ended.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=_on_one_thread, args=(function, *arguments), daemon=True
    )
    threads = torch.get_num_threads()
    process.start()
    try:
        torch.set_num_threads(1)
        yield
        process.join()
    finally:
        torch.set_num_threads(threads)
        process.terminate()
        process.join()
    if process.exitcode:
        raise GossamerError(
            f"{function.__name__} ended with code {process.exitcode}; its output above says why"
        )


def _on_one_thread(function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except KeyboardInterrupt:  # the parent says so
        raise SystemExit(130) from None
