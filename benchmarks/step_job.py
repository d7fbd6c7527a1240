"""Trainers for bench_step: the demo's tiny model on generated clips, and 0.5B's decoder on random tower features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from omnigrpo.algorithm.advantage import AdvantageConfig
from omnigrpo.algorithm.agreement import AgreementConfig
from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.data.prompt_stream import PromptStream
from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset, vocabulary_texts
from omnigrpo.demo import build_base
from omnigrpo.group_sampler import GroupSampler
from omnigrpo.model.checkpoint_format import load_model, towers_hash
from omnigrpo.model.config import AudioConfig, DecoderConfig, HumanOmniConfig, VisionConfig, tiny
from omnigrpo.model.humanomni import HumanOmni, reference_copy
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.model.tiny_tokenizer import build_gate_tokenizer, build_tokenizer
from omnigrpo.prefix_source import MediaConfig, PrefixSource, SourceBatch
from omnigrpo.reward.composition import RewardConfig, RewardSet, RewardTerm
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.runtime.distributed import World
from omnigrpo.runtime.optimizer import Optimizer, OptimizerConfig
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.schema import Clip, ClipFeatures, Group, PrefixInputs, Prompt
from omnigrpo.trainer import Trainer, TrainerConfig
from omnigrpo_kernels.grpo_objective import ObjectiveConfig
from step_work import Sizes

FILLER = "<|video_pad|>"
"""Lengthens a question to the wanted prefix: one token, in whatever texts a tokenizer was trained on."""
SHORT_QUESTION = "which emotion?"
"""Leaves room below R1-Omni's P of 976 for what the demo's tokenizer makes of the chat text."""
SPREAD = "step_job:length_spread"
MEDIA = MediaConfig(prefetch_depth=0)
"""Without prefetch, so that decoding and encoding are phases of the step and not beside it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trainer whose every step sees the same prompts."""

    trainer: Trainer
    inputs: tuple[PrefixInputs, ...]
    """Of every prompt of the step."""
    description: str
    """What the figures are of."""
    new_source: Callable[[], PrefixSource] | None = None
    """Makes a source with an empty feature cache; None where there are no clips."""

    def forget_clips(self) -> None:
        """Give the trainer a source that has seen no clip."""
        assert self.new_source is not None, "only a job on clips has a cold cache"
        self.trainer.sampler.source.close()
        self.trainer.sampler.source = self.new_source()


class RandomFeatures:
    """Stands where PrefixSource does, with features drawn once in place of decoded and encoded clips."""

    def __init__(self, config: HumanOmniConfig, encoder: PromptEncoder) -> None:
        self._config, self._encoder = config, encoder
        self._made: dict[str, PrefixInputs] = {}

    def inputs(self, prompts: Sequence[Prompt]) -> SourceBatch:
        """Return every prompt's inputs, the same at each call."""
        for prompt in prompts:
            if prompt.prompt_id not in self._made:
                self._made[prompt.prompt_id] = self._encoder.encode(prompt, random_features(self._config))
        return SourceBatch(inputs=tuple(self._made[p.prompt_id] for p in prompts), dropped=())

    def read(self, batches: Callable[[int], Sequence[Prompt]], position: int) -> SourceBatch:
        """Return the inputs of a step."""
        return self.inputs(batches(position))

    def close(self) -> None:
        """Do nothing."""


def clips_job(directory: Path, sizes: Sizes, device: torch.device) -> Job:
    """The demo's model, untrained, on as many generated clips as a step has prompts."""
    config = SyntheticConfig(num_cold_start=0, num_rl=sizes.prompts, num_heldout=0, num_ood=0)
    manifest = generate_dataset(directory / "data", config, num_workers=0)
    build_base(directory / "base", seed=0)
    loaded = load_model(directory / "base", device=device)
    model = loaded.model
    encoder = PromptEncoder(loaded.tokenizer, loaded.gate_tokenizer, model.config, PromptTemplate())
    spans = SpanRecorder(synchronize_cuda=device.type == "cuda")
    new_source = partial(
        PrefixSource,
        model=model,
        prompt_encoder=encoder,
        tower_hash=towers_hash(model),
        config=MEDIA,
        spans=spans,
    )
    prompts = read_dataset(manifest.json_path("rl"), PromptStyle())
    trainer, inputs = _trainer(model, encoder, spans, new_source(), prompts, sizes)
    return Job(
        trainer=trainer,
        inputs=inputs,
        new_source=new_source,
        description="the demo's untrained model on generated clips; no prefetch: media run inside the step",
    )


