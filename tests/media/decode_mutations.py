"""Decodes randomly damaged files in a process of its own, so that a crash is seen and its file known.

Run as a script: ``decode_mutations.py DIRECTORY FIRST COUNT``. It prints each file's name before it is decoded, and
at the end how often each status came, as JSON. The file that is decoded lies in the directory.
"""

import faulthandler
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from broken_files import GOOD, good_file

from omnigrpo.media.decode import SamplingConfig, decode
from omnigrpo.schema import Clip, ClipStatus

Random = np.random.Generator
TIMEOUT_SECONDS = 60.0


def mutation(number: int) -> tuple[str, bytes]:
    """The name and the bytes of a file; the same for the same number."""
    names, random = tuple(GOOD), np.random.default_rng(number)
    name, change = names[number % len(names)], CHANGES[number // len(names) % len(CHANGES)]
    content = bytearray(good_file(name))
    change(content, random)
    return f"{number} {change.__name__} {name}", bytes(content)


def cut(content: bytearray, random: Random) -> None:
    del content[_place(content, random) :]


def flip_one_bit(content: bytearray, random: Random) -> None:
    content[_place(content, random)] ^= 1 << int(random.integers(8))


def flip_many_bits(content: bytearray, random: Random) -> None:
    for _ in range(int(random.integers(2, 200))):
        flip_one_bit(content, random)


def flip_bits_at_an_end(content: bytearray, random: Random) -> None:
    """Headers lie at either end."""
    for _ in range(int(random.integers(1, 20))):
        at = int(random.integers(min(1500, len(content))))
        content[at if random.integers(2) else -at - 1] ^= 1 << int(random.integers(8))


def burst(content: bytearray, random: Random) -> None:
    at, size = _place(content, random), int(random.integers(4, 3000))
    content[at : at + size] = random.bytes(min(size, len(content) - at))


def extreme_number(content: bytearray, random: Random) -> None:
    at = int(random.integers(min(3000, len(content))))
    at = at if random.integers(2) else max(len(content) - at - 4, 0)
    content[at : at + 4] = random.choice(
        [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"]
    ).ljust(4, b"\0")


def swap_blocks(content: bytearray, random: Random) -> None:
    size = int(random.integers(16, len(content) // 4))
    first, second = sorted((_place(content, random, size), _place(content, random, size)))
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )


def repeat_range(content: bytearray, random: Random) -> None:
    at, size = _place(content, random), int(random.integers(1, 5000))
    content[at:at] = content[at : at + size]


def remove_range(content: bytearray, random: Random) -> None:
    at = _place(content, random)
    del content[at : at + int(random.integers(1, 5000))]


def insert_zeros(content: bytearray, random: Random) -> None:
    at = _place(content, random)
    content[at:at] = bytes(int(random.integers(1, 5000)))


CHANGES: tuple[Callable[[bytearray, Random], None], ...] = (
    cut,
    flip_one_bit,
    flip_many_bits,
    flip_bits_at_an_end,
    burst,
    extreme_number,
    swap_blocks,
    repeat_range,
    remove_range,
    insert_zeros,
)


def _place(content: bytearray, random: Random, room: int = 1) -> int:
    return int(random.integers(max(len(content) - room, 1)))


def main(directory: Path, first: int, count: int) -> None:
    statuses: Counter[ClipStatus] = Counter()
    for number in range(first, first + count):
        name, content = mutation(number)
        print(name, flush=True)
        path = directory / "file"
        path.write_bytes(content)
        clip = decode(
            [Clip(path=path)], [("video", "audio")], SamplingConfig(), timeout_seconds=TIMEOUT_SECONDS
        ).clips[0]
        is_whole = clip.frames_FHWC is not None and clip.waveform is not None
        assert is_whole == (clip.status is ClipStatus.OK) == (clip.error is None), name
        statuses[clip.status] += 1
    print(json.dumps(statuses))


if __name__ == "__main__":
    faulthandler.enable()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
