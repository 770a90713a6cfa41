"""Activations that are NaN or infinite: of which linear, and from which row of the calibration text."""

import contextlib
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor

from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.calibration import CalibrationOptions, calibration_ids
from gossamer.errors import CalibrationError

NUM_TOKENS = 16


class NotFinite(CalibrationError):
    """What the linears `names` are given is NaN or infinite, first in this row."""

    def __init__(self, names: Collection[str], row: int) -> None:
        super().__init__(
            f"{', '.join(names)}: the inputs are NaN or infinite in row {row} of the calibration text"
        )
        self.row = row


def finite(inputs: Iterable[Tensor], names: Collection[str], first_row: int = 0) -> Iterator[Tensor]:
    """The pieces of input [rows, T, K] of some linears; NotFinite for the first row that is not finite.

    Rows are counted from `first_row` on.
    """
    for x_BTK in inputs:
        if not x_BTK.sum().isfinite():  # which is cheap, and also so where finite values add up to infinity
            for row, x_TK in enumerate(x_BTK, first_row):
                if not x_TK.isfinite().all():
                    raise NotFinite(names, row)
        first_row += len(x_BTK)
        yield x_BTK


@contextlib.contextmanager
def telling_text(source: Checkpoint, job: CalibrationOptions) -> Iterator[None]:
    """Add to NotFinite how the row begins."""
    try:
        yield
    except NotFinite as error:
        from gossamer.tokens.tokenizer import Tokenizer

        ids = calibration_ids(source, job)[error.row, 1:NUM_TOKENS].tolist()
        words = Tokenizer.open(source.path).decode(ids)
        raise CalibrationError(
            f"{error} (it begins {words!r}): the model overflows there; give other text, or mend its weights"
        ) from error
