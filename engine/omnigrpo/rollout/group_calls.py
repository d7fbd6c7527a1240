"""The calls by which an engine that continues prompts draws one group, whoever answers them."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from omnigrpo.rollout.interface import GroupRequest, SamplingParams
from omnigrpo.rollout.sglang_requests import Generated, room_of


class Draw(Protocol):
    """One call: samples of the prompt with these tokens appended."""

    async def __call__(self, tokens: tuple[int, ...], num_samples: int, room: int) -> list[Generated]:
        """``room``: new tokens of a sample at most; 0 only computes the prompt."""
        ...


def missing_samples(request: GroupRequest) -> list[int]:
    """The samples that are not finished yet."""
    begun = [request.begun_by(sample) for sample in range(len(request.seeds))]
    return [i for i, had in enumerate(begun) if had is None or not had.is_finished]


async def draw_group(
    request: GroupRequest, sampling: SamplingParams, missing: Sequence[int], draw: Draw
) -> dict[int, Generated]:
    """Fresh samples in one call, which computes their prefix first; begun ones in a call each, after it is computed."""
    had = {i: completion for i in missing if (completion := request.begun_by(i)) is not None}
    fresh = [i for i in missing if i not in had]
    drawn: dict[int, Generated] = {}
    if fresh:
        samples = await draw((), len(fresh), room_of(sampling, None))
        drawn |= dict(zip(fresh, samples, strict=True))
    elif len(had) > 1:
        await draw((), 1, 0)
    try:
        async with asyncio.TaskGroup() as group:
            parts = {
                i: group.create_task(draw(part.token_ids, 1, room_of(sampling, part)))
                for i, part in had.items()
            }
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # The others were cancelled for it.
    return drawn | {i: only for i, task in parts.items() for only in task.result()}
