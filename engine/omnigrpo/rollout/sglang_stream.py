"""The groups of one call, from SGLang's event loop to whoever reads them."""

import asyncio
import concurrent.futures
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from omnigrpo.rollout.interface import FinishedGroup, RolloutError
from omnigrpo.schema import Completion

GroupFuture = concurrent.futures.Future[tuple[Completion, ...]]

_POLL_SECONDS = 1.0
_ABORT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOwner:
    """What a stream asks of its engine."""

    timeout_seconds: float
    """Without a finished group, pauses left out."""
    is_paused: Callable[[], bool]
    error: Callable[[], RolloutError]
    """Why the engine ended."""
    abort: Callable[[], None]
    """End what is under way of this call, and let nothing more of it begin."""


class OpenCalls:
    """The calls under way of one stream, by their ids; for one event loop."""

    def __init__(self, abort: Callable[[str], None]) -> None:
        """``abort`` ends a call."""
        self._abort = abort
        self._ids: set[str] = set()
        self._is_closed = False

    def check(self) -> None:
        """Raise RolloutError when no call may begin any more."""
        if self._is_closed:
            raise RolloutError("the stream of these samples was closed")

    @contextmanager
    def under_way(self, request_id: str) -> Iterator[None]:
        """Around a call, which is aborted when the body is cancelled; raises as ``check`` does."""
        self.check()
        self._ids.add(request_id)
        try:
            yield
        except asyncio.CancelledError:
            self._abort(request_id)
            raise
        finally:
            self._ids.discard(request_id)

    def close(self) -> None:
        """Abort them all; none begins afterwards."""
        self._is_closed = True
        for request_id in tuple(self._ids):
            self._abort(request_id)


class SGLangStream:
    """Yields each group as soon as its last sample has ended; the samples are drawn whether or not it is read."""

    def __init__(self, futures: Mapping[GroupFuture, int], names: list[str], owner: StreamOwner) -> None:
        self._names = names
        self._owner = owner
        self._unfinished = dict(futures)
        self._finished: queue.SimpleQueue[GroupFuture] = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(self._finished.put)

    def __iter__(self) -> "SGLangStream":
        """Itself."""
        return self

    def __next__(self) -> FinishedGroup:
        """Wait for the next group; RolloutError when SGLang cannot give it, and then the others are aborted."""
        if not self._unfinished:
            raise StopIteration
        future = self._wait()
        index = self._unfinished.pop(future)
        if future.cancelled():
            self.close()
            raise self._owner.error()
        error = future.exception()
        if error is None:
            return FinishedGroup(index=index, completions=future.result())
        self.close()
        if isinstance(error, RolloutError):
            raise error
        raise RolloutError(f"SGLang failed on {self._names[index]}: {error!r}") from error

    def close(self) -> None:
        """Abort what is under way; nothing more is yielded."""
        if not self._unfinished:
            return
        self._owner.abort()
        concurrent.futures.wait(self._unfinished, timeout=_ABORT_SECONDS)
        for future in self._unfinished:
            future.cancel()
        self._unfinished.clear()

    def _wait(self) -> GroupFuture:
        """The next that is done."""
        waited = 0.0
        while waited < self._owner.timeout_seconds:
            begun = time.monotonic()
            try:
                return self._finished.get(timeout=min(_POLL_SECONDS, self._owner.timeout_seconds))
            except queue.Empty:
                waited += 0.0 if self._owner.is_paused() else time.monotonic() - begun
        missing = [self._names[index] for index in self._unfinished.values()]
        self.close()
        raise RolloutError(
            f"no group was finished within {self._owner.timeout_seconds} s; {len(missing)} are missing, {missing[0]} "
            "among them: raise sglang.timeout_seconds if they need that long"
        )
