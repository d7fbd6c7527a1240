"""``media.decoder``: whoever decodes, features are the same and are cached under one key."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from clip_files import ClipRecipe, write_clip
from dali_at_hand import require_dali

from omnigrpo.feature_source import FeatureSource, MediaConfig
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.schema import Clip, ClipFeatures, Prompt

MakeSource = Callable[..., FeatureSource]


@pytest.fixture
def make_source(builders: ModuleType) -> MakeSource:
    model = builders.model(dtype=torch.float32)

    def make(**settings: object) -> FeatureSource:
        config = MediaConfig(**settings)  # type: ignore[arg-type]
        return FeatureSource(model=model, tower_hash="towers", config=config, spans=SpanRecorder())

    return make


@pytest.fixture
def prompts(tmp_path: Path) -> list[Prompt]:
    """Prompts over four clips of VP9, which DALI decodes on a CPU, and two of H.264, which it does not."""
    vp9 = {"codec": "libvpx-vp9", "audio_codec": "libopus", "audio_rate": 48_000,
           "options": {"crf": "10", "cpu-used": "8", "deadline": "realtime"}}  # fmt: skip
    recipes = [ClipRecipe(num_frames=20 + n, tone_seconds=1.0, **(vp9 if n < 4 else {})) for n in range(6)]
    return [
        Prompt(
            prompt_id=str(n),
            clip=Clip(path=write_clip(tmp_path / f"{n}.{'webm' if n < 4 else 'mp4'}", recipe)),
            question="",
            modalities=("video", "audio"),
            solution="",
        )
        for n, recipe in enumerate(recipes)
    ]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_features_do_not_depend_on_who_decodes(
    make_source: MakeSource, prompts: list[Prompt], tmp_path: Path, num_workers: int
):
    require_dali()
    with_pyav, with_both = (
        make_source(decoder=decoder, num_workers=num_workers, cache_directory=tmp_path / decoder)
        for decoder in ("pyav", "both")
    )
    loaded = with_both.load(prompts)
    decoders = [item.clip.decoder for item in loaded.decoded.values()]
    assert decoders[4:] == ["pyav", "pyav"]
    assert "dali" in decoders
    ours, expected = (
        source.encode(batch).results
        for source, batch in ((with_both, loaded), (with_pyav, with_pyav.load(prompts)))
    )
    for request, features in expected.items():
        mine = ours[request]
        assert isinstance(features, ClipFeatures)
        assert isinstance(mine, ClipFeatures)
        for a, b in ((mine.vision_FND, features.vision_FND), (mine.audio_AD, features.audio_AD)):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)
    assert [with_both.key_of(prompt) for prompt in prompts] == [
        with_pyav.key_of(prompt) for prompt in prompts
    ]
    with_both.close()
    with_pyav.close()
    other = make_source(decoder="auto", cache_directory=tmp_path / "both")
    assert other.load(prompts).counts.disk_hits == 6
    other.close()


def test_the_colour_is_part_of_the_key(make_source: MakeSource, prompts: list[Prompt]):
    keys = {make_source(colour=colour).key_of(prompts[0]) for colour in ("tag", "bt601")}
    assert len(keys) == 2


def test_a_decoder_that_is_not_there_is_told_before_anything_is_read(
    make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for decoder in ("dali", "both"):
        with pytest.raises(ImportError, match="DALI is not installed"):
            make_source(decoder=decoder)
    make_source(decoder="auto").close()


def test_an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match=r"media.decoder must be one of auto, pyav, dali, both, got 'gpu'"):
        MediaConfig(decoder="gpu")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["auto", "both"])
def test_features_of_a_model_on_a_gpu(builders: ModuleType, prompts: list[Prompt], decoder: str):
    """Pixels of both decoders meet in one batch on the model's device."""
    require_dali()
    features = []
    for choice in (decoder, "pyav"):
        model = builders.model(dtype=torch.float32).cuda()
        config = MediaConfig(decoder=choice, colour="bt601")  # type: ignore[arg-type]
        source = FeatureSource(model=model, tower_hash="towers", config=config, spans=SpanRecorder())
        encoded = source.encode(source.load(prompts))
        encoded.handover.receive()
        features.append(list(encoded.results.values()))
        source.close()
    for ours, expected in zip(*features, strict=True):
        assert isinstance(ours, ClipFeatures)
        assert isinstance(expected, ClipFeatures)
        assert ours.vision_FND is not None
        assert expected.vision_FND is not None
        assert ours.vision_FND.is_cuda
        scale = expected.vision_FND.abs().max()
        assert (ours.vision_FND - expected.vision_FND).abs().max() <= 0.05 * scale
