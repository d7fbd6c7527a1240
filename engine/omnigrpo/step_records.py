"""What of a step report goes to the run's files, as records."""

from omnigrpo.metrics import DroppedRecord, RolloutRecord
from omnigrpo.schema import Group, GroupRewards, StepReport


def rollout_records(report: StepReport, *, limit: int) -> list[RolloutRecord]:
    """Up to ``limit`` groups of a step, spread evenly over it, as text."""
    count = min(limit, len(report.groups))
    chosen = [index * len(report.groups) // count for index in range(count)]
    return [_rollout(report.groups[index], report.rewards[index]) for index in chosen]


def dropped_records(report: StepReport) -> list[DroppedRecord]:
    """The prompts that the step went on without."""
    return [DroppedRecord(prompt_id=d.prompt_id, status=str(d.status), error=d.error) for d in report.dropped]


def _rollout(group: Group, rewards: GroupRewards) -> RolloutRecord:
    prompt = group.inputs.prompt
    return RolloutRecord(
        prompt_id=prompt.prompt_id,
        clip=str(prompt.clip.path),
        start_seconds=prompt.clip.start_seconds,
        end_seconds=prompt.clip.end_seconds,
        question=prompt.question,
        solution=prompt.solution,
        texts=group.texts,
        totals=rewards.totals,
        components=rewards.components,
    )
