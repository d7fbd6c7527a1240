"""Builds a run from its configuration and drives it: supervised training, GRPO, evaluation."""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from omnigrpo.algorithm.agreement import DisagreementError
from omnigrpo.attribution.group_scorer import PolicyScorer
from omnigrpo.config import ConfigError, RunConfig, changed_settings, load_config, save_config
from omnigrpo.data.dataset import check_responses, read_dataset
from omnigrpo.data.prompt_stream import PromptStream
from omnigrpo.evaluate.benchmarks import Benchmark, benchmarks_of
from omnigrpo.evaluate.evaluation_report import EvaluatedClip, EvaluationReport
from omnigrpo.evaluate.evaluator import evaluate
from omnigrpo.evaluate.journal import EvaluationJournal, clip_stamp, fingerprint_of
from omnigrpo.group_sampler import GroupSampler, embed
from omnigrpo.loop import Steps, run_steps
from omnigrpo.metrics import METRICS_FILE, MetricsLog
from omnigrpo.model.checkpoint_format import (
    GATE_TOKENIZER_DIRECTORY,
    LoadedModel,
    load_model,
    save_model,
    towers_hash,
)
from omnigrpo.model.humanomni import reference_copy
from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.model.weight_files import weight_files
from omnigrpo.prefix_source import PrefixSource
from omnigrpo.progress import counting
from omnigrpo.reward.composition import RewardSet
from omnigrpo.rollout.build import build_engine
from omnigrpo.rollout.interface import RolloutEngine
from omnigrpo.runtime.checkpoint import CheckpointWriter, latest_checkpoint, load_state, model_directory
from omnigrpo.runtime.distributed import World
from omnigrpo.runtime.optimizer import Optimizer
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.runtime.state_tree import capture_rng, restore_rng
from omnigrpo.schema import DroppedPrompt, Prefix, Prompt
from omnigrpo.sft import SupervisedTrainer
from omnigrpo.trainer import Trainer, trained_weights

CONFIG_FILE = "config.toml"
CHECKPOINTS_DIRECTORY = "checkpoints"
MODEL_DIRECTORY = "model"
"""The trained model of a finished run, in the reference layout."""
DISAGREEMENT_FILE = "disagreement.json"
"""What ended a run whose rollout and trainer disagreed."""
EVALUATION_BATCH = 64
"""Prompts decoded at once in an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What every kind of run needs, built once."""

    directory: Path
    """Whence the model was loaded."""
    loaded: LoadedModel
    prompt_encoder: PromptEncoder
    source: PrefixSource
    spans: SpanRecorder
    world: World


def run_sft(config: RunConfig, *, resume: bool = False, title: str = "cold start") -> None:
    """Supervised training; writes the run directory and, at its end, the model. ``title`` names it while it runs."""
    prompts = _read(config, config.data.train)
    check_responses(prompts, config.data.train)
    checkpoint = _start(config, resume)
    with open_parts(config, checkpoint) as parts:
        if config.model.reset_gate and checkpoint is None:
            parts.loaded.model.reset_gate(config.run.seed)
        optimizer = _optimizer(config, parts, total_steps=config.run.steps)
        trainer = SupervisedTrainer(
            policy=parts.loaded.model,
            prompts=_stream(config, prompts),
            prompt_encoder=parts.prompt_encoder,
            source=parts.source,
            optimizer=optimizer,
            spans=parts.spans,
            world=parts.world,
            budget_rows=config.trainer.budget_rows,
        )
        _drive(config, parts, trainer, optimizer, checkpoint, title=title)


