"""What holds for transformers and vLLM alike as hosts of sparse linears: tested versions, and CPUs."""

import re
from collections.abc import Callable

from gossamer.errors import UnsupportedError


def check_version(
    host: str,
    version: str,
    tested: tuple[tuple[int, int], tuple[int, int]],
    by: str,
    warn_once: Callable[..., object],
) -> None:
    """UnsupportedError for a host that is too old; one that was not tested is named in a warning, once.

    `tested`: the oldest and the newest. `by`: who supports them.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) if "dev" not in version else None
    (oldest, newest), supported = tested, "{}.{} to {}.{}".format(*tested[0], *tested[1])
    if found and found < oldest:
        raise UnsupportedError(f"found {host} {version}; supported by {by}: {supported}")
    if not found or found > newest:
        warn_once("Found %s %s; %s was tested with %s", host, version, by, supported)


def slow_on_cpu(by: str) -> str:
    """What logs say of a model whose linears lie on a CPU."""
    return f"On a CPU {by} is for tests: `gossamer serve` is fast there"
