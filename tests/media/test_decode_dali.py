"""DALI's frames are PyAV's: by its operators for the CPU bit for bit, and what it cannot decode exactly it refuses."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from clip_files import ClipRecipe, write_clip
from clip_matrix import H264, HEVC, MATRIX, VP_AND_AV1, MatrixClip, write
from dali_at_hand import require_dali
from mp4_boxes import set_rotation
from torch import Tensor

from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.decode import Decoder, decode, decode_each
from omnigrpo.media.decode_dali import DaliClip, DaliDecoder, DaliFailure, NotForDaliError, prepare
from omnigrpo.media.decode_pyav import open_clip
from omnigrpo.media.frames_pyav import FrameDecoder
from omnigrpo.media.sampling import Colour, SamplingConfig
from omnigrpo.schema import Clip, ClipStatus, DecodedClip, Modality

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
VIDEO: tuple[Modality, ...] = ("video",)
VPX = {"crf": "6", "b:v": "2M", "cpu-used": "8", "deadline": "realtime", "g": "20"}
KINDS: dict[str, dict] = {
    "vp8": {"codec": "libvpx", "options": VPX},
    "vp9": {"codec": "libvpx-vp9", "options": VPX},
    "mjpeg": {"codec": "mjpeg", "options": {"qscale": "2"}, "pixel_format": "yuvj420p"},
}
CLIPS: dict[str, dict] = {
    "vp8.webm": {}, "vp8.mkv": {}, "vp9.webm": {}, "vp9.mkv": {}, "vp9.mp4": {}, "mjpeg.mov": {}, "mjpeg.mkv": {},
    "mjpeg.mp4": {},
    "vp9 odd.webm": {"width": 97, "height": 65},
    "vp9 444.mkv": {"options": VPX | {"profile": "1"}, "pixel_format": "yuv444p"},
    "vp9 variable.webm": {"stamps": [20 * i + 3 * i * i for i in range(40)]},
    "mjpeg 422.mov": {"pixel_format": "yuvj422p"},
    "mjpeg 444.mkv": {"pixel_format": "yuvj444p"},
}  # fmt: skip
"""What DALI's operators for the CPU decode."""


@pytest.fixture(autouse=True)
def _dali():
    require_dali()


def _write(directory: Path, name: str, **changes: object) -> Path:
    kind = KINDS[name.partition(".")[0].partition(" ")[0]]
    settings = {"num_frames": 40, "tone_hertz": None} | kind | CLIPS.get(name, {}) | changes
    return write_clip(directory / name, ClipRecipe(**settings))  # type: ignore[arg-type]


def _decode(
    path: Path,
    decoder: Decoder,
    *,
    num_frames: int = 8,
    colour: Colour = "bt601",
    start: float | None = None,
    end: float | None = None,
) -> DecodedClip:
    sampling = SamplingConfig(num_frames=num_frames, min_frames=1, colour=colour)
    clip = Clip(path=path, start_seconds=start, end_seconds=end)
    return decode([clip], [VIDEO], sampling, decoder=decoder).clips[0]


def _frames(clip: DecodedClip) -> Tensor:
    assert clip.frames_FHWC is not None, clip.error
    return clip.frames_FHWC


@contextmanager
def _opened(path: Path, num_frames: int = 8) -> Iterator[FrameDecoder]:
    sampling = SamplingConfig(num_frames=num_frames, min_frames=1)
    with open_clip(Clip(path=path), VIDEO, sampling, Deadline.after(60)) as opened:
        assert opened.frames is not None
        yield opened.frames


def _prepared(path: Path, device: torch.device = CPU, colour: Colour = "bt601") -> DaliClip:
    with _opened(path) as frames:
        return prepare(frames, device, colour)


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_of_pyav(tmp_path: Path, name: str):
    path = _write(tmp_path, name)
    for num_frames in (1, 8, 32):
        ours, expected = (_decode(path, decoder, num_frames=num_frames) for decoder in ("dali", "pyav"))
        assert (ours.decoder, expected.decoder) == ("dali", "pyav")
        assert ours.num_pictures >= num_frames or num_frames == 32
        assert torch.equal(_frames(ours), _frames(expected))
        assert _frames(ours).is_contiguous()
    for start, end in ((0.5, 1.1), (1.3, None), (None, 0.2)):
        ours, expected = (
            _decode(path, decoder, num_frames=3, start=start, end=end) for decoder in ("dali", "pyav")
        )
        assert ours.decoder == "dali"
        assert torch.equal(_frames(ours), _frames(expected))


