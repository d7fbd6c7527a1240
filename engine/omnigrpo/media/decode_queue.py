"""Two decoders at work on one queue of opened clips: PyAV in threads of the CPU, and DALI on batches.

Each clip has a thread of its own, which opens it and then either decodes it or waits for DALI. Work on the CPU needs
one of ``num_workers`` slots; waiting needs none, so that the next clip is opened meanwhile. A thread that finds DALI
idle starts a batch of all that wait, in a further thread, so that none hangs with DALI. Where both decoders share the
work, a thread whose clip would wait long takes it back as soon as there is a slot, and decodes it itself.
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
    outcome: Tensor | DaliFailure | BaseException | None = field(default=None)
    is_taken: bool = False
    """Whether it is in a batch."""
    is_taken_back: bool = False
    """Whether the CPU decodes it after all; what DALI gives later is thrown away."""


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

        DALI has half of the clip's time: if it hangs, the other half is left for the CPU. Raises ClipError when the
        time is over, and what ``DaliDecoder.decode`` raises.
        """
        request = _Request(clip=clip)
        with self._changed:
            self._slots.discard(index)
            self._waiting.append(request)
            self._changed.notify_all()
        try:
            self._wait(request, index, deadline)
        finally:
            with self._changed:
                if request in self._waiting:
                    self._waiting.remove(request)
        if request.is_taken_back:
            return None
        deadline.check()
        self._return(index)
        if isinstance(request.outcome, BaseException):
            raise request.outcome
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

    def _wait(self, request: _Request, index: int, deadline: Deadline) -> None:
        """Until the request has an outcome, or is taken back; starts a batch when DALI is idle."""
        late_at_seconds = deadline.at_seconds - deadline.timeout_seconds / 2
        with self._changed:
            while request.outcome is None:
                if not self._is_busy and not request.is_taken:
                    self._start_batch()
                    continue
                is_late = time.monotonic() >= late_at_seconds
                if is_late and request.is_taken and not self._is_hanging:
                    self._is_hanging = True
                    self._changed.notify_all()
                if self._has_slot() and (is_late or self._may_take_back(request)):
                    self._take_back(request, index)
                    return
                until_seconds = deadline.at_seconds if is_late else late_at_seconds
                self._changed.wait(max(until_seconds - time.monotonic(), 0.0) + 0.01)
                deadline.check()

    def _start_batch(self) -> None:
        assert self._dali is not None
        batch, self._waiting = (
            self._waiting[: self._dali.num_threads],
            self._waiting[self._dali.num_threads :],
        )
        for request in batch:
            request.is_taken = True
        self._is_busy = True
        threading.Thread(target=self._decode, args=(batch,), name="dali", daemon=True).start()

    def _may_take_back(self, request: _Request) -> bool:
        """Of those that wait, the last one, which DALI would decode last; while DALI hangs, each in turn."""
        if request.is_taken or request is not self._waiting[-1]:
            return False
        assert self._dali is not None
        is_long = len(self._waiting) > self._dali.num_threads or self._num_unopened == 0
        return self._is_hanging or (self._dali.is_shared and is_long)

    def _take_back(self, request: _Request, index: int) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        request.is_taken_back = True
        self._slots.add(index)

    def _decode(self, batch: Sequence[_Request]) -> None:
        """Decode a batch and hand out its results, or the error that each of its threads then raises."""
        assert self._dali is not None
        outcomes: Sequence[Tensor | DaliFailure | BaseException]
        try:
            with dali_decoder(self._dali.device, self._dali.num_threads) as decoder:
                outcomes = decoder.decode([request.clip for request in batch])
        except BaseException as error:  # noqa: BLE001 (raised again where it is waited for)
            outcomes = [error] * len(batch)
        with self._changed:
            self._is_busy = self._is_hanging = False
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
