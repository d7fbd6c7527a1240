"""Two decoders at work on one queue of opened clips: PyAV in threads of the CPU, and DALI on batches.

Each clip has a thread of its own, which opens it and then either decodes it or waits for DALI. Work on the CPU needs
one of ``num_workers`` slots; waiting needs none, so that the next clip is opened meanwhile. A thread that finds DALI
idle decodes a batch of all that wait. Where both decoders share the work, a thread whose clip would wait long takes it
back as soon as there is a slot, and decodes it itself.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.decode_dali import DaliClip, DaliFailure, dali_decoder


@dataclass(frozen=True, kw_only=True, slots=True)
class DaliWork:
    """What DALI does in one call of ``decode``."""

    device: torch.device
    num_threads: int
    """Clips that DALI decodes at once, and the size of its batches."""
    is_shared: bool
    """Whether the CPU takes back clips that wait."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Request:
    """A clip that waits for DALI, or is being decoded by it."""

    clip: DaliClip
    outcome: Tensor | DaliFailure | None = field(default=None)
    is_taken: bool = False
    """Whether it is in a batch."""


class DecodeQueue:
    """The slots of the CPU, and the clips that wait for DALI, in one call of ``decode``.

    Clips go by their index. ``admit`` gives a slot, ``release`` gives it back, and ``decode_by_dali`` does without one
    while it waits.
    """

    def __init__(self, *, num_clips: int, num_workers: int, dali: DaliWork | None) -> None:
        self._num_unopened, self._num_workers, self._dali = num_clips, num_workers, dali
        self._changed = threading.Condition()
        self._slots: set[int] = set()
        self._num_returning = 0
        """Threads that come back from DALI and want a slot: before new clips, for their frames are in memory."""
        self._waiting: list[_Request] = []
        self._is_busy = self._is_hanging = False
        """Of DALI."""
        self._is_closed = False

    @property
    def num_threads(self) -> int:
        """One for each slot; and for DALI a batch at work and one that waits."""
        return self._num_workers + (0 if self._dali is None else 2 * self._dali.num_threads)

    def admit(self, index: int) -> None:
        """Wait for a slot to open a clip."""
        with self._changed:
            self._changed.wait_for(self._may_open)
            self._num_unopened -= 1
            self._slots.add(index)
            self._changed.notify_all()

    def release(self, index: int) -> None:
        """Give a clip's slot back, if it has one."""
        with self._changed:
            self._slots.discard(index)
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait for a slot any more: the call is over, with its results or with an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def decode_by_dali(self, index: int, clip: DaliClip, deadline: Deadline) -> Tensor | DaliFailure | None:
        """Frames of a clip that has a slot, as ``DaliDecoder.decode``; None when the CPU is to decode it after all.

        Raises ClipError when the time is over.
        """
        request = _Request(clip=clip)
        with self._changed:
            self._slots.discard(index)
            self._waiting.append(request)
            self._changed.notify_all()
        try:
            while batch := self._wait(request, index, deadline):
                self._decode(batch)
        finally:
            with self._changed:
                if request in self._waiting:
                    self._waiting.remove(request)
        if request.outcome is not None:
            deadline.check()
            self._return(index)
        return request.outcome

    def _may_open(self) -> bool:
        if self._is_closed:
            return True
        is_clogged = (
            self._dali is not None and self._dali.is_shared and len(self._waiting) > self._dali.num_threads
        )
        return self._has_slot() and self._num_returning == 0 and not is_clogged

    def _has_slot(self) -> bool:
        return len(self._slots) < self._num_workers

    def _wait(self, request: _Request, index: int, deadline: Deadline) -> Sequence[_Request] | None:
        """A batch to decode as soon as DALI is idle; None when the request is done with, or taken back."""
        with self._changed:
            while request.outcome is None:
                if not self._is_busy and not request.is_taken:
                    return self._take_batch()
                if self._may_take_back(request):
                    self._waiting.remove(request)
                    self._slots.add(index)
                    return None
                if not self._changed.wait(max(deadline.at_seconds - time.monotonic(), 0.0) + 0.01):
                    self._is_hanging = self._is_hanging or request.is_taken
                    self._changed.notify_all()
                    deadline.check()
            return None

    def _take_batch(self) -> Sequence[_Request]:
        assert self._dali is not None
        batch, self._waiting = (
            self._waiting[: self._dali.num_threads],
            self._waiting[self._dali.num_threads :],
        )
        for request in batch:
            request.is_taken = True
        self._is_busy = True
        return batch

    def _may_take_back(self, request: _Request) -> bool:
        """Of those that wait, the last one, which DALI would decode last."""
        if request.is_taken or request is not self._waiting[-1] or not self._has_slot():
            return False
        assert self._dali is not None
        is_long = len(self._waiting) > self._dali.num_threads or self._num_unopened == 0
        return self._is_hanging or (self._dali.is_shared and is_long)

    def _decode(self, batch: Sequence[_Request]) -> None:
        """Decode a batch and hand out its results; an unexpected error is raised in this thread alone."""
        assert self._dali is not None
        outcomes: Sequence[Tensor | DaliFailure] = [DaliFailure(reason="the batch ended in an error")] * len(
            batch
        )
        try:
            with dali_decoder(self._dali.device, self._dali.num_threads) as decoder:
                outcomes = decoder.decode([request.clip for request in batch])
        finally:
            with self._changed:
                self._is_busy = False
                for request, outcome in zip(batch, outcomes, strict=True):
                    request.outcome = outcome
                self._changed.notify_all()

    def _return(self, index: int) -> None:
        with self._changed:
            self._num_returning += 1
            self._changed.wait_for(lambda: self._is_closed or self._has_slot())
            self._num_returning -= 1
            self._slots.add(index)
            self._changed.notify_all()
