"""Answers of a checkpoint about real clips, through the Python API and the command."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from omnigrpo.cli import app
from omnigrpo.generate import GenerateConfig, Generator, Mode
from omnigrpo.rollout.interface import SamplingParams
from omnigrpo.schema import ClipStatus

SHORT = SamplingParams(temperature=0.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def generator(job):
    with Generator.open(job.base) as opened:
        yield opened


def clips(job) -> list[Path]:
    return sorted((job.data / "clips" / "heldout").glob("*.mp4"))


@pytest.mark.parametrize("mode", ["video", "audio", "video_audio"])
def test_every_mode_answers_every_clip(generator: Generator, job, mode: Mode) -> None:
    paths = clips(job)[:3]
    answers = list(generator.answers(paths, GenerateConfig(mode=mode, sampling=SHORT)))
    assert [answer.clip for answer in answers] == paths
    assert all(answer.status is ClipStatus.OK and 0 < answer.num_tokens <= 6 for answer in answers)


def test_modes_differ_and_companions_do_not_matter(generator: Generator, job) -> None:
    paths = clips(job)[:4]

    def texts(mode: Mode, batch_size: int) -> list[str]:
        config = GenerateConfig(
            mode=mode, sampling=SamplingParams(temperature=1.0, max_new_tokens=20), batch_size=batch_size
        )
        return [answer.text for answer in generator.answers(paths, config)]

    together = {mode: texts(mode, 8) for mode in ("video", "audio", "video_audio")}
    assert len({tuple(t) for t in together.values()}) == 3
    assert texts("video_audio", 1) == together["video_audio"]


def test_a_clip_that_cannot_be_used_leaves_the_others_alone(
    generator: Generator, job, tmp_path: Path
) -> None:
    good = clips(job)[0]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(good.read_bytes()[:500])
    missing = tmp_path / "missing.mp4"
    answers = list(generator.answers([broken, good, missing, good], GenerateConfig(sampling=SHORT)))
    assert [answer.clip for answer in answers] == [broken, good, missing, good]
    assert [answer.status is ClipStatus.OK for answer in answers] == [False, True, False, True]
    assert answers[2].status is ClipStatus.MISSING
    assert answers[2].error is not None
    assert answers[1].text == answers[3].text


def test_samples_of_a_clip_stand_together_and_differ(generator: Generator, job) -> None:
    config = GenerateConfig(samples=3, sampling=SamplingParams(temperature=1.0, max_new_tokens=12))
    answers = list(generator.answers(clips(job)[:2], config))
    assert [answer.clip for answer in answers] == [clips(job)[0]] * 3 + [clips(job)[1]] * 3
    assert len({answer.text for answer in answers[:3]}) > 1


def test_the_answer_is_taken_apart(generator: Generator) -> None:
    from omnigrpo.schema import Completion, VersionSpan

    text = "<think>The brows are low.</think>\n<answer>angry</answer>"
    ids = tuple(generator._encoder.encode_response(text))
    completion = Completion(
        token_ids=ids,
        logprobs=(0.0,) * len(ids),
        finish_reason="stop",
        version_spans=(VersionSpan(version=0, num_tokens=len(ids)),),
        cached_tokens=0,
    )
    answer = generator._answer(Path("clip.mp4"), completion)
    assert (answer.reasoning, answer.label, answer.text) == ("The brows are low.", "angry", text)


def test_the_command_prints_json_and_its_status(job, tmp_path: Path, capsys) -> None:
    folder = job.data / "clips" / "ood"
    arguments = ["generate", str(job.base), str(folder), "--max-new-tokens", "4", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [line["status"] for line in lines] == ["ok"] * 7
    assert [line["clip"] for line in lines] == [str(path) for path in sorted(folder.glob("*.mp4"))]

    result = CliRunner().invoke(app, ["generate", str(job.base), str(tmp_path / "none.mp4")])
    assert result.exit_code == 1
    assert "missing" in result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "smell"}, "mode must be one of video, audio, video_audio"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 2}, "2 samples of greedy decoding"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_asked(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)


def test_half_precision_is_the_files_or_asked_for(job) -> None:
    with Generator.open(job.base, dtype=torch.bfloat16) as opened:
        assert opened._model.device.type == "cpu"
        assert opened._model.head_weight_VD.dtype == torch.bfloat16
        (answer,) = opened.answers(clips(job)[:1], GenerateConfig(sampling=SHORT))
    assert answer.status is ClipStatus.OK
