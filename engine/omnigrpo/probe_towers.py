"""How much emotion frozen towers give away: a logistic regression on mean features of generated clips.

    python -m omnigrpo.probe_towers --data runs/demo/data --towers tiny_towers.safetensors

`data` is what `omnigrpo generate-data` wrote. The clips go through the engine's media path; each tower's
features are averaged over frames and positions. The figures say how far a cold start on a hundred clips and
training on a thousand can get, and that neither modality alone passes its bound.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.data.synthetic.emotions import LABELS
from omnigrpo.media.decode import decode
from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.media.pixels import siglip_pixels
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.model.checkpoint_format import load_towers
from omnigrpo.model.config import tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.schema import Modality, Prompt

VIEWS: dict[str, tuple[Modality, ...]] = {
    "video": ("video",),
    "audio": ("audio",),
    "both": ("video", "audio"),
}
TRAIN_SIZES = (80, 100, 300, 1000)
_BATCH_CLIPS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFeatures:
    """Mean features and labels of n clips."""

    video_ND: Tensor
    audio_ND: Tensor
    labels_N: Tensor
    """int64 index into LABELS."""

    def view(self, modalities: Sequence[Modality]) -> Tensor:
        """The features of some modalities side by side."""
        return torch.cat([self.video_ND if name == "video" else self.audio_ND for name in modalities], dim=1)


@torch.no_grad()
def probe_features(model: HumanOmni, prompts: Sequence[Prompt]) -> ProbeFeatures:
    """Decode and encode every clip, and average its features."""
    config, video, audio = model.config, [], []
    both: tuple[Modality, ...] = ("video", "audio")
    for start in range(0, len(prompts), _BATCH_CLIPS):
        clips = [prompt.clip for prompt in prompts[start : start + _BATCH_CLIPS]]
        pixels, mels = [], []
        sampling = SamplingConfig(num_frames=config.vision.num_frames)
        for item in decode(clips, [both] * len(clips), sampling).clips:
            if item.frames_FHWC is None or item.waveform is None:
                raise ValueError(f"the probe needs every clip, but {item.error}; generate the data again")
            pixels.append(siglip_pixels(item.frames_FHWC, image_size=config.vision.image_size, aspect="pad"))
            mels.append(
                whisper_log_mel(
                    item.waveform,
                    num_mel_bins=config.audio.num_mel_bins,
                    chunk_seconds=config.audio.chunk_seconds,
                )
            )
        for features in model.encode(torch.stack(pixels), torch.stack(mels)):
            assert features.vision_FND is not None
            assert features.audio_AD is not None
            video.append(features.vision_FND.float().mean(dim=(0, 1)))
            audio.append(features.audio_AD.float().mean(dim=0))
    return ProbeFeatures(
        video_ND=torch.stack(video),
        audio_ND=torch.stack(audio),
        labels_N=torch.tensor([LABELS.index(prompt.solution) for prompt in prompts]),
    )


def probe_accuracy(
    train_ND: Tensor, labels_N: Tensor, tests: Sequence[tuple[Tensor, Tensor]], *, penalty: float = 0.3
) -> list[float]:
    """Fit a ridge-penalised logistic regression and return its accuracy on each (features, labels) test set.

    ``penalty`` is divided by the number of clips, as for a fixed Gaussian prior.
    """
    mean_D, std_D = train_ND.mean(0), train_ND.std(0) + 1e-6
    inputs_ND = (train_ND - mean_D) / std_D
    weight_CD = torch.zeros(len(LABELS), inputs_ND.shape[1], requires_grad=True)
    bias_C = torch.zeros(len(LABELS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CD, bias_C], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs_ND @ weight_CD.T + bias_C, labels_N)
        loss = loss + penalty / len(labels_N) * weight_CD.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return [
            float((((x - mean_D) / std_D @ weight_CD.T + bias_C).argmax(1) == y).float().mean())
            for x, y in tests
        ]


def probe_table(
    train: ProbeFeatures, tests: dict[str, ProbeFeatures], sizes: Sequence[int] = TRAIN_SIZES
) -> dict[str, float]:
    """Accuracy in percent by ``<test>/<view>/<number of labelled clips>``; sizes beyond the data are left out."""
    table = {}
    for view, modalities in VIEWS.items():
        for size in (size for size in sizes if size <= len(train.labels_N)):
            fits = [(test.view(modalities), test.labels_N) for test in tests.values()]
            scores = probe_accuracy(train.view(modalities)[:size], train.labels_N[:size], fits)
            for name, score in zip(tests, scores, strict=True):
                table[f"{name}/{view}/{size}"] = round(100 * score, 1)
    return table


def probe(data: Path, towers: Path, *, sizes: Sequence[int] = TRAIN_SIZES) -> dict[str, float]:
    """Probe the tiny model with the given towers on a generated dataset: fit on ``rl``, test on the other two."""
    model = HumanOmni(tiny())
    model.init_weights(0)
    load_towers(model, towers)
    splits = {name: read_dataset(data / f"{name}.json", PromptStyle()) for name in ("rl", "heldout", "ood")}
    features = {name: probe_features(model, prompts) for name, prompts in splits.items()}
    return probe_table(features.pop("rl"), features, sizes)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Probe frozen towers on a generated dataset.")
    parser.add_argument(
        "--data", type=Path, required=True, help="directory written by `omnigrpo generate-data`"
    )
    parser.add_argument(
        "--towers", type=Path, required=True, help="weights written by omnigrpo.pretrain_towers"
    )
    arguments = parser.parse_args()
    print(json.dumps(probe(arguments.data, arguments.towers), indent=1))


if __name__ == "__main__":
    main()
