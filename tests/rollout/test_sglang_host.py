"""SGLang absent, or another release of it: what is said, in an environment without it."""

import importlib.metadata
import importlib.util

import pytest
import torch

from omnigrpo.rollout import sglang_host
from omnigrpo.rollout.sglang_config import SGLangConfig
from omnigrpo.rollout.sglang_engine import SGLangEngine


def test_sglang_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"SGLang is not installed: run `make sglang`.*pip install 'omnigrpo\[sglang\]'"
    ):
        SGLangEngine(tmp_path, device="cpu", dtype=torch.float32)


def test_another_release_of_sglang(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.9")
    with pytest.raises(ImportError, match=r"SGLang 0\.5\.9 is installed, .* internals of 0\.5\.17"):
        SGLangEngine(tmp_path, device="cpu", dtype=torch.float32)


def test_settings_of_the_process_come_back(monkeypatch):
    monkeypatch.delenv("OMNIGRPO_A_TEST", raising=False)
    monkeypatch.setenv("OMNIGRPO_ANOTHER", "before")
    root = sglang_host.logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with sglang_host._everything_put_back({"OMNIGRPO_A_TEST": "1", "OMNIGRPO_ANOTHER": "2"}):
        sglang_host.logging.basicConfig(level="DEBUG", force=True)
        sglang_host.multiprocessing.set_start_method("spawn", force=True)
    assert "OMNIGRPO_A_TEST" not in sglang_host.os.environ
    assert sglang_host.os.environ["OMNIGRPO_ANOTHER"] == "before"
    assert (root.handlers, root.level) == (handlers, level)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mem_fraction", 1.0), ("bucket_bytes", 0), ("max_total_tokens", 0), ("timeout_seconds", float("inf"))],
)
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ValueError, match=f"sglang.{name} must be"):
        SGLangConfig(**{name: value})
