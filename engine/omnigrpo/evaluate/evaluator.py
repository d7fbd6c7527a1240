"""Runs a rollout engine over a split and reports how often it is right."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import get_args

from omnigrpo.evaluate.emotion_metrics import AnswerRule
from omnigrpo.evaluate.evaluation_report import EvaluatedClip, EvaluationReport, summarise
from omnigrpo.rollout.interface import GroupRequest, Sampler, SamplingParams, collect
from omnigrpo.schema import Completion, DroppedPrompt, Prefix


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How answers are read in an evaluation."""

    answer: AnswerRule = "tags"
    """tags: what the first answer block holds, the whole text without one; raw: the whole text, as the reference's
    evaluation scripts compare it."""

    def __post_init__(self) -> None:
        """Reject an unknown rule."""
        if self.answer not in get_args(AnswerRule):
            raise ValueError(
                f"evaluation.answer must be one of {', '.join(get_args(AnswerRule))}, got {self.answer!r}"
            )


def evaluate(
    engine: Sampler,
    prefixes: Iterable[Prefix],
    *,
    detokenize: Callable[[Sequence[int]], str],
    sampling: SamplingParams,
    stage: str,
    split: str,
    labels: Sequence[str] | None = None,
    benchmark: str | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    dropped: Sequence[DroppedPrompt] = (),
    batch_size: int = 32,
    done: Sequence[EvaluatedClip] = (),
    on_batch: Callable[[Sequence[EvaluatedClip]], None] | None = None,
    answer: AnswerRule = "tags",
) -> EvaluationReport:
    """Answer every prompt once, greedily, and compare the answers with the solutions.

    ``prefixes`` may be a generator: ``batch_size`` of them are held at a time. ``sampling`` gives the limits;
    its temperature, top-k, top-p and token budget are ignored. ``detokenize`` leaves special tokens out.
    ``done`` are clips that were answered before, which the report counts too; ``prefixes`` must leave them out.
    ``on_batch`` is given the clips of every batch. ``dropped`` is read after the last prefix only, so a
    generator may go on filling it (a list) while its prefixes are consumed.

    Raises ValueError when there is no prompt left to answer.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    greedy = replace(sampling, temperature=0.0, top_k=0, top_p=1.0, token_budget=None)
    clips = list(done)
    seconds = 0.0
    for batch in _batched(prefixes, batch_size):
        started = time.perf_counter()
        requests = [GroupRequest(prefix=prefix, seeds=(0,)) for prefix in batch]
        completions = collect(engine.generate(requests, greedy), len(batch))
        seconds += time.perf_counter() - started
        answered = [
            _evaluated(prefix, only, detokenize) for prefix, (only,) in zip(batch, completions, strict=True)
        ]
        clips += answered
        if on_batch is not None:
            on_batch(answered)
    if not clips:
        raise ValueError(
            f"nothing to evaluate on split {split!r}: no usable prompt, {len(dropped)} dropped"
            + (f", the first because {dropped[0].error}" if dropped else "")
        )
    return summarise(
        clips,
        stage=stage,
        split=split,
        labels=labels,
        benchmark=benchmark,
        pairs=pairs,
        dropped=dropped,
        seconds=seconds,
        answer=answer,
    )


def _evaluated(
    prefix: Prefix, completion: Completion, detokenize: Callable[[Sequence[int]], str]
) -> EvaluatedClip:
    prompt = prefix.inputs.prompt
    return EvaluatedClip(
        prompt_id=prompt.prompt_id,
        clip=str(prompt.clip.path),
        solution=prompt.solution,
        text=detokenize(completion.token_ids),
        num_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
    )


def _batched(prefixes: Iterable[Prefix], size: int) -> Iterator[list[Prefix]]:
    remaining = iter(prefixes)
    while batch := list(islice(remaining, size)):
        yield batch
