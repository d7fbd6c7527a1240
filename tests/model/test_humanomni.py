"""The whole model: prefix embeddings, freezing, initialisation, reference copies."""

from dataclasses import replace

import pytest
import torch

from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.humanomni import CLIPS_PER_PASS, HumanOmni, reference_copy
from omnigrpo.model.parts import part_of
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, ClipFeatures
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


def _both(features: ClipFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    assert features.vision_FND is not None
    assert features.audio_AD is not None
    return features.vision_FND, features.audio_AD


def test_encode_runs_the_towers_clip_by_clip(model: HumanOmni) -> None:
    pixels, mel = torch.randn(3, 2, 3, 32, 32), torch.randn(3, 20, 100)
    for i, features in enumerate(model.encode(pixels, mel)):
        vision_FND, audio_AD = _both(features)
        torch.testing.assert_close(vision_FND, model.model.vision_tower(pixels[i]), rtol=0, atol=1e-6)
        torch.testing.assert_close(audio_AD, model.model.audio_tower(mel[i : i + 1])[0], rtol=0, atol=1e-6)
        vision_alone, audio_alone = _both(model.encode(pixels[i : i + 1], mel[i : i + 1])[0])
        assert torch.equal(vision_alone, vision_FND)
        assert torch.equal(audio_alone, audio_AD)
        assert (vision_FND.shape, audio_AD.shape) == ((2, 16, 16), (16, 16))
        assert not vision_FND.requires_grad


def test_passes_are_filled_up_to_one_shape(model: HumanOmni, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, mel = torch.randn(5, 2, 3, 32, 32), torch.randn(5, 20, 100)
    one_by_one = model.encode(pixels, mel)
    monkeypatch.setitem(CLIPS_PER_PASS, "cpu", 3)
    shapes: list[tuple[int, ...]] = []
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)))
    together = model.encode(pixels, mel)
    assert shapes == [(6, 3, 32, 32)] * 2 + [(3, 20, 100)] * 2
    assert len(together) == 5
    for features, alone in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(_both(features), _both(alone), rtol=0, atol=5e-6)
    last = model.encode(pixels[3:4], mel[3:4])[0]
    assert all(torch.equal(a, b) for a, b in zip(_both(last), _both(together[3]), strict=True))


def test_encode_one_modality(model: HumanOmni) -> None:
    assert model.encode(None, torch.randn(2, 20, 100))[1].vision_FND is None
    assert model.encode(torch.randn(2, 2, 3, 32, 32), None)[1].audio_AD is None
    with pytest.raises(ValueError, match="got neither"):
        model.encode(None, None)
    with pytest.raises(ValueError, match="1 clips of pixels but 2 of mel"):
        model.encode(torch.randn(1, 2, 3, 32, 32), torch.randn(2, 20, 100))


def test_encode_in_inference_mode_gives_tensors_that_gradients_can_use(model: HumanOmni, make_inputs) -> None:
    with torch.inference_mode():
        features = model.encode(torch.randn(1, 2, 3, 32, 32), torch.randn(1, 20, 100))[0]
    assert not any(tensor.is_inference() for tensor in _both(features))
    model.embed_prefixes([replace(make_inputs(), features=features)]).sum().backward()
    assert model.model.audio_projector[0].weight.grad is not None


def test_rows_of_a_prefix_are_text_video_and_audio_in_place(model: HumanOmni, make_inputs) -> None:
    item = make_inputs()
    rows = model.embed_prefixes([item])
    ids, backbone = item.token_ids_P, model.model
    text = ids >= 0
    assert torch.equal(rows[text], backbone.embed_tokens.weight[ids[text]])
    state = backbone.bert_model(input_ids=item.question_ids[None]).last_hidden_state[:, 0]
    weights = backbone.bert_gate(state).softmax(-1)
    visual = backbone.mm_projector(item.features.vision_FND[None], weights)[0]
    torch.testing.assert_close(rows[ids == VIDEO_ROW], visual, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        rows[ids == AUDIO_ROW], backbone.audio_projector(item.features.audio_AD), rtol=0, atol=1e-6
    )


