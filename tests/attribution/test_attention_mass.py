"""Attention mass against transformers' own attention weights, sequence by sequence."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2Model

from omnigrpo.attribution.attention_mass import ROW_KINDS, row_kinds, visible_shares
from omnigrpo.attribution.scoring import Scene, SceneScorer
from omnigrpo.attribution.spoken import Spoken, with_answer
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW


@pytest.fixture(scope="module")
def clips(rig):
    return rig.clips(3)


@pytest.fixture(scope="module")
def texts(rig):
    full = with_answer(rig.encoder, "<think>The voice is low. I see wide eyes.</think>\n<answer>", "sad")
    return full, Spoken.of(rig.encoder, tuple(rig.encoder.encode_response("<think>No.</think>")))


@torch.no_grad()
def theirs(rig, inputs, spoken):
    """Masses ``[L, C, X]`` and log-probs from the eager attention of transformers, in float64."""
    config = rig.model.config.decoder
    model = Qwen2Model(
        Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            use_sliding_window=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",  # pyright: ignore[reportCallIssue] - transformers takes it as a keyword
        )
    ).eval()
    model.load_state_dict(rig.model.decoder.state_dict())
    nn.Module.to(model, torch.float64)
    ids = torch.tensor(spoken.token_ids)
    rows = torch.cat([rig.model.embed_prefixes([inputs]), rig.model.embed_tokens(ids)])
    out = model(inputs_embeds=rows[None], output_attentions=True)
    kinds = torch.cat([row_kinds(inputs.token_ids_P), torch.full((len(ids),), 3)])
    weights = torch.stack([layer[0].mean(0)[-len(ids) :].double() for layer in out.attentions])
    masses = torch.stack([weights[..., kinds == kind].sum(-1) for kind in range(len(ROW_KINDS))], -1)
    logits = out.last_hidden_state[0, -len(ids) - 1 : -1] @ rig.model.head_weight_VD.T
    return masses, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize("budget", [4096, 300], ids=["one pass", "several passes"])
def test_masses_and_logprobs_equal_transformers(rig, clips, texts, budget) -> None:
    scorer = SceneScorer(model=rig.model, budget_rows=budget)
    scenes = [
        Scene(inputs=clips[0], spoken=(texts[0], texts[1]), is_watched=True),
        Scene(inputs=clips[1], spoken=(texts[0],)),
        Scene(inputs=clips[2], spoken=(texts[1], texts[0]), is_watched=True),
    ]
    scored = scorer.score(scenes)
    assert scored[1].mass_LCX is None
    for scene, result in zip(scenes, scored, strict=True):
        for index, spoken in enumerate(scene.spoken):
            masses, logprobs = theirs(rig, scene.inputs, spoken)
            # transformers norms, rotates and softmaxes in float32 throughout.
            assert list(result.logprobs[index]) == pytest.approx(logprobs.tolist(), abs=2e-5)
            if index == 0 and scene.is_watched:
                torch.testing.assert_close(result.mass_LCX, masses, rtol=0, atol=2e-6)
    for watched in (scored[0].mass_LCX, scored[2].mass_LCX):
        assert watched is not None
        torch.testing.assert_close(watched.sum(-1), torch.ones_like(watched[..., 0]))


def test_work_is_counted(rig, clips, texts) -> None:
    scorer = SceneScorer(model=rig.model, budget_rows=4096)
    scorer.score([Scene(inputs=clip, spoken=texts) for clip in clips])
    rows = sum(len(clip.token_ids_P) + sum(len(text.token_ids) for text in texts) for clip in clips)
    assert (scorer.counters.passes, scorer.counters.prefixes, scorer.counters.rows) == (1, 3, rows)


def test_visible_shares_by_hand() -> None:
    ids = torch.tensor([5, VIDEO_ROW, VIDEO_ROW, AUDIO_ROW, 6])
    expected = torch.tensor([[2 / 6, 1 / 6, 2 / 6, 1 / 6], [2 / 7, 1 / 7, 2 / 7, 2 / 7]])
    torch.testing.assert_close(visible_shares(ids, 2), expected.double())
    assert row_kinds(ids).tolist() == [2, 0, 0, 1, 2]
