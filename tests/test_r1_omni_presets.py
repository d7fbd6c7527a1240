"""R1-Omni's presets: what docs/r1_omni.md says of every switch, and the paper's hyper-parameters."""

import re
import tomllib
from importlib.resources import as_file, files
from pathlib import Path

import pytest

from omnigrpo.config import RunConfig, load_config
from omnigrpo.runtime.optimizer import learning_rate

DOCS = Path(__file__).resolve().parents[1] / "docs" / "r1_omni.md"
STAGES = {
    "RLVR": "r1_omni",
    "cold start": "r1_omni_cold_start",
    "SFT": "r1_omni_sft",
    "evaluation": "r1_omni_evaluation",
}
_ROW = re.compile(
    r"\| *\d* *\| `(?P<key>[\w.]+)`(?P<where>[^|]*)\| `(?P<reference>[^`]+)` \| `(?P<ours>[^`]+)` \|"
)


def preset(name: str) -> RunConfig:
    with as_file(files("omnigrpo") / "presets" / f"{name}.toml") as path:
        return load_config(path, ["model.path=base", "data.train=train.json", "run.output=run"])


def value(config: RunConfig, key: str) -> object:
    if key == "reward.terms":
        (only,) = {str(term.preset) for term in config.reward.terms}
        return only
    found: object = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def documented() -> list[tuple[str, str, object, object]]:
    """Preset, key, the reference's value and ours, of every row of the table that names a setting."""
    rows = []
    for match in _ROW.finditer(DOCS.read_text(encoding="utf-8")):
        named = [STAGES[stage] for stage in STAGES if re.search(rf"\b{stage}\b", match["where"])]
        values = [tomllib.loads(f"v = {match[column]}")["v"] for column in ("reference", "ours")]
        rows += [(name, match["key"], *values) for name in named or [STAGES["RLVR"]]]
    return rows


def test_every_numbered_switch_is_in_the_table() -> None:
    numbers = re.findall(r"^\| (\d+) \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, 18))
    assert len({key for _, key, *_ in documented()}) == 18


@pytest.mark.parametrize(("name", "key", "reference", "ours"), documented())
def test_presets_are_as_documented(name: str, key: str, reference: object, ours: object) -> None:
    assert value(preset(f"{name}_faithful"), key) == reference
    assert value(preset(name), key) == ours


@pytest.mark.parametrize("suffix", ["", "_faithful"])
@pytest.mark.parametrize(
    ("name", "clips", "batch", "epochs", "steps"),
    [("cold_start", 580, 16, 5, 181), ("sft", 15_306, 128, 1, 120)],
)
def test_supervised_stages(name: str, clips: int, batch: int, epochs: int, steps: int, suffix: str) -> None:
    config = preset(f"r1_omni_{name}{suffix}")
    assert (config.run.steps, config.trainer.prompts_per_step) == (steps, batch)
    assert round(clips * epochs / batch) == steps
    rates = [learning_rate(config.optimizer, step, steps) for step in range(steps)]
    assert max(rates) == 2e-5
    assert rates.index(max(rates)) == -(-3 * steps // 100) - 1
    assert rates[-1] < 1e-8
    assert (config.optimizer.schedule, config.optimizer.weight_decay) == ("cosine", 0.0)
    assert (config.data.style.label_response == "{label}") is (name == "sft")


@pytest.mark.parametrize("name", ["r1_omni", "r1_omni_faithful"])
def test_rlvr(name: str) -> None:
    config = preset(name)
    assert (config.run.steps, config.trainer.prompts_per_step, config.trainer.iterations) == (1913, 16, 1)
    assert round(15_306 * 2 / 16) == 1913
    assert (config.rollout.samples, config.rollout.max_new_tokens, config.rollout.top_p) == (8, 512, 1.0)
    assert [(term.name, term.weight) for term in config.reward.terms] == [("accuracy", 1.0), ("format", 1.0)]
    assert (config.objective.kl_coefficient, config.objective.kl_estimator) == (0.04, "k3")
    assert config.objective.max_importance_weight is None
    optimizer = config.optimizer
    assert (optimizer.betas, optimizer.eps, optimizer.max_grad_norm) == ((0.9, 0.999), 1e-8, 1.0)
    rates = [learning_rate(optimizer, step, 1913) for step in (0, 1, 1912)]
    assert rates == pytest.approx([1e-6, 1e-6 * 1912 / 1913, 1e-6 / 1913])


@pytest.mark.parametrize("suffix", ["", "_faithful"])
def test_prompts_differ_only_as_the_stages_do(suffix: str) -> None:
    """Mended, every stage that asks for tags asks in the same words."""
    asking = [preset(f"r1_omni{stage}{suffix}") for stage in ("", "_cold_start", "_evaluation")]
    prompts = {(config.prompt, config.data.style) for config in asking}
    assert len(prompts) == (1 if suffix == "" else 3)
