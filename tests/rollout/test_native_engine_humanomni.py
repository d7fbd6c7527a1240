"""The native engine on the real model class, from tower features to log-probs."""

from pathlib import Path

import pytest
import torch

from omnigrpo.model.config import tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.rollout.interface import GroupRequest, SamplingParams, collect
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.schema import (
    AUDIO_ROW,
    VIDEO_ROW,
    Clip,
    ClipFeatures,
    Prefix,
    PrefixInputs,
    Prompt,
    SharedPrefixLayout,
)
from omnigrpo_kernels.linear_logprob import linear_logprob

CONFIG = tiny()


def make_inputs(seed: int, num_text: int) -> PrefixInputs:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, CONFIG.decoder.vocab_size, (num_text,), generator=generator)
    video = torch.full((CONFIG.vision.num_tokens,), VIDEO_ROW)
    audio = torch.full((CONFIG.audio.num_tokens,), AUDIO_ROW)
    frames = (CONFIG.vision.num_frames, CONFIG.vision.grid**2, CONFIG.vision.width)
    return PrefixInputs(
        prompt=Prompt(
            prompt_id=str(seed),
            clip=Clip(path=Path("clip.mp4")),
            question="?",
            modalities=("video", "audio"),
            solution="happy",
        ),
        token_ids_P=torch.cat([text[:2], video, audio, text[2:]]),
        question_ids=torch.tensor([1, 2 + seed, 3]),
        features=ClipFeatures(
            vision_FND=torch.randn(frames, generator=generator),
            audio_AD=torch.randn(CONFIG.audio.num_tokens, CONFIG.audio.width, generator=generator),
        ),
    )


def test_logprobs_equal_the_packed_training_pass():
    model = HumanOmni(CONFIG)
    model.init_weights(seed=0)
    model.double()
    with torch.no_grad():
        model.head_weight_VD.mul_(2)  # away from the uniform distribution of a fresh model
    inputs = [make_inputs(seed, num_text) for seed, num_text in ((0, 9), (1, 14), (2, 4))]
    inputs = [_doubled(item) for item in inputs]
    with torch.no_grad():
        embeddings = model.embed_prefixes(inputs).split([len(item.token_ids_P) for item in inputs])
    prefixes = [Prefix(inputs=i, embeddings_PD=e) for i, e in zip(inputs, embeddings, strict=True)]
    sampling = SamplingParams(temperature=0.9, max_new_tokens=20, stop_token_ids=tuple(range(0, 512, 8)))

    seeds = ((1, 2, 3), (4,), (5, 6))
    requests = [GroupRequest(prefix=p, seeds=group) for p, group in zip(prefixes, seeds, strict=True)]
    groups = collect(NativeEngine(model).generate(requests, sampling), len(requests))

    lengths = tuple(tuple(len(item.token_ids) for item in group) for group in groups)
    assert len({length for group in lengths for length in group}) > 2
    layout = SharedPrefixLayout(
        prefix_lengths=tuple(len(prefix.embeddings_PD) for prefix in prefixes), completion_lengths=lengths
    )
    rows, positions, predictors, targets, reported = [], [], [], [], []
    start = 0
    for prefix, group in zip(prefixes, groups, strict=True):
        prefix_rows = len(prefix.embeddings_PD)
        last_prefix_row = start + prefix_rows - 1
        rows.append(prefix.embeddings_PD)
        positions.append(torch.arange(prefix_rows))
        start += prefix_rows
        for item in group:
            ids = torch.tensor(item.token_ids)
            rows.append(model.embed_tokens(ids))
            positions.append(prefix_rows + torch.arange(len(ids)))
            predictors += [last_prefix_row, *range(start, start + len(ids) - 1)]
            targets += item.token_ids
            reported += item.logprobs
            start += len(ids)
    with torch.no_grad():
        hidden_TD = model.decoder(torch.cat(rows), torch.cat(positions), layout)
        trained = linear_logprob(
            hidden_TD[predictors], model.head_weight_VD, torch.tensor(targets), temperature=0.9
        )
    assert reported == pytest.approx(trained.logprob_T.tolist(), rel=0, abs=1e-9)


def _doubled(inputs: PrefixInputs) -> PrefixInputs:
    assert inputs.features.vision_FND is not None
    assert inputs.features.audio_AD is not None
    return PrefixInputs(
        prompt=inputs.prompt,
        token_ids_P=inputs.token_ids_P,
        question_ids=inputs.question_ids,
        features=ClipFeatures(
            vision_FND=inputs.features.vision_FND.double(), audio_AD=inputs.features.audio_AD.double()
        ),
    )
