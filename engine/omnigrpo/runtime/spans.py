"""Wall time per phase of a step, in the metrics and as NVTX ranges."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import nvtx
import torch

Item = TypeVar("Item")

OVERLAPPED_PREFIX = "overlapped/"
"""Marks the seconds of spans that ran beside the recorder's own thread."""


class Phase(StrEnum):
    """The phases that one training step passes through, in order."""

    MEDIA_WAIT = "media_wait"
    """Until the features of the step's clips are at hand; what is decoded and encoded meanwhile counts apart."""
    DECODE = "decode"
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE_TOKENS = "decode_tokens"
    REWARD = "reward"
    PACK = "pack"
    REFERENCE = "reference"
    FORWARD = "forward"
    HEAD = "head"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    PUBLISH = "publish"


@dataclass(slots=True)
class _Frame:
    """One open span."""

    started: float
    nested_seconds: float = 0.0


class _End:
    """No item of an iterable."""


_END = _End()


class _ThreadSpans(threading.local):
    """The spans that a thread has open, outermost first."""

    def __init__(self) -> None:
        self.open: list[_Frame] = []


class SpanRecorder:
    """Adds up the seconds of named spans.

    Accounting is exclusive: while a span is open inside another of its thread, only the inner one counts,
    so the phases of the thread that built the recorder never add up to more than the wall time. Spans of
    any other thread run at the same time as those; ``drain`` reports them under ``overlapped/<name>``.
    A span counts when it closes: one that is open during a drain belongs to the next.

    CUDA work is asynchronous, so by default a span holds the time to launch it and whoever waits pays for it.
    ``synchronize_cuda`` waits for the device at both ends of every span: true times per phase, at the price
    of the overlap.
    """

    def __init__(
        self, *, synchronize_cuda: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if synchronize_cuda and not torch.cuda.is_available():
            raise ValueError(
                "synchronize_cuda is true, but torch finds no CUDA device; set it to false to time on the CPU"
            )
        self._synchronize_cuda = synchronize_cuda
        self._clock = clock
        self._owner = threading.get_ident()
        self._thread = _ThreadSpans()
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what runs inside towards ``name``, also when it raises."""
        open_spans = self._thread.open
        with nvtx.annotate(str(name)):
            frame = _Frame(self._now())
            open_spans.append(frame)
            try:
                yield
            finally:
                open_spans.pop()
                self._close(str(name), frame, parent=open_spans[-1] if open_spans else None)

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and count towards ``name`` the time that each takes to come."""
        iterator = iter(items)
        while True:
            with self.span(name):
                item = next(iterator, _END)
            if isinstance(item, _End):
                return
            yield item

    def drain(self) -> dict[str, float]:
        """Seconds by name of the spans that closed since the last drain."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds

    def _close(self, name: str, frame: _Frame, parent: _Frame | None) -> None:
        elapsed = self._now() - frame.started
        if parent is not None:
            parent.nested_seconds += elapsed
        key = name if threading.get_ident() == self._owner else OVERLAPPED_PREFIX + name
        with self._lock:
            self._seconds[key] = self._seconds.get(key, 0.0) + elapsed - frame.nested_seconds

    def _now(self) -> float:
        if self._synchronize_cuda:
            torch.cuda.synchronize()
        return self._clock()
