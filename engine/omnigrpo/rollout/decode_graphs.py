"""Decode steps as CUDA graphs: one launch a step instead of hundreds, captured once per size of batch.

Sizes are rounded up (rows and groups to powers of two, tables to powers of two of blocks), so that few graphs serve all
batches; what fills up a batch draws for nobody.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from omnigrpo.rollout.decode_rows import DecodeRows
from omnigrpo.rollout.interface import SamplingParams
from omnigrpo.rollout.kv_pool import KVPool
from omnigrpo.rollout.policy import PolicyModel, weight_addresses


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphSizes:
    """What a captured step is made for."""

    rows: int
    groups: int
    prefix_blocks: int
    own_blocks: int

    @classmethod
    def for_rows(cls, rows: DecodeRows) -> "GraphSizes":
        """The smallest that these rows fit."""
        return cls(
            rows=power_of_two(len(rows.token_S)),
            groups=power_of_two(len(rows.prefix_lengths_B)),
            prefix_blocks=power_of_two(rows.prefix_blocks_BP.shape[1]),
            own_blocks=power_of_two(rows.own_blocks_SR.shape[1]),
        )

    def pad(self, rows: DecodeRows) -> DecodeRows:
        """The rows in tensors of these sizes."""
        return rows.padded(
            rows=self.rows, groups=self.groups, prefix_blocks=self.prefix_blocks, own_blocks=self.own_blocks
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedStep:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    rows: DecodeRows
    token_S: Tensor
    logprob_S: Tensor

    def replay(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """One step: ``token_S, logprob_S`` of the first rows, which later replays leave alone."""
        self.graph.replay()
        return self.token_S[:num_rows].clone(), self.logprob_S[:num_rows].clone()

    def store(self, rows: DecodeRows) -> None:
        """Hand what the steps moved on back to the rows that were loaded."""
        rows.token_S.copy_(self.rows.token_S[: len(rows.token_S)])
        rows.index_S.copy_(self.rows.index_S[: len(rows.index_S)])


class DecodeGraphs:
    """The captured steps of one engine; they die when weights or pool move."""

    def __init__(self, model: PolicyModel) -> None:
        self._model = model
        self._made_for: object = None
        self._steps: dict[tuple[GraphSizes, SamplingParams], CapturedStep] = {}
        self._memory = None
        """The memory pool that all graphs share: one runs at a time, and what it gives is copied at once."""

    def load(self, rows: DecodeRows, pool: KVPool, sampling: SamplingParams) -> CapturedStep:
        """The step for rows of this size, captured when there is none yet, with these rows in it."""
        made_for = (pool, pool.generation, weight_addresses(self._model))
        if made_for != self._made_for:
            self._steps.clear()
            self._made_for, self._memory = made_for, None
        sizes = GraphSizes.for_rows(rows)
        padded = sizes.pad(rows)
        step = self._steps.get((sizes, sampling))
        if step is None:
            step = self._steps[sizes, sampling] = self._capture(padded, pool, sampling)
        step.rows.copy_(padded)
        return step

    def _capture(self, rows: DecodeRows, pool: KVPool, sampling: SamplingParams) -> CapturedStep:
        """Run the step once, so that everything is compiled and allocated, and record it.

        That run writes the keys and values that the first replay will write again.
        """
        static = rows.padded(
            rows=len(rows.token_S),
            groups=len(rows.prefix_lengths_B),
            prefix_blocks=rows.prefix_blocks_BP.shape[1],
            own_blocks=rows.own_blocks_SR.shape[1],
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            static.step(self._model, pool, sampling)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            token_S, logprob_S = static.step(self._model, pool, sampling)
        self._memory = graph.pool()
        return CapturedStep(graph=graph, rows=static, token_S=token_S, logprob_S=logprob_S)


def power_of_two(count: int) -> int:
    """The smallest that is not below ``count``."""
    return 1 << (count - 1).bit_length()
