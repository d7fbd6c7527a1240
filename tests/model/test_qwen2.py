"""The decoder: against transformers' Qwen2, packed against alone, prefill and decode against forward."""

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.qwen2 import Qwen2Decoder, RMSNorm, rotary_angles
from omnigrpo_kernels.rope import rotate_reference
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

CONFIG = DecoderConfig(
    vocab_size=97,
    width=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    ffn_width=64,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_positions=128,
)
LAYOUT = SharedPrefixLayout(prefix_lengths=(5, 1, 7), completion_lengths=((4, 1, 6), (2, 3), (1,)))


@pytest.fixture
def decoder() -> Qwen2Decoder:
    torch.manual_seed(0)
    decoder = Qwen2Decoder(CONFIG)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def _plain(length: int) -> SharedPrefixLayout:
    return SharedPrefixLayout(prefix_lengths=(length,), completion_lengths=((),))


def _positions(layout: SharedPrefixLayout) -> Tensor:
    parts = []
    for prefix, completions in zip(layout.prefix_lengths, layout.completion_lengths, strict=True):
        parts += [torch.arange(prefix)] + [torch.arange(prefix, prefix + length) for length in completions]
    return torch.cat(parts)


def _sequences(layout: SharedPrefixLayout) -> list[tuple[Tensor, int, int]]:
    """Packed rows of each sequence (prefix, then completion), its prefix length and its group's size."""
    sequences, start = [], 0
    for prefix, completions in zip(layout.prefix_lengths, layout.completion_lengths, strict=True):
        prefix_rows = torch.arange(start, start + prefix)
        start += prefix
        for length in completions:
            sequences.append(
                (torch.cat([prefix_rows, torch.arange(start, start + length)]), prefix, len(completions))
            )
            start += length
    return sequences


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-5), (torch.float64, 5e-6)],  # transformers norms and rotates in float32 throughout
    ids=["float32", "float64"],
)
def test_decoder_equals_transformers(decoder: Qwen2Decoder, dtype: torch.dtype, tolerance: float) -> None:
    theirs = Qwen2Model(
        Qwen2Config(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.width,
            intermediate_size=CONFIG.ffn_width,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            rms_norm_eps=CONFIG.rms_norm_eps,
            use_sliding_window=False,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        )
    ).eval()
    theirs.load_state_dict(decoder.state_dict())
    for module in (decoder, theirs):
        nn.Module.to(module, dtype)
    ids = torch.arange(23) * 7 % CONFIG.vocab_size
    ours = decoder(decoder.embed_tokens(ids), torch.arange(23), _plain(23))
    torch.testing.assert_close(ours, theirs(input_ids=ids[None]).last_hidden_state[0], rtol=0, atol=tolerance)


