"""Closing a stream whose groups are under way, or still wait; SGLang is imitated."""

import asyncio

import pytest

from omnigrpo.rollout.admission import Admission, Need
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.loop_thread import LoopThread
from omnigrpo.rollout.sglang_stream import OpenCalls, SGLangStream, StreamOwner


def test_groups_that_wait_never_begin_once_the_stream_is_closed():
    loop, begun, ends = LoopThread("test"), [], {}
    calls = OpenCalls(lambda request_id: ends[request_id].set())
    admission = loop.run(_admission())

    async def group(name: str) -> tuple[()]:
        async with admission.hold(Need(rows=1, media_bytes=0)):
            calls.check()
            begun.append(name)
            ends[name] = asyncio.Event()
            with calls.under_way(name):
                await ends[name].wait()
        return ()

    async def close() -> None:
        calls.close()

    futures = {loop.submit(group(name)): i for i, name in enumerate("abc")}
    owner = StreamOwner(
        timeout_seconds=10.0,
        is_paused=lambda: False,
        error=lambda: RolloutError("ended"),
        abort=lambda: loop.run(close()),
    )
    stream = SGLangStream(futures, list("abc"), owner)
    while not ends:
        loop.run(asyncio.sleep(0))
    stream.close()
    assert begun == ["a"]
    assert admission.num_inside == 0
    assert all(future.done() and not future.cancelled() for future in futures)
    loop.close()


async def _admission() -> Admission:
    return Admission(Need(rows=1, media_bytes=0))


def test_a_call_that_is_cancelled_is_aborted():
    aborted: list[str] = []

    async def main() -> None:
        calls = OpenCalls(aborted.append)

        async def call() -> None:
            with calls.under_way("a"):
                await asyncio.Event().wait()

        task = asyncio.ensure_future(call())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        calls.close()

    asyncio.run(main())
    assert aborted == ["a"]
