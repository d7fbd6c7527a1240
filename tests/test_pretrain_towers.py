"""Tower pre-training: a small run for real, the shipped weights, and the probe."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.data.synthetic.emotions import LABELS
from omnigrpo.data.synthetic.studies import FACE_TARGETS, VOICE_TARGETS, StudyFormat, make_studies
from omnigrpo.model.checkpoint_format import load_towers
from omnigrpo.model.config import tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.pretrain_towers import PretrainConfig, pretrain
from omnigrpo.probe_towers import probe, probe_accuracy

SMALL = PretrainConfig(
    num_reels=4, vision_steps=8, vision_batch=8, audio_steps=8, audio_batch=8, num_workers=1
)


def assets_path(name: str) -> Path:
    return Path(str(files("omnigrpo.model") / "assets" / name))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    threads = torch.get_num_threads()
    output = tmp_path_factory.mktemp("towers") / "towers.safetensors"
    record = pretrain(SMALL, output, command="python -m omnigrpo.pretrain_towers")
    torch.set_num_threads(threads)
    return output, record


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return json.loads(assets_path("tiny_towers.json").read_text())


def test_a_small_run_writes_weights_and_their_record(small_run: tuple[Path, dict[str, Any]]) -> None:
    output, record = small_run
    assert json.loads(output.with_suffix(".json").read_text()) == record
    assert record["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert set(record["r_squared"]["vision"]) == set(FACE_TARGETS)
    assert set(record["r_squared"]["audio"]) == set(VOICE_TARGETS)


def test_a_small_run_moves_both_towers_and_only_those_it_computes(
    small_run: tuple[Path, dict[str, Any]],
) -> None:
    start, trained = HumanOmni(tiny()), HumanOmni(tiny())
    start.init_weights(SMALL.seed)
    trained.init_weights(SMALL.seed)
    load_towers(trained, small_run[0])
    before, after = start.state_dict(), trained.state_dict()
    moved = {name for name in before if (before[name] - after[name]).abs().max() > 1e-3}
    assert any("vision_tower" in name for name in moved)
    assert any("audio_tower" in name for name in moved)
    assert not any("embed_positions" in name for name in moved if "audio_tower" in name)
    assert all("_tower" in name for name in moved)


def test_studies_are_standardised_and_deterministic() -> None:
    study_format = StudyFormat(image_size=32, num_mel_bins=16, chunk_seconds=3)
    faces, voices = make_studies(study_format, seed=1, num_reels=6, num_workers=1)
    assert faces.inputs.shape == (144, 32, 32, 3)
    assert faces.inputs.dtype == torch.uint8
    assert voices.inputs.shape == (48, 16, 300)
    for studies in (faces, voices):
        assert torch.all(studies.targets_NT.mean(0).abs() < 0.5)
        assert torch.all((studies.targets_NT.std(0) - 1).abs() < 0.5)
    again, _ = make_studies(study_format, seed=1, num_reels=6, num_workers=1)
    assert torch.equal(again.inputs, faces.inputs)


def test_shipped_towers_are_those_of_their_record(shipped: dict[str, Any]) -> None:
    weights = assets_path("tiny_towers.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == shipped["sha256"]
    assert len(weights) == shipped["bytes"] < 4_000_000
    assert shipped["command"].startswith("python -m omnigrpo.pretrain_towers")
    assert shipped["seed"] == shipped["config"]["seed"]


def test_shipped_towers_learnt_what_was_drawn_and_sung(shipped: dict[str, Any]) -> None:
    for tower, weakest in (("vision", 0.6), ("audio", 0.6)):
        scores = {name: r for name, r in shipped["r_squared"][tower].items() if not name.startswith("pose_")}
        assert min(scores.values()) > weakest, scores


def test_shipped_towers_load_into_the_tiny_model() -> None:
    model = HumanOmni(tiny())
    load_towers(model, assets_path("tiny_towers.safetensors"))
    features = model.encode(torch.zeros(1, 4, 3, 96, 96), torch.zeros(1, 80, 300))[0]
    assert features.vision_FND is not None
    assert features.audio_AD is not None
    assert features.vision_FND.shape == (4, 36, 96)
    assert features.audio_AD.shape == (50, 96)
    assert torch.isfinite(features.vision_FND).all()
    assert torch.isfinite(features.audio_AD).all()


def test_both_modalities_of_shipped_towers_tell_more_than_one(tmp_path: Path) -> None:
    config = SyntheticConfig(seed=11, num_cold_start=0, num_rl=175, num_heldout=105, num_ood=35)
    generate_dataset(tmp_path, config)
    # An empty split has no readable file, and the probe asks only for the other three.
    table = probe(tmp_path, assets_path("tiny_towers.safetensors"), sizes=(175,))
    video, audio, both = (table[f"heldout/{view}/175"] for view in ("video", "audio", "both"))
    # 57.1 % is the bound of one modality; three standard errors of 105 clips are 14.5 points.
    assert max(video, audio) < 57.1 + 14.5
    assert both > 65
    assert both > max(video, audio) + 8
    assert table["ood/both/175"] > 100 / len(LABELS) + 15


def test_the_probe_separates_what_is_separable_and_not_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(140) % 7
    separable_ND = torch.nn.functional.one_hot(labels_N, 7) + 0.1 * torch.randn(140, 7, generator=generator)
    noise_ND = torch.randn(140, 7, generator=generator)
    fresh_ND = torch.nn.functional.one_hot(labels_N, 7) + 0.1 * torch.randn(140, 7, generator=generator)
    assert probe_accuracy(separable_ND, labels_N, [(fresh_ND, labels_N)])[0] == 1.0
    assert probe_accuracy(noise_ND, labels_N, [(fresh_ND, labels_N)])[0] < 0.5
