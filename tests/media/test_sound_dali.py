"""Sound files by DALI's audio decoder have the waveform that FFmpeg gives."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.audio.stream import AudioStream
from dali_at_hand import require_dali

from omnigrpo.media import sound_dali
from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.decode import Decoder, decode
from omnigrpo.media.decode_dali import DaliDecoder, DaliFailure, DaliSound
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.media.tracks import open_tracks
from omnigrpo.schema import Clip, ClipStatus, DecodedClip

FILES = {
    "16 bits.wav": ("pcm_s16le", 44_100, "stereo"),
    "24 bits.wav": ("pcm_s24le", 48_000, "stereo"),
    "floats.wav": ("pcm_f32le", 22_050, "mono"),
    "8 bits.wav": ("pcm_u8", 8_000, "mono"),
    "as wanted.wav": ("pcm_s16le", 16_000, "mono"),
    "stereo.flac": ("flac", 44_100, "stereo"),
    "mono.flac": ("flac", 32_000, "mono"),
    "stereo.ogg": ("vorbis", 44_100, "stereo"),
    "fast.ogg": ("vorbis", 48_000, "stereo"),
}
"""Codec, rate and channels."""
OTHERS = {
    "opus.ogg": ("libopus", 24_000, "stereo"),
    "aac.m4a": ("aac", 44_100, "stereo"),
    "sound.mp3": ("mp3", 44_100, "stereo"),
    "six channels.wav": ("pcm_s16le", 16_000, "5.1"),
}


@pytest.fixture(autouse=True)
def _dali():
    require_dali()


def _write(path: Path, codec: str, rate: int, layout: str) -> Path:
    """Two seconds of two sines and noise, of which the second half is louder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "experimental"})
        assert isinstance(stream, AudioStream)
        kind = (
            stream.codec_context.codec.audio_formats[0].name
            if stream.codec_context.codec.audio_formats
            else "fltp"
        )
        resampler = av.AudioResampler(format=kind, layout=layout, rate=rate)
        time = np.arange(2 * rate) / rate
        noise = np.random.default_rng(0).normal(0, 0.05, (len(stream.layout.channels), len(time)))
        sines = [0.4 * np.sin(2 * math.pi * hertz * time) for hertz in (440, 1250)]
        samples = np.stack([sines[at % 2] for at in range(len(noise))]) * np.where(time < 1, 0.5, 1) + noise
        for start in range(0, len(time), 960):
            block = np.ascontiguousarray(samples[:, start : start + 960].clip(-1, 1), np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            for part in resampler.resample(frame):
                container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def _decode(path: Path, decoder: Decoder, **window: float) -> DecodedClip:
    return decode([Clip(path=path, **window)], [("audio",)], SamplingConfig(), decoder=decoder).clips[0]


def _sound(clip: DecodedClip) -> torch.Tensor:
    assert clip.waveform is not None, clip.error
    return clip.waveform


def _is_for_dali(path: Path, **window: float) -> bool:
    clip, deadline = Clip(path=path, **window), Deadline.after(60)
    with path.open("rb") as file, open_tracks(file, clip, deadline) as tracks:
        assert tracks.audio is not None
        return sound_dali.is_for_dali(tracks.audio, tracks.window)


@pytest.mark.parametrize("name", FILES)
def test_the_waveform_of_the_front_end(tmp_path: Path, name: str):
    path = _write(tmp_path / name, *FILES[name])
    assert _is_for_dali(path)
    for window in ({}, {"start_seconds": 0.5, "end_seconds": 1.25}, {"start_seconds": 1.9}):
        ours, expected = (_sound(_decode(path, decoder, **window)) for decoder in ("dali", "pyav"))
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 1e-4
    assert abs(len(_sound(_decode(path, "dali"))) - 32_000) <= (400 if name.endswith(".ogg") else 1)


@pytest.mark.parametrize("name", FILES)
def test_dali_itself_reads_what_was_written(tmp_path: Path, name: str):
    codec, rate, layout = FILES[name]
    sound = DaliDecoder(torch.device("cpu"), 1).decode_sound(
        _write(tmp_path / name, codec, rate, layout).read_bytes()
    )
    assert isinstance(sound, DaliSound)
    assert sound.sample_rate_hz == rate
    assert 0 <= len(sound.samples_TC) - 2 * rate <= 64  # Vorbis fills its last block.
    assert sound.samples_TC.shape[1] == (2 if layout == "stereo" else 1)
    assert 0.3 <= np.abs(sound.samples_TC).max() <= 1.0


@pytest.mark.parametrize("name", OTHERS)
def test_other_sound_is_the_front_ends(tmp_path: Path, name: str):
    path = _write(tmp_path / name, *OTHERS[name])
    assert not _is_for_dali(path)
    assert torch.equal(_sound(_decode(path, "dali")), _sound(_decode(path, "pyav")))


def test_a_window_of_a_file_and_a_huge_one_are_the_front_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """DALI reads all of a file, whatever is wanted of it."""
    path = _write(tmp_path / "16 bits.wav", *FILES["16 bits.wav"])
    assert _is_for_dali(path)
    assert not _is_for_dali(path, start_seconds=1.0)
    assert not _is_for_dali(path, end_seconds=1.0)
    monkeypatch.setattr(sound_dali, "_MAX_BYTES", 100_000)
    assert not _is_for_dali(path)


def _with_half_the_samples(flac: bytes) -> bytes:
    """STREAMINFO counts samples in the lower 36 bits of its bytes 10 to 17; it lies 8 bytes into the file."""
    numbers = int.from_bytes(flac[18:26], "big")
    count = numbers & ((1 << 36) - 1)
    return flac[:18] + (numbers - count + count // 2).to_bytes(8, "big") + flac[26:]


def test_sound_of_another_length_than_the_packets_is_the_front_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    flac = _write(tmp_path / "short.flac", *FILES["mono.flac"])
    flac.write_bytes(_with_half_the_samples(flac.read_bytes()))
    chained = _write(tmp_path / "chained.ogg", *FILES["stereo.ogg"])
    chained.write_bytes(chained.read_bytes() * 2)
    for path, reason in ((flac, "the packets hold 2.00 s"), (chained, "the packets hold")):
        caplog.clear()
        ours, expected = (_sound(_decode(path, decoder)) for decoder in ("dali", "pyav"))
        assert torch.equal(ours, expected)
        assert reason in caplog.text or "go back" in caplog.text


def test_a_file_that_dali_does_not_read_is_a_failure_of_its_own():
    decoder = DaliDecoder(torch.device("cpu"), 1)
    assert isinstance(decoder.decode_sound(b"no sound at all" * 9), DaliFailure)
    assert isinstance(decoder.decode_sound(b""), DaliFailure)


def test_damaged_files_end_in_a_status(tmp_path: Path):
    for name in ("16 bits.wav", "stereo.flac", "stereo.ogg"):
        path = _write(tmp_path / name, *FILES[name])
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:60], whole[:200] + bytes(5000) + whole[5200:]):
            path.write_bytes(content)
            ours, expected = (_decode(path, decoder) for decoder in ("dali", "pyav"))
            assert ours.status is expected.status or {ours.status, expected.status} <= {
                ClipStatus.OK,
                ClipStatus.CORRUPT,
            }
