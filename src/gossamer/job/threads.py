"""How many threads torch computes on."""

import torch

from gossamer.errors import ConfigError


def use_threads(wanted: int) -> None:
    """Let torch compute on so many threads in this process, from now on; ConfigError for none.

    Until then it takes the physical cores, which on a busy machine can be slower than fewer threads.
    """
    if wanted < 1:
        raise ConfigError(f"--threads is {wanted}; expected at least 1")
    torch.set_num_threads(wanted)
