"""Pre-trains the tiny model's towers on drawn faces and sung voices, by regressing how they were made.

    python -m omnigrpo.pretrain_towers --output tiny_towers.safetensors

No emotion, category or prototype is ever used: expression and prosody are uniform over their whole ranges, and
people, speakers, scenes and poses come from both domains, in and out of distribution. The vision tower learns
mouth, brows, eyes and pose of single frames; the audio tower learns pitch, contour, energy, tempo and tremor.
All pictures go through H.264 and all sounds through AAC and the engine's own media path first.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from omnigrpo.data.synthetic.attributes import (
    Expression,
    Prosody,
    names,
    sample_any_expression,
    sample_any_prosody,
    vector,
)
from omnigrpo.data.synthetic.encode import write_mp4
from omnigrpo.data.synthetic.face import FaceStates, draw_faces
from omnigrpo.data.synthetic.identity import (
    Domain,
    Pose,
    sample_face_identity,
    sample_pose,
    sample_scene,
    sample_voice_identity,
)
from omnigrpo.data.synthetic.voice import PITCH_SEMITONES, SAMPLE_RATE_HZ, sing
from omnigrpo.media.decode_pyav import decode_clip
from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.media.pixels import siglip_pixels
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.model.checkpoint_format import save_towers
from omnigrpo.model.config import HumanOmniConfig, tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.schema import Clip

FACE_TARGETS = names(Expression) + tuple(f"pose_{name}" for name in ("x", "y", "size", "roll", "yaw", "nod"))
VOICE_TARGETS = names(Prosody)
POSE_WEIGHT = 0.3
"""Weight of each pose target's loss; expression targets have 1."""
_OOD_SHARE = 0.35
_DRAWN_SIZE = 112
_FRAMES_PER_REEL = 24
_VOICES_PER_REEL = 8
_SLOT_SECONDS = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How much to draw and sing, and how long to learn from it."""

    seed: int = 0
    num_reels: int = 1200
    """Each reel is one .mp4 file of 24 faces and 8 voices."""
    vision_steps: int = 4000
    audio_steps: int = 2500
    batch_size: int = 64
    learning_rate: float = 8e-4
    """Peak, after a linear warm-up over 5 % of the steps and before a cosine to 0; 3e-3 diverges."""
    weight_decay: float = 0.02
    num_workers: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Studies:
    """Inputs of one tower and what to regress."""

    inputs: Tensor
    """uint8 RGB ``[n, S, S, 3]`` for faces, float16 log-mel ``[n, M, L]`` for voices."""
    targets_NT: Tensor
    """float32, standardised over the uniform ranges: mean about 0, variance about 1."""

    def split(self, num_test: int) -> tuple["Studies", "Studies"]:
        """The rest, and the last ``num_test``."""
        return tuple(
            replace(self, inputs=self.inputs[part], targets_NT=self.targets_NT[part])
            for part in (slice(None, -num_test), slice(-num_test, None))
        )


def make_studies(config: PretrainConfig, model: HumanOmniConfig) -> tuple[Studies, Studies]:
    """Draws, sings, encodes and decodes: the faces and the voices."""
    work = partial(_make_reel, config.seed, model)
    with ProcessPoolExecutor(config.num_workers, mp_context=get_context("spawn")) as pool:
        reels = list(pool.map(work, range(config.num_reels), chunksize=4))
    faces, face_targets, voices, voice_targets = (
        torch.from_numpy(np.concatenate(column)) for column in zip(*reels, strict=True)
    )
    return (
        Studies(inputs=faces, targets_NT=face_targets),
        Studies(inputs=voices, targets_NT=voice_targets),
    )


def _make_reel(
    seed: int, model: HumanOmniConfig, index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One file of unrelated faces and voices, written and read back: pixels, targets, log-mels, targets."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, index])
    frames_FHWC, face_targets = _draw_reel(rng)
    waves, voice_targets = _sing_reel(rng)
    slot = round(_SLOT_SECONDS * SAMPLE_RATE_HZ)
    track = np.concatenate([np.pad(wave, (0, slot - len(wave))) for wave in waves])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "reel.mp4"
        write_mp4(path, frames_FHWC, track, frames_per_second=12, sample_rate_hz=SAMPLE_RATE_HZ)
        decoded = decode_clip(
            Clip(path=path), ("video", "audio"), SamplingConfig(num_frames=_FRAMES_PER_REEL)
        )
    assert decoded.frames_FHWC is not None, decoded.error
    assert decoded.waveform is not None, decoded.error
    pixels = siglip_pixels(decoded.frames_FHWC, image_size=model.vision.image_size, aspect="pad")
    pixels_FSS3 = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    heard = [decoded.waveform[n * slot :][: len(wave)] for n, wave in enumerate(waves)]
    mels = [
        whisper_log_mel(wave, num_mel_bins=model.audio.num_mel_bins, chunk_seconds=model.audio.chunk_seconds)
        for wave in heard
    ]
    return pixels_FSS3.numpy(), face_targets, torch.stack(mels).half().numpy(), voice_targets


def _draw_reel(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    domains = [_domain(rng) for _ in range(_FRAMES_PER_REEL)]
    expressions = np.stack([vector(sample_any_expression(rng)) for _ in domains])
    poses = np.asarray([astuple(_sway(sample_pose(rng), rng)) for _ in domains], dtype=np.float32)
    states = FaceStates(
        identities=tuple(sample_face_identity(domain, rng) for domain in domains),
        scenes=tuple(sample_scene(domain, rng, occlusion=0.1) for domain in domains),
        expressions_FE=expressions,
        poses_FP=poses,
    )
    low_high = [(-1, 1), (0, 1), (0, 1), (-1, 1), (-1, 1), (0.15, 1)]
    low_high += [(0.41, 0.59), (0.45, 0.56), (0.29, 0.39), (-0.2, 0.2), (-0.7, 0.7), (-0.6, 0.6)]
    values = np.concatenate([expressions, poses], axis=1)
    return draw_faces(states, size=_DRAWN_SIZE, grain_rng=rng), _standardise(values, low_high)


def _sing_reel(rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    waves, values = [], []
    for _ in range(_VOICES_PER_REEL):
        identity, prosody = sample_voice_identity(_domain(rng), rng), sample_any_prosody(rng)
        seconds = int(rng.integers(18, 31)) / 12
        waves.append(sing(prosody, identity, duration_seconds=seconds, rng=rng))
        # Nobody can hear a stranger's base, so pitch is what is heard: semitones around 160 Hz.
        semitones = 12 * math.log2(identity.base_hz / 160) + PITCH_SEMITONES * prosody.pitch
        values.append([semitones, *vector(prosody)[1:]])
    low_high = [(-12, 12), (-1, 1), (0, 1), (0, 1), (0, 1)]
    return waves, _standardise(np.asarray(values), low_high)


def _domain(rng: np.random.Generator) -> Domain:
    return "ood" if rng.random() < _OOD_SHARE else "in"


def _sway(pose: Pose, rng: np.random.Generator) -> Pose:
    spread = (0.012, 0.01, 0.004, 0.04, 0.15, 0.2)
    moved = (value + rng.uniform(-step, step) for value, step in zip(astuple(pose), spread, strict=True))
    return Pose(**dict(zip(("x", "y", "size", "roll", "yaw", "nod"), moved, strict=True)))


def _standardise(values: np.ndarray, low_high: list[tuple[float, float]]) -> np.ndarray:
    low, high = np.asarray(low_high, dtype=np.float64).T
    return ((values - (low + high) / 2) / ((high - low) / math.sqrt(12))).astype(np.float32)


class TowerHead(nn.Module):
    """Reads the targets off a tower's mean feature; thrown away after pre-training."""

    def __init__(self, width: int, num_targets: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, num_targets)
        )

    def forward(self, features_BND: Tensor) -> Tensor:
        """Targets ``[B, T]``."""
        return self.layers(features_BND.mean(dim=1))


