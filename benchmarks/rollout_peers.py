"""Who draws the samples in bench_rollout, each behind one small interface: the native engine and transformers.

Legend: ``G`` samples, ``P`` prefix rows, ``R`` tokens of a sample, ``D`` width, ``V`` vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM

from omnigrpo.rollout.interface import GroupRequest, SamplingParams, collect
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.schema import Prefix


class Peer(Protocol):
    """One way to draw G samples from one prefix."""

    @property
    def name(self) -> str:
        """In the tables."""
        ...

    def draw(self, num_samples: int, num_tokens: int) -> int:
        """Draw so many tokens of so many samples; the prefix rows that went through the decoder."""
        ...


@dataclass(frozen=True, kw_only=True)
class Native:
    """Ours: one request with G seeds."""

    engine: NativeEngine
    prefix: Prefix
    name: str = "native"

    def draw(self, num_samples: int, num_tokens: int) -> int:
        """Draw tokens at temperature 1; see `Peer`."""
        before = self.engine.counters
        request = GroupRequest(prefix=self.prefix, seeds=tuple(range(num_samples)))
        sampling = SamplingParams(max_new_tokens=num_tokens)
        (group,) = collect(self.engine.generate([request], sampling), 1)
        assert [len(completion.token_ids) for completion in group] == [num_tokens] * num_samples
        return self.engine.counters.since(before).prefix_rows


@dataclass(frozen=True, kw_only=True)
class Generate:
    """``transformers.generate`` with num_return_sequences=G: it prefills a copy of the prefix for each sample."""

    model: Qwen2ForCausalLM
    embeddings_PD: Tensor
    name: str = "transformers.generate"

    @torch.no_grad()
    def draw(self, num_samples: int, num_tokens: int) -> int:
        """Draw tokens at temperature 1 with no end of sequence and no truncation, which would sort; see `Peer`."""
        rows = len(self.embeddings_PD)
        drawn = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            inputs_embeds=self.embeddings_PD[None],
            attention_mask=torch.ones(1, rows, dtype=torch.int64, device=self.embeddings_PD.device),
            num_return_sequences=num_samples,
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        assert drawn.shape == (num_samples, num_tokens)
        return rows * num_samples


@dataclass(frozen=True, kw_only=True)
class SharedPrefill:
    """The same model with the prefix prefilled once and its cache repeated: what is left is its decode step."""

    model: Qwen2ForCausalLM
    embeddings_PD: Tensor
    name: str = "transformers, prefill shared"

    @torch.no_grad()
    def draw(self, num_samples: int, num_tokens: int) -> int:
        """Draw tokens at temperature 1; see `Peer`."""
        cache = DynamicCache(config=self.model.config)
        logits_1PV = self.model(
            inputs_embeds=self.embeddings_PD[None], past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        cache.batch_repeat_interleave(num_samples)
        token_G1 = _sampled(logits_1PV[:, -1].expand(num_samples, -1))
        for _ in range(num_tokens - 1):
            logits_G1V = self.model(input_ids=token_G1, past_key_values=cache, use_cache=True).logits
            token_G1 = _sampled(logits_G1V[:, -1])
        return len(self.embeddings_PD)


def _sampled(logits_GV: Tensor) -> Tensor:
    return torch.multinomial(logits_GV.float().softmax(dim=-1), 1)
