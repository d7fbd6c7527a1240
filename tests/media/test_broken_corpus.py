"""Damaged files end in a status that fits, whatever their bytes say, and disturb no other clip of their batch."""

import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from av.codec.context import CodecContext
from av.packet import Packet
from broken_files import GOOD, BrokenFile, broken_files, good_file

from omnigrpo.media.decode import SamplingConfig
from omnigrpo.schema import Clip, ClipStatus, DecodedBatch, DecodedClip, Modality

Decode = Callable[..., DecodedBatch]

BOTH: tuple[Modality, ...] = ("video", "audio")
CORPUS = tuple(broken_files())
SAMPLING = SamplingConfig()


def _assert_told(clip: DecodedClip):
    """A clip is whole, or says why it is not."""
    is_ok = clip.status is ClipStatus.OK
    assert is_ok == (clip.error is None) == (clip.content_hash is not None)
    if not is_ok:
        assert clip.frames_FHWC is None
        assert clip.waveform is None
        assert clip.error is not None
        assert clip.error.startswith(f"{clip.clip.path} ")


def _equal(ours: DecodedClip, other: DecodedClip) -> bool:
    for mine, its in ((ours.frames_FHWC, other.frames_FHWC), (ours.waveform, other.waveform)):
        if (mine is None) != (its is None) or (
            mine is not None and its is not None and not torch.equal(mine, its)
        ):
            return False
    return (ours.status, ours.error) == (other.status, other.error)


@pytest.fixture(scope="module")
def corpus_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, and beside it what some of its files name: a good clip, and a pipe that nobody writes to."""
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "good.mp4").write_bytes(good_file("behind.mp4"))
    os.mkfifo(directory / "fifo")
    for file in CORPUS:
        (directory / file.name).write_bytes(file.content())
    return directory


def test_the_corpus_is_as_large_as_promised():
    assert len({file.name for file in CORPUS}) == len(CORPUS) >= 30
    assert all(
        file.content() != whole
        for file in CORPUS
        for whole in map(good_file, GOOD)
        if file.statuses != {"ok"}
    )


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_a_broken_file_ends_in_a_status(decode: Decode, corpus_directory: Path, file: BrokenFile):
    clip = decode([Clip(path=corpus_directory / file.name)], [file.wanted], SAMPLING).clips[0]
    assert clip.status in file.statuses, clip.error
    _assert_told(clip)


def test_good_clips_beside_broken_ones_are_unharmed(decode: Decode, corpus_directory: Path):
    good = Clip(path=corpus_directory / "good.mp4")
    alone = decode([good], [BOTH], SAMPLING).clips[0]
    assert alone.status is ClipStatus.OK
    clips = [clip for file in CORPUS for clip in (Clip(path=corpus_directory / file.name), good)]
    wanted = [modalities for file in CORPUS for modalities in (file.wanted, BOTH)]
    together = decode(clips, wanted, SAMPLING, num_workers=2).clips
    assert [clip.clip for clip in together] == clips
    assert all(_equal(clip, alone) for clip in together[1::2])
    again = decode(clips[::2], wanted[::2], SAMPLING).clips
    assert all(_equal(ours, other) for ours, other in zip(together[::2], again, strict=True))


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/urandom", "/proc/self/mem", "/", "."])
def test_what_is_no_regular_file(decode: Decode, path: str):
    clip = decode([Clip(path=Path(path))], [BOTH], SAMPLING).clips[0]
    assert clip.status is ClipStatus.UNREADABLE, clip.error
    _assert_told(clip)


def test_a_pipe_and_a_socket_do_not_block(decode: Decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "fifo.mp4")
    monkeypatch.chdir(tmp_path)  # A socket's path may be no longer than 107 bytes.
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.mp4")
        clips = [Clip(path=tmp_path / name) for name in ("fifo.mp4", "socket.mp4")]
        for clip in decode(clips, [BOTH] * 2, SAMPLING).clips:
            assert clip.status is ClipStatus.UNREADABLE, clip.error
            _assert_told(clip)


def test_paths_that_cannot_be_opened(decode: Decode, tmp_path: Path):
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "file.mp4").write_bytes(good_file("behind.mp4"))
    expected = {
        "loop.mp4": ClipStatus.UNREADABLE,
        "dangling.mp4": ClipStatus.MISSING,
        "file.mp4/inside.mp4": ClipStatus.UNREADABLE,
        "null\0byte.mp4": ClipStatus.UNREADABLE,
        "x" * 300 + ".mp4": ClipStatus.UNREADABLE,
        "a/" * 3000 + ".mp4": ClipStatus.UNREADABLE,
        "surrogate\ud800.mp4": ClipStatus.UNREADABLE,
        "": ClipStatus.UNREADABLE,
    }
    clips = [Clip(path=tmp_path / name) for name in expected]
    decoded = decode(clips, [BOTH] * len(clips), SAMPLING).clips
    assert [clip.status for clip in decoded] == list(expected.values())
    for clip in decoded:
        _assert_told(clip)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(decode: Decode, tmp_path: Path):
    path = tmp_path / "secret.mp4"
    path.write_bytes(good_file("behind.mp4"))
    path.chmod(0)
    clip = decode([Clip(path=path)], [BOTH], SAMPLING).clips[0]
    assert clip.status is ClipStatus.UNREADABLE
    _assert_told(clip)


@pytest.fixture
def endless_file(tmp_path: Path) -> Iterator[Path]:
    """A mebi-mebibyte without a block on disk."""
    path = tmp_path / "endless.mp4"
    with path.open("wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError:
            pytest.skip("this file system holds no file of a tebibyte")
    yield path
    path.unlink()


def test_a_file_without_end_is_given_up_by_the_thread_that_reads_it(decode: Decode, endless_file: Path):
    good = endless_file.with_name("good.mp4")
    good.write_bytes(good_file("behind.mp4"))
    num_threads = threading.active_count()
    clips = [Clip(path=endless_file), Clip(path=good)]
    endless = decode(clips[:1], [BOTH], SAMPLING, timeout_seconds=0.5).clips[0]
    assert endless.status is ClipStatus.TIMEOUT
    _assert_told(endless)
    for thread in threading.enumerate():
        if thread.name == "decode":
            thread.join()
    assert threading.active_count() == num_threads
    assert decode(clips[1:], [BOTH], SAMPLING).clips[0].status is ClipStatus.OK


def test_packets_and_decoders_do_not_wait_for_the_garbage_collector(decode: Decode, tmp_path: Path):
    """Which may come late in a process that makes few objects, while a clip's packets are megabytes."""
    for name in GOOD:
        (tmp_path / name).write_bytes(good_file(name))
        (tmp_path / f"noisy {name}").write_bytes(good_file(name)[:-9000] + bytes(9000))
    paths = sorted(tmp_path.iterdir())
    gc.collect()
    gc.disable()
    try:
        decode([Clip(path=path) for path in paths], [BOTH] * len(paths), SAMPLING)
        assert not [kept for kept in gc.get_objects() if issubclass(type(kept), Packet | CodecContext)]
    finally:
        gc.enable()