def train_tower(
    tower: nn.Module,
    studies: Studies,
    test: Studies,
    prepare: Callable[[Tensor], Tensor],
    weights_T: Tensor,
    config: PretrainConfig,
    num_steps: int,
) -> Tensor:
    """Trains one tower in place; returns the explained variance (R squared) of each target on ``test``."""
    torch.manual_seed(config.seed)
    width = tower.config.width
    head = TowerHead(width, studies.targets_NT.shape[1])
    parameters = [p for p in (*tower.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warm_cosine, num_steps))
    started, running = time.perf_counter(), 0.0
    for step, rows in enumerate(_batches(len(studies.inputs), config, num_steps), start=1):
        predicted = head(tower(prepare(studies.inputs[rows])))
        loss = ((predicted - studies.targets_NT[rows]) ** 2 * weights_T).mean() / weights_T.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == num_steps:
            print(
                f"  step {step}/{num_steps} loss {running:.4f} {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return explained_variance(tower, head, test, prepare)


@torch.no_grad()
def explained_variance(
    tower: nn.Module, head: nn.Module, test: Studies, prepare: Callable[[Tensor], Tensor]
) -> Tensor:
    """R squared per target."""
    parts = [head(tower(prepare(part))) for part in test.inputs.split(256)]
    residual = (torch.cat(parts) - test.targets_NT).square().mean(0)
    return 1 - residual / test.targets_NT.var(0, correction=0)


def _batches(count: int, config: PretrainConfig, num_steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(count, generator=generator)
    position = 0
    for _ in range(num_steps):
        if position + config.batch_size > count:
            order, position = torch.randperm(count, generator=generator), 0
        yield order[position : position + config.batch_size]
        position += config.batch_size


def _warm_cosine(num_steps: int, step: int) -> float:
    warm = max(1, num_steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def _pixels(frames: Tensor) -> Tensor:
    return siglip_pixels(frames, image_size=frames.shape[1], aspect="stretch")


def pretrain(config: PretrainConfig, output: Path, *, command: str) -> dict[str, object]:
    """Pre-trains both towers, writes the weights as float16 and a JSON record beside them."""
    started = time.perf_counter()
    geometry = tiny()
    model = HumanOmni(geometry)
    model.init_weights(config.seed)
    faces, voices = make_studies(config, geometry)
    seconds = {"generate": time.perf_counter() - started}
    num_test = max(1, len(voices.inputs) // 10)
    face_weights = torch.tensor([1.0 if "pose" not in name else POSE_WEIGHT for name in FACE_TARGETS])
    metrics = {}
    for name, tower, studies, prepare, weights, steps, targets in (
        ("vision", model.model.vision_tower, faces, _pixels, face_weights, config.vision_steps, FACE_TARGETS),
        (
            "audio",
            model.model.audio_tower,
            voices,
            Tensor.float,
            torch.ones(5),
            config.audio_steps,
            VOICE_TARGETS,
        ),
    ):
        began = time.perf_counter()
        _unfreeze(tower)
        train, test = studies.split(num_test)
        print(f"{name}: {len(train.inputs)} examples", flush=True)
        scores = train_tower(tower, train, test, prepare, weights, config, steps).tolist()
        metrics[f"{name}_r2"] = {
            target: round(score, 4) for target, score in zip(targets, scores, strict=True)
        }
        seconds[name] = time.perf_counter() - began
    output.parent.mkdir(parents=True, exist_ok=True)
    save_towers(model, output, dtype=torch.float16)
    record = {
        "command": command,
        "seed": config.seed,
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
        "bytes": output.stat().st_size,
        "config": asdict(config),
        "vision": asdict(geometry.vision),
        "audio": asdict(geometry.audio),
        "metrics": metrics,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "av", "numpy")},
    }
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _unfreeze(tower: nn.Module) -> None:
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("embed_positions" not in name)


def main() -> None:
    """Command line."""
    defaults = PretrainConfig()
    parser = argparse.ArgumentParser(description="Pre-train the tiny towers on generated faces and voices.")
    parser.add_argument("--output", type=Path, required=True, help="weights to write (.safetensors)")
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    command = shlex.join(["python", "-m", "omnigrpo.pretrain_towers", *sys.argv[1:]])
    record = pretrain(PretrainConfig(**arguments), output, command=command)
    print(json.dumps(record["metrics"] | {"seconds": record["seconds"], "bytes": record["bytes"]}, indent=1))


if __name__ == "__main__":
    main()
