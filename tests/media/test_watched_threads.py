"""Tasks that hang are left behind: in real threads, behind a pipe that nobody writes to."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from clip_files import ClipRecipe, write_clip

from omnigrpo.media.decode import SamplingConfig, decode_each
from omnigrpo.media.watched_threads import GRACE_SECONDS, run_watched
from omnigrpo.schema import Clip, ClipStatus, DecodedBatch, DecodedClip, Modality

VIDEO: tuple[Modality, ...] = ("video",)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe; who opens it to read waits until the test is over."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    yield path
    while any(thread.name == "decode" for thread in threading.enumerate()):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # Nobody reads; a thread may be on its way to.
            time.sleep(0.01)


def _give_up(index: int) -> str:
    return f"{index} gave up"


def _name(index: int) -> str:
    return f"{index} by {threading.current_thread().name}"


@pytest.mark.parametrize("num_threads", [1, 3, 20])
def test_results_are_in_order(num_threads: int):
    tasks = [partial(_name, index) for index in range(10)]
    results = run_watched(tasks, num_threads=num_threads, timeout_seconds=60, on_timeout=_give_up)
    assert results == [f"{index} by decode" for index in range(10)]
    assert run_watched([], num_threads=num_threads, timeout_seconds=60, on_timeout=_give_up) == []


def test_no_more_threads_than_asked_for_run_at_once():
    barrier = threading.Barrier(2, timeout=60)

    def meet() -> int:
        barrier.wait()
        return threading.active_count()

    before = threading.active_count()
    counts = run_watched([meet] * 10, num_threads=2, timeout_seconds=60, on_timeout=lambda index: -1)
    assert max(counts) <= before + 2


def test_the_time_before_a_task_is_admitted_does_not_count():
    """The first task ends only once the second has waited longer than a task may take."""
    may_begin = threading.Event()

    def admit(index: int) -> None:
        if index == 1:
            assert may_begin.wait(60)

    def run_first() -> str:
        threading.Timer(GRACE_SECONDS + 0.6, may_begin.set).start()
        return "first"

    results = run_watched(
        [run_first, lambda: "second"], num_threads=2, timeout_seconds=0.1, on_timeout=_give_up, admit=admit
    )
    assert results == ["first", "second"]


def test_a_task_that_is_admitted_after_an_error_does_not_begin():
    failed, begun = threading.Event(), threading.Event()

    def fail() -> str:
        raise OSError("no disk")

    def admit(index: int) -> None:
        if index == 1:
            assert failed.wait(60)

    with pytest.raises(OSError, match="no disk"):
        run_watched(
            [fail, lambda: str(begun.set())],
            num_threads=2,
            timeout_seconds=60,
            on_timeout=_give_up,
            admit=admit,
        )
    failed.set()
    for thread in threading.enumerate():
        if thread.name == "decode":
            thread.join(timeout=60)
    assert not begun.is_set()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_hanging_task_is_left_behind_and_the_others_finish(pipe: Path, num_threads: int):
    tasks: list[Callable[[], str]] = [partial(_name, index) for index in range(8)]
    tasks[2] = tasks[5] = lambda: pipe.read_text(encoding="ascii")
    began = time.monotonic()
    results = run_watched(tasks, num_threads=num_threads, timeout_seconds=0.1, on_timeout=_give_up)
    expected = [f"{index} by decode" for index in range(8)]
    expected[2], expected[5] = "2 gave up", "5 gave up"
    assert results == expected
    assert time.monotonic() - began >= 0.1 + GRACE_SECONDS


def test_what_a_hanging_task_returns_late_is_thrown_away(pipe: Path):
    ended = threading.Event()

    def hang() -> str:
        pipe.read_text(encoding="ascii")
        ended.set()
        return "late"

    results = run_watched([hang, partial(_name, 1)], num_threads=1, timeout_seconds=0.1, on_timeout=_give_up)
    os.close(os.open(pipe, os.O_WRONLY))
    assert ended.wait(60)
    assert results == ["0 gave up", "1 by decode"]


def test_what_a_hanging_task_raises_late_counts_for_nothing():
    is_given_up, raised = threading.Event(), threading.Event()

    def hang() -> str:
        is_given_up.wait(60)
        raised.set()
        raise OSError("too late")

    def give_up(index: int) -> str:
        is_given_up.set()
        return f"{index} gave up"

    def wait_for_the_error() -> str:
        assert raised.wait(60)
        time.sleep(0.1)
        return "fine"

    tasks = [hang, *[partial(_name, index) for index in range(1, 4)], wait_for_the_error]
    results = run_watched(tasks, num_threads=1, timeout_seconds=0.1, on_timeout=give_up)
    assert (results[0], results[-1]) == ("0 gave up", "fine")


def test_the_first_exception_ends_the_run():
    done: list[int] = []

    def task(index: int) -> None:
        if index == 3:
            raise KeyError("three")
        done.append(index)

    tasks = [partial(task, index) for index in range(10)]
    with pytest.raises(KeyError, match="three"):
        run_watched(tasks, num_threads=1, timeout_seconds=60, on_timeout=lambda index: None)
    assert done == [0, 1, 2]


def test_a_process_with_a_hanging_task_can_end(pipe: Path):
    script = f"""
        from omnigrpo.media.watched_threads import run_watched

        tasks = [lambda: open({str(pipe)!r}).read(), lambda: "done"]
        print(run_watched(tasks, num_threads=2, timeout_seconds=0.1, on_timeout=lambda index: "gave up"))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['gave up', 'done']"


def test_a_clip_that_takes_too_long_stops_by_itself(decode: Callable[..., DecodedBatch], tmp_path: Path):
    long = write_clip(tmp_path / "long.mp4", ClipRecipe(num_frames=300, tone_seconds=10.0))
    before = threading.active_count()
    for wanted in (("video",), ("audio",), ("video", "audio")):
        clip = decode([Clip(path=long)], [wanted], SamplingConfig(), timeout_seconds=1e-6).clips[0]
        assert clip.status is ClipStatus.TIMEOUT
        assert clip.error == (
            f"{long} was not decoded within 1e-06 s: cut it, or raise media.timeout_seconds"
        )
    assert threading.active_count() <= before + 3
    assert decode([Clip(path=long)], [("video", "audio")], SamplingConfig()).clips[0].status is ClipStatus.OK


def test_a_step_after_decoding_that_hangs_costs_its_own_clip_alone(pipe: Path, tmp_path: Path):
    """As the next one would, were it inside the decoder."""
    paths = [write_clip(tmp_path / f"{n}.mp4", ClipRecipe(num_frames=10, tone_hertz=None)) for n in range(3)]

    def then(clip: DecodedClip) -> ClipStatus:
        if clip.clip.path == paths[1] and clip.status is ClipStatus.OK:
            pipe.read_text(encoding="ascii")
        return clip.status

    statuses = decode_each(
        [Clip(path=path) for path in paths], [VIDEO] * 3, SamplingConfig(), then, timeout_seconds=3.0
    )
    assert statuses == [ClipStatus.OK, ClipStatus.TIMEOUT, ClipStatus.OK]
