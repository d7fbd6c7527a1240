"""The calls by which an engine that continues prompts draws one group, whoever answers them."""

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

from omnigrpo.rollout.interface import GroupRequest, RolloutCounters, SamplingParams
from omnigrpo.rollout.sglang_requests import Generated, room_of


class Draw(Protocol):
    """One call: samples of the prompt with these tokens appended."""

    async def __call__(self, tokens: tuple[int, ...], num_samples: int, room: int) -> list[Generated]:
        """``room``: new tokens of a sample at most; 0 only computes the prompt."""
        ...


async def draw_group(
    request: GroupRequest, sampling: SamplingParams, missing: Sequence[int], draw: Draw
) -> dict[int, Generated]:
    """Fresh samples in one call, which computes their prefix first; begun ones in a call each, after it is computed.

    The first call that fails ends the others.
    """
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


def counted(before: RolloutCounters, request: GroupRequest, drawn: Iterable[Generated]) -> RolloutCounters:
    """The totals with one more group."""
    tokens = sum(len(generated.token_ids) for generated in drawn)
    return dataclasses.replace(
        before,
        prefixes_prefilled=before.prefixes_prefilled + 1,
        prefix_rows=before.prefix_rows + len(request.prefix.inputs.token_ids_P),
        decode_rows=before.decode_rows + tokens,
        tokens_generated=before.tokens_generated + tokens,
    )