@pytest.mark.parametrize("degrees_clockwise", [90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees_clockwise: int):
    path = _write(tmp_path, "vp9.mp4")
    upright = _frames(_decode(path, "dali"))
    set_rotation(path, degrees_clockwise=degrees_clockwise)
    ours = _decode(path, "dali")
    assert ours.decoder == "dali"
    assert torch.equal(_frames(ours), torch.rot90(upright, k=-degrees_clockwise // 90, dims=(1, 2)))
    assert torch.equal(_frames(ours), _frames(_decode(path, "pyav")))


@pytest.mark.parametrize(("matrix", "is_dalis"), [(Colorspace.ITU709, False), (Colorspace.ITU601, True)])
def test_a_tag_that_dali_does_not_heed_is_left_to_pyav(tmp_path: Path, matrix: Colorspace, is_dalis: bool):
    path = _write(tmp_path, "vp9.webm", colour=(matrix, ColorRange.MPEG))
    by_tag, by_dali = _decode(path, "dali", colour="tag"), _decode(path, "dali", colour="bt601")
    assert by_tag.decoder == ("dali" if is_dalis else "pyav")
    assert by_dali.decoder == "dali"
    assert torch.equal(_frames(by_tag), _frames(_decode(path, "pyav", colour="tag")))
    assert torch.equal(_frames(by_dali), _frames(_decode(path, "pyav", colour="bt601")))
    assert torch.equal(_frames(by_tag), _frames(by_dali)) == is_dalis


def test_h264_on_the_cpu_is_refused_by_dali_alone(tmp_path: Path):
    path = write_clip(tmp_path / "clip.mp4", ClipRecipe())
    alone = _decode(path, "dali")
    assert alone.status is ClipStatus.UNSUPPORTED_CODEC
    assert alone.error == (
        f"{path} is coded as h264, and DALI's CPU variant decodes VP8, VP9 and MJPEG: set media.decoder to 'auto' or "
        "'pyav', or decode on a GPU"
    )
    for decoder in ("auto", "pyav", "both"):
        assert _decode(path, decoder).decoder == "pyav"


def test_what_must_be_counted_is_left_to_pyav(tmp_path: Path):
    path = _write(tmp_path, "vp8.avi")
    assert _decode(path, "dali").decoder == "pyav"


@pytest.mark.parametrize("decoder", ["dali", "both"])
def test_without_dali_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, decoder: Decoder):
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install 'omnigrpo\[dali\]'"):
        decode([], [], SamplingConfig(), decoder=decoder)
    assert decode([], [], SamplingConfig(), decoder="auto", device="cuda").clips == ()


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="decoder must be one of auto, pyav, dali, both, got 'cpu'"):
        decode([], [], SamplingConfig(), decoder="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device, got 'meta'"):
        decode([], [], SamplingConfig(), decoder="dali", device="meta")
    with pytest.raises(ValueError, match="dali_threads must be at least 1, got 0"):
        decode([], [], SamplingConfig(), decoder="dali", dali_threads=0)


def _damaged(clip: DaliClip) -> DaliClip:
    """The same file with a hole in its pictures."""
    content = bytearray(clip.stream.content)
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    return replace(clip, stream=replace(clip.stream, content=bytes(content)))


def test_a_damaged_clip_fails_alone_and_the_context_stays_usable(tmp_path: Path):
    good = [_prepared(_write(tmp_path, name)) for name in ("vp8.webm", "vp9.mp4", "mjpeg.mov")]
    decoder = DaliDecoder(CPU, 2)
    whole = decoder.decode(good)
    for _ in range(2):
        first, damaged, garbage, *others = decoder.decode(
            [
                good[0],
                _damaged(good[0]),
                replace(good[0], stream=replace(good[0].stream, content=b"no video at all" * 9)),
                *good[1:],
            ]
        )
        assert isinstance(damaged, DaliFailure)
        assert isinstance(garbage, DaliFailure)
        assert damaged.reason
        for ours, expected in zip([first, *others], whole, strict=True):
            assert isinstance(ours, Tensor)
            assert isinstance(expected, Tensor)
            assert torch.equal(ours, expected)


def test_a_frame_that_is_not_there_is_an_error_and_never_black(tmp_path: Path):
    clip = _prepared(_write(tmp_path, "vp9.webm"))
    beyond = replace(clip, stream=replace(clip.stream, frames=(0, clip.stream.num_packets)))
    (failure,) = DaliDecoder(CPU, 1).decode([beyond])
    assert isinstance(failure, DaliFailure)
    assert "out-of-bounds" in failure.reason


def _with_a_damaged_picture(path: Path) -> Path:
    """Let a picture of VP8 claim a first partition that is larger than the picture."""
    with av.open(str(path)) as container:
        data = [bytes(packet) for packet in container.demux(video=0) if packet.size][10]
    content = path.read_bytes()
    assert content.count(data) == 1
    path.write_bytes(content.replace(data, bytes((data[0] | 0xE0, 0xFF, 0xFF)) + data[3:]))
    return path


def test_a_damaged_file_among_good_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good = [_write(tmp_path, name) for name in ("vp8.webm", "vp9.mp4", "mjpeg.mov")]
    damaged = _with_a_damaged_picture(_write(tmp_path, "vp8.mkv"))
    clips = [Clip(path=path) for path in (good[0], damaged, *good[1:])]
    sampling = SamplingConfig(colour="bt601")
    ours = decode(clips, [VIDEO] * 4, sampling, num_workers=2, decoder="dali").clips
    alone = decode(clips, [VIDEO] * 4, sampling, decoder="pyav").clips
    assert (ours[1].status, ours[1].error) == (ClipStatus.CORRUPT, alone[1].error)
    assert f"DALI could not decode {damaged}, PyAV decodes it instead" in caplog.text
    for mine, other in zip(ours[:1] + ours[2:], alone[:1] + alone[2:], strict=True):
        assert mine.decoder == "dali"
        assert torch.equal(_frames(mine), _frames(other))


@pytest.mark.parametrize("decoder", ["dali", "both"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_many_clips_keep_their_order_and_their_frames(tmp_path: Path, decoder: Decoder, num_workers: int):
    paths = [_write(tmp_path, name, num_frames=9 + at) for at, name in enumerate(CLIPS)]
    if decoder == "both":
        paths += [write_clip(tmp_path / f"{n}.mp4", ClipRecipe(num_frames=12 + n)) for n in range(4)]
    clips = [Clip(path=path) for path in paths * 2]
    sampling = SamplingConfig(colour="bt601")
    alone = decode(clips, [VIDEO] * len(clips), sampling, decoder="pyav").clips
    ours = decode(
        clips, [VIDEO] * len(clips), sampling, num_workers=num_workers, decoder=decoder, dali_threads=2
    ).clips
    assert [clip.clip for clip in ours] == clips
    for mine, other in zip(ours, alone, strict=True):
        assert mine.content_hash == other.content_hash
        assert torch.equal(_frames(mine), _frames(other))
    assert {clip.decoder for clip in ours} >= {"dali"}


@pytest.mark.parametrize("decoder", ["pyav", "both"])
def test_an_error_in_what_follows_leaves_no_thread_waiting(tmp_path: Path, decoder: Decoder):
    path, num_calls = _write(tmp_path, "vp8.webm", num_frames=5), iter(range(99))

    def fail_at_the_third(clip: DecodedClip) -> None:
        if next(num_calls) == 2:
            raise RuntimeError(f"no use for {clip.clip.path}")

    with pytest.raises(RuntimeError, match="no use for"):
        decode_each(
            [Clip(path=path)] * 30,
            [VIDEO] * 30,
            SamplingConfig(),
            fail_at_the_third,
            num_workers=2,
            decoder=decoder,
        )
    threads = [thread for thread in threading.enumerate() if thread.name == "decode"]
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)


def test_pyav_takes_back_what_waits_for_dali(tmp_path: Path):
    """DALI is at work on a large clip for about a second; the small ones behind it take milliseconds."""
    large = _write(tmp_path, "vp9.webm", width=1280, height=720, num_frames=60)
    small = _write(tmp_path, "vp8.webm", num_frames=5)
    clips = [Clip(path=large), *[Clip(path=small)] * 30]
    sampling = SamplingConfig(num_frames=32, colour="bt601")
    decoders = [
        clip.decoder
        for clip in decode(clips, [VIDEO] * 31, sampling, num_workers=2, decoder="both", dali_threads=1).clips
    ]
    assert "dali" in decoders
    assert "pyav" in decoders[1:]


@pytest.mark.parametrize("decoder", ["dali", "both"])
def test_a_clip_that_hangs_in_dali_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: Decoder
):
    """Those that wait for it, and those of its batch, are decoded by PyAV in the other half of their time."""
    small, bad = _write(tmp_path, "vp8.webm", num_frames=5), _write(tmp_path, "vp8.mkv", num_frames=30)
    release, decode_batch = threading.Event(), DaliDecoder.decode

    def hang(self: DaliDecoder, clips: Sequence[DaliClip]) -> list[Tensor | DaliFailure]:
        if any(clip.stream.num_packets > 20 for clip in clips):
            release.wait(60)
        return decode_batch(self, clips)

    monkeypatch.setattr(DaliDecoder, "decode", hang)
    clips = [Clip(path=path) for path in (*[small] * 3, bad, *[small] * 16)]
    sampling = SamplingConfig(num_frames=32, colour="bt601")
    began = time.monotonic()
    decoded = decode(
        clips, [VIDEO] * 20, sampling, decoder=decoder, num_workers=2, dali_threads=4, timeout_seconds=6
    ).clips
    assert time.monotonic() - began < 30
    release.set()
    assert [clip.error for clip in decoded] == [None] * 20
    assert decoded[3].decoder == "pyav"
    for thread in threading.enumerate():
        if thread.name == "dali":
            thread.join(timeout=60)


@pytest.mark.parametrize("decoder", ["dali", "both"])
def test_an_error_that_dali_does_not_expect_ends_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: Decoder
):
    def fail(self: DaliDecoder, clips: Sequence[DaliClip]) -> list[Tensor | DaliFailure]:
        raise KeyError("a bug")

    monkeypatch.setattr(DaliDecoder, "decode", fail)
    clips = [Clip(path=_write(tmp_path, "vp8.webm", num_frames=5))] * 3
    with pytest.raises(KeyError, match="a bug"):
        decode(clips, [VIDEO] * 3, SamplingConfig(), decoder=decoder)


