"""Ctrl-C and SIGTERM while a model trains: stop at the next safe moment, save, and end the run."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from gossamer.training.parallel import any_process

SAME_PRESS_S = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """On the first signal, saves the last finished step and ends training; on a second one, raises at once.

    A signal within a second of the first does not count as a second one, because torchrun passes on to its
    processes the Ctrl-C that they have already received from the terminal. All processes stop after the same
    step. A step that has begun is abandoned between two of its micro-batches: weights and moments do not
    change before the optimizer runs.

    torchrun kills its processes 30 s after it has passed the signal on. If a micro-batch and a save take
    longer, `torchrun --shutdown-timeout SECONDS` (since torch 2.13) gives them the time to save.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked = False
        self._asked_at = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals for the time of the block.

        Only the main thread may set a handler, and an ignored signal (as under `nohup`) stays ignored.
        """
        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.getsignal(number) for number in SIGNALS}
        previous = {number: old for number, old in previous.items() if old is not signal.SIG_IGN}
        for number in previous:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop(state, control)

    def _stop(self, state: Any, control: Any) -> None:
        self.asked = any_process(self.asked)
        if self.asked and not control.should_training_stop:
            control.should_training_stop = True
            control.should_save = state.global_step > 0
            self.say(f"stopping after step {state.global_step}, saving it")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
        elif now - self._asked_at > SAME_PRESS_S:
            raise KeyboardInterrupt
