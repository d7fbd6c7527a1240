"""Small trainers for tests: the model, packing, objective and optimizer are real, what feeds them is given."""

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from omnigrpo.algorithm.advantage import AdvantageConfig
from omnigrpo.algorithm.agreement import AgreementConfig
from omnigrpo.data.prompt_stream import PromptStream
from omnigrpo.group_sampler import GroupSampler
from omnigrpo.model.config import tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.prefix_source import SourceBatch
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.rollout.interface import (
    FinishedGroup,
    GroupRequest,
    RolloutCounters,
    RolloutEngine,
    SamplingParams,
)
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.runtime.distributed import World
from omnigrpo.runtime.optimizer import Optimizer, OptimizerConfig
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.schema import (
    AUDIO_ROW,
    VIDEO_ROW,
    Clip,
    ClipFeatures,
    ClipStatus,
    Completion,
    DroppedPrompt,
    Group,
    GroupRewards,
    Modality,
    PrefixInputs,
    Prompt,
    VersionSpan,
)
from omnigrpo.trainer import Trainer, TrainerConfig
from omnigrpo_kernels.grpo_objective import ObjectiveConfig

VOCABULARY = 300
CONFIG = tiny(vocab_size=VOCABULARY, gate_vocab_size=50)


def model(seed: int = 1, *, dtype: torch.dtype = torch.float64) -> HumanOmni:
    """A fresh tiny model."""
    fresh = HumanOmni(CONFIG)
    fresh.init_weights(seed)
    return fresh.to(dtype)


def inputs(
    name: str, *, text: tuple[int, int] = (3, 4), modalities: tuple[Modality, ...] = ("video", "audio")
) -> PrefixInputs:
    """A prefix drawn from its name: text rows, modality rows, text rows."""
    vision, audio = CONFIG.vision, CONFIG.audio
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**31)
    video_rows = vision.num_tokens if "video" in modalities else 0
    audio_rows = audio.num_tokens if "audio" in modalities else 0
    frames = (vision.num_frames, vision.grid**2, vision.width)
    return PrefixInputs(
        prompt=Prompt(
            prompt_id=name,
            clip=Clip(path=Path(f"{name}.mp4")),
            question="?",
            modalities=modalities,
            solution="happy",
        ),
        token_ids_P=torch.cat(
            [
                torch.randint(0, VOCABULARY, (text[0],), generator=generator),
                torch.full((video_rows,), VIDEO_ROW),
                torch.full((audio_rows,), AUDIO_ROW),
                torch.randint(0, VOCABULARY, (text[1],), generator=generator),
            ]
        ),
        question_ids=torch.tensor([2, 7, 9, 3]),
        features=ClipFeatures(
            vision_FND=torch.randn(frames, generator=generator) if video_rows else None,
            audio_AD=torch.randn(audio_rows, audio.width, generator=generator) if audio_rows else None,
        ),
    )


def group(prefix: PrefixInputs, lengths: Sequence[int], *, seed: int = 0) -> Group:
    """Completions of random tokens of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    completions = tuple(
        Completion(
            token_ids=tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()),
            logprobs=(-1.0,) * length,
            finish_reason="stop",
            version_spans=(VersionSpan(version=0, num_tokens=length),),
            cached_tokens=0,
        )
        for length in lengths
    )
    return Group(inputs=prefix, completions=completions, texts=("",) * len(lengths))


def rewards(*totals: float) -> GroupRewards:
    """The rewards of one group, without components."""
    return GroupRewards(totals=totals, components={})


class Source:
    """Serves given prefixes and drops the prompts named in ``unusable``."""

    def __init__(self, prefixes: Sequence[PrefixInputs]) -> None:
        self._prefixes = {prefix.prompt.prompt_id: prefix for prefix in prefixes}
        self.unusable: set[str] = set()

    def inputs(self, prompts: Sequence[Prompt]) -> SourceBatch:
        names = [prompt.prompt_id for prompt in prompts]
        return SourceBatch(
            inputs=tuple(self._prefixes[name] for name in names if name not in self.unusable),
            dropped=tuple(
                DroppedPrompt(prompt_id=name, status=ClipStatus.MISSING, error=f"{name}.mp4 is missing")
                for name in names
                if name in self.unusable
            ),
        )

    def read(self, batches: Callable[[int], Sequence[Prompt]], position: int) -> SourceBatch:
        return self.inputs(batches(position))


class Words:
    """Stands in for the prompt encoder: a token's text is its number."""

    stop_token_ids = tuple(range(0, VOCABULARY, 10))

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


