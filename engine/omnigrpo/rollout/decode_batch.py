"""The rows that decode together: they come and go between steps, while their keys and values stay where they are.

The host reads tokens some steps after they were drawn. It knows without reading how many a row has, so rows leave on
time at their longest; one that has drawn a stop token goes on until the host reads that, for nothing.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnigrpo.rollout.decode_graphs import DecodeGraphs
from omnigrpo.rollout.decode_rows import DecodeRows, table, to_device
from omnigrpo.rollout.group_state import LiveGroup, Sample
from omnigrpo.rollout.interface import SamplingParams
from omnigrpo.rollout.kv_pool import KVPool
from omnigrpo.rollout.policy import PolicyModel
from omnigrpo_kernels.decode_attention import BLOCK_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """Tokens that the host has not read yet."""

    rows: tuple[tuple[LiveGroup, Sample], ...]
    token_TS: Tensor
    logprob_TS: Tensor
    version: int
    copied: "torch.cuda.Event | None"
    """Both are on the host once this has happened; None when they are there."""


class DecodeBatch:
    """Live rows of all groups, those of one group side by side."""

    def __init__(
        self, model: PolicyModel, pool: KVPool, sampling: SamplingParams, graphs: DecodeGraphs | None
    ) -> None:
        self._model, self._pool, self._sampling, self._graphs = model, pool, sampling, graphs
        self._stops = frozenset(sampling.stop_token_ids)
        self._live: list[tuple[LiveGroup, Sample]] = []
        self._rows: DecodeRows | None = None
        self._token_S: Tensor | None = None
        self._unread: deque[_Drawn] = deque()

    @property
    def num_rows(self) -> int:
        """Rows of the next step."""
        return len(self._live)

    @property
    def num_unread(self) -> int:
        """Pieces of work that the host has not read yet."""
        return len(self._unread)

    def add(self, groups: Sequence[LiveGroup], token_S: Tensor, logprob_S: Tensor, version: int) -> None:
        """Take in the samples of groups after their prefill, with the first token of each."""
        rows = [(group, sample) for group in groups for sample in group.active()]
        self._drew(rows, token_S[None], logprob_S[None], version)
        self._live += rows
        self._token_S = token_S if self._token_S is None else torch.cat([self._token_S, token_S])
        self._rows = None
        self._leave()

    def step(self, num_steps: int, version: int) -> int:
        """Draw up to so many tokens of every row, none beyond a row's limit; the steps that were made."""
        num_steps = min(num_steps, *(sample.limit - sample.num_drawn for _, sample in self._live))
        rows = self._prepared(num_steps)
        graph = None if self._graphs is None else self._graphs.load(rows, self._pool, self._sampling)
        drawn = []
        for _ in range(num_steps):
            if graph is None:
                drawn.append(rows.step(self._model, self._pool, self._sampling))
            else:
                drawn.append(graph.replay(self.num_rows))
        token_TS, logprob_TS = (torch.stack(each) for each in zip(*drawn, strict=True))
        if graph is not None:
            graph.store(rows)
        self._token_S = token_TS[-1]
        self._drew(self._live, token_TS, logprob_TS, version)
        self._leave()
        return num_steps

    def read(self) -> int:
        """Hand the oldest unread tokens to their samples; the number of them that counted."""
        drawn = self._unread.popleft()
        if drawn.copied is not None:
            drawn.copied.synchronize()
        before = sum(len(sample.tokens) for _, sample in drawn.rows)
        for tokens, logprobs in zip(drawn.token_TS.tolist(), drawn.logprob_TS.tolist(), strict=True):
            for (group, sample), token, logprob in zip(drawn.rows, tokens, logprobs, strict=True):
                sample.read(token, logprob, drawn.version, self._stops, group.request.name)
        self._leave()
        return sum(len(sample.tokens) for _, sample in drawn.rows) - before

    def _drew(
        self,
        rows: Sequence[tuple[LiveGroup, Sample]],
        token_TS: Tensor,
        logprob_TS: Tensor,
        version: int,
    ) -> None:
        for _, sample in rows:
            sample.num_drawn += len(token_TS)
        copied = None
        if token_TS.is_cuda:
            token_TS, logprob_TS = (each.to("cpu", non_blocking=True) for each in (token_TS, logprob_TS))
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append(
            _Drawn(rows=tuple(rows), token_TS=token_TS, logprob_TS=logprob_TS, version=version, copied=copied)
        )

    def _leave(self) -> None:
        """Drop the rows that draw no more."""
        stay = [index for index, (_, sample) in enumerate(self._live) if not sample.is_drawn_out]
        if len(stay) == len(self._live):
            return
        assert self._token_S is not None
        self._token_S = self._token_S[to_device(stay, self._token_S.device)]
        self._live = [self._live[index] for index in stay]
        self._rows = None

    def _prepared(self, num_steps: int) -> DecodeRows:
        """The rows' tensors, with blocks for so many more tokens."""
        for _, sample in self._live:
            # The last token that is drawn is not fed.
            missing = sample.num_drawn + num_steps - 1 - len(sample.blocks) * BLOCK_TOKENS
            if missing > 0:
                sample.blocks += self._pool.take(missing)
                self._rows = None
        if self._rows is None:
            self._rows = self._built()
        return self._rows

    def _built(self) -> DecodeRows:
        assert self._token_S is not None
        device = self._token_S.device
        groups = list(dict.fromkeys(group for group, _ in self._live))
        row_of = {group: row for row, group in enumerate(groups)}
        samples = [sample for _, sample in self._live]
        return DecodeRows(
            token_S=self._token_S.clone(),
            index_S=to_device([sample.num_drawn for sample in samples], device),
            advance_S=to_device([1] * len(samples), device),
            seed_S=to_device([sample.seed for sample in samples], device),
            first_position_S=to_device(
                [group.request.prefix.inputs.next_position for group, _ in self._live], device
            ),
            groups_S=to_device([row_of[group] for group, _ in self._live], device),
            prefix_blocks_BP=table([group.prefix_blocks for group in groups], device),
            prefix_lengths_B=to_device([group.prefix_rows for group in groups], device),
            own_blocks_SR=table([sample.blocks for sample in samples], device),
        )
