"""Requests to stop, which wait for the end of a step."""

import signal
import threading
from typing import Any

import jax


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a request to stop after this step.

    Cloud machines send SIGTERM some seconds before they are taken away. Over several
    processes JAX takes the signal, tells it to the others, and finds a step that all
    can stop after.
    """

    def __init__(self):
        self._is_set = False
        self._old: dict[int, Any] = {}

    def is_due(self, step: int) -> bool:
        """Whether to stop after this step; asked at every step, by every process."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_set

    def __enter__(self) -> "StopRequest":
        is_main_thread = threading.current_thread() is threading.main_thread()
        if is_main_thread and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: Any) -> None:
        del frame
        self._is_set = True
        signal.signal(number, self._old[number])  # A second one is not held back.

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
