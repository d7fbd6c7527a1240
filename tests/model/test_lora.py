"""LoRA against peft on transformers' Qwen2, the shared base with adapters off, and merged weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model

from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.lora import (
    ALL_TARGETS,
    LoRAConfig,
    LoRAProjection,
    adapters_off,
    add_lora,
    merged_parameters,
)
from omnigrpo.model.qwen2 import Qwen2Decoder
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

CONFIG = DecoderConfig(
    vocab_size=97,
    width=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    ffn_width=64,
    rope_theta=1e4,
    max_positions=128,
)
LAYOUT = SharedPrefixLayout(prefix_lengths=(9,), completion_lengths=((),))
LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture
def decoder() -> Qwen2Decoder:
    torch.manual_seed(0)
    decoder = Qwen2Decoder(CONFIG).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def run(decoder: Qwen2Decoder, embeddings_TD: Tensor) -> Tensor:
    return decoder(embeddings_TD, torch.arange(len(embeddings_TD)), LAYOUT)


def with_random_adapters(decoder: Qwen2Decoder, config: LoRAConfig = LORA) -> Qwen2Decoder:
    add_lora(decoder, config)
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, LoRAProjection):
                module.lora_B.normal_(std=0.2)
    return decoder


def peft_twin(decoder: Qwen2Decoder, base: Qwen2Decoder, config: LoRAConfig):
    """transformers' decoder of the same weights with peft's adapters of the same values."""
    qwen2 = Qwen2Model(
        Qwen2Config(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.width,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            intermediate_size=CONFIG.ffn_width,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            rms_norm_eps=CONFIG.rms_norm_eps,
        )
    ).double()
    qwen2.load_state_dict(base.state_dict())
    twin = get_peft_model(
        qwen2,
        LoraConfig(
            r=config.rank, lora_alpha=int(config.alpha), target_modules=list(config.targets), lora_dropout=0.0
        ),
    ).double()
    values = {name: p for name, p in decoder.named_parameters() if ".lora_" in name}
    peft_parameters = {name: p for name, p in twin.named_parameters() if ".lora_" in name}
    assert len(values) == len(peft_parameters)
    with torch.no_grad():
        for name, value in values.items():
            peft_parameters[f"base_model.model.{name}.default.weight"].copy_(value)
    return twin, {name: peft_parameters[f"base_model.model.{name}.default.weight"] for name in values}


@pytest.mark.parametrize(
    "targets", [ALL_TARGETS, ("q_proj", "v_proj"), ("down_proj",)], ids=lambda t: "+".join(t)
)
def test_values_and_gradients_equal_pefts(decoder: Qwen2Decoder, targets) -> None:
    config = LoRAConfig(rank=4, alpha=8.0, targets=targets)
    base = copy.deepcopy(decoder)
    with_random_adapters(decoder, config)
    twin, twin_adapters = peft_twin(decoder, base, config)
    embeddings_TD = torch.randn(9, CONFIG.width, dtype=torch.float64)
    weight_TD = torch.randn(9, CONFIG.width, dtype=torch.float64)

    ours = run(decoder, embeddings_TD)
    theirs = twin(inputs_embeds=embeddings_TD[None]).last_hidden_state[0]
    # transformers computes the rotary angles in float32.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    (ours * weight_TD).sum().backward()
    (theirs * weight_TD).sum().backward()
    parameters = dict(decoder.named_parameters())
    for name, twin_adapter in twin_adapters.items():
        torch.testing.assert_close(parameters[name].grad, twin_adapter.grad, rtol=1e-4, atol=1e-4)
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert trained == set(twin_adapters)
    assert all(p.grad is None for name, p in parameters.items() if name not in trained)


def test_new_adapters_change_nothing(decoder: Qwen2Decoder) -> None:
    embeddings_TD = torch.randn(9, CONFIG.width, dtype=torch.float64)
    before = run(decoder, embeddings_TD)
    add_lora(decoder, LORA)
    assert torch.equal(run(decoder, embeddings_TD), before)


def test_with_adapters_off_it_is_the_base(decoder: Qwen2Decoder) -> None:
    embeddings_TD = torch.randn(9, CONFIG.width, dtype=torch.float64)
    before = run(decoder, embeddings_TD)
    with_random_adapters(decoder)
    assert not torch.allclose(run(decoder, embeddings_TD), before)
    with adapters_off(decoder):
        assert torch.equal(run(decoder, embeddings_TD), before)
        with adapters_off(decoder):
            pass
        assert torch.equal(run(decoder, embeddings_TD), before)
    assert not torch.allclose(run(decoder, embeddings_TD), before)


def test_merged_weights_in_a_plain_decoder_compute_the_same(decoder: Qwen2Decoder) -> None:
    names = set(decoder.state_dict())
    with_random_adapters(decoder)
    plain = Qwen2Decoder(CONFIG).double()
    merged = dict(merged_parameters(decoder))
    assert set(merged) == names
    plain.load_state_dict(merged)
    embeddings_TD = torch.randn(9, CONFIG.width, dtype=torch.float64)
    # Merged in float32.
    torch.testing.assert_close(run(plain, embeddings_TD), run(decoder, embeddings_TD), rtol=0, atol=1e-5)


def test_decoding_uses_the_adapters(decoder: Qwen2Decoder) -> None:
    """Few rows without gradients go another way than many with them."""
    decoder.float()
    with_random_adapters(decoder)
    rows_TD = torch.randn(3, CONFIG.width)
    for module in decoder.modules():
        if isinstance(module, LoRAProjection) and module.weight.shape[1] == CONFIG.width:
            with torch.no_grad():
                decoded = module(rows_TD)
            torch.testing.assert_close(decoded, module(rows_TD).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha must be finite"),
        ({"alpha": float("nan")}, "lora.alpha must be finite"),
        ({"targets": ()}, "lora.targets must name"),
        ({"targets": ("q_proj", "q_proj")}, "lora.targets must name"),
    ],
)
def test_adapters_that_could_not_learn(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_adapters_are_added_once(decoder: Qwen2Decoder) -> None:
    add_lora(decoder, LORA)
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(decoder, LORA)
