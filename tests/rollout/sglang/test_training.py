"""GRPO with SGLang from the configuration on, for two short steps."""

import math

from omnigrpo.config import load_config
from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.metrics import Metric, read_metrics
from omnigrpo.run import run_grpo


def test_two_steps_of_grpo(base, tmp_path):
    generate_dataset(tmp_path / "data", SyntheticConfig(num_cold_start=7, num_rl=7, num_heldout=7, num_ood=7))
    settings = load_config(
        None,
        [
            f"model.path='{base}'",
            f"data.train='{tmp_path}/data/rl.json'",
            f"run.output='{tmp_path}/run'",
            "run.steps=2",
            "run.threads=1",
            "trainer.prompts_per_step=3",
            "optimizer.learning_rate=1e-3",
            "rollout.engine=sglang",
            "rollout.samples=3",
            "rollout.max_new_tokens=8",
            "rollout.sglang.max_total_tokens=4096",
            "rollout.sglang.threads=1",
        ],
    )

    run_grpo(settings)

    steps = read_metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step[Metric.SAMPLES] == 9
        assert step[Metric.LOGPROB_DIFFERENCE_MAX] < 1e-4
        assert all(math.isfinite(v) for v in step.values() if isinstance(v, float))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
