"""What a run shows while it trains: events for the progress bar, `metrics.jsonl`, `loss.png`, TensorBoard.

Every figure is put into the Trainer's own log. All reporters therefore show the same figures, and the log of
a resumed run begins with that of the run that it resumes.
"""

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from gossamer import plots
from gossamer.errors import ConfigError
from gossamer.job.processes import is_first
from gossamer.job.report import Event, Progress
from gossamer.training.history import PARTS

METRICS, LOSS_CURVE, TENSORBOARD = "metrics.jsonl", "loss.png", "runs"
WINDOW_STEPS = 20
REDRAW_S = 60


def check_reporter(name: str) -> None:
    """Raise ConfigError for a reporter that transformers does not know or whose package is missing."""
    if name == "none":
        return
    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise ConfigError(f"--report-to {name}: expected none or one of {known}")
    try:
        INTEGRATION_TO_CALLBACK[name]()
    except (RuntimeError, ImportError) as error:
        raise ConfigError(f"--report-to {name}: {error}; install its package, or --report-to none") from error


def reporters(name: str, run_dir: Path, first_step: int) -> list[TrainerCallback]:
    """transformers' own callback for the reporter `name`; TensorBoard writes into the run's directory.

    TensorBoard forgets the steps from `first_step` on, which an interrupted run may already have written.
    """
    if name == "none" or not is_first():
        return []
    if name != "tensorboard":
        return [INTEGRATION_TO_CALLBACK[name]()]
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(log_dir=str(run_dir / TENSORBOARD), purge_step=first_step)
    return [INTEGRATION_TO_CALLBACK[name](writer)]


class Monitor(TrainerCallback):
    """Adds figures to the Trainer's log and passes it on to the progress bar and the run's own files."""

    def __init__(self, stage: str, progress: Progress, run_dir: Path, sparsity: float) -> None:
        self.stage, self.progress, self.run_dir, self.sparsity = stage, progress, run_dir, sparsity
        self._earlier_s = 0.0
        self._start = self._drawn = 0.0
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=WINDOW_STEPS + 1)
        self._file: TextIO | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock at the time at which the resumed run's log ends, and write that log again."""
        earlier = training_log(state)
        if earlier:
            self._earlier_s, self.sparsity = earlier[-1]["seconds"], earlier[-1]["sparsity"]
        self._start = self._drawn = time.perf_counter()
        num_tokens = earlier[-1]["num_tokens"] if earlier else 0
        self._recent.append((self._earlier_s, state.global_step, num_tokens))
        if state.is_world_process_zero:
            self._file = (self.run_dir / METRICS).open("w", encoding="utf-8")
            self._write(*earlier)

    def risen(self, sparsity: float) -> None:
        """Weights were made zero while training."""
        self.sparsity = sparsity

    def figures(self, step: int, max_steps: int, num_tokens: int) -> dict[str, float]:
        """The figures to add to the Trainer's log of `step`; num_tokens: trained on up to that step."""
        seconds = self._earlier_s + time.perf_counter() - self._start
        self._recent.append((seconds, step, num_tokens))
        then_s, then_step, then_tokens = self._recent[0]
        passed_s = seconds - then_s
        return {
            "sparsity": round(self.sparsity, 6),
            "num_tokens": num_tokens,
            "tokens_per_s": round((num_tokens - then_tokens) / passed_s, 1),
            "seconds": round(seconds, 3),
            "eta_s": round((max_steps - step) * passed_s / (step - then_step), 1),
            "memory_gb": round(resident_bytes() / 1e9, 3),
        }

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: Mapping[str, Any] = kwargs["logs"]
        if "loss" not in logs or not state.is_world_process_zero:
            return
        self._write(state.log_history[-1])
        names = (
            "loss",
            *PARTS,
            "tokens_per_s",
            "eta_s",
            "sparsity",
            "memory_gb",
            "learning_rate",
            "grad_norm",
        )
        metrics = {name: logs[name] for name in names if name in logs}
        self.progress(Event(self.stage, "training", state.global_step, state.max_steps, metrics))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.perf_counter() - self._drawn > REDRAW_S:
            self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw(state)
        if self._file is not None:
            self._file.close()

    def _write(self, *entries: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.writelines(json.dumps(entry) + "\n" for entry in entries)
        self._file.flush()

    def _draw(self, state: Any) -> None:
        self._drawn = time.perf_counter()
        losses = [entry["loss"] for entry in training_log(state)]
        if losses and state.is_world_process_zero:
            plots.loss_curve(self.run_dir / LOSS_CURVE, losses, f"{self.stage}, {self.sparsity:.0%} zeros")


def training_log(state: Any) -> list[dict[str, Any]]:
    """The Trainer's log, one entry for each optimizer step, those of the resumed run included."""
    return [entry for entry in state.log_history if "loss" in entry]


def resident_bytes() -> int:
    """Bytes of this process that are in physical memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
