"""Settings of the SGLang engine; imports nothing of SGLang, so that a configuration can be read without it."""

import math
from dataclasses import dataclass
from typing import Literal

SGLANG_VERSION = "0.5.17"
"""The release whose internals the engine and the plugin were written for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SGLangConfig:
    """How SGLang's processes are started, and how long they are waited for."""

    dtype: Literal["policy", "float32", "bfloat16"] = "policy"
    """Of weights and KV cache; ``policy`` takes the trained model's."""
    attention_backend: str | None = None
    """SGLang's name of it; None is ``torch_native`` on a CPU and SGLang's own choice on CUDA."""
    context_length: int | None = None
    """Tokens of a prompt with its completion at most; None is the decoder's number of positions."""
    mem_fraction: float = 0.5
    """Share of the device's memory for weights and KV cache (``mem_fraction_static``)."""
    max_total_tokens: int | None = None
    """Rows of the KV cache; None lets SGLang fill ``mem_fraction`` on CUDA, and is 65536 on a CPU."""
    tensor_parallel: int = 1
    """Devices that one copy of the decoder is split over."""
    threads: int | None = None
    """CPU threads of each of its processes; None leaves the number to torch, which takes every core."""
    memory_saver: bool = False
    """Let ``release_memory`` free weights and KV cache (CUDA, torch_memory_saver); weights wait on the host."""
    bucket_bytes: int = 512 << 20
    """Bytes of weights published at once; twice as much is alive meanwhile."""
    shared_memory_bytes: int = 1 << 30
    """Media rows under way between the processes at once, in /dev/shm; at most half of what is free there at the start
    is used."""
    start_timeout_seconds: float = 600.0
    """Until the processes have loaded the checkpoint."""
    timeout_seconds: float = 600.0
    """For a reader of a stream without a finished group, and for an answer to a command; not counted while paused."""
    log_level: str = "error"
    """Of SGLang's own messages."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no engine can start with."""
        if not 0 < self.mem_fraction < 1:
            raise ValueError(f"sglang.mem_fraction must be between 0 and 1, got {self.mem_fraction}")
        for name in ("tensor_parallel", "bucket_bytes", "shared_memory_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"sglang.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("context_length", "max_total_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"sglang.{name} must be at least 1, or absent for the default, got {value}")
        for name in ("start_timeout_seconds", "timeout_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"sglang.{name} must be a number above 0, got {value}")