OBSTACLES = {
    "h264_interlaced.mp4": "is interlaced",
    "h264_interlaced.ts": "is interlaced",
    "h264_10_bit.mkv": "has pictures of format yuv420p10le",
    "h264_444.mp4": "has pictures of format yuv444p, and NVDEC gives 8-bit 4:2:0",
    "h264.avi": "has pictures that must be counted",
    "h264_new_parameters.mp4": "describes its codec anew on the way",
    "hevc_10_bit.mp4": "has pictures of format yuv420p10le",
    "vp9_444.mkv": "has pictures of format yuv444p, and NVDEC gives 8-bit 4:2:0",
    "vp9_shown_again.webm": "shows pictures again without decoding them",
    "av1.mp4": "is coded as av1, and DALI's GPU variant here decodes H.264, HEVC, VP8 and VP9",
    "mpeg4_b.mp4": "is coded as mpeg4, and DALI's GPU variant here decodes H.264, HEVC, VP8 and VP9",
    "mjpeg.mov": "is coded as mjpeg, and DALI's GPU variant here decodes H.264, HEVC, VP8 and VP9",
    "prores.mov": "is coded as prores, and DALI's GPU variant here decodes H.264, HEVC, VP8 and VP9",
}
"""Why clips of the matrix are not for a GPU."""
TAKEN = (
    "h264_gop250.mp4", "h264_open_gop.ts", "h264_vfr.mkv", "h264_turned.mp4", "h264_full_range.mp4", "h264_709.mp4",
    "hevc.mp4", "hevc_open_gop.mp4", "hevc_layers.mp4", "vp8.webm", "vp9.mp4", "vp9_hidden.webm",
)  # fmt: skip


