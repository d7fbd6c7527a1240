"""A policy, and a real SGLang on the CPU that has its weights."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from omnigrpo.group_sampler import embed
from omnigrpo.model.checkpoint_format import load_model
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.rollout.interface import GroupRequest, SamplingParams, collect
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.rollout.sglang_config import SGLangConfig
from omnigrpo.rollout.sglang_engine import SGLangEngine
from omnigrpo.schema import (
    Clip,
    ClipFeatures,
    Completion,
    Modality,
    Prefix,
    Prompt,
    SharedPrefixLayout,
)
from omnigrpo_kernels.linear_logprob import linear_logprob

BOTH: tuple[Modality, ...] = ("video", "audio")
SETTINGS = SGLangConfig(max_total_tokens=8192, bucket_bytes=1 << 20, timeout_seconds=120.0, threads=1)
"""Buckets far smaller than the 2.6 MB of the tiny decoder in float32, so that every publication has several."""


@dataclass(kw_only=True)
class Rig:
    """A policy and an engine that has its weights."""

    policy: HumanOmni
    encoder: PromptEncoder
    engine: SGLangEngine
    directory: Path
    version: int = 0

    def publish(self, policy: HumanOmni | None = None) -> int:
        """Give the engine the weights of this policy, or of its own."""
        self.version += 1
        self.engine.publish((policy or self.policy).state_dict().items(), self.version)
        return self.version

    def prefix(
        self, name: str, modalities: tuple[Modality, ...] = BOTH, *, policy: HumanOmni | None = None
    ) -> Prefix:
        """A prompt with random tower features; the same name is the same prompt."""
        policy = policy or self.policy
        vision, audio = policy.config.vision, policy.config.audio
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**31)
        frames = (vision.num_frames, vision.grid**2, vision.width)
        features = ClipFeatures(
            vision_FND=torch.randn(frames, generator=generator) if "video" in modalities else None,
            audio_AD=torch.randn(audio.num_tokens, audio.width, generator=generator)
            if "audio" in modalities
            else None,
        )
        prompt = Prompt(
            prompt_id=name,
            clip=Clip(path=Path(f"{name}.mp4")),
            question=f"What does clip {name} show?",
            modalities=modalities,
            solution="happy",
        )
        with torch.no_grad():
            return embed(policy, [self.encoder.encode(prompt, features)])[0]

    def sampling(self, **changed) -> SamplingParams:
        """Greedy and short, unless it is changed."""
        settings = {"temperature": 0.0, "max_new_tokens": 12, "stop_token_ids": self.encoder.stop_token_ids}
        return SamplingParams(**(settings | changed))

    def draw(self, requests: list[GroupRequest], sampling: SamplingParams) -> list[tuple[Completion, ...]]:
        """From SGLang."""
        return collect(self.engine.generate(requests, sampling), len(requests))

    def draw_natively(
        self, requests: list[GroupRequest], sampling: SamplingParams, policy: HumanOmni | None = None
    ) -> list[tuple[Completion, ...]]:
        """From the native engine, by the same weights."""
        return collect(NativeEngine(policy or self.policy).generate(requests, sampling), len(requests))


def group(prefix: Prefix, samples: int = 3, *begun: Completion | None) -> GroupRequest:
    """A request for so many samples."""
    return GroupRequest(prefix=prefix, seeds=tuple(range(samples)), begun=begun)


def assert_same(drawn: list[tuple[Completion, ...]], expected: list[tuple[Completion, ...]]) -> None:
    """The same tokens and ends, and log-probs that differ by no more than rounding in other batches does."""
    for ours, theirs in zip(drawn, expected, strict=True):
        for sample, other in zip(ours, theirs, strict=True):
            assert (sample.token_ids, sample.finish_reason) == (other.token_ids, other.finish_reason)
            assert sample.logprobs == pytest.approx(other.logprobs, rel=0, abs=1e-4)


@torch.no_grad()
def policy_logprobs(
    policy: HumanOmni, prefix: Prefix, completion: Completion, temperature: float
) -> list[float]:
    """What the policy thinks of a completion's tokens."""
    ids, rows = torch.tensor(completion.token_ids), len(prefix.embeddings_PD)
    embeddings_TD = torch.cat([prefix.embeddings_PD, policy.embed_tokens(ids)])
    layout = SharedPrefixLayout(prefix_lengths=(rows,), completion_lengths=((len(ids),),))
    hidden_TD = policy.decoder(embeddings_TD, torch.arange(len(embeddings_TD)), layout)
    predictors_RD = hidden_TD[rows - 1 : rows - 1 + len(ids)]
    return linear_logprob(
        predictors_RD, policy.head_weight_VD, ids, temperature=temperature
    ).logprob_T.tolist()


def open_rig(directory: Path, dtype: torch.dtype) -> Rig:
    """Load the policy, start SGLang, and make both more lively than a fresh model, which repeats its last token."""
    loaded = load_model(directory, dtype=dtype)
    with torch.no_grad():
        loaded.model.head_weight_VD.mul_(2)
        for parameter in loaded.model.decoder.layers.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    encoder = PromptEncoder(loaded.tokenizer, loaded.gate_tokenizer, loaded.model.config, PromptTemplate())
    engine = SGLangEngine(directory, SETTINGS, device="cpu", dtype=dtype)
    rig = Rig(policy=loaded.model, encoder=encoder, engine=engine, directory=directory)
    rig.publish()
    return rig
