"""Who may begin, and when."""

import asyncio

import pytest

from omnigrpo.rollout.admission import Admission, Need

LIMIT = Need(rows=10, media_bytes=100)


def need(rows: int, media_bytes: int = 0) -> Need:
    return Need(rows=rows, media_bytes=media_bytes)


async def hold(admission: Admission, wanted: Need, name: str, log: list[str], until: asyncio.Event) -> None:
    async with admission.hold(wanted):
        log.append(name)
        await until.wait()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def begun_of(*wanted: Need) -> list[str]:
    """Who begins when they come one after the other and nobody ends."""

    async def main() -> list[str]:
        admission, log, never = Admission(LIMIT), [], asyncio.Event()
        tasks = [
            asyncio.ensure_future(hold(admission, item, str(i), log, never)) for i, item in enumerate(wanted)
        ]
        await settle()
        begun = log[:]
        never.set()
        await asyncio.gather(*tasks)
        assert sorted(log) == [str(i) for i in range(len(wanted))]
        assert admission.num_inside == 0
        return begun

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("wanted", "begun"),
    [
        ((need(4), need(6)), ["0", "1"]),
        ((need(4), need(7), need(1)), ["0"]),
        ((need(99), need(1)), ["0"]),
        ((need(1), need(99), need(1)), ["0"]),
        ((need(1, 60), need(1, 50)), ["0"]),
    ],
    ids=["fit", "first come first served", "too large goes alone", "too large waits", "bytes count too"],
)
def test_who_begins(wanted, begun):
    assert begun_of(*wanted) == begun


def test_alone_waits_for_those_inside_and_holds_up_the_others():
    async def main() -> list[str]:
        admission, log, done = Admission(LIMIT), [], asyncio.Event()

        async def alone() -> None:
            async with admission.alone():
                log.append("alone")
                await settle()

        first = asyncio.ensure_future(hold(admission, need(1), "first", log, done))
        await settle()
        middle = asyncio.ensure_future(alone())
        last = asyncio.ensure_future(hold(admission, need(1), "last", log, done))
        await settle()
        assert log == ["first"]
        done.set()
        await asyncio.gather(first, middle, last)
        return log

    assert asyncio.run(main()) == ["first", "alone", "last"]


def test_one_that_gives_up_waiting_holds_up_nobody():
    async def main() -> list[str]:
        admission, log, done = Admission(LIMIT), [], asyncio.Event()
        tasks = [asyncio.ensure_future(hold(admission, need(6), str(i), log, done)) for i in range(3)]
        await settle()
        tasks[1].cancel()
        tasks[0].cancel()
        await settle()
        done.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return log

    assert asyncio.run(main()) == ["0", "2"]
