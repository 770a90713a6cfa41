"""What torchrun tells each of the processes that it starts."""

import os

from gossamer.errors import UnsupportedError


def num_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def refuse_several(verb: str) -> None:
    """Raise UnsupportedError under torchrun: processes that share no work would write the same files."""
    if num_processes() > 1:
        raise UnsupportedError(
            f"found {num_processes()} processes; `{verb}` runs in one: leave torchrun out "
            "(pretrain and finetune run in several)"
        )
