import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from omnigrpo.evaluate.evaluation_report import EvaluatedClip, summarise
from omnigrpo.metrics import DroppedRecord, MetricsLog, RolloutRecord

LABELS = ("happy", "surprise", "neutral", "angry", "disgust", "sad", "fear")
PAIRS = (("surprise", "fear"), ("angry", "disgust"))
CONFIG = """\
[model]
path = "runs/demo/cold_start"
[data]
train = "clips/rl.json"
[run]
steps = 40
seed = 0
[rollout]
samples = 8
[optimizer]
learning_rate = 1e-4
[[reward.terms]]
name = "accuracy"
weight = 1.0
"""


def write_clip(path: Path, shade: int) -> None:
    """A half-second clip of a face-like disc that changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:96, :128]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(6):
            frame = np.full((96, 128, 3), (40 + shade, 90, 160 - shade), dtype=np.uint8)
            frame[(rows - 48) ** 2 + (columns - 64) ** 2 < 32**2] = (235, 190, 150)
            frame[(abs(rows - 60) < 2 + index) & (abs(columns - 64) < 14)] = (150, 40, 50)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def completion(label: str, reasoning: str) -> str:
    return f"<think>{reasoning}</think>\n<answer>{label}</answer>"


def step_metrics(step: int, num_steps: int, rng: random.Random) -> dict[str, float]:
    progress = 1 - math.exp(-3 * step / num_steps)
    accuracy = 0.35 + 0.55 * progress + rng.gauss(0, 0.04)
    format_rate = 0.9 + 0.1 * progress
    phases = {
        "decode": 0.02, "encode": 0.05, "prefill": 0.12, "decode_tokens": 1.1, "reward": 0.004, "pack": 0.01,
        "reference": 0.22, "forward": 0.31, "head": 0.2, "backward": 0.43, "optimizer": 0.03, "publish": 0.006,
    }  # fmt: skip
    seconds = {f"seconds/{name}": value * rng.uniform(0.9, 1.15) for name, value in phases.items()}
    wall = sum(seconds.values()) + 0.07
    return seconds | {
        "reward/mean": accuracy + format_rate,
        "reward/std": 0.5 - 0.3 * progress,
        "reward/equal_groups": 0.2 + 0.5 * progress,
        "rewards/accuracy": accuracy,
        "rewards/format": format_rate,
        "completion/length": 44 - 9 * progress + rng.gauss(0, 0.7),
        "kl/mean": 0.02 * progress + abs(rng.gauss(0, 0.001)),
        "entropy/mean": 0.7 - 0.4 * progress + rng.gauss(0, 0.01),
        "logprob_difference/mean": 1e-7 * rng.uniform(0.8, 1.2),
        "logprob_difference/p99": 4e-7 * rng.uniform(0.8, 1.5),
        "logprob_difference/max": 9e-7 * rng.uniform(0.8, 2.0),
        "loss": rng.gauss(0, 0.01),
        "grad_norm": 0.4 + rng.gauss(0, 0.05) if step != 2 else math.nan,
        "samples_per_second": 128 / wall,
        "seconds/step": wall,
        "seconds/overlapped/decode": 0.4,
    }


def write_evaluation(directory: Path, stage: str, split: str, accuracy: float, rng: random.Random) -> None:
    partner = {"surprise": "fear", "fear": "surprise", "angry": "disgust", "disgust": "angry"}
    clips = []
    for index in range(140):
        gold = LABELS[index % 7]
        answer = gold
        if rng.random() > accuracy:
            answer = partner.get(gold, "calm") if rng.random() < 0.6 else rng.choice(LABELS)
        if rng.random() < 0.1:
            answer = answer.capitalize()
        clips.append(
            EvaluatedClip(
                prompt_id=f"{split}-{index}",
                clip=f"{split}/{index}.mp4",
                solution=gold,
                text=completion(answer, "brows up"),
                num_tokens=40,
                finish_reason="stop",
            )
        )
    report = summarise(clips, stage=stage, split=split, labels=LABELS, pairs=PAIRS, seconds=3.0)
    directory.mkdir(exist_ok=True)
    (directory / f"{stage}_{split}.json").write_text(json.dumps(report.to_json()))


def rollout(directory: Path, step: int, index: int, right: int, rng: random.Random) -> RolloutRecord:
    label = LABELS[(index + step) % 7]
    clip = directory / "clips" / f"{label}.mp4"
    if not clip.exists():
        write_clip(clip, shade=20 * LABELS.index(label))
    wrong = rng.choice([other for other in LABELS if other != label])
    reasoning = (
        f"The corners of the mouth move and the brows are raised <slightly> at step {step}; the voice is "
        "high and its tempo quick, with wide swings of the pitch, so the speaker is moved rather than calm."
    )
    texts = tuple(completion(label if at < right else wrong, reasoning) for at in range(4))
    accuracy = tuple(float(at < right) for at in range(4))
    return RolloutRecord(
        prompt_id=f"rl-{step}-{index}", clip=str(clip), start_seconds=None, end_seconds=None,
        question="Which emotion conveyed by the characters is the most obvious to you?", solution=label,
        texts=texts, totals=tuple(value + 1 for value in accuracy),
        components={"accuracy": accuracy, "format": (1.0,) * 4},
    )  # fmt: skip


def _write_run(directory: Path, num_steps: int = 40) -> Path:
    rng = random.Random(0)
    with MetricsLog(directory) as log:
        for step in range(1, num_steps + 1):
            log.log(step, step_metrics(step, num_steps, rng))
            if step in (1, 2, num_steps - 1, num_steps):
                right = 1 if step < 3 else 4
                log.log_rollouts(step, [rollout(directory, step, index, right, rng) for index in range(2)])
        error = "clips/broken.mp4: truncated <moov>"
        log.log_dropped(1, [DroppedRecord(prompt_id="rl-99", status="truncated", error=error)])
    (directory / "config.toml").write_text(CONFIG)
    (directory / "summary.json").write_text(json.dumps({"samples_per_second": 51.2}))
    for stage, heldout, ood in (("cold_start", 0.42, 0.36), ("grpo", 0.9, 0.74)):
        write_evaluation(directory / "evaluations", stage, "heldout", heldout, rng)
        write_evaluation(directory / "evaluations", stage, "ood", ood, rng)
    return directory


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Writes a plausible run into a directory."""
    return _write_run
