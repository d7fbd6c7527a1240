import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from omnigrpo.runtime import spans
from omnigrpo.runtime.spans import Phase, SpanRecorder


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def in_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_the_phases_are_those_of_a_step() -> None:
    names = (
        "media_wait decode encode prefill decode_tokens reward pack reference forward head backward optimizer "
        "publish"
    )
    assert [str(phase) for phase in Phase] == names.split()


def test_spans_of_one_name_add_up_until_drained(clock: Clock) -> None:
    recorder = SpanRecorder(clock=clock)
    for seconds in (1.0, 2.0):
        with recorder.span(Phase.FORWARD):
            clock.advance(seconds)
    assert recorder.drain() == {"forward": 3.0}
    assert recorder.drain() == {}


def test_nested_spans_are_exclusive(clock: Clock) -> None:
    recorder = SpanRecorder(clock=clock)
    with recorder.span("step"):
        clock.advance(1)
        with recorder.span(Phase.FORWARD):
            clock.advance(2)
            with recorder.span(Phase.PACK):
                clock.advance(4)
            with recorder.span(Phase.FORWARD):
                clock.advance(8)
        clock.advance(16)
    assert recorder.drain() == {"step": 17.0, "forward": 10.0, "pack": 4.0}


def test_a_span_counts_when_it_closes(clock: Clock) -> None:
    recorder = SpanRecorder(clock=clock)
    with recorder.span("outer"):
        clock.advance(1)
        with recorder.span("inner"):
            clock.advance(1)
        assert recorder.drain() == {"inner": 1.0}
    assert recorder.drain() == {"outer": 1.0}


def test_an_exception_still_closes_the_span(clock: Clock) -> None:
    recorder = SpanRecorder(clock=clock)

    def failing() -> None:
        with recorder.span("outer"), recorder.span("inner"):
            clock.advance(3)
            raise KeyError("x")

    with pytest.raises(KeyError):
        failing()
    assert recorder.drain() == {"inner": 3.0, "outer": 0.0}


def test_each_counts_the_making_of_the_items_alone(clock: Clock) -> None:
    recorder = SpanRecorder(clock=clock)

    def made() -> Iterator[str]:
        clock.advance(1)
        yield "a"
        clock.advance(2)
        yield "b"
        clock.advance(4)

    seen = []
    for item in recorder.each(Phase.FORWARD, made()):
        seen.append(item)
        with recorder.span(Phase.HEAD):
            clock.advance(8)
    assert seen == ["a", "b"]
    assert recorder.drain() == {"forward": 7.0, "head": 16.0}


def test_background_spans_are_reported_apart_and_leave_the_foreground_alone(clock: Clock) -> None:
    recorder = SpanRecorder(clock=clock)

    def background() -> None:
        with recorder.span(Phase.DECODE):
            clock.advance(2)

    with recorder.span(Phase.FORWARD):
        in_thread(background)
        with recorder.span(Phase.PACK):
            clock.advance(4)
        clock.advance(1)
    assert recorder.drain() == {"overlapped/decode": 2.0, "forward": 3.0, "pack": 4.0}


def test_many_threads_lose_nothing() -> None:
    recorder = SpanRecorder(clock=iter(range(10**6)).__next__)

    def work() -> None:
        for _ in range(200):
            with recorder.span("x"):
                time.sleep(0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Every span reads a clock that never repeats, so each lasts at least one tick.
    assert recorder.drain()["overlapped/x"] >= 8 * 200


def test_real_phases_do_not_exceed_the_wall_time() -> None:
    recorder = SpanRecorder()
    started = time.perf_counter()
    with recorder.span("a"):
        time.sleep(0.02)
        with recorder.span("b"):
            time.sleep(0.02)
    wall = time.perf_counter() - started
    seconds = recorder.drain()
    assert seconds["a"] >= 0.015
    assert seconds["b"] >= 0.015
    assert sum(seconds.values()) <= wall


def test_every_span_is_an_nvtx_range_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = spans.nvtx.annotate

    def annotate(message: str) -> object:
        opened.append(message)
        return real(message)

    monkeypatch.setattr(spans.nvtx, "annotate", annotate)
    recorder = SpanRecorder()
    with recorder.span(Phase.PREFILL), recorder.span("mine"):
        pass
    assert opened == ["prefill", "mine"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_synchronising_without_cuda_says_so() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        SpanRecorder(synchronize_cuda=True)
