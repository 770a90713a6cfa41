"""Ctrl-C and SIGTERM while a model trains: finish nothing more than is safe, save, stop."""

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
    """Once asked to stop, saves the last finished step and ends training; asked again later, raises at once.

    Later, because torchrun hands its processes the very Ctrl-C that they had from the terminal. All of them
    stop after the same step. One under way is given up between two of its micro-batches: until the optimizer
    runs, nothing of it has touched weights or moments.

    torchrun kills its processes 30 s after it passed the signal on: where a micro-batch and a save take more,
    `torchrun --shutdown-timeout SECONDS` (torch 2.13 has it) saves what was done since the last checkpoint.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked = False
        self._asked_at = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals, where this thread may and they are not ignored (as under `nohup`)."""
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