def run_grpo(config: RunConfig, *, resume: bool = False) -> None:
    """GRPO; writes the run directory and, at its end, the model."""
    check_grpo(config)
    prompts = _read(config, config.data.train)
    rewards = RewardSet.from_config(config.reward)
    checkpoint = _start(config, resume)
    with open_parts(config, checkpoint) as parts:
        policy = parts.loaded.model
        if rewards.reads_model:
            rewards = rewards.with_scorer(_scorer(config, parts))
        reference = None
        if config.objective.kl_coefficient:
            start = config.model.reference or config.model.path
            fresh = checkpoint is None and start == config.model.path
            reference = reference_copy(policy if fresh else _load(config, start).model)
        optimizer = _optimizer(config, parts, total_steps=config.run.steps * config.trainer.iterations)
        with closing(_build_rollout(config, parts)) as engine:
            sampler = GroupSampler(
                policy=policy,
                prompts=_stream(config, prompts),
                prompt_encoder=parts.prompt_encoder,
                source=parts.source,
                engine=engine,
                rewards=rewards,
                spans=parts.spans,
                world=parts.world,
                seed=config.run.seed,
                budget_rows=config.trainer.budget_rows,
                config=config.rollout,
            )
            trainer = Trainer(
                policy=policy,
                reference=reference,
                sampler=sampler,
                optimizer=optimizer,
                spans=parts.spans,
                world=parts.world,
                advantage_config=config.advantage,
                objective_config=config.objective,
                agreement_config=config.agreement,
                config=config.trainer,
            )
            with closing(sampler):
                _drive(config, parts, trainer, optimizer, checkpoint, title="GRPO")


def check_grpo(config: RunConfig) -> None:
    """Raise ConfigError for what only supervised training can do."""
    if config.model.reset_gate:
        raise ConfigError(
            "model.reset_gate would throw away the gate that GRPO starts from: it is for supervised training; leave it "
            "out"
        )


