"""Decodes many clips in one process, and tells what they leave behind.

Run as a script: ``decode_many.py DIRECTORY COUNT``. Prints JSON: how often each status came; open files and threads
after the first clips and at the end; and the median of the resident memory over the second and the last quarter.
"""

import json
import os
import resource
import statistics
import sys
import threading
from collections import Counter
from pathlib import Path

from broken_files import good_file

from omnigrpo.media.decode import SamplingConfig, decode
from omnigrpo.schema import Clip, ClipStatus, Modality

PER_BATCH = 20
BOTH: tuple[Modality, ...] = ("video", "audio")


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


def _usage() -> tuple[int, int]:
    """Open files and threads, once those that are done are gone."""
    for thread in threading.enumerate():
        if thread.name == "decode":
            thread.join()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208


def _resident_mebibytes() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def main(directory: Path, count: int) -> None:
    batch = clips(directory)
    assert len(batch) == PER_BATCH
    statuses: Counter[ClipStatus] = Counter()
    usage, resident = [], []
    for turn in range(count // PER_BATCH):
        decoded = decode(batch, [BOTH] * PER_BATCH, SamplingConfig(), num_workers=2).clips
        statuses.update(clip.status for clip in decoded)
        del decoded
        resident.append(_resident_mebibytes())
        if turn in (0, count // PER_BATCH - 1):
            usage.append(_usage())
    quarter = len(resident) // 4
    second, last = resident[quarter : 2 * quarter], resident[-quarter:]
    files, threads = zip(*usage, strict=True)
    report = {
        "statuses": statuses,
        "open_files": files,
        "threads": threads,
        "rss_mebibytes": [statistics.median(second), statistics.median(last)],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
