"""DALI against the CPU path, on thinned streams: on a GPU's NVDEC engines, or by DALI's operators for the CPU."""

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from harness import Bench, Variant
from media_peers import torchcodec_cuda_frames
from omnigrpo.media.decode import Decoder, decode, decode_each
from omnigrpo.media.decode_dali import is_installed
from omnigrpo.media.log_mel import SAMPLE_RATE_HZ, whisper_log_mel
from omnigrpo.media.log_mel_dali import dali_log_mel
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip, DecodedClip, Modality
from report import Check

NUM_WAVEFORMS = 8
LOG_MEL_EQUAL = 1e-4
VIDEO: tuple[Modality, ...] = ("video",)
NUM_CLIPS = {"cpu": 4, "cuda": 56}
THREADS = {"cpu": (1, 2), "cuda": (1, 2, 4, 7, 14, 28)}
"""Clips that DALI decodes at once."""
TOLERANCE = {"cpu": 0, "cuda": 2}
"""Largest difference of a colour value between the two paths, of 255."""
CEILING_FRAMES_PER_SECOND = 7 * 1650
"""H.264, 720p, of the seven NVDEC engines of an H100 or H200, by what one engine reaches (NVIDIA's application note
gives 748 frames/s of 1080p; torchcodec's maintainers saw 1,620 of 720p)."""


def measure_dali(bench: Bench, path: Path, k: int) -> None:
    """Clips/s by decoder and by the number of clips at once, for copies of one clip; frames only, full size."""
    if not is_installed():
        bench.notes.append("DALI is left out: it is not installed; pip install -e '.[dali]'")
        return
    device, num_clips = bench.device, NUM_CLIPS[bench.device.type]
    sampling = SamplingConfig(num_frames=k, colour="bt601")
    by_cpu, by_dali = (_one(path, sampling, decoder, device) for decoder in ("pyav", "dali"))
    bench.checks += equality_checks(path.name, by_cpu, by_dali, TOLERANCE[device.type])
    workers = os.cpu_count() or 1

    def run(decoder: Decoder, dali_threads: int | None) -> None:
        decode_each(
            [Clip(path=path)] * num_clips,
            [VIDEO] * num_clips,
            sampling,
            _forget,
            num_workers=workers,
            decoder=decoder,
            device=device,
            dali_threads=dali_threads,
        )

    variants = [Variant(name=f"PyAV, {workers} threads", run=partial(run, "pyav", None))]
    variants += [
        Variant(name=f"DALI, {count} at once", run=partial(run, "dali", count))
        for count in THREADS[device.type]
    ]
    variants.append(Variant(name="both on one queue", run=partial(run, "both", None)))
    if device.type == "cuda":
        variants += _torchcodec(bench, path, k, num_clips)
    first = len(bench.rows)
    section = f"{device.type}: {num_clips} clips of {path.name}, k={k}, {by_dali.num_pictures} pictures each"
    bench.compare(section, variants)
    pictures = num_clips * by_dali.num_pictures
    for at in range(first, len(bench.rows)):
        seconds = statistics.median(bench.rows[at].seconds)
        figures = {"clips/s": num_clips / seconds}
        if not bench.rows[at].name.startswith("torchcodec"):  # It decodes other pictures than ours.
            figures["pictures/s"] = pictures / seconds
        if bench.rows[at].name.startswith("DALI") and device.type == "cuda":
            figures["of 7 engines"] = pictures / seconds / CEILING_FRAMES_PER_SECOND
        bench.rows[at] = replace(bench.rows[at], figures=figures)


def measure_log_mel(bench: Bench) -> None:
    """Whisper's log-mels of a batch by torch, which a run uses, and by DALI's operators, on the bench's device."""
    if not is_installed():
        return
    waveforms = [
        torch.randn(10 * SAMPLE_RATE_HZ, generator=torch.Generator().manual_seed(number)).to(bench.device)
        for number in range(NUM_WAVEFORMS)
    ]
    sizes = {"num_mel_bins": 128, "chunk_seconds": 30}
    by_torch, by_dali = (partial(compute, waveforms, **sizes) for compute in (whisper_log_mel, dali_log_mel))
    difference = float((by_torch() - by_dali()).abs().max())
    bench.checks.append(Check.at_most("|log-mel by DALI - by torch|", difference, LOG_MEL_EQUAL))
    variants = [Variant(name="torch", run=by_torch), Variant(name="DALI", run=by_dali)]
    bench.compare(f"log-mel of {NUM_WAVEFORMS} waveforms of 10 s, 128 mels, {bench.device.type}", variants)


def equality_checks(name: str, by_cpu: DecodedClip, by_dali: DecodedClip, tolerance: int) -> list[Check]:
    """That DALI did the work, and that its frames are those of the CPU path."""
    assert by_cpu.frames_FHWC is not None
    assert by_dali.frames_FHWC is not None
    difference = (by_dali.frames_FHWC.cpu().int() - by_cpu.frames_FHWC.int()).abs().max()
    return [
        Check.at_least(f"{name}: decoded by DALI", float(by_dali.decoder == "dali"), 1),
        Check.at_most(f"{name}: |DALI - PyAV| of 255", float(difference), tolerance),
    ]


def _one(path: Path, sampling: SamplingConfig, decoder: Decoder, device: torch.device) -> DecodedClip:
    clip = decode([Clip(path=path)], [VIDEO], sampling, decoder=decoder, device=device).clips[0]
    if clip.error is not None:
        raise SystemExit(f"the clip of the benchmark cannot be used: {clip.error}")
    return clip


def _torchcodec(bench: Bench, path: Path, k: int, num_clips: int) -> list[Variant]:
    """torchcodec's CUDA decoder in as many threads, where it is installed."""
    try:
        read = torchcodec_cuda_frames()
    except ImportError as error:
        bench.notes.append(f"torchcodec's CUDA decoder is left out: {error}")
        return []
    return [Variant(name="torchcodec, CUDA", run=partial(_in_threads, read, path, k, num_clips))]


def _in_threads(read: Callable[[Path, int], object], path: Path, k: int, num_clips: int) -> None:
    with ThreadPoolExecutor(max(THREADS["cuda"])) as pool:
        list(pool.map(lambda _: read(path, k) is None, range(num_clips)))


def _forget(clip: DecodedClip) -> None:
    assert clip.error is None, clip.error
