"""From a clip's file to what the towers take: ours against torchcodec, decord and plain PyAV; and the feature cache.

One clip of 10 s, 720p30, H.264 and AAC, by keyframe distance and number of frames k. Every reader ends with the same
224 x 224 SigLIP pixels and Whisper log-mel (128 mels), computed by the same code, so that reading is the whole
difference. One thread each. `--clips DIRECTORY` keeps the generated clips for the next run.

Sections beside that: where a clip's time goes, two threads against one thread and two processes, DALI's CPU operators,
and what it takes to serve a clip from the warm cache. On CUDA (`--device cuda`): thinned streams on NVDEC, by the
number of decoders.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from harness import Bench, Variant, arguments, parse, require_green
from media_cache import measure_cache, measure_cached_step
from media_dali import measure_dali, measure_log_mel
from media_parts import measure_parts
from media_peers import READERS, Media, Reader, exact_rgb, sequential_frames, sequential_pyav
from media_work import VP9, ClipSpec, write_clips
from omnigrpo.media.decode import decode, decode_each
from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.media.pixels import siglip_pixels
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip, DecodedClip, Modality
from report import Check, paired_ratio

OWN_TESTS = (
    "tests/kernels/test_yuv_to_rgb.py",
    *(
        f"tests/media/test_{name}.py"
        for name in (
            *("decode", "exact_frames", "decode_dali", "sound_dali", "frame_memory"),
            *("pixels", "log_mel", "log_mel_dali", "feature_cache"),
        )
    ),
)
BOTH: tuple[Modality, ...] = ("video", "audio")
CASES = {(250, 8): 1.5, (30, 8): 1.35, (250, 32): 1.35, (30, 32): 1.35}
"""Keyframe distance and k, and what torchcodec's and decord's time over ours must be at least."""
DALI_CASES = (("gop250.mp4", 8), ("gop30.mp4", 8), ("gop250.mp4", 32))
"""Clips and k for NVDEC."""
TWO_THREADS = 1.8
"""Clips/s of two threads over those of one, at least."""
THREADED_CLIPS = 8
"""Alike, so that both threads end together."""
TARGET_PEERS = ("torchcodec", "decord")
SMOKE_SIZE = ClipSpec(width=160, height=96, num_frames=40)
IMAGE_SIZE, NUM_MEL_BINS, CHUNK_SECONDS = 224, 128, 30
WAVEFORM_EQUAL = 1e-5
MAX_LACK = 32
"""Samples by which the lengths may differ: plain PyAV resamples block by block."""

TowerInput = tuple[Tensor, Tensor]
"""Pixels and log-mel."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(argv)
    require_green(OWN_TESTS)
    bench = Bench("media", args)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as directory:
            clips = generated_clips(args.clips or Path(directory), smoke=args.smoke)
            if bench.device.type == "cpu":
                measure_on_cpu(bench, clips, smoke=args.smoke)
            else:
                for name, k in DALI_CASES:
                    measure_dali(bench, clips[name], k)
                measure_log_mel(bench)
    finally:
        torch.set_num_threads(threads)
    # Most of the memory is allocated in threads, which the profiler does not see.
    bench.rows = [replace(row, peak_bytes=None) for row in bench.rows]
    return bench.report()


def measure_on_cpu(bench: Bench, clips: Mapping[str, Path], *, smoke: bool) -> None:
    """Readers, parts, threads, DALI's operators for the CPU, and the cache."""
    readers = installed_readers(bench)
    for (gop, k), target in CASES.items():
        compare_readers(bench, readers, clips[f"gop{gop}.mp4"], f"GOP {gop}, k={k}", k, target)
    for gop in (250, 30):
        section = f"parts of one clip, GOP {gop}, k=8"
        measure_parts(bench, section, clips[f"gop{gop}.mp4"], 8, ours, tower_input)
    compare_threads(bench, clips["gop30.mp4"])
    measure_dali(bench, clips["vp9.webm"], 8)
    measure_log_mel(bench)
    measure_cache(bench, smoke=smoke)
    measure_cached_step(bench)


def installed_readers(bench: Bench) -> dict[str, Reader]:
    """The peers that are here; a note says why the others are not."""
    readers: dict[str, Reader] = {}
    for name, make in READERS.items():
        try:
            readers[name] = make()
        except ImportError as error:
            bench.notes.append(f"{name} is left out: {error}; pip install -e '.[peers]'")
    return readers


def compare_readers(
    bench: Bench, readers: Mapping[str, Reader], path: Path, case: str, k: int, target: float
) -> None:
    """One section: ours and every reader that is installed, on one clip."""
    decoded = ours(path, k)
    bench.checks += equality_checks(case, decoded, sequential_pyav()(path, k))
    variants = [Variant(name="ours", run=lambda: tower_input(ours(path, k)))]
    variants += [Variant(name=name, run=partial(_read, read, path, k)) for name, read in readers.items()]
    timings = bench.compare(f"{case}: {decoded.num_pictures} pictures decoded by ours", variants)
    for name in (peer for peer in TARGET_PEERS if peer in readers):
        ratio = paired_ratio(timings[name].seconds, timings["ours"].seconds)
        bench.checks.append(Check.at_least(f"{case}: {name}'s time / ours", ratio, target))


