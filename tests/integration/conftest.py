"""A handful of real clips and an untrained tiny model, made once for all integration tests."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.demo import build_base

REWARD_SOURCE = '''
def vowels(group):
    """A reward that an untrained model can earn: the share of vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in group.texts]
'''


@dataclass(frozen=True, kw_only=True)
class Job:
    """Inputs of a small run."""

    data: Path
    base: Path
    reward: Path

    def settings(self, output: Path, *more: str) -> list[str]:
        """Overrides of a GRPO run of a few short steps."""
        return [
            f"model.path='{self.base}'",
            f"data.train='{self.data}/rl.json'",
            f"run.output='{output}'",
            "run.threads=1",
            "trainer.prompts_per_step=4",
            "rollout.samples=3",
            "rollout.max_new_tokens=8",
            "optimizer.learning_rate=1e-3",
            f"reward.terms=[{{name='{self.reward}:vowels'}}]",
            *more,
        ]


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> Job:
    root = tmp_path_factory.mktemp("job")
    generate_dataset(
        root / "data", SyntheticConfig(num_cold_start=7, num_rl=14, num_heldout=7, num_ood=7), num_workers=0
    )
    (root / "rewards.py").write_text(REWARD_SOURCE)
    build_base(root / "base", seed=0)
    return Job(data=root / "data", base=root / "base", reward=root / "rewards.py")
