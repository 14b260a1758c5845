"""Who drives an engine, and how threads share it.

Either a thread runs the loop (the engine used as a context manager), or the callers that wait for
something do. Every access happens between two steps.
"""

from __future__ import annotations

import abc
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from flexjax.engine.heap import settled_heap
from flexjax.errors import EngineDeadError

_Loop = TypeVar("_Loop", bound="EngineLoop")  # no typing.Self: beartype refuses it


class EngineLoop(abc.ABC):
    """The loop around `_step`, and the lock that everything else takes.

    While a thread runs it, full garbage collections leave older objects alone (`settled_heap`).
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pending_calls = 0
        self._pending_lock = threading.Lock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._should_stop = False
        self._dead: BaseException | None = None

    @abc.abstractmethod
    def _step(self) -> bool:
        """Runs one iteration; returns whether there was anything to do."""

    @abc.abstractmethod
    def _tell_dead(self, error: BaseException) -> None:
        """Tells everyone who waits that nothing will come any more."""

    def step(self) -> bool:
        """Runs one iteration: plans and launches a step, reads the one before it.

        Returns:
          Whether there was anything to do.
        """
        with self._lock:
            self._check_alive()
            try:
                return self._step()
            except BaseException as error:
                self._dead = error
                self._tell_dead(error)
                raise

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the engine between two steps; a running loop yields to it."""
        with self._pending_lock:
            self._pending_calls += 1
        try:
            with self._lock:
                yield
        finally:
            with self._pending_lock:
                self._pending_calls -= 1

    def wait_for(
        self, event: threading.Event, timeout: float | None, check: Callable[[], None]
    ) -> None:
        """Waits for `event`, driving the engine where no thread does.

        Raises:
          EngineDeadError: If the engine stopped on an internal error.
        """
        deadline = None if timeout is None else time.perf_counter() + timeout
        while not event.is_set():
            if deadline is not None and time.perf_counter() >= deadline:
                return
            self._check_alive()
            if self._thread is not None and threading.current_thread() is not self._thread:
                event.wait(0.05)
            elif not self.step():
                check()
                time.sleep(0.001)

    def __enter__(self: _Loop) -> _Loop:
        self._should_stop = False
        self._thread = threading.Thread(target=self._loop, name="flexjax-engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        thread, self._should_stop = self._thread, True
        self._notify()
        if thread is not None:
            thread.join()
        self._thread = None

    def _loop(self) -> None:
        with settled_heap():
            while not self._should_stop:
                try:
                    has_work = self.step()
                except BaseException:  # the engine is dead; everyone who waits has been told
                    return
                while self._pending_calls and not self._should_stop:
                    time.sleep(0.0001)
                if not has_work:
                    with self._wake:
                        self._wake.wait(0.02)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"The engine stopped: {self._dead!r}") from self._dead
