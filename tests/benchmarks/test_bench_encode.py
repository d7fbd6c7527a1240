"""bench_encode: a smoke run, that both sides do the same work, and its arithmetic by hand."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from omnigrpo.model.audio_tower import AudioTower
from omnigrpo.model.config import AudioConfig, VisionConfig
from omnigrpo.model.projectors import AllInOneSmall
from omnigrpo.model.vision_tower import VisionTower

VISION = VisionConfig(
    image_size=32, patch_size=8, width=16, num_layers=3, num_heads=2, ffn_width=24, num_frames=2
)
AUDIO = AudioConfig(num_mel_bins=20, chunk_seconds=1, width=16, num_layers=2, num_heads=2, ffn_width=24)


@pytest.fixture
def bench(bench_module):
    return bench_module("bench_encode")


@pytest.fixture
def peers(bench_module):
    return bench_module("encode_peers")


@pytest.fixture
def work(bench_module):
    return bench_module("encode_work")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smoke(run, dtype: str):
    report = run("--dtype", dtype, "--clips", "2")
    names = {row["section"]: [] for row in report["rows"]}
    for row in report["rows"]:
        names[row["section"]].append(row["name"])
    assert names == {
        "SigLIP, 2 clips": ["ours", "transformers"],
        "Whisper, 2 clips, 3 layers": ["ours", "transformers"],
        "projector forward, 2 clips": ["ours", "plain"],
        "projector forward + backward, 2 clips": ["ours", "plain"],
        "embedding and modality rows, 2 prompts": ["ours", "plain"],
    }
    assert 1.3 < report["rows"][1]["ideal_ratio"] < 1.4  # 4 layers against 3, beside what both do.
    checks = {check["name"]: check for check in report["checks"]}
    exact = ": |ours - theirs|" if dtype == "float32" else ": error against float32 / theirs"
    targets = {"SigLIP: transformers' time / ours": ">= 1.08", "Whisper: transformers' time / ours": ">= 1"}
    bound = "<= 1e-05" if dtype == "float32" else "<= 2"
    targets |= {name + exact: bound for name in ("SigLIP", "Whisper", "projector")}
    targets |= {"prefix rows: |ours - plain|": "<= 0"}
    assert {name: check["target"] for name, check in checks.items()} == targets
    assert all(check["ok"] for name, check in checks.items() if "time" not in name)


def test_sizes_are_those_of_the_published_model(bench):
    config = bench.real_config(32)
    assert (config.vision, config.audio) == (VisionConfig(), AudioConfig())


@pytest.mark.parametrize(
    ("option", "name"), [("--clips", "--clips"), ("--whisper-layers", "--whisper-layers")]
)
def test_a_count_below_one_is_refused(bench, capsys: pytest.CaptureFixture[str], option: str, name: str):
    with pytest.raises(SystemExit):
        bench.main(["--smoke", option, "0"])
    assert f"{name} must be at least 1, got 0" in capsys.readouterr().err


@torch.no_grad()
def test_peers_do_the_same_work(peers):
    torch.manual_seed(0)
    vision, audio = VisionTower(VISION).eval(), AudioTower(AUDIO).eval()
    pixels, mel = torch.randn(3, 2, 3, 32, 32), torch.randn(3, 20, 100)
    features = peers.TransformersVision(vision).eval()(pixels)
    torch.testing.assert_close(features, vision(pixels.flatten(0, 1)).unflatten(0, (3, 2)), rtol=0, atol=5e-6)
    torch.testing.assert_close(peers.TransformersAudio(audio).eval()(mel), audio(mel), rtol=0, atol=5e-6)
    projector = AllInOneSmall(VISION, 32).double()
    gates = torch.rand(3, 3).double()
    plain = peers.plain_projector(projector, features.double(), gates)
    torch.testing.assert_close(plain, projector(features.double(), gates), rtol=0, atol=1e-12)


def test_plain_rows_by_hand(peers):
    embedding = nn.Embedding(4, 2)
    modality = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = peers.plain_rows(torch.tensor([3, -201, -201, 0]), embedding, {-201: modality})
    assert torch.equal(rows, torch.stack([embedding.weight[3], *modality, embedding.weight[0]]))


def test_speed_checks_are_medians_of_paired_ratios(bench, bench_module):
    timing = bench_module("harness").Timing
    towers = {
        "SigLIP": (
            timing(seconds=(1.0, 2.0, 1.0), peak_bytes=0),
            timing(seconds=(1.1, 2.4, 5.0), peak_bytes=0),
        ),
        "Whisper": (
            timing(seconds=(1.0, 1.0, 2.0), peak_bytes=0),
            timing(seconds=(0.9, 0.8, 2.4), peak_bytes=0),
        ),
    }
    cpu = {check.name.partition(":")[0]: check for check in bench.speed_checks("cpu", towers)}
    assert cpu.keys() == {"SigLIP", "Whisper"}
    assert (cpu["SigLIP"].value, cpu["SigLIP"].ok) == (pytest.approx(1.2), True)
    assert (cpu["Whisper"].value, cpu["Whisper"].ok) == (pytest.approx(0.9), False)
    (both,) = bench.speed_checks("cuda", towers)
    assert both.value == pytest.approx(3.2 / 3)
    assert (both.target, both.ok) == (">= 1.3", False)


def test_flops_by_hand(work):
    layer = 2 * 16 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 2 * 16 * 16 * 16
    patches = 2 * 16 * (3 * 8 * 8) * 16
    assert work.vision_flops(VISION) == 2 * (patches + 2 * layer)
    head = 2 * 16 * 2 * 16 * 16 + 2 * 2 * 16 * 16 + 2 * (2 * 16 * 16 + 2 * 16 * 24)
    assert work.whole_vision_flops(VISION) == 2 * (patches + 3 * layer + head)
    audio_layer = 2 * 50 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 2 * 50 * 50 * 16
    assert work.audio_flops(AUDIO) == 2 * 100 * 60 * 16 + 2 * 50 * 48 * 16 + 2 * audio_layer


def test_projector_flops_are_those_of_its_products(work):
    counted = FlopCounterMode(display=False)
    projector = AllInOneSmall(VISION, 64)
    with counted, torch.no_grad():
        projector(torch.randn(1, 2, 16, 16), torch.ones(1, 3))
    pieces = [
        value for op, value in counted.get_flop_counts()["Global"].items() if "convolution" not in str(op)
    ]
    assert work.projector_flops(VISION, 64) == pytest.approx(sum(pieces), rel=0.02)


def test_real_towers_take_the_published_work(work):
    assert work.vision_flops(VisionConfig()) / 1e12 == pytest.approx(0.26, abs=0.02)
    assert work.audio_flops(AudioConfig()) / 1e12 == pytest.approx(2.27, abs=0.05)
    assert work.whole_vision_flops(VisionConfig()) / work.vision_flops(VisionConfig()) == pytest.approx(
        12 / 11, abs=0.03
    )
