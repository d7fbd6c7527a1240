"""Decodes many clips in one process, and measures after every batch what they leave behind.

Run as a script: ``decode_many.py DIRECTORY COUNT [--decoder NAME] [--leak]``. Prints JSON: how often each status came,
and each measure after every batch. With ``--leak`` something of every kind is left behind on purpose.
"""

import argparse
import ctypes
import gc
import json
import mmap
import os
import resource
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
from broken_files import good_file
from decode_mutations import DECODERS

from omnigrpo.schema import Clip, ClipStatus

PER_BATCH = 20
LEAKED_HEAP_BYTES = 20_000
"""Per clip."""
LEAKED_PAGES_BYTES = 100_000
"""Per clip; outside the heap, so that resident memory alone shows it."""
MEASURES = ("heap_bytes", "resident_bytes", "python_blocks", "open_files", "threads")
C_LIBRARY = ctypes.CDLL(None)


def clips(directory: Path) -> list[Clip]:
    """Half of them good; the others broken in many ways."""
    half = {
        name: good_file(name)[: len(good_file(name)) // 2] for name in ("behind.mp4", "front.mp4", "h264.mkv")
    }
    noisy = {name: _noisy(good_file(name)) for name in ("front.mp4", "hevc.mp4")}
    files = {
        **{f"good {name}": good_file(name) for name in GOOD_NAMES},
        **{f"half {name}": content for name, content in half.items()},
        "half mpeg4.avi": good_file("mpeg4.avi")[:20_000],
        **{f"noisy {name}": content for name, content in noisy.items()},
        "text.mp4": b"this is no video\n" * 100,
        "unknown codec.avi": good_file("mpeg4.avi").replace(b"FMP4", b"xxxx"),
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return [
        Clip(path=path) for path in (*map(directory.joinpath, files), directory, directory / "nowhere.mp4")
    ]


GOOD_NAMES = (
    "behind.mp4",
    "front.mp4",
    "fragments.mp4",
    "hevc.mp4",
    "h264.mkv",
    "av1.mkv",
    "vp9.webm",
    "h264.ts",
    "mpeg4.avi",
    "mjpeg.mov",
)


def _noisy(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[: middle - 3000] + bytes(range(250)) * 24 + content[middle + 3000 :]


class _HeapUsage(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "mapped_bytes", "usmblks", "fsmblks"),
            *("used_bytes", "free_bytes", "keepcost"),
        )
    )


def measures() -> tuple[int, ...]:
    """``MEASURES``, once threads that are done are gone and free memory is given back.

    The heap's used bytes are exact, and grow by what is leaked; resident memory shows what lies elsewhere.
    """
    for thread in threading.enumerate():
        if thread.name == "decode":
            thread.join()
    gc.collect()  # Empties Python's lists of free objects, too.
    C_LIBRARY.malloc_trim(0)
    heap = C_LIBRARY.mallinfo2()
    resident_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return (
        heap.used_bytes + heap.mapped_bytes,
        resident_pages * resource.getpagesize(),
        sys.getallocatedblocks(),
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        len(os.listdir("/proc/self/task")),  # noqa: PTH208
    )


class Leak:
    """Holds on to something of every kind, to show that the measures see it."""

    def __init__(self) -> None:
        self._kept: list[object] = []

    def grow(self, num_clips: int) -> None:
        for _ in range(num_clips):
            pages = mmap.mmap(-1, LEAKED_PAGES_BYTES)
            pages.write(b"x" * LEAKED_PAGES_BYTES)
            self._kept += [bytearray(LEAKED_HEAP_BYTES), pages, object()]
        os.open("/dev/null", os.O_RDONLY)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


def main(directory: Path, count: int, decoder: str, *, leak: bool) -> None:
    C_LIBRARY.mallinfo2.restype = _HeapUsage
    batch = clips(directory)
    assert len(batch) == PER_BATCH
    statuses: Counter[ClipStatus] = Counter()
    history = np.zeros((count // PER_BATCH, len(MEASURES)), np.int64)
    """Made beforehand, to be no growth itself."""
    kept = Leak()
    for turn in range(count // PER_BATCH):
        statuses.update(clip.status for clip in DECODERS[decoder](batch))
        if leak:
            kept.grow(PER_BATCH)
        history[turn] = measures()
    columns = zip(MEASURES, history.T.tolist(), strict=True)
    print(json.dumps({"statuses": statuses, **dict(columns)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--decoder", choices=DECODERS, default="pyav")
    parser.add_argument("--leak", action="store_true")
    main(**vars(parser.parse_args()))