class Scores:
    """Stands in for the reward set: one reward, a function of a completion's tokens."""

    def __init__(self, reward: Callable[[Sequence[int]], float]) -> None:
        self._reward = reward

    def score(self, group: Group, neighbours: Sequence[PrefixInputs] = ()) -> GroupRewards:
        totals = tuple(self._reward(completion.token_ids) for completion in group.completions)
        return GroupRewards(totals=totals, components={"given": totals})


class RecordingOptimizer:
    """The real optimizer; it keeps each update's gradients, from before clipping."""

    def __init__(self, policy: HumanOmni, config: OptimizerConfig) -> None:
        self._names = list(policy.trainable_parameters())
        self._inner = Optimizer(policy.named_parameters(), config, total_steps=100)
        self.gradients: list[dict[str, Tensor]] = []

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return self._inner.parameters

    @property
    def learning_rate(self) -> float:
        return self._inner.learning_rate

    def step(self) -> float:
        named = zip(self._names, self.parameters, strict=True)
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return self._inner.step()


class OwnWeightsEngine:
    """A native engine over a copy of the policy: it samples at once, by what was last published."""

    overlaps_training = True

    def __init__(self, policy: HumanOmni) -> None:
        self._copy = copy.deepcopy(policy)
        self._native = NativeEngine(self._copy)
        self.requests: list[list[GroupRequest]] = []
        self.memory = ["held"]

    @property
    def counters(self) -> RolloutCounters:
        return self._native.counters

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingParams
    ) -> Generator[FinishedGroup, None, None]:
        assert self.memory[-1] == "held"
        self.requests.append(list(requests))
        groups = list(self._native.generate(requests, sampling))
        return (group for group in groups)

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert self.memory[-1] == "held"
        self._copy.load_state_dict(dict(weights), strict=False)
        self._native.publish([], version)

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def release_memory(self) -> None:
        self.memory.append("released")

    def restore_memory(self) -> None:
        self.memory.append("held")

    def close(self) -> None:
        self._native.close()


def low_token_share(token_ids: Sequence[int]) -> float:
    """A reward that differs between most completions."""
    return sum(token < VOCABULARY // 2 for token in token_ids) / len(token_ids)


def trainer(
    policy: HumanOmni,
    prefixes: Sequence[PrefixInputs] = (),
    *,
    reference: HumanOmni | None = None,
    reward: Callable[[Sequence[int]], float] = low_token_share,
    world: World | None = None,
    seed: int = 0,
    learning_rate: float = 1e-3,
    engine: RolloutEngine | None = None,
    rollout: RolloutConfig | None = None,
    advantage: AdvantageConfig | None = None,
    objective: ObjectiveConfig | None = None,
    agreement: AgreementConfig | None = None,
    budget_rows: int = 16384,
    iterations: int = 1,
) -> Trainer:
    """A trainer whose every step sees all of ``prefixes``."""
    prompts = tuple(prefix.prompt for prefix in prefixes) or (inputs("unused").prompt,)
    without_kl = ObjectiveConfig(kl_coefficient=0.0)
    sampler_parts: dict[str, Any] = {
        "source": Source(prefixes),
        "prompt_encoder": Words(),
        "rewards": Scores(reward),
        "engine": engine or NativeEngine(policy),
    }
    spans, world = SpanRecorder(), world or World()
    sampler = GroupSampler(
        policy=policy,
        prompts=PromptStream(prompts=prompts, batch_size=len(prompts), seed=0),
        spans=spans,
        world=world,
        seed=seed,
        budget_rows=budget_rows,
        config=rollout or RolloutConfig(samples=3, max_new_tokens=8),
        **sampler_parts,
    )
    optimizer: Any = RecordingOptimizer(
        policy, OptimizerConfig(learning_rate=learning_rate, schedule="constant")
    )
    return Trainer(
        policy=policy,
        reference=reference,
        sampler=sampler,
        optimizer=optimizer,
        spans=spans,
        world=world,
        advantage_config=advantage or AdvantageConfig(),
        objective_config=objective or without_kl,
        agreement_config=agreement or AgreementConfig(),
        config=TrainerConfig(prompts_per_step=len(prompts), budget_rows=budget_rows, iterations=iterations),
    )


def gradients(trained: Trainer) -> list[dict[str, Tensor]]:
    """The gradients of every update so far, by parameter name."""
    return cast(RecordingOptimizer, trained.optimizer).gradients


def weights(source: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in source.state_dict().items()}


def moved(before: dict[str, Tensor], source: nn.Module) -> list[str]:
    """Names of the weights that are not the same bits as in ``before``."""
    return [name for name, tensor in source.state_dict().items() if not tensor.equal(before[name])]
