"""Whether the disks have room for what is going to be written, asked before the work begins."""

import errno
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Need:
    """`num_bytes` that `what` is going to write into a folder, which need not be there yet."""

    folder: Path
    num_bytes: int
    what: str
    token_bytes: int

    def __str__(self) -> str:
        return f"{self.what} needs {size(self.num_bytes)} ({self.token_bytes:,} bytes a token)"


def check_room(needs: Sequence[Need], advice: str) -> None:
    """Raise OSError, which ends with the advice, where a disk has no room for all that it is to take."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(_place(need.folder).stat().st_dev, []).append(need)
    for of_disk in disks.values():
        folder = of_disk[0].folder
        free = shutil.disk_usage(_place(folder)).free
        if sum(need.num_bytes for need in of_disk) > free:
            needed = " and ".join(map(str, of_disk))
            raise OSError(
                errno.ENOSPC, f"{needed}, {size(free)} are free: make room, or {advice}", str(folder)
            )


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"


def _place(folder: Path) -> Path:
    """The folder, or the one that is there and that it will be made in."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
