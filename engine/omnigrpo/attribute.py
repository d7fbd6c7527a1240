"""`omnigrpo attribute`: how much vision and sound contribute to a model's answers, over a data set."""

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omnigrpo.attribution.attributor import Attributor
from omnigrpo.attribution.clip_attribution import ClipAttribution
from omnigrpo.attribution.config import AttributionConfig
from omnigrpo.attribution.pictures import (
    ATTENTION_PICTURE,
    SHAPLEY_PICTURE,
    VALUES_PICTURE,
    draw_attention,
    draw_clips,
    draw_values,
)
from omnigrpo.attribution.scoring import SceneScorer, ScoringCounters
from omnigrpo.attribution.summary import DatasetAttribution, summarise
from omnigrpo.attribution.tables import Figures, all_figures
from omnigrpo.config import ConfigError, RunConfig
from omnigrpo.data.dataset import read_dataset
from omnigrpo.progress import counting
from omnigrpo.rollout.interface import RolloutCounters
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.run import Parts, open_parts
from omnigrpo.schema import DroppedPrompt, PrefixInputs, Prompt

JSON_FILE = "attribution.json"
MARKDOWN_FILE = "attribution.md"
CLIPS_PER_POOL = 64
"""Clips whose tower features are held at once; a clip's donor is of the same pool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributionReport:
    """What the command writes."""

    model: str
    data: str
    config: AttributionConfig
    summary: DatasetAttribution
    clips: tuple[ClipAttribution, ...]
    """In the data set's order."""
    dropped: tuple[DroppedPrompt, ...]
    rollout: RolloutCounters
    """Work of the greedy completions."""
    scoring: ScoringCounters
    """Work of everything else."""
    clips_decoded: int
    """Clips that the cache of tower features did not hold."""
    seconds: float
    """Wall time after loading the model, media included."""

    def figures(self) -> list[Figures]:
        """The tables."""
        return all_figures(self.summary)

    def headline(self) -> str:
        """Clips, work and time in one line."""
        count = len(self.clips)
        return (
            f"{count} clips, {len(self.dropped)} dropped, baseline {self.config.baseline}; per clip "
            f"{self.rollout.prefixes_prefilled / count:.1f} prefixes prefilled and {self.scoring.prefixes / count:.1f} "
            f"scored, in {self.scoring.passes} packed forwards; {self.seconds:.1f} s"
        )

    def markdown(self) -> str:
        """The tables with a heading and the pictures."""
        pictures = (VALUES_PICTURE, ATTENTION_PICTURE, SHAPLEY_PICTURE)
        shown = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
        tables = "\n".join(table.markdown() for table in self.figures())
        return f"# Modality attribution of {self.model} on {self.data}\n\n{self.headline()}\n\n{tables}\n{shown}\n"


@dataclass(kw_only=True, slots=True)
class _Measured:
    """What has been measured so far."""

    clips: list[ClipAttribution] = field(default_factory=list)
    dropped: list[DroppedPrompt] = field(default_factory=list)


def attribute_dataset(
    config: RunConfig, attribution: AttributionConfig, *, output: Path, limit: int | None = None
) -> AttributionReport:
    """Attribute the clips of ``config.data.train``, or ``limit`` of them drawn by the seed, and write the report.

    Raises ConfigError when fewer than two clips can be used, ValueError for a prompt that asks for one modality only.
    """
    prompts = read_dataset(config.data.train, config.data.style, media_root=config.data.media_root)
    order = random.Random(attribution.seed).sample(range(len(prompts)), len(prompts))[:limit]
    measured = _Measured()
    with open_parts(config, None) as parts:
        started = time.perf_counter()
        engine = NativeEngine(parts.loaded.model, config.rollout.native, spans=parts.spans)
        scorer = SceneScorer(model=parts.loaded.model, budget_rows=config.trainer.budget_rows)
        attributor = Attributor(
            model=parts.loaded.model,
            encoder=parts.prompt_encoder,
            engine=engine,
            sampling=config.rollout.sampling(stop_token_ids=parts.prompt_encoder.stop_token_ids),
            scorer=scorer,
            config=attribution,
        )
        with closing(engine), counting("attribute") as show:
            for pool in _pools(parts, [prompts[index] for index in order], measured.dropped):
                before = len(measured.clips)
                measured.clips += attributor.measure(
                    pool, on_clip=lambda done, before=before: show(before + done, len(order))
                )
        if not measured.clips:
            raise ConfigError(_too_few(config, measured.dropped))
        position = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
        clips = sorted(measured.clips, key=lambda clip: position[clip.prompt_id])
        report = AttributionReport(
            model=str(config.model.path),
            data=str(config.data.train),
            config=attribution,
            summary=summarise(clips),
            clips=tuple(clips),
            dropped=tuple(measured.dropped),
            rollout=engine.counters,
            scoring=scorer.counters,
            clips_decoded=parts.source.num_decoded,
            seconds=time.perf_counter() - started,
        )
    _write(report, output)
    return report


def _pools(
    parts: Parts, prompts: Sequence[Prompt], dropped: list[DroppedPrompt]
) -> Iterator[list[PrefixInputs]]:
    """Usable clips in pools of about equal size, read ahead; where a pool would have a single clip, two are one."""
    count = max(1, math.ceil(len(prompts) / CLIPS_PER_POOL))
    bounds = [round(index * len(prompts) / count) for index in range(count + 1)]

    def batches(position: int) -> Sequence[Prompt]:
        return prompts[bounds[position] : bounds[position + 1]] if position < count else ()

    pool: list[PrefixInputs] = []
    for position in range(count):
        batch = parts.source.read(batches, position)
        dropped += batch.dropped
        if len(pool) > 1 and len(batch.inputs) > 1:
            yield pool
            pool = []
        pool += batch.inputs
    if len(pool) > 1:
        yield pool


def _too_few(config: RunConfig, dropped: Sequence[DroppedPrompt]) -> str:
    reasons = f"; the first was dropped because {dropped[0].error}" if dropped else ""
    return (
        f"attribution swaps modalities between clips and needs two that can be used, but {config.data.train} has "
        f"fewer{reasons}"
    )


def _write(report: AttributionReport, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(report), indent=1, default=str)
    (output / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    (output / MARKDOWN_FILE).write_text(report.markdown(), encoding="utf-8")
    draw_values(report.summary, output / VALUES_PICTURE, unfounded_below=report.config.unfounded_below)
    draw_attention(report.summary, output / ATTENTION_PICTURE)
    draw_clips(report.clips, output / SHAPLEY_PICTURE)
