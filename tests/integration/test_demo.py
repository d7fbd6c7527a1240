"""The demo's chain in miniature: every stage, a few steps each."""

import json
from pathlib import Path

import pytest

from omnigrpo import stages
from omnigrpo.data.synthetic.dataset import SyntheticConfig
from omnigrpo.demo import DemoConfig, run_demo
from omnigrpo.metrics import read_metrics

SHORT = ("run.steps=2", "run.threads=1", "trainer.prompts_per_step=4")
SMALL = SyntheticConfig(num_cold_start=7, num_rl=14, num_heldout=7, num_ood=7)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def summary(output) -> dict:
    """A demo that is interrupted before its GRPO stage, and then started again."""
    sampling = ("rollout.samples=2", "rollout.max_new_tokens=12")
    config = DemoConfig(output=output, data=SMALL, cold_start=SHORT, grpo=(*SHORT, *sampling))

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        patched.setattr(stages, "run_grpo", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(config)
        assert not (output / "summary.json").exists()
        patched.undo()
        patched.setenv("OMP_NUM_THREADS", "1")
        return run_demo(config)


def test_the_summary_is_what_was_written(summary, output):
    assert json.loads((output / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_a_demo_that_goes_on_repeats_no_step(summary, output):
    for run in (output / "cold_start", output):
        assert [step["step"] for step in read_metrics(run)] == [1, 2]


@pytest.mark.parametrize("stage", ["base", "cold_start", "grpo"])
@pytest.mark.parametrize("split", ["heldout", "ood"])
def test_every_stage_is_evaluated_on_both_splits(summary, output, stage, split):
    figures = summary["evaluations"][stage][split]
    assert 0 <= figures["war"] <= figures["war_alias"] <= 1
    assert set(figures["audio_only_pair_recalls"]) == {"surprise/fear", "neutral/sad", "angry/disgust"}
    assert (output / "evaluations" / f"{stage}_{split}.json").is_file()


def test_phases_account_for_the_steps(summary, output):
    phases = dict(summary["seconds_per_phase"])
    step = phases.pop("step")
    inside = sum(seconds for name, seconds in phases.items() if not name.startswith("overlapped/"))
    assert 0.9 * step < inside <= step
    assert {"decode_tokens", "prefill", "forward", "backward", "reference", "optimizer", "publish"} <= set(
        phases
    )
    assert len(read_metrics(output)) == 2
    assert summary["samples_per_second"] > 0


def test_the_report_holds_the_run(output, summary):
    page = (output / "report.html").read_text()
    for word in ("Confusion", "surprise", "data:image/jpeg;base64"):
        assert word in page


def test_a_finished_demo_is_not_overwritten(output, summary):
    with pytest.raises(ValueError, match="already holds a finished demo"):
        run_demo(DemoConfig(output=output, data=SMALL))
