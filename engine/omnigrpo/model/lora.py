"""Low-rank adapters on a decoder's projections (Hu et al., 2021): ``y = x W^T + b + (alpha / r) (x A^T) B^T``.

W stays frozen and shared with the reference policy, which is the same decoder with its adapters off.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from omnigrpo.model.qwen2 import Projection, Qwen2Decoder
from omnigrpo_kernels.skinny_linear import linear

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Which projections get adapters, and of which size; the defaults are AffectGPT's, without its dropout."""

    rank: int = 16
    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[Target, ...] = ALL_TARGETS

    def __post_init__(self) -> None:
        """Raises ValueError for adapters that could not learn."""
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"lora.alpha must be finite and not 0, got {self.alpha}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets must name projections, each once, got {self.targets}")


class LoRAProjection(nn.Module):
    """A frozen projection with an adapter beside it; B starts at zero, so that it changes nothing yet."""

    def __init__(self, base: Projection, config: LoRAConfig) -> None:
        """Take over ``base``'s weight and bias, and freeze them."""
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        out_width, in_width = base.weight.shape
        self.lora_A = nn.Parameter(base.weight.new_empty(config.rank, in_width))
        self.lora_B = nn.Parameter(base.weight.new_zeros(out_width, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = config.alpha / config.rank
        self.is_on = True

    def forward(self, rows_TD: Tensor) -> Tensor:
        """The projection of each row, the adapter's share included while it is on."""
        base = linear(rows_TD, self.weight, self.bias)
        if not self.is_on:
            return base
        return base + linear(linear(rows_TD, self.lora_A), self.lora_B) * self.scale

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + (alpha / r) B A, summed in float32 and rounded to W's dtype; a new tensor."""
        change = self.lora_B.float() @ self.lora_A.float() * self.scale
        return (self.weight.float() + change).to(self.weight.dtype)


def add_lora(decoder: Qwen2Decoder, config: LoRAConfig) -> None:
    """Freeze the decoder and put adapters on the chosen projections of every layer; A is drawn from torch's generator.

    Raises ValueError when it has adapters already.
    """
    if any(isinstance(module, LoRAProjection) for module in decoder.modules()):
        raise ValueError("the decoder has LoRA adapters already; merge them first")
    decoder.requires_grad_(False)
    for owner in list(decoder.layers.modules()):
        for name, module in list(owner.named_children()):
            if name in config.targets and isinstance(module, Projection):
                setattr(owner, name, LoRAProjection(module, config))


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, every adapter of the module is off: what it computes is the frozen base."""
    changed = [m for m in module.modules() if isinstance(m, LoRAProjection) and m.is_on]
    for adapter in changed:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in changed:
            adapter.is_on = True


def merged_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under the name it has without adapters, the adapted weights merged one at a time.

    For engines that hold no adapters of their own.
    """
    adapters = {name: m for name, m in module.named_modules() if isinstance(m, LoRAProjection)}
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in adapters and leaf in ("lora_A", "lora_B"):
            continue
        yield name, adapters[owner].merged_weight() if owner in adapters and leaf == "weight" else parameter
