"""The in-process rollout engine: it samples from the policy model itself, whose weights it shares.

Each group's prefix is prefilled once and its keys and values stay where they are, read by all its samples; groups join
the batch as soon as rows are free, and are handed out as soon as their last sample ends.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from omnigrpo.rollout.decode_batch import DecodeBatch
from omnigrpo.rollout.decode_graphs import DecodeGraphs
from omnigrpo.rollout.group_schedule import GroupSchedule
from omnigrpo.rollout.group_state import LiveGroup
from omnigrpo.rollout.interface import (
    FinishedGroup,
    GroupRequest,
    RolloutCounters,
    RolloutError,
    SamplingParams,
    Spans,
)
from omnigrpo.rollout.kv_pool import KVPool
from omnigrpo.rollout.policy import PolicyModel, evaluating
from omnigrpo.rollout.request_check import check_requests

LOOKS_ON_CUDA = 8
"""Decode steps between two looks of the host at what was drawn, where looking waits for the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeEngineConfig:
    """Memory budgets of the engine, and how it drives the device."""

    max_prefill_tokens: int = 16384
    """Rows of one prefill call; a longer prefix is prefilled alone."""
    max_decode_rows: int = 256
    """Samples decoded at once; a larger group, which is never split, is decoded alone."""
    steps_between_looks: int | None = None
    """Decode steps after which the host looks which samples have ended, so that their rows leave; None is 1 on a CPU
    and 8 on CUDA, where a look waits for the device."""
    cuda_graphs: bool = True
    """Launch a decode step as one captured graph; CUDA only."""

    def __post_init__(self) -> None:
        """Reject budgets that admit nothing."""
        for name in ("max_prefill_tokens", "max_decode_rows", "steps_between_looks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")


class _NoSpans:
    """Times nothing."""

    def span(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()


class NativeEngine:
    """Draws samples from a model in this process, in the thread that reads them."""

    def __init__(
        self, model: PolicyModel, config: NativeEngineConfig | None = None, *, spans: Spans | None = None
    ) -> None:
        """Share ``model``'s weights: what the trainer writes into them is what samples."""
        self._model: PolicyModel | None = model
        self._config = config or NativeEngineConfig()
        self._spans = spans or _NoSpans()
        self._version = 0
        self._counters = RolloutCounters()
        self._is_paused = False
        self.pool: KVPool | None = None
        """Keys and values; None before the first call and after ``release_memory``."""
        self._graphs: DecodeGraphs | None = None
        self._streams: WeakSet[NativeStream] = WeakSet()

    @property
    def counters(self) -> RolloutCounters:
        """Totals so far."""
        return self._counters

    @property
    def overlaps_training(self) -> bool:
        """False: the weights are the trainer's own."""
        return False

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Name the weights; they are the model's own, so nothing is copied.

        Samples under way go on with the new weights over keys and values of the old ones; their version spans say so.
        """
        self._version = version

    def pause(self) -> None:
        """Draw no tokens until ``resume``: reading a stream raises RolloutError, since nothing else could wake it."""
        self._is_paused = True

    def resume(self) -> None:
        """Streams can be read again, from where they were."""
        self._is_paused = False

    def release_memory(self) -> None:
        """Free the blocks of keys and values, and captured graphs; RolloutError while a stream is under way."""
        if self._streams:
            raise RolloutError(
                f"{len(self._streams)} stream(s) of the native engine are under way and hold keys and values; "
                "read them to the end or close them before release_memory"
            )
        self.pool = self._graphs = None

    def restore_memory(self) -> None:
        """Nothing to do: memory is taken again when it is needed."""

    def close(self) -> None:
        """End all streams, free what they hold, and let go of the model."""
        for stream in list(self._streams):
            stream.close()
        self.pool = self._graphs = None
        self._model = None

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingParams) -> "NativeStream":
        """Draw the samples of every request while the stream is read; one without seeds is not prefilled.

        Raises ValueError before any work for what cannot be served, and RolloutError of a closed engine. Reading the
        stream raises FloatingPointError when the model's logits are not finite.
        """
        model = self._open_model()
        check_requests(model, requests, sampling)
        groups = [LiveGroup.of_request(i, request, sampling) for i, request in enumerate(requests)]
        stream = NativeStream(self, model, self._schedule(model, groups, sampling) if groups else None)
        self._streams.add(stream)
        return stream

    def check_readable(self) -> None:
        """Raise RolloutError while the engine is paused or closed."""
        self._open_model()
        if self._is_paused:
            raise RolloutError(
                "the native engine is paused, and draws tokens only in the thread that reads its stream: call "
                "resume() before reading on"
            )

    def ended(self, stream: "NativeStream") -> None:
        """Forget a stream."""
        self._streams.discard(stream)

    def _open_model(self) -> PolicyModel:
        if self._model is None:
            raise RolloutError("this rollout engine is closed; build a new NativeEngine to generate")
        return self._model

    def _schedule(
        self, model: PolicyModel, groups: list[LiveGroup], sampling: SamplingParams
    ) -> GroupSchedule:
        config, like = self._config, groups[0].request.prefix.embeddings_PD
        if self.pool is None:
            decoder = model.decoder.config
            self.pool = KVPool(
                num_layers=decoder.num_layers,
                num_kv_heads=decoder.num_kv_heads,
                head_width=decoder.head_width,
                dtype=like.dtype,
                device=like.device,
            )
        if self._graphs is None and config.cuda_graphs and like.is_cuda:
            self._graphs = DecodeGraphs(model)
        return GroupSchedule(
            model,
            self.pool,
            DecodeBatch(model, self.pool, sampling, self._graphs),
            groups,
            sampling,
            max_prefill_tokens=config.max_prefill_tokens,
            max_decode_rows=config.max_decode_rows,
            steps_between_looks=config.steps_between_looks or (LOOKS_ON_CUDA if like.is_cuda else 1),
            version=lambda: self._version,
            count=self._count,
            spans=self._spans,
        )

    def _count(self, **added: int) -> None:
        totals = {name: getattr(self._counters, name) + count for name, count in added.items()}
        self._counters = dataclasses.replace(self._counters, **totals)


class NativeStream:
    """The groups of one ``generate`` call; tokens are drawn while it is read. Its blocks go back at its end."""

    def __init__(self, engine: NativeEngine, model: PolicyModel, schedule: GroupSchedule | None) -> None:
        """Without a schedule there is nothing to read."""
        self._engine, self._model = engine, model
        self._schedule = schedule
        self._finished: list[FinishedGroup] = []

    def __iter__(self) -> "NativeStream":
        """Itself."""
        return self

    def __next__(self) -> FinishedGroup:
        """Draw until a group is finished. RolloutError while the engine is paused; an error ends the stream."""
        if self._schedule is not None:
            self._engine.check_readable()
        while not self._finished:
            if self._schedule is None or self._schedule.is_done:
                self.close()
                raise StopIteration
            done = False
            try:
                with torch.no_grad(), evaluating(self._model):
                    self._finished = list(self._schedule.advance())
                done = True
            finally:
                if not done:
                    self.close()
        return self._finished.pop(0)

    def close(self) -> None:
        """Abort what is under way; nothing more is yielded."""
        if self._schedule is not None:
            self._schedule.close()
            self._schedule = None
        self._finished.clear()
        self._engine.ended(self)

    def __del__(self) -> None:
        """A stream that nobody reads any more gives its blocks back."""
        self.close()
