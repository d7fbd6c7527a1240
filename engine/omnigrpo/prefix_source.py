"""From prompts to prefix inputs, read ahead of the steps that need them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from omnigrpo.feature_source import (
    EncodedClips,
    FeatureSource,
    LoadedClips,
    MediaConfig,
    MediaCounts,
    request_of,
)
from omnigrpo.media.prefetch import PrefetchQueue, PrefetchStats
from omnigrpo.metrics import Metric
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.runtime.side_stream import Handover
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import DecodedClip, DroppedPrompt, PrefixInputs, Prompt

__all__ = ["MediaConfig", "PrefixSource", "SourceBatch"]

Batches = Callable[[int], Sequence[Prompt]]
"""The prompts of each step; the same whenever it is asked, and none after the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceBatch:
    """The usable prompts of a step and the ones that left it."""

    inputs: tuple[PrefixInputs, ...]
    dropped: tuple[DroppedPrompt, ...]
    counts: MediaCounts = field(default_factory=MediaCounts)
    """Where its clips came from."""
    prefetch: PrefetchStats = field(default_factory=PrefetchStats)
    """How ``read`` fared with it."""

    @property
    def metrics(self) -> dict[str, float]:
        """What a step logs of its media."""
        return {
            Metric.PREFETCH_DEPTH: float(self.prefetch.ready),
            Metric.PREFETCH_STALLS: float(self.prefetch.stalls),
            Metric.PREFETCH_STALL_SECONDS: self.prefetch.stall_seconds,
            Metric.CACHE_MEMORY_HITS: float(self.counts.memory_hits),
            Metric.CACHE_DISK_HITS: float(self.counts.disk_hits),
            Metric.CACHE_MISSES: float(self.counts.misses),
            Metric.MEDIA_DECODED: float(self.counts.decoded),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Built:
    """A batch that another stream may still be computing."""

    batch: SourceBatch
    handover: Handover


class PrefixSource:
    """Builds prefix inputs for prompts, in order; one thread reads, the work ahead is done in others."""

    def __init__(
        self,
        *,
        model: HumanOmni,
        prompt_encoder: PromptEncoder,
        tower_hash: str,
        config: MediaConfig,
        spans: SpanRecorder,
    ) -> None:
        self._prompt_encoder = prompt_encoder
        self._depth = config.prefetch_depth
        self._spans = spans
        self.features = FeatureSource(model=model, tower_hash=tower_hash, config=config, spans=spans)
        self._closed = False
        self._batches: Batches | None = None
        self._queue: PrefetchQueue[tuple[Sequence[Prompt], LoadedClips], _Built] | None = None

    @property
    def num_decoded(self) -> int:
        """Clips decoded since the start; a step over cached clips adds none."""
        return self.features.num_decoded

    def inputs(self, prompts: Sequence[Prompt]) -> SourceBatch:
        """Return prefix inputs for all prompts whose clip is usable, and why the others are not."""
        built = self._build((prompts, self.features.load(prompts)))
        built.handover.receive()
        return built.batch

    def read(self, batches: Batches, position: int) -> SourceBatch:
        """Return ``inputs(batches(position))``, and build the batches after it while the caller works on this one.

        Args:
            batches: the prompts of each position; another function than the last time begins another sequence.
            position: usually the one after the last; any other begins there.
        """
        if self._closed:
            raise RuntimeError("the prefix source is closed; nothing can be read from it any more")
        queue = self._queue_of(batches)
        before = queue.stats
        with self._spans.span(Phase.MEDIA_WAIT):
            built = queue.get(position)
            built.handover.receive()
        return replace(built.batch, prefetch=queue.stats - before)

    def close(self) -> None:
        """Wait for the clips under way and stop; what was read ahead is forgotten, and nothing more is read."""
        self._closed = True
        self.features.stop()
        if self._queue is not None:
            self._queue.close()
        self.features.close()

    def _queue_of(self, batches: Batches) -> PrefetchQueue[tuple[Sequence[Prompt], LoadedClips], _Built]:
        if self._queue is None or self._batches != batches:
            if self._queue is not None:
                self._queue.close()

            def load(position: int) -> tuple[Sequence[Prompt], LoadedClips]:
                prompts = tuple(batches(position))
                return prompts, self.features.load(prompts)

            self._queue = PrefetchQueue(load, self._build, depth=self._depth)
            self._batches = batches
        return self._queue

    def _build(self, loaded: tuple[Sequence[Prompt], LoadedClips]) -> _Built:
        prompts, clips = loaded
        encoded = self.features.encode(clips)
        return _Built(batch=self._batch(prompts, encoded), handover=encoded.handover)

    def _batch(self, prompts: Sequence[Prompt], encoded: EncodedClips) -> SourceBatch:
        inputs, dropped = [], []
        for prompt in prompts:
            features = encoded.results[request_of(prompt)]
            if isinstance(features, DecodedClip):
                dropped.append(_dropped(prompt, features))
            else:
                inputs.append(self._prompt_encoder.encode(prompt, features))
        return SourceBatch(inputs=tuple(inputs), dropped=tuple(dropped), counts=encoded.counts)


def _dropped(prompt: Prompt, clip: DecodedClip) -> DroppedPrompt:
    return DroppedPrompt(prompt_id=prompt.prompt_id, status=clip.status, error=clip.error or clip.status)
