"""From prompts to prefix inputs: every clip is decoded and encoded once, then served from the feature cache."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from omnigrpo.media.container_check import content_hash
from omnigrpo.media.decode import SamplingConfig, decode
from omnigrpo.media.feature_cache import FeatureCache, feature_key
from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.media.pixels import Aspect, siglip_pixels
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import (
    ClipFeatures,
    ClipStatus,
    DecodedClip,
    DroppedPrompt,
    PrefixInputs,
    Prompt,
)

RECIPE_VERSION = 2
"""Raised whenever decoding, pixels, log-mel or towers change what they compute: older cached features are void."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaConfig:
    """How clips are read and how long their features are kept."""

    aspect: Aspect = "pad"
    """pad: grey bars to a square frame (HumanOmni's training); stretch: its inference."""
    num_workers: int = 2
    """Decoding threads."""
    cache_directory: Path | None = None
    """Where tower features outlive the run; None keeps them in memory only."""
    cache_budget_mib: int = 2048
    """Memory for tower features, MiB."""
    min_frames: int = 2
    """A clip with fewer frames is refused; 1 repeats a lone frame, as the reference does."""
    prefetch: bool = True
    """Decode and encode the next step's clips while this step runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceBatch:
    """The usable prompts of a step and the ones that left it."""

    inputs: tuple[PrefixInputs, ...]
    dropped: tuple[DroppedPrompt, ...]


class PrefixSource:
    """Builds prefix inputs for prompts, in order; safe to call from one thread while another prefetches."""

    def __init__(
        self,
        *,
        model: HumanOmni,
        prompt_encoder: PromptEncoder,
        tower_hash: str,
        config: MediaConfig,
        spans: SpanRecorder,
    ) -> None:
        self._model = model
        self._prompt_encoder = prompt_encoder
        self._config = config
        self._spans = spans
        self._sampling = SamplingConfig(
            num_frames=model.config.vision.num_frames, min_frames=config.min_frames
        )
        geometry = f"{model.config.vision}/{model.config.audio}"
        self._recipe = f"{RECIPE_VERSION}/{tower_hash}/{geometry}/{config.aspect}/{config.min_frames}"
        self._cache = FeatureCache(config.cache_directory, config.cache_budget_mib * 2**20)
        self._known_hashes: dict[tuple[object, ...], str] = {}
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[tuple[Prompt, ...], Future[SourceBatch]] | None = None
        self.num_decoded = 0
        """Clips decoded since the start; a step over cached clips adds none."""

    def inputs(self, prompts: Sequence[Prompt]) -> SourceBatch:
        """Return prefix inputs for all prompts whose clip is usable, and why the others are not."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            batch = ahead[1].result()
            if ahead[0] == tuple(prompts):
                return batch
        return self._build(prompts)

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Start to build these prompts' inputs in the background; the next ``inputs`` call collects them."""
        if self._config.prefetch:
            self._ahead = (tuple(prompts), self._background.submit(self._build, prompts))

    def close(self) -> None:
        """Wait for background work and stop its thread."""
        self._background.shutdown(wait=True, cancel_futures=True)

    def _build(self, prompts: Sequence[Prompt]) -> SourceBatch:
        wanted = {_request(prompt): prompt for prompt in prompts}
        found = {request: self._lookup(prompt) for request, prompt in wanted.items()}
        missing = {request: wanted[request] for request, features in found.items() if features is None}
        encoded = dict(zip(missing, self._encode(tuple(missing.values())), strict=True))
        inputs, dropped = [], []
        for prompt in prompts:
            features = found[_request(prompt)] or encoded[_request(prompt)]
            if isinstance(features, DecodedClip):
                dropped.append(_dropped(prompt, features))
            else:
                inputs.append(self._prompt_encoder.encode(prompt, features))
        return SourceBatch(inputs=tuple(inputs), dropped=tuple(dropped))

    def _lookup(self, prompt: Prompt) -> ClipFeatures | None:
        """Cached features of the prompt's clip, without decoding it; its content is hashed once."""
        if not prompt.modalities:
            return ClipFeatures(vision_FND=None, audio_AD=None)
        try:
            identity = _identity(prompt)
            if identity not in self._known_hashes:
                self._known_hashes[identity] = content_hash(prompt.clip)
        except OSError:
            return None  # The decoder says what is wrong with the file.
        return self._cache.get(self._key(prompt, self._known_hashes[identity]))

    def _key(self, prompt: Prompt, clip_hash: str) -> str:
        return feature_key(clip_hash, f"{self._recipe}/{'+'.join(prompt.modalities)}")

    def _encode(self, prompts: Sequence[Prompt]) -> list[ClipFeatures | DecodedClip]:
        """Decode and encode; an unusable clip stays as it was decoded, with its status."""
        if not prompts:
            return []
        with self._spans.span(Phase.DECODE):
            decoded = decode(
                [prompt.clip for prompt in prompts],
                [prompt.modalities for prompt in prompts],
                self._sampling,
                num_workers=self._config.num_workers,
            ).clips
        self.num_decoded += len(decoded)
        results: list[ClipFeatures | DecodedClip] = list(decoded)
        usable = [at for at, clip in enumerate(decoded) if clip.status is ClipStatus.OK]
        with self._spans.span(Phase.ENCODE):
            for modalities in sorted({prompts[at].modalities for at in usable}):
                members = [at for at in usable if prompts[at].modalities == modalities]
                for at, features in zip(
                    members, self._run_towers([decoded[at] for at in members]), strict=True
                ):
                    clip_hash = decoded[at].content_hash
                    assert clip_hash is not None, "a decoded clip has a hash"
                    self._cache.put(self._key(prompts[at], clip_hash), features)
                    results[at] = features
        return results

    def _run_towers(self, clips: Sequence[DecodedClip]) -> list[ClipFeatures]:
        """Encode clips that hold the same modalities in one batch."""
        vision, audio = self._model.config.vision, self._model.config.audio
        frames = [clip.frames_FHWC for clip in clips if clip.frames_FHWC is not None]
        waveforms = [clip.waveform for clip in clips if clip.waveform is not None]
        pixels = [siglip_pixels(f, image_size=vision.image_size, aspect=self._config.aspect) for f in frames]
        mels = [
            whisper_log_mel(w, num_mel_bins=audio.num_mel_bins, chunk_seconds=audio.chunk_seconds)
            for w in waveforms
        ]
        return self._model.encode(
            torch.stack(pixels) if pixels else None, torch.stack(mels) if mels else None
        )


def _dropped(prompt: Prompt, clip: DecodedClip) -> DroppedPrompt:
    return DroppedPrompt(prompt_id=prompt.prompt_id, status=clip.status, error=clip.error or clip.status)


def _request(prompt: Prompt) -> tuple[object, ...]:
    """What is asked of a clip: prompts that agree in it share one decode."""
    return (prompt.clip, prompt.modalities)


def _identity(prompt: Prompt) -> tuple[object, ...]:
    """What tells an unchanged file without reading it; OSError when there is no such file."""
    clip = prompt.clip
    stat = clip.path.stat()
    return (clip.path, stat.st_mtime_ns, stat.st_size, clip.start_seconds, clip.end_seconds)
