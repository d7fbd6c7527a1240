"""Decoding good clips: the right frames, the right sound, the right order."""

import math
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omnigrpo.media.container_check import hash_open_clip
from omnigrpo.media.decode import SamplingConfig, decode
from omnigrpo.schema import Clip, ClipStatus, DecodedClip, Modality

BOTH: tuple[Modality, ...] = ("video", "audio")
VIDEO: tuple[Modality, ...] = ("video",)
EIGHT_OF_50 = [3, 9, 15, 21, 28, 34, 40, 46]

ClipFile = Callable[..., Path]
FrameNumbers = Callable[[torch.Tensor], list[int]]


def _decode_one(
    path: Path, wanted=BOTH, *, num_frames: int = 8, min_frames: int = 2, **window: float
) -> DecodedClip:
    sampling = SamplingConfig(num_frames=num_frames, min_frames=min_frames)
    return decode([Clip(path=path, **window)], [wanted], sampling).clips[0]


def _frames(clip: DecodedClip) -> torch.Tensor:
    assert clip.frames_FHWC is not None, clip.error
    return clip.frames_FHWC


def _sound(clip: DecodedClip) -> torch.Tensor:
    assert clip.waveform is not None, clip.error
    return clip.waveform


def _tone(num_samples: int, delay_seconds: float = 0.0) -> torch.Tensor:
    """The written sine as mono: 0.5 on both channels, mixed with a weight of 0.707 each."""
    time = torch.arange(num_samples, dtype=torch.float64) / 16_000 - delay_seconds
    return (math.sqrt(0.5) * torch.sin(2 * math.pi * 440 * time)).float()


def test_frames_and_waveform_of_an_h264_clip_with_b_frames(clip_file: ClipFile, frame_numbers: FrameNumbers):
    clip = _decode_one(clip_file())
    assert clip.status is ClipStatus.OK
    assert clip.error is None
    assert _frames(clip).dtype == torch.uint8
    assert _frames(clip).shape == (8, 64, 96, 3)
    assert frame_numbers(_frames(clip)) == EIGHT_OF_50
    assert _sound(clip).dtype == torch.float32
    assert clip.sample_rate_hz == 16_000
    assert abs(len(_sound(clip)) - 32_000) <= 1024
    assert torch.fft.rfft(_sound(clip)[:16_000]).abs().argmax() == 440
    middle = slice(4000, 28_000)
    assert (_sound(clip)[middle] - _tone(32_000)[middle]).abs().max() <= 0.05


