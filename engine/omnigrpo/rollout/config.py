"""How completions are sampled."""

import math
from dataclasses import dataclass, field
from typing import Literal

from omnigrpo.rollout.interface import SamplingParams
from omnigrpo.rollout.native_engine import NativeEngineConfig
from omnigrpo.rollout.server_config import ServerConfig, check_servers
from omnigrpo.rollout.sglang_config import SGLangConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Which engine samples, what, and how far ahead of the update."""

    engine: Literal["native", "sglang", "servers"] = "native"
    """native samples in this process; sglang in processes that this one starts; servers on the SGLang servers of
    ``servers``, over HTTP."""
    servers: tuple[str, ...] = ()
    """Addresses of SGLang servers, e.g. ``["http://10.0.0.1:30000"]``, for the engine of that name."""
    samples: int = 8
    """G, completions per prompt."""
    temperature: float = 1.0
    top_k: int = 0
    """0 is off; log-probs ignore the truncation, so off keeps the rollout on-policy."""
    top_p: float = 1.0
    """1 is off."""
    max_new_tokens: int = 512
    token_budget: int | None = None
    """Tokens that a step adds to a completion at most. A group with an unfinished one is not trained on: it keeps its
    tokens and log-probs and goes on in the next step, so that a few long tails do not hold up all the others."""
    overlap_update: bool = False
    """Sample the next step's completions, by the weights of now, while this step's update runs (one step off-policy).
    Needs an engine with weights of its own. The last step of a run samples one more, for a run that goes on."""
    max_staleness: int = 0
    """By how many updates a token's weights may be behind the ones that learn from it."""
    release_memory: bool = False
    """Give the engine's device memory to the update and take it back before the next weights."""
    native: NativeEngineConfig = field(default_factory=NativeEngineConfig)
    """Memory budgets of the native engine."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    """Processes and limits of SGLang."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """What servers are sent, and how long they are waited for."""

    def __post_init__(self) -> None:
        """Reject a group without baseline, a temperature without log-probs, and modes that exclude each other."""
        if self.samples < 2:
            raise ValueError(
                f"rollout.samples must be at least 2 to compare within a group, got {self.samples}"
            )
        if not self.temperature > 0:
            raise ValueError(f"rollout.temperature must be above 0 to explore, got {self.temperature}")
        if self.max_staleness < 0:
            raise ValueError(f"rollout.max_staleness must be at least 0, got {self.max_staleness}")
        if self.max_staleness < self.staleness:
            raise ValueError(
                f"rollout.overlap_update {self.overlap_update} and rollout.token_budget {self.token_budget} let a "
                f"completion of rollout.max_new_tokens {self.max_new_tokens} learn from tokens that are "
                f"{self.staleness} updates old, but rollout.max_staleness is {self.max_staleness}: raise it, or change "
                "the others"
            )
        if self.release_memory and self.overlap_update:
            raise ValueError(
                "rollout.release_memory takes the engine's memory during the update, and rollout.overlap_update "
                "samples then: choose one"
            )
        if self.release_memory and self.engine == "sglang" and not self.sglang.memory_saver:
            raise ValueError(
                "rollout.release_memory frees nothing of SGLang without its memory saver: set "
                "rollout.sglang.memory_saver=true (CUDA only), or leave rollout.release_memory out"
            )
        if self.engine == "servers":
            check_servers(self.servers)
        elif self.servers:
            raise ValueError(
                f"rollout.servers is given, but rollout.engine is {self.engine}: set it to servers, or leave them out"
            )
        self.sampling(stop_token_ids=())

    @property
    def staleness(self) -> int:
        """By how many updates the first token of the longest completion is behind the weights that learn from it."""
        budget = self.token_budget or self.max_new_tokens
        return math.ceil(self.max_new_tokens / budget) - 1 + int(self.overlap_update)

    def sampling(self, *, stop_token_ids: tuple[int, ...]) -> SamplingParams:
        """What the engine is asked for; raises ValueError where it cannot be honoured."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            token_budget=self.token_budget,
            stop_token_ids=stop_token_ids,
        )
