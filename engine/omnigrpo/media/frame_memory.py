"""Memory for full-size frames that is used again once nobody reads them.

Frames live briefly: the next step makes small pixels of them. But the 22 MB of eight 720p frames are more than malloc
keeps, so each clip would get fresh pages from the kernel, at 1.6 ms a frame on a virtual machine: three times what
converting a picture takes.
"""

import threading
import weakref
from collections import deque
from math import prod

import numpy as np
import torch
from torch import Tensor

KEPT_BYTES = 256 * 2**20
"""Most memory that is kept for later, bytes."""


class FrameMemory:
    """Lends memory; it comes back by itself when the last tensor that shares it is gone. For many threads."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self._returned: deque[np.ndarray] = deque()
        """Blocks that came back and are not sorted in yet."""
        self._free: list[np.ndarray] = []
        """Blocks that nobody uses, the one that came back last at the end."""

    @property
    def free_bytes(self) -> int:
        """Memory that is kept now."""
        with self._lock:
            self._sort_in()
            return sum(block.nbytes for block in self._free)

    def empty(self, *shape: int) -> Tensor:
        """A contiguous uint8 tensor on the CPU, of any content."""
        size = prod(shape)
        block = self._take(size)
        if block is None:
            block = np.empty(size, np.uint8)
        lent = block[
            :size
        ]  # An object of its own: the tensor holds it, and its end tells that the tensor's came.
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent).view(shape)

    def _take(self, size: int) -> np.ndarray | None:
        """A free block that fits and is not far too large."""
        with self._lock:
            self._sort_in()
            for at in reversed(range(len(self._free))):
                if size <= self._free[at].nbytes <= 2 * size:
                    return self._free.pop(at)
        return None

    def _give_back(self, block: np.ndarray) -> None:
        """May run anywhere, wherever the garbage collector does: so it waits for no lock."""
        self._returned.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            if block.nbytes <= self._kept_bytes:
                self._free.append(block)
        while sum(block.nbytes for block in self._free) > self._kept_bytes:
            self._free.pop(0)


FRAME_MEMORY = FrameMemory()
"""Of the whole process: clips are decoded in threads that come and go."""
