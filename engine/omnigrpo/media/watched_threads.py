"""Runs tasks in threads and goes on without those that hang.

A thread that is inside a C library cannot be stopped: one that is over its time is left behind, and a fresh one
takes its place. Threads are daemons, so that a hanging one does not keep the process from ending.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

R = TypeVar("R")

GRACE_SECONDS = 2.0
"""How much longer than its own deadline a task may take before its thread is left behind."""


def run_watched(
    tasks: Sequence[Callable[[], R]],
    *,
    num_threads: int,
    timeout_seconds: float,
    on_timeout: Callable[[int], R],
    admit: Callable[[int], None] | None = None,
) -> list[R]:
    """Run tasks in ``num_threads`` threads and return their results in order.

    Args:
        tasks: each should end by itself within ``timeout_seconds``.
        num_threads: how many run at once.
        timeout_seconds: after this and ``GRACE_SECONDS`` a task counts as hanging.
        on_timeout: gives the result of a hanging task from its index.
        admit: called with a task's index before its time begins to count; may wait.

    Raises the first exception of a task at once: those that run go on, and their results are thrown away. What a
    hanging task raises later counts for nothing.
    """
    watch = _Watch(tasks, timeout_seconds + GRACE_SECONDS, on_timeout, admit)
    for _ in range(min(num_threads, len(tasks))):
        watch.start_thread()
    return watch.wait()


class _Watch(Generic[R]):
    """The tasks of one call, and who works on which."""

    def __init__(
        self,
        tasks: Sequence[Callable[[], R]],
        limit_seconds: float,
        on_timeout: Callable[[int], R],
        admit: Callable[[int], None] | None,
    ) -> None:
        self._tasks, self._limit_seconds, self._on_timeout = tasks, limit_seconds, on_timeout
        self._admit = admit
        self._changed = threading.Condition()
        self._next, self._is_over = 0, False
        self._started: dict[int, float] = {}
        """Time at which each running task began."""
        self._given_up: set[int] = set()
        self._results: dict[int, R] = {}
        self._failure: BaseException | None = None

    def start_thread(self) -> None:
        """Add a worker."""
        threading.Thread(target=self._work, name="decode", daemon=True).start()

    def wait(self) -> list[R]:
        """Watch until every task has a result; an interrupt lets no further task begin."""
        try:
            while not self._is_done():
                for index in self._hanging():
                    self.start_thread()
                    result = self._on_timeout(index)
                    with self._changed:
                        self._results[index] = result
            if self._failure is not None:
                raise self._failure
            return [self._results[index] for index in range(len(self._tasks))]
        finally:
            with self._changed:
                self._is_over = True

    def _seconds_left(self) -> float | None:
        if not self._started:
            return None
        return max(min(self._started.values()) + self._limit_seconds - time.monotonic(), 0.0) + 0.01

    def _is_done(self) -> bool:
        with self._changed:
            return self._failure is not None or len(self._results) == len(self._tasks)

    def _hanging(self) -> list[int]:
        """Wait until something changes, or a task is over its time; returns those, which are given up now."""
        with self._changed:
            if self._failure is None and len(self._results) < len(self._tasks):
                self._changed.wait(self._seconds_left())
            now = time.monotonic()
            hanging = [i for i, began in self._started.items() if now - began > self._limit_seconds]
            for index in hanging:
                del self._started[index]
                self._given_up.add(index)
            return hanging

    def _work(self) -> None:
        while (index := self._take()) is not None:
            try:
                if not self._begin(index):
                    return
                result = self._tasks[index]()
            except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
                self._fail(index, error)
                return
            if not self._finish(index, result):
                return

    def _fail(self, index: int, error: BaseException) -> None:
        with self._changed:
            if index not in self._given_up:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _take(self) -> int | None:
        with self._changed:
            if self._next >= len(self._tasks) or self._is_over or self._failure is not None:
                return None
            index, self._next = self._next, self._next + 1
            return index

    def _begin(self, index: int) -> bool:
        """Wait until the task may begin; False when nobody waits for its result any more."""
        if self._admit is not None:
            self._admit(index)
        with self._changed:
            if self._is_over or self._failure is not None:
                return False
            self._started[index] = time.monotonic()
            self._changed.notify_all()
            return True

    def _finish(self, index: int, result: R) -> bool:
        """Keep a result; False when the task was given up meanwhile, and this thread with it."""
        with self._changed:
            if self._started.pop(index, None) is None:
                return False
            self._results[index] = result
            self._changed.notify_all()
            return True
