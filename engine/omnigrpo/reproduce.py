"""A published recipe from one directory of data: its stages, their evaluation, and the table."""

from collections.abc import Sequence


def stage_overrides(overrides: Sequence[str], stages: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Overrides ``stage.section.key=value`` by stage; those that begin with ``all.`` go to every one.

    Raises ValueError for one that begins with no stage.
    """
    found: dict[str, list[str]] = {stage: [] for stage in stages}
    for override in overrides:
        stage, _, rest = override.partition(".")
        if stage not in (*stages, "all"):
            raise ValueError(
                f"--set {override!r} must begin with a stage ({', '.join(stages)}, or all), e.g. "
                f"{stages[-1]}.run.steps=10"
            )
        for name in stages if stage == "all" else (stage,):
            found[name].append(rest)
    return {stage: tuple(items) for stage, items in found.items()}
