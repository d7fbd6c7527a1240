"""Whole GRPO steps, and where their time goes."""

import statistics
from collections import defaultdict
from functools import partial

from harness import Bench, Variant
from omnigrpo.runtime.spans import Phase
from report import Check, Row
from step_job import Job
from step_work import Sizes

PHASE_COVERAGE = 0.97
"""Share of a step's wall time that its phases must account for."""


def measure_steps(bench: Bench, job: Job, sizes: Sizes) -> None:
    """Add a row per step, rows for its phases, and the check that these add up to it."""
    phases: dict[str, list[dict[str, float]]] = defaultdict(list)
    tokens: dict[str, list[int]] = defaultdict(list)

    def step(name: str) -> None:
        report = job.trainer.step()
        phases[name].append(job.trainer.spans.drain())
        tokens[name].append(sum(len(c.token_ids) for g in report.groups for c in g.completions))

    def variant(name: str, *, cold: bool) -> Variant:
        return Variant(name=name, run=partial(step, name), prepare=job.forget_clips if cold else None)

    variants = [variant("step", cold=False)]
    if job.new_source is not None:
        variants = [
            variant("step, cold feature cache", cold=True),
            variant("step, warm feature cache", cold=False),
        ]
    for name, timing in bench.measure(variants).items():
        wall = timing.seconds
        timed = phases[name][-len(wall) :]
        section = f"{name}, {sizes}"
        rates = {
            "samples/s": sizes.prompts * sizes.samples / statistics.median(wall),
            "tokens/s": statistics.median(
                n / s for n, s in zip(tokens[name][-len(wall) :], wall, strict=True)
            ),
        }
        bench.rows.append(
            Row(section=section, name="whole step", seconds=wall, peak_bytes=timing.peak_bytes, figures=rates)
        )
        for phase in Phase:
            seconds = tuple(spent.get(phase, 0.0) for spent in timed)
            share = {"share of the step": statistics.median(map(_share, seconds, wall))}
            if any(seconds):
                bench.rows.append(Row(section=section, name=phase, seconds=seconds, figures=share))
        covered = statistics.median(map(_share, (sum(spent.values()) for spent in timed), wall))
        bench.checks.append(Check.at_least(f"{name}: phases / wall time", covered, PHASE_COVERAGE))


def _share(part: float, whole: float) -> float:
    return part / whole