def random_features_job(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, *, layers: int, smoke: bool
) -> Job:
    """Qwen2.5-0.5B's widths and vocabulary with ``layers`` decoder layers (with ``smoke``, tiny's), random weights.

    The towers, which never run, have one layer; projectors, gate and BERT are the full ones. The tokenizer is the
    demo's: its ids are a part of the vocabulary.
    """
    texts = vocabulary_texts()
    tokenizer, gate_tokenizer = build_tokenizer(texts), build_gate_tokenizer(texts)
    config = HumanOmniConfig(
        vision=VisionConfig(num_layers=1),
        audio=AudioConfig(num_layers=1),
        decoder=DecoderConfig(num_layers=layers),
    )
    if smoke:
        config = tiny(vocab_size=len(tokenizer), gate_vocab_size=len(gate_tokenizer))
    model = HumanOmni(config)
    model.init_weights(0)
    model = model.to(device, dtype)
    encoder = PromptEncoder(tokenizer, gate_tokenizer, config, PromptTemplate())
    prompts = tuple(
        Prompt(
            prompt_id=str(index),
            clip=Clip(path=Path("none.mp4")),
            question=SHORT_QUESTION,
            modalities=("video", "audio"),
            solution="happy",
        )
        for index in range(sizes.prompts)
    )
    source = cast(PrefixSource, RandomFeatures(config, encoder))
    spans = SpanRecorder(synchronize_cuda=device.type == "cuda")
    trainer, inputs = _trainer(model, encoder, spans, source, prompts, sizes)
    return Job(
        trainer=trainer,
        inputs=inputs,
        description=f"{'toy widths' if smoke else 'widths of Qwen2.5-0.5B'}, {config.decoder.num_layers} decoder "
        "layers, random weights; random tower features instead of media: no clip is decoded, no tower runs",
    )


def random_features(config: HumanOmniConfig) -> ClipFeatures:
    """What the towers would make of a clip, from torch's global generator."""
    vision, audio = config.vision, config.audio
    return ClipFeatures(
        vision_FND=torch.randn(vision.num_frames, vision.grid**2, vision.width),
        audio_AD=torch.randn(audio.num_tokens, audio.width),
    )


def length_spread(group: Group) -> list[float]:
    """A reward that differs between the samples of an untrained model, so that no advantage is zero."""
    return [len(text) + index / 7 for index, text in enumerate(group.texts)]


def _trainer(
    model: HumanOmni,
    encoder: PromptEncoder,
    spans: SpanRecorder,
    source: PrefixSource,
    prompts: Sequence[Prompt],
    sizes: Sizes,
) -> tuple[Trainer, tuple[PrefixInputs, ...]]:
    if sizes.prefix is not None:
        prompts = [_lengthened(prompt, encoder, model.config, sizes.prefix) for prompt in prompts]
    config = TrainerConfig(prompts_per_step=len(prompts))
    sampler = GroupSampler(
        policy=model,
        prompts=PromptStream(prompts=prompts, batch_size=len(prompts), seed=0),
        prompt_encoder=encoder,
        source=source,
        engine=NativeEngine(model, spans=spans),
        rewards=RewardSet.from_config(RewardConfig(terms=(*RewardConfig().terms, RewardTerm(name=SPREAD)))),
        spans=spans,
        world=World(),
        seed=0,
        budget_rows=config.budget_rows,
        config=RolloutConfig(samples=sizes.samples, max_new_tokens=sizes.completion),
    )
    trainer = Trainer(
        policy=model,
        reference=reference_copy(model),
        sampler=sampler,
        optimizer=Optimizer(model.named_parameters(), OptimizerConfig(), total_steps=1000),
        spans=spans,
        world=World(),
        advantage_config=AdvantageConfig(),
        objective_config=ObjectiveConfig(),
        agreement_config=AgreementConfig(),
        config=config,
    )
    inputs = source.inputs(prompts).inputs
    spans.drain()
    return trainer, inputs


def _lengthened(prompt: Prompt, encoder: PromptEncoder, config: HumanOmniConfig, rows: int) -> Prompt:
    """Append filler to the question until the prefix has ``rows`` rows; SystemExit when it is longer already."""
    features = random_features(config)
    missing = rows - len(encoder.encode(prompt, features).token_ids_P)
    if missing < 0:
        raise SystemExit(
            f"--prefix is {rows}, but a prompt alone takes {rows - missing} rows: give at least those"
        )
    prompt = replace(prompt, question=prompt.question + FILLER * missing)
    assert len(encoder.encode(prompt, features).token_ids_P) == rows, "the filler is one token"
    return prompt