def test_prefixes_equal_an_embedding_of_all_rows_with_features_written_over_it(
    model: HumanOmni, make_inputs
) -> None:
    model = model.double()
    inputs = [make_inputs(seed=0), make_inputs("which voice?", ("audio",), seed=1), make_inputs("who?", ())]
    backbone, ids_T = model.model, torch.cat([item.token_ids_P for item in inputs])
    visual = model.embed_prefixes(inputs[:1])[inputs[0].token_ids_P == VIDEO_ROW]
    audio = backbone.audio_projector(
        torch.cat(
            [item.features.audio_AD for item in inputs[:2] if item.features.audio_AD is not None]
        ).double()
    )
    plain = backbone.embed_tokens(ids_T.clamp(min=0))
    plain = plain.index_copy(0, (ids_T == VIDEO_ROW).nonzero()[:, 0], visual)
    plain = plain.index_copy(0, (ids_T == AUDIO_ROW).nonzero()[:, 0], audio)
    packed = model.embed_prefixes(inputs)
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-12)
    weight_TD = torch.randn(packed.shape, dtype=torch.float64)
    parameters = (backbone.embed_tokens.weight, *backbone.audio_projector.parameters())
    ours, theirs = (torch.autograd.grad((rows * weight_TD).sum(), parameters) for rows in (packed, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_packed_prefixes_and_their_gradients_equal_each_alone(model: HumanOmni, make_inputs) -> None:
    model = model.double()
    model.configure_bert(trainable=True)
    inputs = [
        make_inputs(seed=0),
        make_inputs("is the voice loud?", ("audio",), seed=1),
        make_inputs("which one?", (), seed=2),
        make_inputs("which mouth?", ("video",), seed=3),
        make_inputs("a rather longer question about the voice?", seed=4),
        make_inputs(seed=5),
    ]
    parameters = {
        n: p for n, p in model.trainable_parameters().items() if part_of(n) != "llm" or "embed" in n
    }
    torch.manual_seed(0)
    weights = [torch.randn(len(item.token_ids_P), 32, dtype=torch.float64) for item in inputs]
    packed = model.embed_prefixes(inputs)
    alone = [model.embed_prefixes([item]) for item in inputs]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-9)
    loss = (packed * torch.cat(weights)).sum()
    loss_alone = torch.stack(
        [(rows * weight).sum() for rows, weight in zip(alone, weights, strict=True)]
    ).sum()
    gradients = [torch.autograd.grad(x, list(parameters.values())) for x in (loss, loss_alone)]
    for name, ours, theirs in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert ours.abs().max() > 0 or name.endswith("key.bias"), f"{name} gets no gradient"


def test_gate_runs_once_per_distinct_question(model: HumanOmni, make_inputs) -> None:
    sizes: list[int] = []
    model.model.bert_gate.register_forward_hook(lambda _m, args, _out: sizes.append(len(args[0])))
    model.embed_prefixes([make_inputs(seed=0), make_inputs("which voice?", seed=1), make_inputs(seed=2)])
    assert sizes == [2]


def test_rows_without_features_are_an_error(model: HumanOmni, make_inputs) -> None:
    item = make_inputs()
    silent = replace(item, features=ClipFeatures(vision_FND=item.features.vision_FND, audio_AD=None))
    with pytest.raises(ValueError, match="16 audio rows but no audio features"):
        model.embed_prefixes([silent])
    with pytest.raises(ValueError, match="has 7 video rows, the model makes 8"):
        model.embed_prefixes(
            [replace(item, token_ids_P=item.token_ids_P[item.token_ids_P.eq(VIDEO_ROW).nonzero()[1] :])]
        )


def test_what_trains_by_default(model: HumanOmni) -> None:
    training = {part_of(name) for name in model.trainable_parameters()}
    assert training == {"llm", "mm_projector", "audio_projector", "gate"}
    model.configure_bert(trainable=True)
    names = model.trainable_parameters()
    assert {part_of(name) for name in names} == training | {"bert"}
    assert not any("pooler" in name for name in names)


def test_bert_dropout_is_live_only_when_asked_for_and_training(model: HumanOmni) -> None:
    assert not model.train().model.bert_model.training
    model.configure_bert(trainable=True, dropout=True)
    assert model.model.bert_model.training
    assert not model.model.vision_tower.training
    assert not model.eval().model.bert_model.training


def test_equal_questions_have_dropout_masks_of_their_own(model: HumanOmni, make_inputs) -> None:
    item, rows = make_inputs(), model.config.vision.num_tokens

    def visual_rows() -> list[torch.Tensor]:
        embedded = model.embed_prefixes([item, item]).split(len(item.token_ids_P))
        return [part[item.token_ids_P == VIDEO_ROW] for part in embedded]

    first, second = visual_rows()
    assert first.equal(second)
    model.configure_bert(trainable=False, dropout=True)
    first, second = visual_rows()
    assert len(first) == rows
    assert not first.allclose(second, atol=1e-6)
    model.eval()
    first, second = visual_rows()
    assert first.equal(second)


def test_reset_gate_redraws_the_gate_alone(model: HumanOmni) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    model.reset_gate(5)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name for name, tensor in first.items() if not tensor.equal(before[name])}
    assert changed == {f"model.bert_gate.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert torch.get_rng_state().equal(state)
    model.reset_gate(5)
    assert all(tensor.equal(first[name]) for name, tensor in model.state_dict().items())


def test_every_trainable_parameter_gets_a_gradient(model: HumanOmni, make_inputs) -> None:
    rows = model.embed_prefixes([make_inputs()])
    layout = SharedPrefixLayout(prefix_lengths=(len(rows),), completion_lengths=((),))
    hidden = model.decoder(rows, torch.arange(len(rows)), layout)
    (hidden @ model.head_weight_VD.T).square().sum().backward()
    assert [name for name, p in model.trainable_parameters().items() if p.grad is None] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


def test_decoder_weights_are_the_models_own(model: HumanOmni) -> None:
    names = dict(model.named_parameters())
    own = {f"model.{name}": p for name, p in model.decoder.named_parameters()}
    assert own
    assert all(names[name] is p for name, p in own.items())
    assert {name for name in names if part_of(name) == "llm"} == set(own)
    assert model.head_weight_VD is model.model.embed_tokens.weight


def test_an_untied_head_is_its_own_weight(small_config: HumanOmniConfig) -> None:
    config = replace(small_config, decoder=replace(small_config.decoder, tie_word_embeddings=False))
    model = HumanOmni(config)
    assert model.head_weight_VD is dict(model.named_parameters())["lm_head.weight"]
    assert "lm_head.weight" in model.state_dict()


def test_init_weights_is_deterministic_and_leaves_the_generator_alone(small_config: HumanOmniConfig) -> None:
    models = [HumanOmni(small_config) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.init_weights(seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, second, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_reference_copy_shares_frozen_tensors_and_copies_the_rest(model: HumanOmni, make_inputs) -> None:
    reference = reference_copy(model)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert (theirs[name] is parameter) == (part_of(name) in ("vision tower", "audio tower", "bert")), name
    assert not any(p.requires_grad for p in theirs.values())
    item = make_inputs()
    before = reference.embed_prefixes([item])
    assert torch.equal(before, model.embed_prefixes([item]))
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(1.0)
    assert torch.equal(reference.embed_prefixes([item]), before)
    assert not torch.equal(model.embed_prefixes([item]), before)
    assert reference.decoder.norm is reference.model.norm is not model.model.norm


def test_reference_copy_of_a_training_bert_stays_behind(model: HumanOmni, make_inputs) -> None:
    model.configure_bert(trainable=True, dropout=True)
    reference = reference_copy(model)
    before = reference.embed_prefixes([make_inputs()])
    with torch.no_grad():
        model.model.bert_model.embeddings.word_embeddings.weight.add_(torch.randn(160, 16))
    model.train()
    assert torch.equal(reference.embed_prefixes([make_inputs()]), before)
