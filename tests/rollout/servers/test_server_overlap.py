"""One step off-policy with servers: the next step is drawn while the trainer updates."""

from omnigrpo.metrics import Metric
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo_kernels.grpo_objective import ObjectiveConfig


def test_overlapped_steps_learn_from_tokens_that_are_one_update_old(
    make_engine, policy, builders, monkeypatch
):
    monkeypatch.setattr(builders.Words, "stop_token_ids", policy.encoder.stop_token_ids)
    engine = make_engine()
    trainer = builders.trainer(
        policy.model,
        policy.inputs[:3],
        engine=engine,
        rollout=RolloutConfig(samples=3, max_new_tokens=8, overlap_update=True, max_staleness=1),
        objective=ObjectiveConfig(kl_coefficient=0.0, max_importance_weight=2.0),
        reward=lambda token_ids: float(sum(token_ids) % 7),
    )
    try:
        reports = [trainer.step() for _ in range(3)]
    finally:
        trainer.sampler.close()

    assert [report.metrics[Metric.STALENESS] for report in reports] == [0.0, 1.0, 1.0]
    assert [report.metrics[Metric.SAMPLES] for report in reports] == [9.0] * 3
    versions = [
        {span.version for group in r.groups for c in group.completions for span in c.version_spans}
        for r in reports
    ]
    assert versions == [{0}, {0}, {1}]
    on_policy, *behind = (report.metrics["logprob_difference/max"] for report in reports)
    assert on_policy < 1e-3
    assert all(difference > on_policy for difference in behind), "those tokens are of the weights before"
