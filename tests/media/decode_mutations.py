"""Decodes randomly damaged files in a process of its own, so that a crash or a hang is seen and its file known.

Run as a script: ``decode_mutations.py DIRECTORY FIRST COUNT [--decoder NAME]``. It prints each file's name before it is
decoded, alone and between good clips, and at the end how often each status came, as JSON. Files lie in the directory.
"""

import argparse
import faulthandler
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from broken_files import GOOD, good_file

from omnigrpo.media.decode import SamplingConfig, decode
from omnigrpo.schema import Clip, ClipStatus, DecodedClip, Modality

Random = np.random.Generator
Decode = Callable[[Sequence[Clip]], Sequence[DecodedClip]]

BOTH: tuple[Modality, ...] = ("video", "audio")
TIMEOUT_SECONDS = 60.0
HANG_SECONDS = 150.0
"""When a file counts as one that hangs where no watchdog helps: then this process ends, and shows its stacks."""
GOOD_NAME = "behind.mp4"


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


def by_pyav(clips: Sequence[Clip]) -> Sequence[DecodedClip]:
    wanted = [BOTH] * len(clips)
    return decode(clips, wanted, SamplingConfig(), num_workers=2, timeout_seconds=TIMEOUT_SECONDS).clips


def by_dali_and_pyav(clips: Sequence[Clip]) -> Sequence[DecodedClip]:
    wanted = [BOTH] * len(clips)
    return decode(
        clips, wanted, SamplingConfig(), num_workers=2, timeout_seconds=TIMEOUT_SECONDS, decoder="both"
    ).clips


def that_crashes(clips: Sequence[Clip]) -> Sequence[DecodedClip]:
    os.abort()


def that_hangs(clips: Sequence[Clip]) -> Sequence[DecodedClip]:
    threading.Event().wait()
    return ()


def that_harms_others(clips: Sequence[Clip]) -> Sequence[DecodedClip]:
    black_FHWC = torch.zeros(8, 64, 96, 3, dtype=torch.uint8)
    return [
        replace(clip, frames_FHWC=black_FHWC) if clip.status is ClipStatus.OK else clip
        for clip in by_pyav(clips)
    ]


DECODERS: dict[str, Decode] = {"pyav": by_pyav, "both": by_dali_and_pyav}
BAD_DECODERS: dict[str, Decode] = {"crash": that_crashes, "hang": that_hangs, "harm": that_harms_others}
"""What the test must notice; they come into play once the good clip is decoded."""


def is_same(one: DecodedClip, other: DecodedClip) -> bool:
    """Whether two results are equal, to the bit."""
    tensors = ((one.frames_FHWC, other.frames_FHWC), (one.waveform, other.waveform))
    are_equal = (a is b if a is None or b is None else torch.equal(a, b) for a, b in tensors)
    return all(are_equal) and (one.status, one.error) == (other.status, other.error)


def check(decode_clips: Decode, path: Path, good: DecodedClip) -> ClipStatus:
    """Decode one damaged file alone and between good clips."""
    bad = Clip(path=path)
    (alone,) = decode_clips([bad])
    before, between, behind = decode_clips([good.clip, bad, good.clip])
    assert alone.status is not ClipStatus.TIMEOUT
    is_whole = alone.frames_FHWC is not None and alone.waveform is not None
    assert is_whole == (alone.status is ClipStatus.OK) == (alone.error is None)
    assert is_same(between, alone), "it ends otherwise in a batch"
    assert is_same(before, good), "a good clip of its batch is harmed"
    assert is_same(behind, good), "a good clip of its batch is harmed"
    return alone.status


def main(directory: Path, first: int, count: int, decoder: str, hang_seconds: float) -> None:
    path = directory / GOOD_NAME
    path.write_bytes(good_file(GOOD_NAME))
    (good,) = by_pyav([Clip(path=path)])
    assert good.status is ClipStatus.OK
    statuses: Counter[ClipStatus] = Counter()
    for number in range(first, first + count):
        name, content = mutation(number)
        print(name, flush=True)
        faulthandler.dump_traceback_later(hang_seconds, exit=True)
        path = directory / "file"
        path.write_bytes(content)
        statuses[check((DECODERS | BAD_DECODERS)[decoder], path, good)] += 1
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(statuses))


if __name__ == "__main__":
    faulthandler.enable()
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--decoder", choices=[*DECODERS, *BAD_DECODERS], default="pyav")
    parser.add_argument("--hang-seconds", type=float, default=HANG_SECONDS)
    main(**vars(parser.parse_args()))
