"""The prefetch queue: order, back-pressure, errors where they belong, resumption, and a close at any time."""

import gc
import random
import threading
import time
import weakref

import pytest

from omnigrpo.media.prefetch import PrefetchQueue, PrefetchStats


def same(loaded: int) -> int:
    return loaded


class Recorder:
    """A load that notes which positions it was asked for and how far ahead of the reader it is."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.taken = 0
        self.furthest = 0

    def __call__(self, position: int) -> int:
        self.asked.append(position)
        self.furthest = max(self.furthest, position - self.taken)
        return position * 10


def wait_until(condition, *, seconds: float = 60.0) -> None:
    """Fail when a condition that must come true never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_items_come_in_order_and_each_is_made_once(depth: int):
    load = Recorder()
    with PrefetchQueue(load, lambda loaded: loaded + 1, depth=depth) as queue:
        assert [queue.get(position) for position in range(20)] == [p * 10 + 1 for p in range(20)]
    assert load.asked == sorted(set(load.asked))
    assert load.asked[:20] == list(range(20))
    assert len(load.asked) <= 20 + depth


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_items_are_begun_ahead_of_the_reader(depth: int):
    """A slow reader: both stages fill up to the depth, and stop."""
    begun: list[int] = []
    with PrefetchQueue(lambda position: begun.append(position) or position, same, depth=depth) as queue:
        for position in range(4):
            assert queue.get(position) == position
            wait_until(lambda: queue.num_ready == depth)
            time.sleep(0.02)  # Time to overrun, if it would.
            assert begun == list(range(position + 1 + depth))


def test_back_pressure_holds_for_a_reader_of_any_speed():
    load = Recorder()
    generator = random.Random(0)
    with PrefetchQueue(load, same, depth=3) as queue:
        for position in range(60):
            queue.get(position)
            load.taken = position + 1
            time.sleep(generator.choice((0.0, 0.0, 0.002)))
    assert load.furthest <= 3


def test_both_stages_work_at_once_and_in_order():
    """``finish`` of one item returns only after ``load`` of the next one began."""
    began = [threading.Event() for _ in range(7)]
    finished: list[int] = []

    def load(position: int) -> int:
        began[position].set()
        return position

    def finish(position: int) -> int:
        assert position >= 4 or began[position + 1].wait(60)
        finished.append(position)
        return position

    with PrefetchQueue(load, finish, depth=2) as queue:
        assert [queue.get(position) for position in range(5)] == list(range(5))
    assert finished[:5] == list(range(5))


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("stage", ["load", "finish"])
def test_an_error_is_raised_at_its_position_and_tried_again(depth: int, stage: str):
    failures = [True]

    def fails_once_at_two(position: int) -> int:
        if position == 2 and failures:
            failures.pop()
            raise OSError("disk gone")
        return position

    stages = (fails_once_at_two, same) if stage == "load" else (same, fails_once_at_two)
    with PrefetchQueue(*stages, depth=depth) as queue:
        assert [queue.get(0), queue.get(1)] == [0, 1]
        with pytest.raises(OSError, match="disk gone"):
            queue.get(2)
        assert [queue.get(2), queue.get(3)] == [2, 3]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_any_position_may_be_asked_for(depth: int):
    """A run that is resumed begins where it stopped; what was read ahead for another place is not served."""
    load = Recorder()
    with PrefetchQueue(load, same, depth=depth) as queue:
        assert [queue.get(p) for p in (7, 8, 3, 4, 4, 100, 0)] == [70, 80, 30, 40, 40, 1000, 0]
    assert load.asked[0] == 7


def test_items_of_an_earlier_beginning_are_thrown_away():
    """A load that is under way when the reader turns elsewhere must not be served as something else."""
    gate, entered = threading.Event(), threading.Event()

    def load(position: int) -> tuple[int, str]:
        if position == 1 and not gate.is_set():
            entered.set()
            assert gate.wait(60)
            return position, "old"
        return position, "new"

    with PrefetchQueue(load, lambda loaded: loaded, depth=1) as queue:
        assert queue.get(0) == (0, "new")
        assert entered.wait(60)
        gate_opener = threading.Timer(0.05, gate.set)
        gate_opener.start()
        assert queue.get(0) == (0, "new")
        assert queue.get(1) == (1, "new")


def test_stalls_and_ready_items_are_counted():
    clock_seconds = [0.0]
    release = threading.Event()

    def load(position: int) -> int:
        if position == 0:
            assert release.wait(60)
            clock_seconds[0] += 2.0
        return position

    with PrefetchQueue(load, same, depth=2, clock=lambda: clock_seconds[0]) as queue:
        threading.Timer(0.02, release.set).start()
        queue.get(0)
        assert queue.stats == PrefetchStats(gets=1, ready=0, stalls=1, stall_seconds=2.0)
        wait_until(lambda: queue.num_ready == 2)
        before = queue.stats
        queue.get(1)
        assert queue.stats - before == PrefetchStats(gets=1, ready=2, stalls=0, stall_seconds=0.0)


def test_without_prefetch_the_reader_does_the_work_and_waits_for_all_of_it():
    clock_seconds = [0.0]
    threads = set()

    def load(position: int) -> int:
        clock_seconds[0] += 3.0
        threads.add(threading.get_ident())
        return position

    with PrefetchQueue(load, same, depth=0, clock=lambda: clock_seconds[0]) as queue:
        assert [queue.get(0), queue.get(1)] == [0, 1]
        assert queue.stats == PrefetchStats(gets=2, ready=0, stalls=2, stall_seconds=6.0)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("reads", [0, 1, 3])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_close_ends_the_threads_at_any_time(reads: int, depth: int):
    before = threading.active_count()
    queue = PrefetchQueue(lambda position: time.sleep(0.002) or position, same, depth=depth)
    for position in range(reads):
        queue.get(position)
    queue.close()
    queue.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="the prefetch queue is closed"):
        queue.get(reads)
    assert threading.active_count() == before


def test_close_wakes_a_reader_that_waits():
    gate = threading.Event()
    errors = []

    def load(position: int) -> int:
        assert gate.wait(60)
        return position

    queue = PrefetchQueue(load, same, depth=1)

    def read() -> None:
        try:
            queue.get(0)
        except RuntimeError as error:
            errors.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    closer = threading.Thread(target=queue.close)
    closer.start()
    reader.join(60)
    assert len(errors) == 1
    assert "closed" in errors[0]
    assert closer.is_alive(), "close waits for what is under way"
    gate.set()
    closer.join(60)
    assert not closer.is_alive()


class Held:
    """Something whose life can be watched."""


def test_no_item_outlives_its_reader():
    """Neither the waiting threads nor a closed queue hold an item that was taken or dropped."""
    made: list[weakref.ref[Held]] = []

    def load(position: int) -> Held:
        item = Held()
        made.append(weakref.ref(item))
        return item

    queue = PrefetchQueue(load, lambda loaded: loaded, depth=2)
    queue.get(0)
    wait_until(lambda: queue.num_ready == 2)
    gc.collect()
    wait_until(lambda: [ref() is None for ref in made] == [True, False, False])
    queue.close()
    gc.collect()
    assert all(ref() is None for ref in made)


def test_a_negative_depth_is_refused():
    with pytest.raises(ValueError, match="prefetch depth must not be negative, got -1; 0 turns prefetch off"):
        PrefetchQueue(same, same, depth=-1)
