"""Qwen2 decoder over packed groups: one layer code for training, prefill and decoding.

Shape suffixes: ``T`` packed rows, ``S`` sequences that decode one token each, ``L`` layers, ``D`` width,
``N`` query heads, ``K`` key/value heads, ``H`` head width, ``P`` prefix rows, ``C`` rows of completions. Rows are T
in a packed pass, S in a decode step. Positions ``[T]`` may be ``[3, T]`` for M-RoPE.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omnigrpo.model.config import DecoderConfig
from omnigrpo.schema import PrefixStates
from omnigrpo_kernels.decoder_layer_cuda import LayerCall, LayerParameters, decoder_layer
from omnigrpo_kernels.rms_norm import rms_norm
from omnigrpo_kernels.rope import rotate_heads
from omnigrpo_kernels.shared_prefix_attention import shared_prefix_attention
from omnigrpo_kernels.shared_prefix_attention_cuda import attention_plan
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout
from omnigrpo_kernels.skinny_linear import linear
from omnigrpo_kernels.swiglu import swiglu

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer_index, q_SNH, k_SKH, v_SKH) -> o_SNH``; q and k are already rotated."""
LayerAttend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedAttend:
    """A `LayerAttend` over packed groups, which says so: a whole layer around it can run as one."""

    layout: SharedPrefixLayout
    prefix: tuple[Tensor, Tensor] | None = None
    """Rotated k and v ``[P, K, H]`` of the layer's rows before these."""
    keep: Callable[[Tensor, Tensor], None] | None = None
    """Is given rotated k and v of these rows."""

    def __call__(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if self.keep is not None:
            self.keep(k_TKH, v_TKH)
        if self.prefix is not None:
            k_TKH, v_TKH = (torch.cat(rows) for rows in zip(self.prefix, (k_TKH, v_TKH), strict=True))
        return shared_prefix_attention(q_TNH, k_TKH, v_TKH, self.layout)


class Rotation(NamedTuple):
    """Cosine and sine of every row's rotary angles, ``[T, 1, H / 2]``, at least float32."""

    cos: Tensor
    sin: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, rows_TD: Tensor) -> Tensor:
        """Normalise each row."""
        return rms_norm(rows_TD, self.weight, self.eps)