def run_evaluation(
    config: RunConfig,
    *,
    output: Path | None,
    stage: str = "eval",
    pairs: tuple[tuple[str, str], ...] = (),
    benchmarks: Mapping[str, str] | None = None,
) -> dict[str, EvaluationReport]:
    """Evaluate the configured model on every split by greedy decoding; writes ``<stage>_<split>.json`` to output.

    Answers are kept in ``<stage>_<split>.partial.jsonl`` until then: an interrupted evaluation of the same weights,
    clips and settings goes on where it was. A split whose benchmark is given by name in ``benchmarks``, or else told by
    its own name (``dfew_test``), has that benchmark's label set.

    Raises:
        ConfigError: no split.
        ValueError: an unknown benchmark or split in ``benchmarks``, a label outside a benchmark's set (named with file
            and item, before the model is loaded), or no clip that can be used.
    """
    if not config.data.evaluate:
        raise ConfigError(
            "data.evaluate names no split: give one, e.g. data.evaluate={heldout='heldout.json'}"
        )
    benchmark_by_split = benchmarks_of(tuple(config.data.evaluate), benchmarks or {})
    splits = {
        name: _read(config, path, None if benchmark is None else benchmark.labels)
        for (name, path), benchmark in zip(
            config.data.evaluate.items(), benchmark_by_split.values(), strict=True
        )
    }
    reports: dict[str, EvaluationReport] = {}
    with open_parts(config, None) as parts, closing(_build_rollout(config, parts)) as engine:
        parts.loaded.model.eval()
        for split, prompts in splits.items():
            name = f"{stage}_{split}"
            journal = None if output is None else _journal(config, output / f"{name}.partial.jsonl", prompts)
            reports[split] = _evaluate_split(
                config,
                parts,
                engine,
                prompts,
                stage=stage,
                split=split,
                benchmark=benchmark_by_split[split],
                pairs=pairs,
                journal=journal,
            )
            if output is not None and journal is not None:
                text = json.dumps(reports[split].to_json(), indent=1)
                (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
                journal.remove()
    return reports


def _journal(config: RunConfig, path: Path, prompts: tuple[Prompt, ...]) -> EvaluationJournal:
    """What a former evaluation left, if all that an answer depends on is as it was then."""
    settings = (
        config.model.dtype,
        config.media.aspect,
        config.media.colour,
        config.media.min_frames,
        config.media.audio_failure,
        config.prompt,
        config.rollout,
        config.evaluation,
        prompts,
        [clip_stamp(prompt.clip.path) for prompt in prompts],
    )
    return EvaluationJournal(path, fingerprint_of([repr(part) for part in settings], _model_files(config)))


def _model_files(config: RunConfig) -> list[Path]:
    """Every file that the model is loaded from: configuration, weights in all their shards, tokenizers."""
    model = config.model
    directories = [d for d in (model.path, model.vision_tower, model.audio_tower) if d is not None]
    texts = [*directories, model.gate_tokenizer or model.path / GATE_TOKENIZER_DIRECTORY]
    return [
        *(path for directory in directories for path in weight_files(directory)),
        *(
            path
            for directory in texts
            for suffix in ("json", "txt")
            for path in sorted(directory.glob(f"*.{suffix}"))
        ),
    ]


def _evaluate_split(
    config: RunConfig,
    parts: Parts,
    engine: RolloutEngine,
    prompts: tuple[Prompt, ...],
    *,
    stage: str,
    split: str,
    benchmark: Benchmark | None,
    pairs: tuple[tuple[str, str], ...],
    journal: EvaluationJournal | None,
) -> EvaluationReport:
    done = () if journal is None else journal.done
    answered = {clip.prompt_id for clip in done}
    remaining = tuple(prompt for prompt in prompts if prompt.prompt_id not in answered)
    dropped: list[DroppedPrompt] = []
    with counting(f"evaluate {split}") as show:
        num_done = len(done)
        show(num_done, len(prompts))

        def on_batch(clips: Sequence[EvaluatedClip]) -> None:
            nonlocal num_done
            num_done += len(clips)
            show(num_done, len(prompts))
            if journal is not None:
                journal.add(clips)

        return evaluate(
            engine,
            _prefixes(parts, remaining, dropped, batch_size=EVALUATION_BATCH),
            detokenize=parts.prompt_encoder.decode,
            sampling=config.rollout.sampling(stop_token_ids=parts.prompt_encoder.stop_token_ids),
            stage=stage,
            split=split,
            labels=None if benchmark is None else benchmark.labels,
            benchmark=None if benchmark is None else benchmark.name,
            pairs=pairs,
            dropped=dropped,
            answer=config.evaluation.answer,
            batch_size=EVALUATION_BATCH,
            done=done,
            on_batch=on_batch,
        )


def _scorer(config: RunConfig, parts: Parts) -> PolicyScorer:
    return PolicyScorer(
        policy=parts.loaded.model,
        prompt_encoder=parts.prompt_encoder,
        temperature=config.rollout.temperature,
        budget_rows=config.trainer.budget_rows,
    )


def _build_rollout(config: RunConfig, parts: Parts) -> RolloutEngine:
    return build_engine(
        config.rollout,
        policy=parts.loaded.model,
        directory=parts.directory,
        media=config.media,
        spans=parts.spans,
    )


def _read(config: RunConfig, path: Path, labels: Sequence[str] | None = None) -> tuple[Prompt, ...]:
    return read_dataset(path, config.data.style, media_root=config.data.media_root, labels=labels)


def _stream(config: RunConfig, prompts: tuple[Prompt, ...]) -> PromptStream:
    return PromptStream(prompts=prompts, batch_size=config.trainer.prompts_per_step, seed=config.run.seed)


def _start(config: RunConfig, resume: bool) -> Path | None:
    """Return the checkpoint to go on from, if any; refuses to write over a run, or to resume nothing or another one."""
    output = config.run.output
    checkpoint = latest_checkpoint(output / CHECKPOINTS_DIRECTORY)
    begun = checkpoint is not None or (output / METRICS_FILE).exists()
    if resume and not begun:
        raise ConfigError(f"nothing to resume: {output} holds no run; start it without --resume")
    if begun and not resume:
        raise ConfigError(
            f"{output} already holds a run: add --resume to go on, or choose another run.output"
        )
    changed = changed_settings(config, load_config(output / CONFIG_FILE)) if begun else []
    if changed:
        raise ConfigError(
            f"the run in {output} has other settings: "
            + "; ".join(changed)
            + f". Resume with those of its {CONFIG_FILE}, or start another run"
        )
    return checkpoint


@contextmanager
def open_parts(config: RunConfig, checkpoint: Path | None) -> Iterator[Parts]:
    """Load the model (the checkpoint's weights when resuming) and what feeds it; closes the feed."""
    world = World.from_environment(config.model.device)
    if world.size > 1:
        world.close()
        raise ConfigError(
            f"WORLD_SIZE is {world.size}, but the command line trains with one process: to train with several, embed "
            "Trainer, which takes a World"
        )
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    random.seed(config.run.seed)
    directory = config.model.path if checkpoint is None else model_directory(checkpoint)
    loaded = _load(config, directory)
    loaded.model.configure_bert(trainable=config.model.train_bert, dropout=config.model.bert_dropout)
    loaded.model.decoder.checkpoint_activations = config.model.checkpoint_activations
    encoder = PromptEncoder(loaded.tokenizer, loaded.gate_tokenizer, loaded.model.config, config.prompt)
    spans = SpanRecorder(synchronize_cuda=config.run.synchronize_cuda)
    source = PrefixSource(
        model=loaded.model,
        prompt_encoder=encoder,
        tower_hash=towers_hash(loaded.model),
        config=config.media,
        spans=spans,
    )
    try:
        yield Parts(
            directory=directory,
            loaded=loaded,
            prompt_encoder=encoder,
            source=source,
            spans=spans,
            world=world,
        )
    finally:
        source.close()
        world.close()


def _load(config: RunConfig, directory: Path) -> LoadedModel:
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device is cuda, but torch finds no CUDA device: set model.device=cpu")
    return load_model(
        directory,
        dtype=getattr(torch, config.model.dtype),
        device=config.model.device,
        gate_tokenizer_directory=config.model.gate_tokenizer,
        vision_tower_directory=config.model.vision_tower,
        audio_tower_directory=config.model.audio_tower,
    )


def _optimizer(config: RunConfig, parts: Parts, *, total_steps: int) -> Optimizer:
    return Optimizer(parts.loaded.model.named_parameters(), config.optimizer, total_steps=total_steps)


def _drive(
    config: RunConfig,
    parts: Parts,
    trainer: Steps,
    optimizer: Optimizer,
    checkpoint: Path | None,
    *,
    title: str,
) -> None:
    """Restore the run's state, step to the end, and leave the model."""
    output = config.run.output
    updates_per_step = config.trainer.iterations if isinstance(trainer, Trainer) else 1
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / CONFIG_FILE)
    writer = CheckpointWriter(output / CHECKPOINTS_DIRECTORY, config.run.keep_last)

    def save_weights(directory: Path) -> None:
        save_model(parts.loaded.model, parts.loaded.tokenizers, directory)

    def save(step: int) -> None:
        if optimizer.steps_done != step * updates_per_step:
            return  # Interrupted between the update and the end of its step: the last checkpoint is the good one.
        state = {"step": step, "optimizer": optimizer.state_dict(), "rng": capture_rng()}
        if isinstance(trainer, Trainer):
            state["sampler"] = trainer.sampler.state_dict()
        writer.save(step, save_weights, state)

    with MetricsLog(output, tensorboard=config.run.tensorboard) as log:
        if checkpoint is not None:
            state = load_state(checkpoint)
            trainer.steps_done = state["step"]
            if isinstance(trainer, Trainer):
                if "sampler" in state:  # Else it is of a version in which every group took one step.
                    trainer.sampler.load_state_dict(state["sampler"])
                trainer.sampler.engine.publish(trained_weights(parts.loaded.model), trainer.steps_done)
            optimizer.load_state_dict(state["optimizer"])
            restore_rng(state["rng"])
        log.truncate_after(trainer.steps_done)
        try:
            run_steps(trainer, config=config.run, log=log, spans=parts.spans, save=save, title=title)
        except DisagreementError as error:
            path = output / DISAGREEMENT_FILE
            path.write_text(json.dumps(error.report, indent=1) + "\n", encoding="utf-8")
            raise ConfigError(f"{error}. The worst tokens are in {path}") from error
    _replace_directory(output / MODEL_DIRECTORY, save_weights)


def _replace_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Write a directory under another name first, so that a kill never leaves half of it under its own."""
    fresh, old = final.with_name(f"{final.name}.tmp"), final.with_name(f"{final.name}.old")
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    write(fresh)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    if old.exists():
        shutil.rmtree(old)


def _prefixes(
    parts: Parts, prompts: tuple[Prompt, ...], dropped: list[DroppedPrompt], *, batch_size: int
) -> Iterator[Prefix]:
    def batches(position: int) -> tuple[Prompt, ...]:
        return prompts[position * batch_size : (position + 1) * batch_size]

    for position in range(math.ceil(len(prompts) / batch_size)):
        batch = parts.source.read(batches, position)
        dropped += batch.dropped
        with torch.no_grad():
            yield from embed(parts.loaded.model, batch.inputs)
