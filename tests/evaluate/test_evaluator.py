import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.evaluate.evaluator import evaluate
from omnigrpo.rollout.interface import FinishedGroup, GroupRequest, SamplingParams
from omnigrpo.schema import (
    Clip,
    ClipFeatures,
    ClipStatus,
    Completion,
    DroppedPrompt,
    Prefix,
    PrefixInputs,
    Prompt,
    VersionSpan,
)

ANSWERS = (
    "<think>a</think>\n<answer>happy</answer>",
    "<think>a</think>\n<answer>Anger</answer>",
    "sad",
)


def inputs(index: int, solution: str) -> PrefixInputs:
    prompt = Prompt(
        prompt_id=f"p{index}",
        clip=Clip(path=Path(f"clips/{index}.mp4")),
        question="?",
        modalities=("video",),
        solution=solution,
    )
    features = ClipFeatures(vision_FND=None, audio_AD=None)
    return PrefixInputs(
        prompt=prompt, token_ids_P=torch.tensor([index]), question_ids=torch.tensor([0]), features=features
    )


def prefixes(*solutions: str) -> Iterator[Prefix]:
    for index, solution in enumerate(solutions):
        yield Prefix(inputs=inputs(index, solution), embeddings_PD=torch.zeros(1, 2))


class ScriptedEngine:
    """Answers prompt i with token i."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.sampling: list[SamplingParams] = []

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingParams
    ) -> Generator[FinishedGroup, None, None]:
        assert [len(request.seeds) for request in requests] == [1] * len(requests)
        self.batches.append(len(requests))
        self.sampling.append(sampling)
        groups = [
            (
                Completion(
                    token_ids=(int(request.prefix.inputs.token_ids_P[0]),) * 4,
                    logprobs=(0.0,) * 4,
                    finish_reason="length" if index == 0 else "stop",
                    version_spans=(VersionSpan(version=0, num_tokens=4),),
                    cached_tokens=0,
                ),
            )
            for index, request in enumerate(requests)
        ]
        return (FinishedGroup(index=i, completions=group) for i, group in reversed(list(enumerate(groups))))


def run(engine: ScriptedEngine, **changes: Any) -> EvaluationReport:
    arguments: dict[str, Any] = {
        "detokenize": lambda ids: ANSWERS[ids[0] % 3],
        "sampling": SamplingParams(
            temperature=1.0, top_k=50, max_new_tokens=9, token_budget=3, stop_token_ids=(5,)
        ),
        "stage": "cold_start",
        "split": "held_out",
        "batch_size": 2,
        "pairs": (("happy", "angry"),),
    }
    return evaluate(engine, prefixes("happy", "angry", "fear"), **(arguments | changes))


def test_every_prompt_is_answered_once_greedily_in_batches() -> None:
    engine = ScriptedEngine()
    seen: list[list[str]] = []
    run(engine, on_batch=lambda clips: seen.append([clip.prompt_id for clip in clips]))
    assert engine.batches == [2, 1]
    assert seen == [["p0", "p1"], ["p2"]]
    assert {params.temperature for params in engine.sampling} == {0.0}
    assert engine.sampling[0] == SamplingParams(temperature=0.0, max_new_tokens=9, stop_token_ids=(5,))


def test_the_report_adds_up() -> None:
    dropped = [DroppedPrompt(prompt_id="x", status=ClipStatus.MISSING, error="gone")]
    report = run(ScriptedEngine(), dropped=dropped)
    assert report.strict.war == pytest.approx(1 / 3)
    assert report.alias.war == pytest.approx(2 / 3)
    assert report.format_rate == pytest.approx(2 / 3)
    assert report.truncated_rate == pytest.approx(2 / 3)
    assert report.mean_completion_tokens == 4
    assert report.num_dropped == 1
    assert report.pairs[0].recalls == (1.0, 1.0)
    assert [clip.solution for clip in report.clips] == ["happy", "angry", "fear"]
    assert report.clips[2].text == "sad"
    assert report.clips[2].clip == "clips/2.mp4"


def test_a_report_survives_json() -> None:
    report = run(ScriptedEngine())
    assert EvaluationReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_json_that_is_no_report_says_so() -> None:
    with pytest.raises(ValueError, match="not an evaluation report"):
        EvaluationReport.from_json({"stage": "grpo"})


def test_no_usable_prompt_is_an_error_with_the_reason() -> None:
    dropped = [DroppedPrompt(prompt_id="x", status=ClipStatus.MISSING, error="x.mp4 does not exist")]
    with pytest.raises(
        ValueError, match=r"'held_out': no usable prompt, 1 dropped, the first because x\.mp4"
    ):
        evaluate(
            ScriptedEngine(),
            [],
            detokenize=lambda ids: "",
            sampling=SamplingParams(),
            stage="grpo",
            split="held_out",
            dropped=dropped,
        )
