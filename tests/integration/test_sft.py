import pytest

from omnigrpo.config import load_config
from omnigrpo.data.dataset import DatasetError
from omnigrpo.metrics import Metric, read_metrics
from omnigrpo.run import run_sft


def settings(job, output, *more: str) -> list[str]:
    return [
        f"model.path='{job.base}'",
        f"data.train='{job.data}/cold_start.json'",
        f"run.output='{output}'",
        "run.threads=1",
        "run.steps=4",
        "trainer.prompts_per_step=7",
        "optimizer.learning_rate=1e-3",
        "optimizer.schedule='constant'",
        *more,
    ]


def losses(directory) -> list[float]:
    return [step[Metric.LOSS] for step in read_metrics(directory)]


def test_golden_losses(job, tmp_path):
    """The first losses of a fixed run: clips, towers, tokenizer, weights, packing, optimizer, all at once."""
    run_sft(load_config(None, settings(job, tmp_path / "run")))
    assert losses(tmp_path / "run") == pytest.approx(GOLDEN, abs=2e-3)


def test_several_packs_equal_one(job, tmp_path):
    run_sft(load_config(None, settings(job, tmp_path / "one")))
    run_sft(load_config(None, settings(job, tmp_path / "many", "trainer.budget_rows=300")))
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_bare_labels_are_refused(job, tmp_path):
    with pytest.raises(DatasetError, match="bare label"):
        run_sft(load_config(None, settings(job, tmp_path / "run", f"data.train='{job.data}/rl.json'")))


GOLDEN = [6.3177, 5.9586, 5.7309, 5.5452]
