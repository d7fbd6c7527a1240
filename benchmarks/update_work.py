"""The policies that bench_update compares: our decoder on packed groups, the same one dense, and transformers' own.

Legend: ``G`` sequences of ``L`` rows, ``T`` rows, ``D`` width, ``V`` vocabulary, ``N`` query heads, ``K`` key/value
heads, ``H`` head width, ``R`` tokens of a completion.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

from omnigrpo.algorithm.split_group import completion_passes
from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.qwen2 import Qwen2Decoder, rotary_angles
from omnigrpo.schema import Clip, ClipFeatures, PrefixInputs, Prompt
from omnigrpo.trainer import TrainingPack
from omnigrpo_kernels.grpo_head import grpo_head
from omnigrpo_kernels.grpo_objective import ObjectiveConfig, TokenBatch
from step_work import Sizes

WEIGHT_STD = 0.02
OBJECTIVE = ObjectiveConfig(loss="grpo", kl_coefficient=0.04, kl_estimator="k3")


class TextPolicy(nn.Module):
    """A Qwen2 of random weights whose prefixes are text alone."""

    def __init__(self, config: DecoderConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.device(device):
            self.decoder = Qwen2Decoder(config)
            self.lm_head = (
                None if config.tie_word_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
            )
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=WEIGHT_STD)

    @property
    def head_weight_VD(self) -> Tensor:
        """The vocabulary projection."""
        return self.decoder.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Text embeddings."""
        return self.decoder.embed_tokens(token_ids)

    def embed_prefixes(self, inputs: Sequence[PrefixInputs]) -> Tensor:
        """Text embeddings of all prefixes, packed."""
        return self.embed_tokens(torch.cat([i.token_ids_P for i in inputs]).to(self.head_weight_VD.device))


def text_prefix(sizes: Sizes, vocab_size: int, generator: torch.Generator) -> PrefixInputs:
    """A prefix of P random tokens."""
    assert sizes.prefix is not None, "this benchmark's sizes name their prefix"
    prompt = Prompt(prompt_id="p", clip=Clip(path=Path("p.mp4")), question="?", modalities=(), solution="x")
    return PrefixInputs(
        prompt=prompt,
        token_ids_P=torch.randint(vocab_size, (sizes.prefix,), generator=generator),
        question_ids=torch.zeros(1, dtype=torch.int64),
        features=ClipFeatures(vision_FND=None, audio_AD=None),
    )


def on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The same constants there."""
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved: dict[str, Tensor] = {name: x.to(device) for name, x in named.items() if x is not None}
    return TokenBatch(**moved)


def update(policy: TextPolicy, item: TrainingPack, budget_rows: int) -> Tensor:
    """Loss of one group and all gradients, as the trainer computes them."""
    loss = torch.zeros((), device=policy.head_weight_VD.device)
    for rows in completion_passes(policy, item.pack, budget_rows):
        head = grpo_head(
            rows.hidden_RD,
            policy.head_weight_VD,
            rows.targets_C,
            item.batch.select(rows.tokens),
            OBJECTIVE,
            rows_C=rows.rows_C,
        )
        head.loss.backward()
        loss += head.loss.detach()
    return loss


def dense_hidden(decoder: Qwen2Decoder, rows_GLD: Tensor) -> Tensor:
    """Each of G equally long sequences alone, in one batch: the same layers over ``[G, L]`` and causal SDPA."""
    sequences, length, _ = rows_GLD.shape
    positions_T = torch.arange(length, device=rows_GLD.device).repeat(sequences)
    rotation = rotary_angles(positions_T, decoder.config, rows_GLD.dtype)

    def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (sequences, length)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        o_GNLH = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o_GNLH.transpose(1, 2).flatten(0, 1)

    rows_TD = rows_GLD.flatten(0, 1)
    for layer in decoder.layers:
        rows_TD = layer(rows_TD, rotation, attend)
    return decoder.norm(rows_TD)


def transformers_policy(policy: TextPolicy) -> Qwen2ForCausalLM:
    """transformers' own Qwen2 with SDPA and our weights (the same tensors)."""
    config = policy.decoder.config
    with torch.device(policy.head_weight_VD.device):
        theirs = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.ffn_width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                rms_norm_eps=config.rms_norm_eps,
                max_position_embeddings=config.max_positions,
                tie_word_embeddings=config.tie_word_embeddings,
                use_sliding_window=False,
                use_cache=False,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
            )
        )
    theirs.model.load_state_dict(dict(policy.decoder.named_parameters()), assign=True)
    theirs.lm_head.weight = (
        policy.decoder.embed_tokens.weight if policy.lm_head is None else policy.lm_head.weight
    )
    return theirs.train()


def reference_update(
    model: Qwen2ForCausalLM, ids_GL: Tensor, advantage_G: Tensor, reference_GR: Tensor
) -> Tensor:
    """Loss and gradients as R1-Omni's trainer computes them: logits of every row, log_softmax in the model's dtype."""
    logprob_GR = reference_logprobs(model, ids_GL, reference_GR.shape[1])
    kl_GR = torch.exp(reference_GR - logprob_GR) - (reference_GR - logprob_GR) - 1
    surrogate_GR = torch.exp(logprob_GR - logprob_GR.detach()) * advantage_G[:, None]
    loss = (OBJECTIVE.kl_coefficient * kl_GR - surrogate_GR).mean(dim=1).mean()
    loss.backward()
    return loss.detach()


def reference_logprobs(model: Qwen2ForCausalLM, ids_GL: Tensor, num_tokens: int) -> Tensor:
    """Log-probs of the last ``num_tokens`` tokens of each sequence ``[G, R]``, one sequence at a time."""
    logits_GRV = model(input_ids=ids_GL).logits[:, :-1][:, -num_tokens:]
    targets_GR = ids_GL[:, -num_tokens:]
    rows = [
        logits_RV.log_softmax(dim=-1).gather(1, targets_R[:, None]).squeeze(1)
        for logits_RV, targets_R in zip(logits_GRV, targets_GR, strict=True)
    ]
    return torch.stack(rows)