class Projection(nn.Linear):
    """A linear map that decodes at the speed of memory: few rows without gradients go through a kernel of their own."""

    def forward(self, rows_TD: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``rows @ weight.T + bias``."""
        return linear(rows_TD, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Projections around an attention that the caller supplies."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        query_width = config.num_heads * config.head_width
        kv_width = config.num_kv_heads * config.head_width
        self.q_proj = Projection(config.width, query_width)
        self.k_proj = Projection(config.width, kv_width)
        self.v_proj = Projection(config.width, kv_width)
        self.o_proj = Projection(query_width, config.width, bias=False)

    def forward(self, rows_TD: Tensor, rotation: Rotation, attend: LayerAttend) -> Tensor:
        """Rotate q and k, attend, and project back to ``[T, D]``."""
        heads = (-1, self.head_width)
        q_TNH, k_TKH = rotate_heads(
            self.q_proj(rows_TD).unflatten(-1, heads),
            self.k_proj(rows_TD).unflatten(-1, heads),
            *rotation,
        )
        v_TKH = self.v_proj(rows_TD).unflatten(-1, heads)
        return self.o_proj(attend(q_TNH, k_TKH, v_TKH).flatten(-2))


class SwiGLU(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Projection(config.width, config.ffn_width, bias=False)
        self.up_proj = Projection(config.width, config.ffn_width, bias=False)
        self.down_proj = Projection(config.ffn_width, config.width, bias=False)

    def forward(self, rows_TD: Tensor) -> Tensor:
        """``down(silu(gate(x)) * up(x))``."""
        return self.down_proj(swiglu(self.gate_proj(rows_TD), self.up_proj(rows_TD)))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_norm_eps)

    def forward(self, rows_TD: Tensor, rotation: Rotation, attend: LayerAttend) -> Tensor:
        """One layer; ``attend`` decides which rows see which."""
        if isinstance(attend, PackedAttend) and _fuses(rows_TD):
            parameters = _plain_parameters(self, rows_TD.dtype)
            if parameters is not None:
                return self._fused(rows_TD, rotation, attend, parameters)
        rows_TD = rows_TD + self.self_attn(self.input_layernorm(rows_TD), rotation, attend)
        return rows_TD + self.mlp(self.post_attention_layernorm(rows_TD))

    def _fused(
        self, rows_TD: Tensor, rotation: Rotation, attend: PackedAttend, parameters: LayerParameters
    ) -> Tensor:
        """The same as one node of autograd."""
        width = self.self_attn.head_width
        heads = parameters.q_weight.shape[0] // width, parameters.k_weight.shape[0] // width
        call = LayerCall(
            plan=attention_plan(attend.layout, rows_TD.device, rows_TD.dtype, *heads, width),
            scale=width**-0.5,
            attention_norm_eps=self.input_layernorm.eps,
            mlp_norm_eps=self.post_attention_layernorm.eps,
            keep_states=attend.keep is not None,
        )
        rows_TD, k_TKH, v_TKH = decoder_layer(rows_TD, *rotation, parameters, call, attend.prefix)
        if attend.keep is not None and k_TKH is not None and v_TKH is not None:
            # Without a graph nothing else holds the buffer of q, k and v: copies let go of q.
            states = (rows if rows.requires_grad else rows.contiguous() for rows in (k_TKH, v_TKH))
            attend.keep(*states)
        return rows_TD


def _fuses(rows_TD: Tensor) -> bool:
    """Whether `decoder_layer` computes layers of these rows."""
    return (
        rows_TD.is_cuda
        and rows_TD.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and len(rows_TD) > 0
        and not torch.is_autocast_enabled("cuda")
    )


def _plain_parameters(layer: DecoderLayer, dtype: torch.dtype) -> LayerParameters | None:
    """The parameters of a layer, unless a module of it is another than ours, or wrapped, hooked or of another dtype."""
    attention, mlp = layer.self_attn, layer.mlp
    if not (_is_plain(attention, SelfAttention) and _is_plain(mlp, SwiGLU)):
        return None
    biased = attention.q_proj, attention.k_proj, attention.v_proj
    unbiased = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    norms = layer.input_layernorm, layer.post_attention_layernorm
    if not all(_is_plain(module, Projection) for module in (*biased, *unbiased)):
        return None
    if not all(_is_plain(module, RMSNorm) for module in norms):
        return None
    q, k, v = biased
    o, gate, up, down = unbiased
    parameters = LayerParameters(
        attention_norm_D=norms[0].weight,
        q_weight=q.weight,
        q_bias=q.bias,
        k_weight=k.weight,
        k_bias=k.bias,
        v_weight=v.weight,
        v_bias=v.bias,
        o_weight=o.weight,
        mlp_norm_D=norms[1].weight,
        gate_weight=gate.weight,
        up_weight=up.weight,
        down_weight=down.weight,
    )
    num_biases = sum(module.bias is not None for module in biased)
    if num_biases not in (0, 3) or any(module.bias is not None for module in unbiased):
        return None
    given = (parameter for parameter in parameters if parameter is not None)
    if all(type(each) in (nn.Parameter, Tensor) and each.dtype == dtype for each in given):
        return parameters
    return None


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is nothing but the ``forward`` of this class."""
    own = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) is kind and "forward" not in own and not any(own[name] for name in hooks)


