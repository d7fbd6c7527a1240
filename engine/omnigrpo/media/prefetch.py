"""Loads the items of a sequence ahead of whoever reads them, a bounded number at a time."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

Loaded = TypeVar("Loaded")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefetchStats:
    """How the reader fared so far."""

    gets: int = 0
    ready: int = 0
    """Items that were ready when the reader asked, summed over its calls; the one it asked for counts."""
    stalls: int = 0
    """Calls in which the reader had to wait; without prefetch, all of them."""
    stall_seconds: float = 0.0
    """Time that the reader waited."""

    def __sub__(self, other: "PrefetchStats") -> "PrefetchStats":
        return PrefetchStats(
            gets=self.gets - other.gets,
            ready=self.ready - other.ready,
            stalls=self.stalls - other.stalls,
            stall_seconds=self.stall_seconds - other.stall_seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What a stage made of a position."""

    value: object = None
    error: BaseException | None = None


class PrefetchQueue(Generic[Loaded, Item]):
    """Item ``position`` is ``finish(load(position))``; both run in order of position, each in a thread of its own.

    While ``finish`` works on one item (the towers on the GPU), ``load`` works on the next (decoding on the CPU). No
    more than ``depth`` items after the one that the reader took last are begun: then both threads wait for the
    reader. What either raises is raised by ``get`` at that position; asking again tries again.

    One thread reads, and any may close. Both functions must give the same item for a position whenever they are
    asked, so that it does not matter how far the queue ran ahead when a run ended.
    """

    def __init__(
        self,
        load: Callable[[int], Loaded],
        finish: Callable[[Loaded], Item],
        *,
        depth: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start nothing yet: the first ``get`` says where to begin. With ``depth`` 0 it does all the work itself."""
        if depth < 0:
            raise ValueError(f"prefetch depth must not be negative, got {depth}; 0 turns prefetch off")
        self._load, self._finish, self._depth, self._clock = load, finish, depth, clock
        self._changed = threading.Condition()
        self._stats = PrefetchStats()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._run = 0
        """Counts the beginnings; what an earlier one left under way is thrown away."""
        self._next: int | None = None
        """The position that the reader will ask for."""
        self._to_load = self._to_finish = 0
        self._loaded: dict[int, _Outcome] = {}
        self._ready: dict[int, _Outcome] = {}

    @property
    def stats(self) -> PrefetchStats:
        """Counts since the beginning."""
        with self._changed:
            return self._stats

    @property
    def num_ready(self) -> int:
        """Items that wait for the reader now."""
        with self._changed:
            return len(self._ready)

    def get(self, position: int) -> Item:
        """Return the item of a position; another one than the next begins there anew (a run that is resumed)."""
        started = self._clock()
        if self._depth == 0:
            if self._closed:
                raise _closed_error()
            try:
                return self._finish(self._load(position))
            finally:
                self._count(ready=0, stalled=True, started=started)
        with self._changed:
            if position != self._next:
                self._begin(position)
            ready, stalled = len(self._ready), position not in self._ready
            while position not in self._ready and not self._closed:
                self._changed.wait()
            if self._closed:
                raise _closed_error()
            outcome = self._ready.pop(position)
            self._next = position + 1 if outcome.error is None else None
            self._changed.notify_all()
        self._count(ready=ready, stalled=stalled, started=started)
        if outcome.error is not None:
            raise outcome.error
        return cast(Item, outcome.value)

    def close(self) -> None:
        """Begin nothing more, wait for what is under way, and forget what is ready; a waiting reader gets an error."""
        with self._changed:
            self._closed = True
            self._loaded.clear()
            self._ready.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, position: int) -> None:
        self._run += 1
        self._next = self._to_load = self._to_finish = position
        self._loaded.clear()
        self._ready.clear()
        if not self._threads and not self._closed:
            for name, work in (("prefetch-load", self._load_ahead), ("prefetch-finish", self._finish_ahead)):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()
        self._changed.notify_all()

    def _load_ahead(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._may_load():
                    self._changed.wait()
                if self._closed:
                    return
                run, position = self._run, self._to_load
                self._to_load += 1
            outcome = _attempt(self._load, position)
            with self._changed:
                if run == self._run and not self._closed:
                    self._loaded[position] = outcome
                    self._changed.notify_all()
            del outcome  # A thread that waits holds no item.

    def _finish_ahead(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._to_finish not in self._loaded:
                    self._changed.wait()
                if self._closed:
                    return
                run, position = self._run, self._to_finish
                self._to_finish += 1
                outcome = self._loaded.pop(position)
            if outcome.error is None:
                outcome = _attempt(self._finish, outcome.value)
            with self._changed:
                if run == self._run and not self._closed:
                    self._ready[position] = outcome
                    self._changed.notify_all()
            del outcome

    def _may_load(self) -> bool:
        return self._next is not None and self._to_load < self._next + self._depth

    def _count(self, *, ready: int, stalled: bool, started: float) -> None:
        seconds = self._clock() - started if stalled else 0.0
        with self._changed:
            self._stats = PrefetchStats(
                gets=self._stats.gets + 1,
                ready=self._stats.ready + ready,
                stalls=self._stats.stalls + int(stalled),
                stall_seconds=self._stats.stall_seconds + seconds,
            )


def _attempt(work: Callable, argument: object) -> _Outcome:
    try:
        return _Outcome(value=work(argument))
    except BaseException as error:  # noqa: BLE001 (raised again in the reader's thread)
        return _Outcome(error=error)


def _closed_error() -> RuntimeError:
    return RuntimeError("the prefetch queue is closed; items cannot be read from it any more")
