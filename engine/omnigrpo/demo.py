"""`omnigrpo demo`: clips, cold start, GRPO, evaluation and report, from nothing, on a CPU."""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from rich.console import Console

from omnigrpo.data.dataset import INSTRUCTION, PromptStyle
from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset, vocabulary_texts
from omnigrpo.data.synthetic.emotions import AUDIO_ONLY_PAIRS, VIDEO_ONLY_PAIRS
from omnigrpo.data.synthetic.reasoning import QUESTION
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.metrics import EVALUATIONS_DIRECTORY, SECONDS_PREFIX, Metric, read_metrics
from omnigrpo.model.checkpoint_format import Tokenizers, load_towers, save_model
from omnigrpo.model.config import tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptTemplate
from omnigrpo.model.tiny_tokenizer import build_gate_tokenizer, build_tokenizer
from omnigrpo.progress import counting
from omnigrpo.report.inputs import SUMMARY_FILE
from omnigrpo.report.page import REPORT_FILE, write_report
from omnigrpo.stages import Stage, evaluate_model, preset_config

SPLITS = ("heldout", "ood")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo may vary."""

    output: Path
    seed: int = 0
    data: SyntheticConfig = field(default_factory=SyntheticConfig)
    cold_start: tuple[str, ...] = ()
    """Overrides of the cold start's preset."""
    grpo: tuple[str, ...] = ()
    """Overrides of the GRPO preset."""


def run_demo(config: DemoConfig) -> dict[str, object]:
    """Run every stage into ``config.output`` and return what summary.json holds; an interrupted demo goes on."""
    console = Console()
    output, seconds = config.output, {}
    if (output / SUMMARY_FILE).exists():
        raise ValueError(
            f"{output} already holds a finished demo: open {output / REPORT_FILE}, or remove the directory, "
            "or choose another --output"
        )
    data, base, first = output / "data", output / "base", output / "cold_start"
    cold_start = _stage_of(
        config, "cold_start", "sft", base, data / "cold_start.json", first, *config.cold_start
    )
    grpo = _stage_of(config, "grpo", "grpo", cold_start.model, data / "rl.json", output, *config.grpo)

    with _stage(console, seconds, "render clips"), counting("render clips") as show:
        generate_dataset(data, replace(config.data, seed=config.seed), on_progress=show)
    build_base(base, seed=config.seed)
    with _stage(console, seconds, "evaluate the untrained model"):
        untrained = _evaluate(console, grpo, base, "base")
    with _stage(console, seconds, "cold start"):
        cold_start.run()
    with _stage(console, seconds, "evaluate the cold start"):
        before = _evaluate(console, grpo, cold_start.model, "cold_start")
    with _stage(console, seconds, "GRPO"):
        grpo.run()
    with _stage(console, seconds, "evaluate GRPO"):
        after = _evaluate(console, grpo, grpo.model, "grpo")

    summary = summarise(
        output, config.seed, {"base": untrained, "cold_start": before, "grpo": after}, seconds
    )
    (output / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(f"wrote {write_report(output)} and {output / SUMMARY_FILE}")
    return summary


def build_base(directory: Path, *, seed: int) -> None:
    """Write the untrained tiny model: shipped towers, new tokenizers, everything else drawn from ``seed``."""
    texts = vocabulary_texts()
    prompt = PromptTemplate().text(f"{QUESTION}{PromptStyle().separator}{INSTRUCTION}", ("video", "audio"))
    # The prompt as often as the answers, so that both become whole words.
    tokenizer = build_tokenizer([*texts, *[prompt] * len(texts)], vocab_size=640)
    gate_tokenizer = build_gate_tokenizer(texts)
    model = HumanOmni(tiny(vocab_size=len(tokenizer), gate_vocab_size=len(gate_tokenizer)))
    model.init_weights(seed)
    with as_file(files("omnigrpo.model") / "assets" / "tiny_towers.safetensors") as towers:
        load_towers(model, towers)
    save_model(model, Tokenizers(text=tokenizer, gate=gate_tokenizer), directory)


def summarise(
    output: Path, seed: int, stages: dict[str, dict[str, EvaluationReport]], stage_seconds: dict[str, float]
) -> dict[str, object]:
    """Gather the figures of a finished demo."""
    steps = read_metrics(output)
    phases = sorted({key for step in steps for key in step if key.startswith(SECONDS_PREFIX)})
    return {
        "seed": seed,
        "evaluations": {
            stage: {split: _figures(report) for split, report in splits.items()}
            for stage, splits in stages.items()
        },
        "samples_per_second": statistics.median(step[Metric.SAMPLES_PER_SECOND] for step in steps),
        "seconds_per_phase": {
            key.removeprefix(SECONDS_PREFIX): sum(step.get(key) or 0.0 for step in steps) for key in phases
        },
        "seconds_per_stage": stage_seconds,
        "peak_memory_gib": _peak_memory_gib(),
        "dropped_prompts": int(sum(step[Metric.DROPPED] for step in steps)),
    }


def _figures(report: EvaluationReport) -> dict[str, object]:
    audio_pairs = {pair.labels for pair in report.pairs} & set(AUDIO_ONLY_PAIRS)
    return {
        "war": report.strict.war,
        "uar": report.strict.uar,
        "war_alias": report.alias.war,
        "uar_alias": report.alias.uar,
        "war_standard_error": report.strict.war_standard_error,
        "format_rate": report.format_rate,
        "mean_completion_tokens": report.mean_completion_tokens,
        "recalls": report.strict.recalls,
        "audio_only_pair_recalls": {
            "/".join(pair.labels): pair.recalls for pair in report.pairs if pair.labels in audio_pairs
        },
    }


def _stage_of(
    config: DemoConfig,
    name: str,
    kind: Literal["sft", "grpo"],
    model: Path,
    train: Path,
    output: Path,
    *extra: str,
) -> Stage:
    splits = {split: config.output / "data" / f"{split}.json" for split in SPLITS}
    settings = preset_config(
        f"demo_{name}",
        model=model,
        train=train,
        output=output,
        evaluate=splits,
        overrides=[f"run.seed={config.seed}", *extra],
    )
    return Stage(name=name, kind=kind, config=settings)


def _evaluate(console: Console, grpo: Stage, model: Path, stage: str) -> dict[str, EvaluationReport]:
    """With the settings of GRPO, whatever trained the model."""
    output = grpo.config.run.output / EVALUATIONS_DIRECTORY
    pairs = (*AUDIO_ONLY_PAIRS, *VIDEO_ONLY_PAIRS)
    reports = evaluate_model(grpo.config, model, stage, output, pairs=pairs)
    for split, report in reports.items():
        console.print(f"{stage} {split}: {report.headline()}", highlight=False)
    return reports


def _peak_memory_gib() -> float:
    """Upper bound, GiB: this process at its largest, and on every core the largest child (the renderers)."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + (os.cpu_count() or 1) * child) * unit / 2**30


@contextmanager
def _stage(console: Console, seconds: dict[str, float], name: str) -> Iterator[None]:
    console.rule(name)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    console.print(f"{name}: {seconds[name]:.1f} s")
