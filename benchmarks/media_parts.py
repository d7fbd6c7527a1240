"""Where the time of one clip goes, part by part, in the order in which the engine does them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import Bench
from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.container_check import hash_open_clip
from omnigrpo.media.frames_pyav import FrameDecoder
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.media.sound import decode_waveform
from omnigrpo.media.tracks import open_tracks
from omnigrpo.schema import Clip, DecodedClip
from report import Row

PARTS = ("hash", "demux", "plan", "sound", "pictures", "pixels and log-mel")
DEADLINE_SECONDS = 600.0


def measure_parts(
    bench: Bench,
    section: str,
    path: Path,
    k: int,
    decode: Callable[[Path, int], DecodedClip],
    finish: Callable[[DecodedClip], object],
) -> None:
    """Add a row per part, with its share of their sum; ``decode`` and ``finish`` make the last part's input and it."""
    decoded = decode(path, k)
    rounds = [
        _parts(path, k) | {"pixels and log-mel": _seconds(finish, decoded)} for _ in range(bench.rounds)
    ]
    for part in PARTS:
        seconds = tuple(timed[part] for timed in rounds)
        share = sum(seconds) / sum(sum(timed.values()) for timed in rounds)
        bench.rows.append(Row(section=section, name=part, seconds=seconds, figures={"share": share}))


def _parts(path: Path, k: int) -> dict[str, float]:
    """Seconds of each part of decoding a file."""
    seconds: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started

    clip, sampling, deadline = Clip(path=path), SamplingConfig(num_frames=k), Deadline.after(DEADLINE_SECONDS)
    with path.open("rb") as file:
        with part("hash"):
            hash_open_clip(file, clip, deadline)
        started = time.perf_counter()
        with open_tracks(file, clip, deadline) as tracks:
            seconds["demux"] = time.perf_counter() - started
            assert tracks.video is not None
            assert tracks.audio is not None
            with part("plan"):
                frames = FrameDecoder(tracks.video, tracks.window, sampling, deadline)
            with part("sound"):
                decode_waveform(tracks.audio, tracks.window, sampling.sample_rate_hz, deadline)
            with part("pictures"):
                frames.decode()
    return seconds


def _seconds(work: Callable[[DecodedClip], object], decoded: DecodedClip) -> float:
    started = time.perf_counter()
    work(decoded)
    return time.perf_counter() - started
