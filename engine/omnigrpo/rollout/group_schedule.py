"""Which groups are under way: admitted while rows are free, decoded together, finished one by one."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from omnigrpo.rollout.decode_batch import DecodeBatch
from omnigrpo.rollout.group_state import LiveGroup
from omnigrpo.rollout.interface import FinishedGroup, SamplingParams, Spans
from omnigrpo.rollout.kv_pool import KVPool
from omnigrpo.rollout.policy import PolicyModel
from omnigrpo.rollout.prefill import prefill
from omnigrpo.runtime.spans import Phase


class GroupSchedule:
    """Continuous batching of the groups of one ``generate`` call."""

    def __init__(
        self,
        model: PolicyModel,
        pool: KVPool,
        batch: DecodeBatch,
        groups: Sequence[LiveGroup],
        sampling: SamplingParams,
        *,
        max_prefill_tokens: int,
        max_decode_rows: int,
        steps_between_looks: int,
        version: Callable[[], int],
        count: Callable[..., None],
        spans: Spans,
    ) -> None:
        """Wait with these groups.

        Args:
            model: the policy.
            pool: where their keys and values go.
            batch: empty.
            groups: in the order in which they are admitted.
            sampling: how tokens are drawn.
            max_prefill_tokens: rows of one prefill, at most; a group with more is prefilled alone.
            max_decode_rows: rows of the batch, at most; a group with more samples is decoded alone.
            steps_between_looks: decode steps after which the host reads what was drawn.
            version: of the weights at this moment.
            count: adds to counters, by their names.
            spans: reports prefill and decode time.
        """
        self._model, self._pool, self._batch, self._sampling = model, pool, batch, sampling
        self._waiting, self._live = deque(groups), list[LiveGroup]()
        self._max_prefill_tokens, self._max_decode_rows = max_prefill_tokens, max_decode_rows
        self._steps_between_looks = steps_between_looks
        self._version, self._count, self._spans = version, count, spans

    def advance(self) -> Iterator[FinishedGroup]:
        """Admit what fits, and decode until a group has finished or another fits; nothing once all are done."""
        while self._waiting and (admitted := self._next_groups()):
            with self._spans.span(Phase.PREFILL):
                self._prefill(admitted)
        with self._spans.span(Phase.DECODE_TOKENS):
            self._decode()
        finished = [group for group in self._live if group.is_finished]
        for group in finished:
            self._live.remove(group)
            group.give_back(self._pool)
        return (
            FinishedGroup(index=group.index, completions=tuple(s.completion() for s in group.samples))
            for group in finished
        )

    @property
    def is_done(self) -> bool:
        """Whether every group has been handed out."""
        return not self._waiting and not self._live

    def close(self) -> None:
        """Give back the blocks of what is under way."""
        for group in self._live:
            group.give_back(self._pool)
        self._live.clear()
        self._waiting.clear()

    def _fits(self, group: LiveGroup, num_rows: int) -> bool:
        """Whether a group can join so many rows."""
        return num_rows == 0 or num_rows + sum(1 for _ in group.active()) <= self._max_decode_rows

    def _next_groups(self) -> list[LiveGroup]:
        """Groups of one prefill; none when the next does not fit. One without a sample that draws takes no part."""
        groups: list[LiveGroup] = []
        rows, tokens = self._batch.num_rows, 0
        while self._waiting and self._fits(self._waiting[0], rows):
            group = self._waiting[0]
            if groups and tokens + group.prefill_rows > self._max_prefill_tokens:
                break
            self._waiting.popleft()
            self._live.append(group)
            active = sum(1 for _ in group.active())
            if active:
                groups.append(group)
                rows, tokens = rows + active, tokens + group.prefill_rows
        return groups

    def _prefill(self, groups: list[LiveGroup]) -> None:
        token_S, logprob_S = prefill(self._model, self._pool, groups, self._sampling)
        self._count(prefixes_prefilled=len(groups), prefix_rows=sum(group.prefix_rows for group in groups))
        self._batch.add(groups, token_S, logprob_S, self._version())
        if self._steps_between_looks == 1:
            self._read(0)

    def _decode(self) -> None:
        """One read is always behind, so that the device has work while the host looks, unless it looks at each step."""
        behind = 0 if self._steps_between_looks == 1 else 1
        self._read(behind)
        while not any(group.is_finished for group in self._live):
            rows = self._batch.num_rows
            if rows:
                steps = self._batch.step(self._steps_between_looks, self._version())
                self._count(decode_steps=steps, decode_rows=steps * rows)
            self._read(behind if self._batch.num_rows else 0)
            if self._waiting and self._fits(self._waiting[0], self._batch.num_rows):
                return

    def _read(self, behind: int) -> None:
        while self._batch.num_unread > behind:
            self._count(tokens_generated=self._batch.read())