@pytest.mark.parametrize(("name", "reason"), OBSTACLES.items())
def test_what_is_not_for_a_gpu(tmp_path: Path, name: str, reason: str):
    path = write(next(clip for clip in MATRIX if clip.name == name), tmp_path)
    with pytest.raises(NotForDaliError) as error:
        _prepared(path, GPU)
    assert str(error.value) == reason


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_for_a_gpu(tmp_path: Path, name: str):
    path = write(next(clip for clip in MATRIX if clip.name == name), tmp_path)
    clip = _prepared(path, GPU)
    assert clip.quarter_turns == (3 if name == "h264_turned.mp4" else 0)
    if name == "h264_709.mp4":
        with pytest.raises(NotForDaliError, match="names the colour matrix 1"):
            _prepared(path, GPU, "tag")


def test_odd_sizes_are_not_for_a_gpu(tmp_path: Path):
    with pytest.raises(NotForDaliError, match="has pictures of 97x65, and NVDEC gives even sizes"):
        _prepared(_write(tmp_path, "vp9 odd.webm"), GPU)


ON_NVDEC = [clip for clip in (*H264, *HEVC, *VP_AND_AV1) if clip.name not in OBSTACLES]


@pytest.mark.gpu
@pytest.mark.parametrize("clip", ON_NVDEC, ids=lambda clip: clip.name)
def test_nvdec_gives_the_frames_of_the_cpu(tmp_path: Path, clip: MatrixClip):
    larger = replace(clip, recipe=replace(clip.recipe, width=352, height=288))  # NVDEC has least sizes.
    path = write(larger, tmp_path)
    for num_frames in (1, 8, 32):
        sampling = SamplingConfig(num_frames=num_frames, min_frames=1, colour="bt601")
        ours, expected = (
            decode([Clip(path=path)], [VIDEO], sampling, decoder=decoder, device="cuda").clips[0]
            for decoder in ("dali", "pyav")
        )
        assert ours.decoder == ("dali" if clip.name in TAKEN else ours.decoder)
        difference = _frames(ours).cpu().int() - _frames(expected).int()
        assert difference.abs().max() <= 2, num_frames


