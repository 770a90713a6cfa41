"""When a run through the layers saves what it has come to; `layer_checkpoint.py` says how."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gossamer.checkpoint.directory import SHARD_BYTES, Derived
from gossamer.data.calibration import CalibrationOptions
from gossamer.job.report import Event, Progress

LEAST_S = 10.0
MOST_SHARE = 1 / 30  # of the time, for saving


@dataclass
class Saving:
    """Saves checkpoints of a run now and then, each after a layer.

    `ids_BT`: the calibration text; `states`: by name, what the run has changed in place after each layer.
    All else that a resumed run needs is in `output`: tensors that were written, and metrics.
    `started`: when this process began with it; `earlier_s`: what it took before it was interrupted.
    """

    output: Derived
    job: CalibrationOptions
    ids_BT: Tensor
    states: Mapping[str, Tensor]
    started: float
    earlier_s: float = 0.0
    saved: float = 0.0
    took_s: float = 0.0

    def begin(self, progress: Progress) -> int:
        """How many layers are finished: as many as the run had saved that is resumed, with its states.

        Raises OSError where the disk has no room for the output and two checkpoints (the older one goes when
        the newer is whole), and what `Checkpoints.newest_sound` does.
        """
        self.saved = time.monotonic()
        if self.job.save_seconds != float("inf"):
            from gossamer.checkpoint.resumable import check_room

            model_bytes = sum(entry.num_bytes for entry in self.output.parent.entries.values())
            checkpoint_bytes = min(SHARD_BYTES, model_bytes) + sum(s.nbytes for s in self.states.values())
            check_room(self.output.path, model_bytes + 2 * checkpoint_bytes)
        if not self.job.resume:
            return 0
        from gossamer.layerwise.layer_checkpoint import load

        layer, self.earlier_s, notes = load(self)
        of = len(self.output.parent.architecture.blocks)
        for note in (f"going on after layer {layer} of {of}", *notes):
            progress(Event(self.output.stage, note, lasting=True))
        return layer

    def seconds(self) -> float:
        """How long the run has taken so far, without what was lost by interruptions."""
        return self.earlier_s + time.monotonic() - self.started

    def after(self, num_layers: int) -> None:
        """Save, if it is time, that so many layers are finished; the last one is followed by the output."""
        wanted, now = self.job.save_seconds, time.monotonic()
        interval_s = max(LEAST_S, self.took_s / MOST_SHARE) if wanted is None else wanted
        if now - self.saved >= interval_s and num_layers < len(self.output.parent.architecture.blocks):
            from gossamer.layerwise.layer_checkpoint import save

            save(self, num_layers)
            self.saved = time.monotonic()
            self.took_s = self.saved - now
