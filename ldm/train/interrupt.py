"""Signals to stop: the first is noted and work ends at a good place, a second one ends it at once."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A training that was told to stop and has saved; `number` is the signal's."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}, which is saved")
        self.number = number


class Interrupts:
    """While entered, SIGINT and SIGTERM only set `received` (the signal's number, 0 for none), once.

    Handlers belong to the main thread; in another one this changes nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
