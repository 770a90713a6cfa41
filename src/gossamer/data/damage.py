"""Files of data that cannot be read to their end, in the user's words. Loaded only once one is met."""

from pathlib import Path

from gossamer.checkpoint.diagnosis import is_lfs_pointer
from gossamer.errors import ConfigError


def damaged(path: Path, reason: Exception | str) -> ConfigError:
    """The error of a file that a library refuses, or that ends too early."""
    if is_lfs_pointer(path):
        return ConfigError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    return ConfigError(f"{path}: damaged, cut short, or of another kind ({reason}); fetch it again")
