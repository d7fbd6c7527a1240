"""From clips to tower features: every clip is decoded and encoded once, then served from the feature cache.

Two stages, which may run in two threads: ``load`` looks up and decodes, ``encode`` runs the towers.
"""

import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from omnigrpo.media.clip_error import ClipError, Deadline
from omnigrpo.media.container_check import hash_open_clip
from omnigrpo.media.decode import DEFAULT_TIMEOUT_SECONDS, Decoder, SamplingConfig, decode_each
from omnigrpo.media.decode_dali import require_dali
from omnigrpo.media.decode_pyav import open_file
from omnigrpo.media.feature_cache import CacheHit, FeatureCache, feature_key
from omnigrpo.media.log_mel import SAMPLE_RATE_HZ, whisper_log_mel
from omnigrpo.media.pixels import Aspect, siglip_pixels
from omnigrpo.media.sampling import Colour
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.runtime.side_stream import Handover, SideStream
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import Clip, ClipFeatures, ClipStatus, DecodedClip, Modality, Prompt

AudioFailure = Literal["drop", "silence"]

SILENCE_SECONDS = 10
"""Length of what the reference hears where sound cannot be decoded."""

_log = logging.getLogger(__name__)

RECIPE_VERSION = 4
"""Raised whenever decoding, pixels, log-mel or towers change what they compute: older cached features are void."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaConfig:
    """How clips are read and how long their features are kept."""

    aspect: Aspect = "pad"
    """pad: grey bars to a square frame (HumanOmni's training); stretch: its inference."""
    colour: Colour = "tag"
    """tag: the matrix that a stream names; bt601: always BT.601, as DALI does."""
    min_frames: int = 2
    """A clip with fewer frames is refused; 1 repeats a lone frame, as the reference does."""
    decoder: Decoder = "auto"
    """Who decodes: PyAV on the CPU; DALI on the model's device, with PyAV for what DALI does not take; or both, PyAV
    taking besides what waits for DALI. auto is dali for a model on a GPU where DALI is installed, else pyav. On a GPU
    set ``colour`` to bt601: DALI gets no clip that names another matrix."""
    num_workers: int = 2
    """Decoding threads."""
    audio_failure: AudioFailure = "drop"
    """What becomes of a prompt for video and audio whose clip has no sound that can be decoded. drop: it leaves its
    step, with the reason; silence: it is trained on with 10 s of zeros for its sound, as the reference does, and the
    reason goes to the log. A clip whose pictures cannot be decoded, and a prompt for audio alone, are dropped."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """A clip that takes longer to decode is dropped."""
    cache_directory: Path | None = None
    """Where tower features outlive the run, several runs' at once; None keeps them in memory only."""
    cache_budget_mib: int = 2048
    """Memory for tower features, MiB."""
    cache_disk_budget_mib: int = 65536
    """Disk space for them, MiB, those of other runs in the same directory included."""
    prefetch_depth: int = 2
    """Steps whose clips are decoded and encoded ahead, while the current one runs; 0 is off."""

    def __post_init__(self) -> None:
        """Reject what could not decode, keep or load anything."""
        for name, least in (
            ("min_frames", 1),
            ("num_workers", 1),
            ("cache_budget_mib", 0),
            ("cache_disk_budget_mib", 0),
            ("prefetch_depth", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"media.{name} must be at least {least}, got {getattr(self, name)}")
        if self.decoder not in get_args(Decoder):
            raise ValueError(
                f"media.decoder must be one of {', '.join(get_args(Decoder))}, got {self.decoder!r}"
            )
        if self.audio_failure not in get_args(AudioFailure):
            raise ValueError(
                f"media.audio_failure must be one of {', '.join(get_args(AudioFailure))}, got {self.audio_failure!r}"
            )
        if not self.timeout_seconds > 0:
            raise ValueError(f"media.timeout_seconds must be above 0, got {self.timeout_seconds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaCounts:
    """Where the clips of some prompts came from; prompts that ask the same of a clip count once."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    """Clips without cached features."""
    decoded: int = 0
    """Clips that were decoded or could not be."""

    def __add__(self, other: "MediaCounts") -> "MediaCounts":
        return MediaCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


Request = tuple[Clip, tuple[Modality, ...]]
"""What is asked of a clip: prompts that agree in it share one decode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerInput:
    """A decoded clip as the towers take it; full-size frames are gone."""

    clip: DecodedClip
    """Its status and hash; frames and waveform are None."""
    pixels_F3SS: Tensor | None
    mel_ML: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class LoadedClips:
    """Clips between the two stages."""

    wanted: dict[Request, Prompt]
    found: dict[Request, ClipFeatures]
    """Features that were cached."""
    decoded: dict[Request, TowerInput]
    awaited: tuple[Request, ...]
    """Clips that an earlier batch is about to encode."""
    counts: MediaCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedClips:
    """What became of each clip."""

    results: dict[Request, ClipFeatures | DecodedClip]
    """Features on the model's device, or the clip with the status that makes it unusable."""
    counts: MediaCounts
    handover: Handover
    """To be received by whoever reads the features."""


class FeatureSource:
    """Serves tower features of clips; ``load`` and ``encode`` may each run in a thread of their own."""

    def __init__(
        self, *, model: HumanOmni, tower_hash: str, config: MediaConfig, spans: SpanRecorder
    ) -> None:
        self._model = model
        self._config = config
        self._spans = spans
        self._sampling = SamplingConfig(
            num_frames=model.config.vision.num_frames, min_frames=config.min_frames, colour=config.colour
        )
        if config.decoder in ("dali", "both"):
            require_dali()
        # The decoder is no part of it: on the CPU frames are equal, on a GPU within 2/255, and with "both" a clip may
        # go either way. Its features are computed once and stay what the run was trained on.
        geometry = f"{model.config.vision}/{model.config.audio}"
        self._recipe = (
            f"{RECIPE_VERSION}/{tower_hash}/{geometry}/{config.aspect}/{config.min_frames}/{config.colour}"
        )
        if config.audio_failure == "silence":  # A run that drops such clips must not find their features.
            self._recipe += "/silence"
        self.cache = FeatureCache(
            config.cache_directory, config.cache_budget_mib * 2**20, config.cache_disk_budget_mib * 2**20
        )
        self._known_hashes: dict[tuple[object, ...], str] = {}
        self._in_flight: weakref.WeakValueDictionary[str, LoadedClips] = weakref.WeakValueDictionary()
        """Keys that are decoded and not yet encoded; a batch that nobody encodes takes its keys with it."""
        self._stream = SideStream(model.device)
        self._closing = threading.Event()
        self.num_decoded = 0
        """Clips decoded since the start; a step over cached clips adds none."""

    def load(self, prompts: Sequence[Prompt]) -> LoadedClips:
        """Look up what the prompts ask of their clips, and decode what is not there."""
        wanted = {request_of(prompt): prompt for prompt in prompts}
        found: dict[Request, ClipFeatures] = {}
        missing: list[Request] = []
        awaited: list[Request] = []
        counts = MediaCounts()
        for request, prompt in wanted.items():
            if not prompt.modalities:
                found[request] = ClipFeatures(vision_FND=None, audio_AD=None)
                continue
            key = self.key_of(prompt)
            if key is not None and key in self._in_flight:
                awaited.append(request)
                continue
            hit = self.cache.find(key) if key is not None else None
            counts += _counted(hit)
            if hit is None:
                missing.append(request)
            else:
                found[request] = hit.features
        loaded = LoadedClips(
            wanted=wanted,
            found=found,
            decoded=self._decode(missing),
            awaited=tuple(awaited),
            counts=counts + MediaCounts(decoded=len(missing)),
        )
        for request, item in loaded.decoded.items():
            if item.clip.status is ClipStatus.OK:
                self._in_flight[self._key(request, item.clip.content_hash)] = loaded
        return loaded

    def encode(self, loaded: LoadedClips) -> EncodedClips:
        """Run the towers over what was decoded; an unusable clip stays as it was decoded, with its status."""
        results: dict[Request, ClipFeatures | DecodedClip] = {}
        with self._stream.work():
            for request, features in loaded.found.items():
                results[request] = self._on_device(features)
            results |= self._encode(loaded.decoded)
            counts = loaded.counts
            late: list[Request] = []
            for request in loaded.awaited:
                hit = self._find_awaited(loaded.wanted[request])
                counts += _counted(hit)
                if hit is None:
                    late.append(request)
                else:
                    results[request] = self._on_device(hit.features)
            if late:  # The earlier batch was dropped, or its features fit into no tier.
                results |= self._encode(self._decode(late))
                counts += MediaCounts(decoded=len(late))
            handover = self._stream.hand_over(
                [t for r in results.values() if isinstance(r, ClipFeatures) for t in _tensors(r)]
            )
        return EncodedClips(results=results, counts=counts, handover=handover)

    def key_of(self, prompt: Prompt) -> str | None:
        """The cache key of the prompt's features; its content is hashed once. None when the clip cannot be read."""
        try:
            identity = _identity(prompt.clip)
            if identity not in self._known_hashes:
                deadline = Deadline.after(self._config.timeout_seconds)
                with open_file(prompt.clip.path) as file:
                    self._known_hashes[identity] = hash_open_clip(file, prompt.clip, deadline)
        except (OSError, ValueError, ClipError):
            return None  # The decoder says what is wrong with the file.
        return self._key(request_of(prompt), self._known_hashes[identity])

    def stop(self) -> None:
        """Let decoding end after the clips under way, with an error; nothing is decoded any more."""
        self._closing.set()

    def close(self) -> None:
        """Release the cache; whatever runs in other threads must have ended."""
        self.stop()
        self.cache.close()

    def _key(self, request: Request, clip_hash: str | None) -> str:
        assert clip_hash is not None, "a clip that was decoded has a hash"
        return feature_key(clip_hash, f"{self._recipe}/{'+'.join(request[1])}")

    def _find_awaited(self, prompt: Prompt) -> CacheHit | None:
        key = self.key_of(prompt)
        return self.cache.find(key) if key is not None else None

    def _decode(self, requests: Sequence[Request]) -> dict[Request, TowerInput]:
        """Decode clips to what the towers take, several at once."""
        if not requests:
            return {}
        with self._spans.span(Phase.DECODE):
            decoded = decode_each(
                [clip for clip, _ in requests],
                [modalities for _, modalities in requests],
                self._sampling,
                self._tower_input,
                num_workers=self._config.num_workers,
                timeout_seconds=self._config.timeout_seconds,
                decoder=self._config.decoder,
                device=self._model.device,
            )
        self.num_decoded += len(decoded)
        results = dict(zip(requests, decoded, strict=True))
        if self._config.audio_failure == "silence":
            results |= self._silenced(results)
        return results

    def _silenced(self, decoded: dict[Request, TowerInput]) -> dict[Request, TowerInput]:
        """The clips that can be used once their sound is replaced by silence."""
        sound: Modality = "audio"
        failed: dict[Request, Request] = {
            request: (request[0], tuple[Modality, ...](m for m in request[1] if m != sound))
            for request, item in decoded.items()
            if item.clip.status is not ClipStatus.OK and sound in request[1] and len(request[1]) > 1
        }
        pictures = self._decode(list(failed.values()))
        results: dict[Request, TowerInput] = {}
        for request, without_sound in failed.items():
            item = pictures[without_sound]
            if item.clip.status is ClipStatus.OK:
                _log.warning("silence stands for the sound of a clip: %s", decoded[request].clip.error)
                results[request] = replace(
                    item, mel_ML=self._mel(torch.zeros(SILENCE_SECONDS * SAMPLE_RATE_HZ))
                )
        return results

    def _tower_input(self, clip: DecodedClip) -> TowerInput:
        """Pixels and log-mel of one clip, in the thread that opened it; pixels are where the frames are."""
        if self._closing.is_set():
            raise RuntimeError("the feature source is closed; nothing is decoded any more")
        pixels_F3SS = mel_ML = None
        if clip.frames_FHWC is not None:
            pixels_F3SS = self._pixels(clip.frames_FHWC)
        if clip.waveform is not None:
            mel_ML = self._mel(clip.waveform)
        bare = replace(clip, frames_FHWC=None, waveform=None)
        return TowerInput(clip=bare, pixels_F3SS=pixels_F3SS, mel_ML=mel_ML)

    def _mel(self, waveform: Tensor) -> Tensor:
        audio = self._model.config.audio
        return whisper_log_mel(waveform, num_mel_bins=audio.num_mel_bins, chunk_seconds=audio.chunk_seconds)

    def _pixels(self, frames_FHWC: Tensor) -> Tensor:
        """SigLIP pixels where the frames are; on a GPU not behind what the trainer has queued on its own stream."""
        recipe = partial(
            siglip_pixels, image_size=self._model.config.vision.image_size, aspect=self._config.aspect
        )
        if not frames_FHWC.is_cuda:
            return recipe(frames_FHWC)
        stream = torch.cuda.Stream(frames_FHWC.device)
        with torch.cuda.stream(stream):
            pixels_F3SS = recipe(frames_FHWC)
        stream.synchronize()
        return pixels_F3SS

    def _encode(self, decoded: dict[Request, TowerInput]) -> dict[Request, ClipFeatures | DecodedClip]:
        """Encode clips that ask for the same modalities in one batch, and keep their features."""
        results: dict[Request, ClipFeatures | DecodedClip] = {
            request: item.clip for request, item in decoded.items()
        }
        usable = {r: item for r, item in decoded.items() if item.clip.status is ClipStatus.OK}
        for modalities in sorted({modalities for _, modalities in usable}):
            members = {r: item for r, item in usable.items() if r[1] == modalities}
            with self._spans.span(Phase.ENCODE):
                features = self._run_towers(list(members.values()))
                host = iter(self._stream.to_host([tensor for f in features for tensor in _tensors(f)]))
            results |= zip(members, features, strict=True)
            for (request, item), of_clip in zip(members.items(), features, strict=True):
                kept = ClipFeatures(
                    vision_FND=None if of_clip.vision_FND is None else next(host),
                    audio_AD=None if of_clip.audio_AD is None else next(host),
                )
                key = self._key(request, item.clip.content_hash)
                self.cache.put(key, kept)
                self._in_flight.pop(key, None)
        return results

    def _run_towers(self, items: Sequence[TowerInput]) -> list[ClipFeatures]:
        pixels = [item.pixels_F3SS for item in items if item.pixels_F3SS is not None]
        mels = [item.mel_ML for item in items if item.mel_ML is not None]
        return self._model.encode(
            self._on_one_device(pixels) if pixels else None,
            self._stream.to_device(torch.stack(mels)) if mels else None,
        )

    def _on_one_device(self, pixels: list[Tensor]) -> Tensor:
        """The pixels of several clips in one tensor, on the model's device; some may be there already."""
        if not any(pixels_F3SS.is_cuda for pixels_F3SS in pixels):
            return self._stream.to_device(torch.stack(pixels))
        return torch.stack([self._stream.to_device(pixels_F3SS) for pixels_F3SS in pixels])

    def _on_device(self, features: ClipFeatures) -> ClipFeatures:
        vision_FND, audio_AD = features.vision_FND, features.audio_AD
        return ClipFeatures(
            vision_FND=None if vision_FND is None else self._stream.to_device(vision_FND),
            audio_AD=None if audio_AD is None else self._stream.to_device(audio_AD),
        )


def request_of(prompt: Prompt) -> Request:
    """What the prompt asks of its clip."""
    return (prompt.clip, prompt.modalities)


def _counted(hit: CacheHit | None) -> MediaCounts:
    if hit is None:
        return MediaCounts(misses=1)
    return MediaCounts(memory_hits=int(hit.tier == "memory"), disk_hits=int(hit.tier == "disk"))


def _tensors(features: ClipFeatures) -> list[Tensor]:
    return [tensor for tensor in (features.vision_FND, features.audio_AD) if tensor is not None]


def _identity(clip: Clip) -> tuple[object, ...]:
    """What tells an unchanged file without reading it; OSError without such a file, ValueError for no path at all."""
    stat = clip.path.stat()
    return (clip.path, stat.st_mtime_ns, stat.st_size, clip.start_seconds, clip.end_seconds)
