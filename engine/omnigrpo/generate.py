"""Answers of a checkpoint about clips: a Python API, and the work of `omnigrpo generate`.

from omnigrpo.generate import Generator

with Generator.open("R1-Omni-0.5B", gate_tokenizer="bert-base-uncased") as generator:
    for answer in generator.answers(["clip.mp4"]):
        print(answer.reasoning, answer.label)
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

import torch

from omnigrpo.data.dataset import INSTRUCTION
from omnigrpo.feature_source import MediaConfig
from omnigrpo.group_sampler import embed
from omnigrpo.media.pixels import Aspect
from omnigrpo.model.checkpoint_format import LoadedModel, load_model, towers_hash
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.prefix_source import PrefixSource
from omnigrpo.reward.tagged_answer import first_answer, reasoning_of
from omnigrpo.rollout.interface import GroupRequest, SamplingParams, collect
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.schema import Clip, ClipStatus, Completion, Modality, Prefix, Prompt

Mode = Literal["video", "audio", "video_audio"]
MODALITIES: dict[Mode, tuple[Modality, ...]] = {
    "video": ("video",),
    "audio": ("audio",),
    "video_audio": ("video", "audio"),
}
QUESTION = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the characters is the most "
    f"obvious to you?  {INSTRUCTION}"
)
"""R1-Omni's question with its request for tags, as its inference asks it (two spaces between them)."""
INFERENCE_TEMPLATE = PromptTemplate(vision_tokens=False)
"""R1-Omni's inference prompt: that of RL without Qwen2-VL's three vision tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """How clips are asked about."""

    mode: Mode = "video_audio"
    question: str = QUESTION
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(temperature=0.0, max_new_tokens=2048)
    )
    """Greedy, as the reference's; its stop tokens are the tokenizer's whatever is given here."""
    samples: int = 1
    """Answers per clip; with greedy decoding they would all be the same."""
    batch_size: int = 8
    """Clips that are answered together."""

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be asked."""
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"{self.samples} samples of greedy decoding are the same one: set a temperature, or ask for one"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said of one clip, or why it could not be asked."""

    clip: Path
    status: ClipStatus
    error: str | None = None
    """None when ``status`` is ok."""
    text: str = ""
    """The completion, special tokens removed."""
    reasoning: str | None = None
    """What the ``<think>`` block holds; None without one."""
    label: str | None = None
    """What the first ``<answer>`` block holds, the whole text without one; None for a clip that was not asked about."""
    num_tokens: int = 0
    finish_reason: str | None = None
    """``stop``, or ``length`` where ``max_new_tokens`` cut it off."""


def inference_media(aspect: str) -> MediaConfig:
    """How clips are read for single questions: nothing ahead; ValueError for another aspect than pad or stretch."""
    if aspect not in get_args(Aspect):
        raise ValueError(f"aspect must be one of {', '.join(get_args(Aspect))}, got {aspect!r}")
    return MediaConfig(aspect=aspect, prefetch_depth=0, min_frames=1)  # type: ignore[arg-type] - checked


def parse_dtype(name: str) -> torch.dtype | None:
    """``auto`` is None, the checkpoint's own; ValueError for another than the floating types."""
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


class Generator(AbstractContextManager["Generator"]):
    """A loaded checkpoint that answers questions about clips; to be closed."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        media: MediaConfig | None = None,
        template: PromptTemplate = INFERENCE_TEMPLATE,
    ) -> None:
        """``media`` by default stretches frames to a square, as the reference's inference does."""
        media = media or inference_media("stretch")
        self._model = loaded.model.eval()
        self._encoder = PromptEncoder(loaded.tokenizer, loaded.gate_tokenizer, loaded.model.config, template)
        self._source = PrefixSource(
            model=loaded.model,
            prompt_encoder=self._encoder,
            tower_hash=towers_hash(loaded.model),
            config=media,
            spans=SpanRecorder(),
        )
        self._engine = NativeEngine(loaded.model)

    @classmethod
    def open(
        cls,
        checkpoint: Path | str,
        *,
        gate_tokenizer: Path | str | None = None,
        vision_tower: Path | str | None = None,
        audio_tower: Path | str | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        media: MediaConfig | None = None,
    ) -> Self:
        """Load a checkpoint directory; ``dtype`` None keeps the file's. Raises as ``load_model``."""
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device is {device}, but torch finds no CUDA device: take cpu")
        loaded = load_model(
            Path(checkpoint),
            dtype=dtype,
            device=device,
            gate_tokenizer_directory=None if gate_tokenizer is None else Path(gate_tokenizer),
            vision_tower_directory=None if vision_tower is None else Path(vision_tower),
            audio_tower_directory=None if audio_tower is None else Path(audio_tower),
        )
        return cls(loaded, media=media)

    def answers(self, clips: Sequence[Path | str], config: GenerateConfig | None = None) -> Iterator[Answer]:
        """Ask about every clip; answers come in the order of the clips, ``samples`` of each, a batch at a time."""
        config = config or GenerateConfig()
        paths = [Path(clip) for clip in clips]
        for start in range(0, len(paths), config.batch_size):
            yield from self._batch(paths[start : start + config.batch_size], start, config)

    def close(self) -> None:
        """Release the engine and the decoding threads."""
        self._engine.close()
        self._source.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _batch(self, paths: Sequence[Path], start: int, config: GenerateConfig) -> list[Answer]:
        """Every clip's answers in order; a path may occur twice, so that prompts are known by their place."""
        prompts = [
            Prompt(
                prompt_id=str(start + index),
                clip=Clip(path=path),
                question=config.question,
                modalities=MODALITIES[config.mode],
                solution="",
            )
            for index, path in enumerate(paths)
        ]
        batch = self._source.inputs(prompts)
        of_prompt = {prefix.prompt.prompt_id: index for index, prefix in enumerate(batch.inputs)}
        errors = {dropped.prompt_id: dropped for dropped in batch.dropped}
        with torch.no_grad():
            groups = self._sample(embed(self._model, batch.inputs), config)
        answers: list[Answer] = []
        for prompt in prompts:
            if prompt.prompt_id in errors:
                dropped = errors[prompt.prompt_id]
                answers.append(Answer(clip=prompt.clip.path, status=dropped.status, error=dropped.error))
            else:
                completions = groups[of_prompt[prompt.prompt_id]]
                answers += [self._answer(prompt.clip.path, completion) for completion in completions]
        return answers

    def _sample(self, prefixes: Sequence[Prefix], config: GenerateConfig) -> list[tuple[Completion, ...]]:
        if not prefixes:
            return []
        seeds = tuple(range(config.samples))
        requests = [GroupRequest(prefix=prefix, seeds=seeds) for prefix in prefixes]
        sampling = replace(config.sampling, stop_token_ids=self._encoder.stop_token_ids)
        return collect(self._engine.generate(requests, sampling), len(requests))

    def _answer(self, path: Path, completion: Completion) -> Answer:
        text = self._encoder.decode(completion.token_ids)
        return Answer(
            clip=path,
            status=ClipStatus.OK,
            text=text,
            reasoning=reasoning_of(text),
            label=first_answer(text),
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
        )