@pytest.mark.parametrize("num_frames", [1, 4, 16, 50, 64])
def test_any_number_of_frames(clip_file: ClipFile, frame_numbers: FrameNumbers, num_frames: int):
    clip = _decode_one(clip_file(tone_hertz=None), ("video",), num_frames=num_frames)
    expected = [round((i + 0.5) * 49 / num_frames + 1e-6) for i in range(num_frames)]
    assert frame_numbers(_frames(clip)) == expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("open.mp4", {"options": {"crf": "9", "g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}}),
        ("one_gop.mp4", {"options": {"crf": "10", "g": "250", "bf": "3"}}),
        ("clip.mkv", {}),
        ("clip.ts", {}),
        ("clip.flv", {}),
        ("clip.mov", {}),
        ("no_stamps.avi", {"audio_codec": "mp3"}),
        ("hidden.webm", {"codec": "libvpx", "options": {"crf": "4", "b:v": "2M", "auto-alt-ref": "1",
                         "lag-in-frames": "16"}, "audio_codec": "libopus", "audio_rate": 48_000}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"crf": "4", "b:v": "0", "cpu-used": "8"},
                      "audio_codec": "libopus", "audio_rate": 48_000}),
        ("vfr.mp4", {"stamps": [20 * i + 3 * i * i for i in range(50)]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_exact_frames_in_other_containers_and_codecs(
    clip_file: ClipFile, frame_numbers: FrameNumbers, name: str, changes: dict
):
    clip = _decode_one(clip_file(name, **changes))
    assert clip.error is None
    assert frame_numbers(_frames(clip)) == EIGHT_OF_50
    assert torch.fft.rfft(_sound(clip)[:16_000]).abs().argmax() == 440


def test_a_window_takes_its_own_frames_and_sound(clip_file: ClipFile, frame_numbers: FrameNumbers):
    path = clip_file()
    clip = _decode_one(path, start_seconds=0.6, end_seconds=1.4)
    assert frame_numbers(_frames(clip)) == [15 + i for i in (1, 4, 6, 8, 11, 13, 15, 18)]
    assert len(_sound(clip)) == 12_800
    assert (_sound(clip) - _tone(32_000)[9600:22_400]).abs().max() <= 0.05
    tail = _decode_one(path, start_seconds=1.92)
    assert frame_numbers(_frames(tail)) == [48] * 4 + [49] * 4


@pytest.mark.parametrize(
    ("name", "changes"),
    [("clip.mp4", {}), ("clip.avi", {"audio_codec": "mp3"}), ("clip.ts", {})],
    ids=["mp4", "avi without stamps", "ts"],
)
def test_every_single_frame_can_be_reached_by_a_window(
    clip_file: ClipFile, frame_numbers: FrameNumbers, name: str, changes: dict
):
    path = clip_file(name, **changes)
    windows = [(n / 25 - 0.02, n / 25 + 0.02) for n in range(50)]
    clips = [Clip(path=path, start_seconds=start, end_seconds=end) for start, end in windows]
    decoded = decode(clips, [VIDEO] * 50, SamplingConfig(num_frames=1, min_frames=1)).clips
    assert [frame_numbers(_frames(clip))[0] for clip in decoded] == list(range(50))


def test_a_window_of_a_variable_rate_clip_goes_by_time(clip_file: ClipFile, frame_numbers: FrameNumbers):
    stamps = [20 * i + 3 * i * i for i in range(50)]
    inside = [i for i, stamp in enumerate(stamps) if 1000 <= stamp < 4000]
    clip = _decode_one(
        clip_file(stamps=stamps, tone_hertz=None), ("video",), num_frames=len(inside),
        start_seconds=0.9999, end_seconds=3.9999,
    )  # fmt: skip
    expected = [inside[round((i + 0.5) * (len(inside) - 1) / len(inside) + 1e-6)] for i in range(len(inside))]
    assert frame_numbers(_frames(clip)) == expected


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_sound_that_starts_late_stays_late(clip_file: ClipFile, name: str):
    path = clip_file(name, audio_delay_seconds=0.5)
    waveform = _sound(_decode_one(path))
    assert waveform[:7600].abs().max() <= 1e-3
    assert waveform[8300:9000].abs().max() >= 0.6
    assert torch.equal(waveform, _sound(_decode_one(path, ("audio",))))


def test_a_file_with_sound_alone_starts_at_its_sound(clip_file: ClipFile):
    clip = _decode_one(clip_file("sound.m4a", num_frames=0), ("audio",))
    assert clip.error is None
    assert clip.frames_FHWC is None
    assert (_sound(clip)[4000:28_000] - _tone(32_000)[4000:28_000]).abs().max() <= 0.05


def test_one_frame_is_repeated_when_one_is_enough(clip_file: ClipFile, frame_numbers: FrameNumbers):
    clip = _decode_one(clip_file(num_frames=1, tone_seconds=0.1), min_frames=1)
    assert clip.status is ClipStatus.OK
    assert frame_numbers(_frames(clip)) == [0] * 8
    assert (_frames(clip) == _frames(clip)[0]).all()


@pytest.mark.parametrize("degrees_clockwise", [90, 180, 270])
def test_rotation_metadata_is_applied(clip_file: ClipFile, degrees_clockwise: int):
    path = clip_file(tone_hertz=None)
    upright = _frames(_decode_one(path, ("video",)))
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees_clockwise]
    matrix = struct.pack(">9i", cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = matrix
    path.write_bytes(content)
    turned = _frames(_decode_one(path, ("video",)))
    assert torch.equal(turned, torch.rot90(upright, k=-degrees_clockwise // 90, dims=(1, 2)))


def test_what_is_not_wanted_is_neither_decoded_nor_required(clip_file: ClipFile):
    silent, blind = clip_file("silent.mp4", tone_hertz=None), clip_file("blind.m4a", num_frames=0)
    video, audio, neither = decode(
        [Clip(path=silent), Clip(path=blind), Clip(path=silent)],
        [("video",), ("audio",), ()],
        SamplingConfig(),
        num_workers=2,
    ).clips
    assert (video.status, audio.status, neither.status) == (ClipStatus.OK,) * 3
    assert video.waveform is None
    assert audio.frames_FHWC is None
    assert neither.frames_FHWC is None
    assert neither.waveform is None


def test_many_workers_keep_the_order_and_the_bytes(clip_file: ClipFile):
    paths = [clip_file(f"{n}.mp4", num_frames=3 + 7 * n, tone_seconds=0.2 + 0.1 * n) for n in range(6)]
    clips = [Clip(path=path) for path in paths * 3]
    alone = decode(clips, [BOTH] * len(clips), SamplingConfig(), num_workers=1).clips
    for num_workers in (3, 8):
        together = decode(clips, [BOTH] * len(clips), SamplingConfig(), num_workers=num_workers).clips
        assert [clip.clip for clip in together] == clips
        for ours, expected in zip(together, alone, strict=True):
            assert torch.equal(_frames(ours), _frames(expected))
            assert torch.equal(_sound(ours), _sound(expected))
            assert ours.content_hash == expected.content_hash


def _hash_of(clip: Clip) -> str:
    with clip.path.open("rb") as file:
        return hash_open_clip(file, clip)


def test_the_hash_tells_contents_and_windows_apart_but_not_paths(clip_file: ClipFile):
    path, other = clip_file("a.mp4"), clip_file("b.mp4", num_frames=49)
    copy = path.with_name("copy.mp4")
    copy.write_bytes(path.read_bytes())
    whole = _hash_of(Clip(path=path))
    assert whole == _hash_of(Clip(path=copy)) == _decode_one(path).content_hash
    windows = [
        _hash_of(Clip(path=path, start_seconds=s, end_seconds=e)) for s, e in ((0, 1), (0, None), (1, None))
    ]
    assert len({whole, _hash_of(Clip(path=other)), *windows}) == 5


def test_arguments_that_do_not_fit_are_refused(clip_file: ClipFile):
    with pytest.raises(ValueError, match="got 1 clips but modalities for 2"):
        decode([Clip(path=Path("a.mp4"))], [BOTH, BOTH], SamplingConfig())
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        decode([], [], SamplingConfig(), num_workers=0)
    assert decode([], [], SamplingConfig(), num_workers=4).clips == ()