class Qwen2Decoder(nn.Module):
    """Qwen2 without its vocabulary head: embeddings in, hidden states after the final norm out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.rms_norm_eps)

    def forward(self, embeddings_TD: Tensor, positions_T: Tensor, layout: SharedPrefixLayout) -> Tensor:
        """Run packed groups and return ``hidden_TD``; differentiable."""
        attend = PackedAttend(layout=layout)
        return self._run(embeddings_TD, positions_T, [attend] * len(self.layers))

    def prefill(self, embeddings_TD: Tensor, positions_T: Tensor, layout: SharedPrefixLayout) -> PrefixStates:
        """Run packed groups and keep what ``decode`` and ``extend`` read of them; differentiable."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def keep(layer_index: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
            if layer_index == len(keys):  # Else a checkpointed layer is computed again.
                keys.append(k_TKH)
                values.append(v_TKH)

        attends = [
            PackedAttend(layout=layout, keep=partial(keep, index)) for index in range(len(self.layers))
        ]
        hidden_TD = self._run(embeddings_TD, positions_T, attends)
        return PrefixStates(hidden_TD=hidden_TD, keys=tuple(keys), values=tuple(values))

    def extend(
        self, prefix: PrefixStates, embeddings_CD: Tensor, positions_C: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """Run completions of these lengths after one prefix and return ``hidden_CD``.

        Equal to the completions' rows of ``forward`` over prefix and completions. Differentiable, in the states too.
        """
        layout = SharedPrefixLayout(
            prefix_lengths=(len(prefix.hidden_TD),), completion_lengths=(lengths,), prefix_queries=False
        )
        states = zip(prefix.keys, prefix.values, strict=True)
        attends = [PackedAttend(layout=layout, prefix=state) for state in states]
        return self._run(embeddings_CD, positions_C, attends)

    @torch.no_grad()
    def decode(self, embeddings_SD: Tensor, positions_S: Tensor, attend: Attend) -> Tensor:
        """Advance S sequences by one token; ``attend`` owns the KV cache and must append k and v to it."""
        attends = [partial(attend, index) for index in range(len(self.layers))]
        return self._run(embeddings_SD, positions_S, attends)

    def _run(self, rows_TD: Tensor, positions_T: Tensor, attends: Sequence[LayerAttend]) -> Tensor:
        if positions_T.shape[-1] != len(rows_TD):
            raise ValueError(
                f"the decoder got {len(rows_TD)} rows but positions of shape {tuple(positions_T.shape)}; "
                "give one position (three for M-RoPE) per row"
            )
        rotation = rotary_angles(positions_T, self.config, rows_TD.dtype)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for layer, attend in zip(self.layers, attends, strict=True):
            if recompute:
                rows_TD = checkpoint(layer, rows_TD, rotation, attend, use_reentrant=False)
            else:
                rows_TD = layer(rows_TD, rotation, attend)
        return self.norm(rows_TD)


def rotary_angles(positions_T: Tensor, config: DecoderConfig, dtype: torch.dtype) -> Rotation:
    """Angles ``position * theta ** (-2 i / H)`` of every row, for rows of ``dtype``.

    Of positions ``[3, T]``, frequency i takes the row whose part of ``mrope_section`` it lies in.
    """
    wide = _at_least_float32(dtype)
    device = positions_T.device
    exponents = torch.arange(0, config.head_width, 2, device=device).to(wide) / config.head_width
    if positions_T.dim() == 1:
        positions_TF = positions_T[:, None]
    else:
        if config.mrope_section is None or len(positions_T) != 3:
            raise ValueError(
                f"got positions of shape {tuple(positions_T.shape)} for a decoder with mrope_section "
                f"{config.mrope_section}; give [T], or [3, T] to a decoder that has sections"
            )
        sections = torch.tensor(config.mrope_section, device=device)
        positions_TF = positions_T[torch.arange(3, device=device).repeat_interleave(sections)].T
    angles = positions_TF.to(wide)[:, None] * (1.0 / config.rope_theta**exponents)
    return Rotation(angles.cos(), angles.sin())


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
