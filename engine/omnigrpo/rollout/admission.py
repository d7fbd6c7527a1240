"""Lets groups begin in their order while what they need is free; for one event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What one group holds while it is under way."""

    rows: int
    """Of the KV cache, at most."""
    media_bytes: int
    """In shared memory, at most."""


class Admission:
    """First come, first served: whoever does not fit yet holds up those behind it, so nobody waits for ever."""

    def __init__(self, limit: Need) -> None:
        """``limit`` is what all of them may hold together; one that needs more goes alone."""
        self._limit = limit
        self._held: list[Need] = []
        self._queue: deque[object] = deque()
        self._changed = asyncio.Condition()

    @property
    def num_inside(self) -> int:
        """How many hold something."""
        return len(self._held)

    @asynccontextmanager
    async def hold(self, need: Need) -> AsyncIterator[None]:
        """Wait for its turn and for room, and hold it inside the body."""
        async with self._turn(lambda: not self._held or self._fits(need)):
            self._held.append(need)
        try:
            yield
        finally:
            self._held.remove(need)
            await self._notify()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait until nobody is inside; whoever comes meanwhile waits for the end of the body."""
        async with self._turn(lambda: not self._held):
            yield

    @asynccontextmanager
    async def _turn(self, is_ready: Callable[[], bool]) -> AsyncIterator[None]:
        """Be the first in the queue, and ready; nobody else begins until the body ends."""
        ticket = object()
        self._queue.append(ticket)
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._queue[0] is ticket and is_ready())
            yield
        finally:
            self._queue.remove(ticket)
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _fits(self, need: Need) -> bool:
        rows = need.rows + sum(held.rows for held in self._held)
        media_bytes = need.media_bytes + sum(held.media_bytes for held in self._held)
        return rows <= self._limit.rows and media_bytes <= self._limit.media_bytes