@pytest.mark.gpu
@pytest.mark.parametrize("num_threads", [1, 4, 14])
def test_a_damaged_clip_on_a_gpu_fails_alone(tmp_path: Path, num_threads: int):
    recipe = next(clip for clip in H264 if clip.name == "h264_gop30.mp4").recipe
    path = write_clip(tmp_path / "clip.mp4", replace(recipe, width=352, height=288))
    good = _prepared(path, GPU)
    garbage = replace(good, stream=replace(good.stream, content=b"no video at all" * 9))
    beyond = replace(good, stream=replace(good.stream, frames=(0, good.stream.num_packets)))
    decoder = DaliDecoder(GPU, num_threads)
    (alone,) = decoder.decode([good])
    assert isinstance(alone, Tensor)
    assert alone.device == GPU
    for _ in range(2):
        outcomes = decoder.decode([good, garbage, good, beyond, good])
        for outcome, is_good in zip(outcomes, (True, False, True, False, True), strict=True):
            assert isinstance(outcome, Tensor if is_good else DaliFailure)
            assert not isinstance(outcome, Tensor) or torch.equal(outcome, alone)


@pytest.mark.gpu
def test_auto_takes_dali_on_a_gpu_and_both_share_one_queue(tmp_path: Path):
    recipe = next(clip for clip in H264 if clip.name == "h264_gop30.mp4").recipe
    path = write_clip(tmp_path / "clip.mp4", replace(recipe, width=352, height=288))
    sampling = SamplingConfig(colour="bt601")
    clips, wanted = [Clip(path=path)] * 40, [VIDEO] * 40
    by_auto = decode(clips, wanted, sampling, num_workers=2, device="cuda").clips
    assert {clip.decoder for clip in by_auto} == {"dali"}
    shared = decode(clips, wanted, sampling, num_workers=2, device="cuda", decoder="both").clips
    for clip in shared:
        difference = _frames(clip).cpu().int() - _frames(by_auto[0]).cpu().int()
        assert difference.abs().max() <= 2