def compare_threads(bench: Bench, path: Path) -> None:
    """Two threads, one, and two processes, which share only the machine, on copies of one clip, 8 frames each."""
    with ProcessPoolExecutor(
        2, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as processes:

        def in_processes() -> None:
            half = THREADED_CLIPS // 2
            list(processes.map(decode_copies, [path] * 2, [half] * 2, [1] * 2))

        variants = [
            Variant(name="two threads", run=partial(decode_copies, path, THREADED_CLIPS, 2)),
            Variant(name="one thread", run=partial(decode_copies, path, THREADED_CLIPS, 1)),
            Variant(name="two processes", run=in_processes),
        ]
        section = f"threads, {THREADED_CLIPS} clips, k=8"
        timings = bench.compare(section, variants, ideal_ratios={"one thread": 2.0, "two processes": 1.0})
    ratio = paired_ratio(timings["one thread"].seconds, timings["two threads"].seconds)
    limit = paired_ratio(timings["one thread"].seconds, timings["two processes"].seconds)
    bench.checks.append(Check.at_least("one thread's time / two threads'", ratio, TWO_THREADS))
    bench.notes.append(f"two processes, which share no interpreter, reach {limit:.2f}x one thread here")


def decode_copies(path: Path, num_clips: int, num_workers: int) -> None:
    """Decode one clip several times, up to what the towers take."""
    decode_each(
        [Clip(path=path)] * num_clips,
        [BOTH] * num_clips,
        SamplingConfig(num_frames=8),
        tower_input,
        num_workers=num_workers,
    )


def ours(path: Path, k: int) -> DecodedClip:
    """Decode one clip in one thread; SystemExit when it cannot be used."""
    clip = decode([Clip(path=path)], [BOTH], SamplingConfig(num_frames=k)).clips[0]
    if clip.error is not None:
        raise SystemExit(f"the clip of the benchmark cannot be used: {clip.error}")
    return clip


def tower_input(clip: DecodedClip | Media) -> TowerInput:
    """Pixels and log-mel, for every reader alike."""
    assert clip.frames_FHWC is not None
    assert clip.waveform is not None
    return (
        siglip_pixels(clip.frames_FHWC, image_size=IMAGE_SIZE, aspect="stretch"),
        whisper_log_mel(clip.waveform, num_mel_bins=NUM_MEL_BINS, chunk_seconds=CHUNK_SECONDS),
    )


def _read(read: Callable[[Path, int], Media], path: Path, k: int) -> TowerInput:
    return tower_input(read(path, k))


def equality_checks(case: str, decoded: DecodedClip, sequential: Media) -> list[Check]:
    """Ours against every picture decoded in order, converted by swscale, and against plain PyAV's sound."""
    assert decoded.frames_FHWC is not None
    assert decoded.waveform is not None
    exact_FHWC = sequential_frames(decoded.clip.path, len(decoded.frames_FHWC), exact_rgb)
    different = int((decoded.frames_FHWC != exact_FHWC).sum())
    lengths = len(decoded.waveform), len(sequential.waveform)
    sound = float((decoded.waveform[: min(lengths)] - sequential.waveform[: min(lengths)]).abs().max())
    return [
        Check.at_most(f"{case}: samples that one waveform lacks", max(lengths) - min(lengths), MAX_LACK),
        Check.at_most(f"{case}: bytes that differ from sequential decoding", different, 0),
        Check.at_most(f"{case}: |waveform - sequential|", sound, WAVEFORM_EQUAL),
    ]


def generated_clips(directory: Path, *, smoke: bool) -> dict[str, Path]:
    """The clips by name; those that lie in the directory are taken as they are."""
    size = SMOKE_SIZE if smoke else ClipSpec()
    specs = {
        "gop250.mp4": size,
        "gop30.mp4": replace(size, gop=30),
        "vp9.webm": replace(size, codec="libvpx-vp9", options=VP9, audio_codec="libopus"),
    }
    paths = {name: directory / f"{'smoke-' if smoke else ''}{name}" for name in specs}
    missing = {name: spec for name, spec in specs.items() if not paths[name].exists()}
    if missing:
        with tempfile.TemporaryDirectory(dir=directory) as unfinished:
            write_clips({Path(unfinished) / name: spec for name, spec in missing.items()})
            for name in missing:
                (Path(unfinished) / name).rename(paths[name])
    return paths


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--clips", type=Path, metavar="DIRECTORY", help="where generated clips stay")
    args = parse(parser, argv)
    if args.clips is not None and not args.clips.is_dir():
        parser.error(f"--clips is {args.clips}, which is no directory: create it first")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