def _gradients(decoder: Qwen2Decoder, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    parameters = [p for name, p in decoder.named_parameters() if name != "embed_tokens.weight"]
    return list(torch.autograd.grad(loss, [*parameters, *inputs]))


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_packed_groups_equal_each_sequence_alone(decoder: Qwen2Decoder, recompute: bool) -> None:
    decoder = decoder.double()
    torch.manual_seed(2)
    rows = len(_positions(LAYOUT))
    embeddings = torch.randn(rows, CONFIG.width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, CONFIG.width, dtype=torch.float64)

    decoder.checkpoint_activations = recompute
    packed = decoder(embeddings, _positions(LAYOUT), LAYOUT)
    packed_gradients = _gradients(decoder, (packed * weight).sum(), [embeddings])

    decoder.checkpoint_activations = False
    loss = torch.zeros((), dtype=torch.float64)
    for at, prefix, group_size in _sequences(LAYOUT):
        alone = decoder(embeddings[at], torch.arange(len(at)), _plain(len(at)))
        torch.testing.assert_close(packed[at], alone, rtol=0, atol=1e-9)
        share = torch.ones(len(at), 1, dtype=torch.float64)
        share[:prefix] /= group_size  # the packed loss counts a prefix row once, not once a sequence
        loss = loss + (alone * weight[at] * share).sum()
    for ours, theirs in zip(packed_gradients, _gradients(decoder, loss, [embeddings]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_prefill_then_decode_equals_forward(decoder: Qwen2Decoder) -> None:
    decoder = decoder.double()
    prefix, steps, samples = 6, 4, 3
    torch.manual_seed(3)
    prompt = torch.randn(prefix, CONFIG.width, dtype=torch.float64)
    answers = torch.randn(samples, steps, CONFIG.width, dtype=torch.float64)

    states = decoder.prefill(prompt, torch.arange(prefix), _plain(prefix))
    head_width = CONFIG.head_width
    assert len(states.keys) == len(states.values) == CONFIG.num_layers
    assert {k.shape for k in states.keys + states.values} == {(prefix, CONFIG.num_kv_heads, head_width)}
    cache = [
        [(k_PKH.clone(), v_PKH.clone()) for _ in range(samples)]
        for k_PKH, v_PKH in zip(states.keys, states.values, strict=True)
    ]

    def attend(layer: int, q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
        outputs = []
        for s in range(samples):
            k, v = (
                torch.cat([old, new[s : s + 1]])
                for old, new in zip(cache[layer][s], (k_SKH, v_SKH), strict=True)
            )
            cache[layer][s] = (k, v)
            k, v = (x.repeat_interleave(CONFIG.num_heads // CONFIG.num_kv_heads, 1) for x in (k, v))
            scores = torch.einsum("nh,tnh->nt", q_SNH[s], k) * head_width**-0.5
            outputs.append(torch.einsum("nt,tnh->nh", scores.softmax(-1), v))
        return torch.stack(outputs)

    decoded = [
        decoder.decode(answers[:, step], torch.full((samples,), prefix + step), attend)
        for step in range(steps)
    ]
    for s in range(samples):
        whole = decoder(torch.cat([prompt, answers[s]]), torch.arange(prefix + steps), _plain(prefix + steps))
        torch.testing.assert_close(whole[:prefix], states.hidden_TD, rtol=0, atol=1e-12)
        torch.testing.assert_close(whole[prefix:], torch.stack(decoded)[:, s], rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_prefill_then_extend_equals_forward(decoder: Qwen2Decoder, recompute: bool) -> None:
    decoder = decoder.double()
    prefix, lengths = 6, (3, 1, 4)
    layout = SharedPrefixLayout(prefix_lengths=(prefix,), completion_lengths=(lengths,))
    torch.manual_seed(4)
    embeddings = torch.randn(layout.num_rows, CONFIG.width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(layout.num_rows, CONFIG.width, dtype=torch.float64)
    positions = _positions(layout)

    whole = decoder(embeddings, positions, layout)
    expected = _gradients(decoder, (whole * weight).sum(), [embeddings])
    decoder.checkpoint_activations = recompute
    states = decoder.prefill(embeddings[:prefix], positions[:prefix], _plain(prefix))
    hidden = decoder.extend(states, embeddings[prefix:], positions[prefix:], lengths)
    both = torch.cat([states.hidden_TD, hidden])
    torch.testing.assert_close(both, whole, rtol=0, atol=1e-9)
    for ours, theirs in zip(_gradients(decoder, (both * weight).sum(), [embeddings]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def _random_layout(seed: int) -> SharedPrefixLayout:
    """One to three groups of one to five completions, many of them one token long."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    groups = number(1, 3)
    return SharedPrefixLayout(
        prefix_lengths=tuple(number(1, 20) for _ in range(groups)),
        completion_lengths=tuple(
            tuple(max(1, number(-3, 12)) for _ in range(number(1, 5))) for _ in range(groups)
        ),
    )


@pytest.mark.parametrize("seed", range(6))
def test_bf16_errs_at_most_twice_as_much_as_each_sequence_alone(decoder: Qwen2Decoder, seed: int) -> None:
    layout = _random_layout(seed)
    torch.manual_seed(seed)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.bfloat16()
    rows, weight = torch.randn(2, layout.num_rows, CONFIG.width).bfloat16()

    def passed(dtype: torch.dtype, packed: bool) -> list[Tensor]:
        nn.Module.to(decoder, dtype)
        embeddings = rows.to(dtype).requires_grad_()
        if packed:
            hidden = decoder(embeddings, _positions(layout), layout)
            total = (hidden * weight.to(dtype)).sum()
            return [hidden, *_gradients(decoder, total, [embeddings])]
        hidden, total = torch.empty_like(embeddings), torch.zeros((), dtype=dtype)
        for at, prefix, group_size in _sequences(layout):
            alone = decoder(embeddings[at], torch.arange(len(at)), _plain(len(at)))
            share = torch.ones(len(at), 1, dtype=dtype)
            share[:prefix] /= group_size
            total = total + (alone * weight[at].to(dtype) * share).sum()
            hidden = hidden.index_copy(0, at, alone)
        return [hidden, *_gradients(decoder, total, [embeddings])]

    exact = passed(torch.float64, packed=True)
    errors = {
        packed: [
            ((got.double() - true).norm() / true.norm()).item()
            for got, true in zip(passed(torch.bfloat16, packed=packed), exact, strict=True)
        ]
        for packed in (True, False)
    }
    for ours, dense in zip(errors[True], errors[False], strict=True):
        assert ours <= 2 * dense


MROPE = replace(CONFIG, num_heads=3, num_kv_heads=1, mrope_section=(2, 3, 3))


def _grid_positions(rows: int) -> Tensor:
    """Three rows that differ, as those of an image between two texts do."""
    at = torch.arange(rows)
    return torch.stack([at.clamp(max=3), at // 2, at % 3 + at // 4])


@pytest.mark.parametrize("module", ["qwen2_5_vl", "qwen2_5_omni", "qwen2_vl"])
def test_three_rows_of_positions_are_transformers_multimodal_rotary(module: str) -> None:
    theirs = import_module(f"transformers.models.{module}.modeling_{module}")
    (name,) = (
        name
        for name in ("Qwen2_5_VLRotaryEmbedding", "Qwen2_5OmniRotaryEmbedding", "Qwen2VLRotaryEmbedding")
        if name in vars(theirs)
    )
    config = Qwen2Config(
        hidden_size=MROPE.width,
        num_attention_heads=MROPE.num_heads,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": MROPE.rope_theta,
            "mrope_section": list(MROPE.mrope_section or ()),
        },
    )
    positions, heads = _grid_positions(11), torch.randn(11, MROPE.num_heads, MROPE.head_width)
    cos, sin = getattr(theirs, name)(config)(heads, positions[:, None])
    expected, _ = apply_rotary_pos_emb(heads[None], heads[None], cos, sin, unsqueeze_dim=2)
    actual = rotate_reference(heads, *rotary_angles(positions, MROPE, torch.float32))
    torch.testing.assert_close(actual, expected[0], rtol=0, atol=2e-5)


def test_each_frequency_turns_with_the_position_of_its_section() -> None:
    positions = _grid_positions(11)
    cos, sin = rotary_angles(positions, MROPE, torch.float64)
    for row in range(11):
        for frequency in range(8):
            axis = 0 if frequency < 2 else 1 if frequency < 5 else 2
            angle = int(positions[axis, row]) * MROPE.rope_theta ** (-2 * frequency / MROPE.head_width)
            assert float(cos[row, 0, frequency]) == pytest.approx(math.cos(angle), abs=1e-12)
            assert float(sin[row, 0, frequency]) == pytest.approx(math.sin(angle), abs=1e-12)


def test_three_equal_rows_are_one() -> None:
    positions = torch.arange(11) * 5
    for mine, theirs in zip(
        rotary_angles(positions.expand(3, -1), MROPE, torch.float64),
        rotary_angles(positions, replace(MROPE, mrope_section=None), torch.float64),
        strict=True,
    ):
        assert mine.equal(theirs)


def test_packed_three_row_positions_equal_each_sequence_alone() -> None:
    torch.manual_seed(5)
    decoder = Qwen2Decoder(MROPE).double()
    layout = SharedPrefixLayout(prefix_lengths=(7,), completion_lengths=((3, 2),))
    prefix = _grid_positions(7)
    own = [(torch.arange(length) + int(prefix.max()) + 1).expand(3, -1) for length in (3, 2)]
    embeddings = torch.randn(12, MROPE.width, dtype=torch.float64)
    packed = decoder(embeddings, torch.cat([prefix, *own], dim=1), layout)
    for (at, _, _), positions in zip(_sequences(layout), own, strict=True):
        alone = decoder(embeddings[at], torch.cat([prefix, positions], dim=1), _plain(len(at)))
        torch.testing.assert_close(packed[at], alone, rtol=0, atol=1e-9)


def test_positions_that_do_not_fit_are_refused(decoder: Qwen2Decoder) -> None:
    x = torch.randn(5, CONFIG.width)
    with pytest.raises(ValueError, match=r"5 rows but positions of shape \(4,\)"):
        decoder(x, torch.arange(4), _plain(5))
    with pytest.raises(ValueError, match=r"shape \(3, 5\) for a decoder with mrope_section None"):
        decoder(x, torch.arange(5).expand(3, -1), _plain(5))


@pytest.mark.parametrize("section", [(2, 3, 4), (4, 4), (9, -1, 0)])
def test_sections_that_do_not_cover_the_frequencies_are_refused(section: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"mrope_section is \({section[0]}.*half the head width, 8"):
        replace(MROPE, mrope_section=section)  # pyright: ignore[reportArgumentType]


def test_positions_are_taken_as_given(decoder: Qwen2Decoder) -> None:
    x = torch.randn(5, CONFIG.width)
    shifted = decoder(x, torch.arange(5) + 9, _plain(5))
    torch.testing.assert_close(
        shifted, decoder(x, torch.arange(5), _plain(5)), rtol=0, atol=1e-5
    )  # RoPE is relative
    spread = decoder(x, torch.arange(5) * 3, _plain(5))
    assert (spread - shifted).abs().max() > 1e-3


def test_rotation_is_transformers_rotate_half() -> None:
    positions, heads = torch.arange(11) * 5, torch.randn(11, 2, CONFIG.head_width)
    config = Qwen2Config(
        hidden_size=CONFIG.width,
        num_attention_heads=CONFIG.num_heads,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
    )
    cos, sin = Qwen2RotaryEmbedding(config)(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads[None], heads[None], cos, sin, unsqueeze_dim=2)
    actual = rotate_reference(heads, *rotary_angles(positions, CONFIG, torch.float32))
    torch.testing.assert_close(actual, expected[0], rtol=0, atol=2e-5)


def test_bf16_stays_bf16_and_near_float32(decoder: Qwen2Decoder) -> None:
    x = torch.randn(9, CONFIG.width)
    exact = decoder(x, torch.arange(9), _plain(9))
    rounded = decoder.bfloat16()(x.bfloat16(), torch.arange(9), _plain(9))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_rms_norm_is_computed_in_float32() -> None:
    norm = RMSNorm(4, 1e-6).bfloat16()
    x = torch.tensor([[300.0, 301.0, 302.0, 303.0]], dtype=torch.bfloat16)
    expected = (x.float() / x.float().square().mean().add(1e-6).sqrt()).bfloat16()
    assert torch.equal(norm(x), expected)
