"""The encoders' side of the omni forward against transformers' towers and plain modules, on the same weights.

SigLIP-B/16 and Whisper-large-v3's encoder with random weights, run as HumanOmni's code runs them: all hidden states
of SigLIP's 12 layers and its head, of which 11 layers are needed. Then the visual projector, and the text embedding
with the modalities' rows put in place. FLOPs counted are the useful ones; the ideal ratio is of the FLOPs done.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from encode_peers import TransformersAudio, TransformersVision, plain_projector, plain_rows
from encode_work import (
    audio_flops,
    projector_flops,
    projector_training_flops,
    vision_flops,
    whole_vision_flops,
)
from harness import Bench, Timing, Variant, arguments, parse, require_green
from omnigrpo.model.config import AudioConfig, DecoderConfig, GateConfig, HumanOmniConfig, tiny
from omnigrpo.model.humanomni import TEXT_ROWS, HumanOmni, interleave_rows
from omnigrpo.model.projectors import AllInOneSmall
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, ClipFeatures
from report import Check, paired_ratio

OWN_TESTS = tuple(
    f"tests/model/test_{name}.py" for name in ("towers", "tower_layer", "projectors", "humanomni")
)
SIGLIP, WHISPER, BOTH = "SigLIP", "Whisper", "both towers"
TARGETS = {"cpu": {SIGLIP: 1.08, WHISPER: 1.0}, "cuda": {BOTH: 1.3}}
"""At least: transformers' time over ours, by device."""
CLIPS = {"cpu": 1, "cuda": 8}
WHISPER_LAYERS = {"cpu": 4, "cuda": 32}
"""Layers are equal to one another, so that a few of the 32 stand for all where 32 take seconds."""
TEXT_TOKENS = (40, 4, 40)
"""Before, between and behind the modalities' rows: R1-Omni's 84."""
EQUAL = 1e-5
"""In float32; in bfloat16 the error against float32 is bounded by twice the peer's."""

Pair = tuple[Callable[[], object], Callable[[], object]]
"""Ours, theirs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(argv)
    require_green(OWN_TESTS)
    bench = Bench("encode", args, dtype=getattr(torch, args.dtype))
    torch.manual_seed(0)
    config = tiny() if args.smoke else real_config(args.whisper_layers)
    with bench.device:
        model = HumanOmni(config).eval().to(bench.dtype)
    bench.notes.append(
        f"{args.clips} clips of {config.vision.num_frames} frames and {config.audio.chunk_seconds} s; "
        f"{config.audio.num_layers} Whisper layers"
    )
    towers = {
        SIGLIP: compare_vision(bench, model, args.clips),
        WHISPER: compare_audio(bench, model, args.clips),
    }
    bench.checks += speed_checks(args.device, towers)
    compare_projectors(bench, model, args.clips)
    compare_rows(bench, model, args.clips)
    return bench.report()


def real_config(whisper_layers: int) -> HumanOmniConfig:
    """HumanOmni-0.5B's encoders, projectors and embedding; what does not run here has one layer."""
    return HumanOmniConfig(
        audio=AudioConfig(num_layers=whisper_layers),
        gate=GateConfig(num_layers=1),
        decoder=DecoderConfig(num_layers=1),
    )


def compare_vision(bench: Bench, model: HumanOmni, clips: int) -> tuple[Timing, Timing]:
    """Patch features of all clips, from pixels."""
    config = model.config.vision
    pixels = torch.randn(
        clips, config.num_frames, 3, config.image_size, config.image_size, device=bench.device
    )
    pixels = pixels.to(bench.dtype)
    with bench.device:
        peer = TransformersVision(model.model.vision_tower).eval().to(bench.dtype)

    def ours() -> Tensor:
        return _stacked([_vision(features) for features in model.encode(pixels, None)])

    bench.checks.append(exactness_check(bench, SIGLIP, ours(), peer, pixels))
    ideal = whole_vision_flops(config) / vision_flops(config)
    pair = (partial(model.encode, pixels, None), partial(_without_gradients, peer, pixels))
    return _compare(
        bench, f"{SIGLIP}, {clips} clips", pair, clips * vision_flops(config), "transformers", ideal
    )


def compare_audio(bench: Bench, model: HumanOmni, clips: int) -> tuple[Timing, Timing]:
    """Pooled features of all clips, from log-mel spectrograms."""
    config = model.config.audio
    mel = torch.randn(clips, config.num_mel_bins, config.num_mel_frames, device=bench.device).to(bench.dtype)
    with bench.device:
        peer = TransformersAudio(model.model.audio_tower).eval().to(bench.dtype)

    def ours() -> Tensor:
        return _stacked([_audio(features) for features in model.encode(None, mel)])

    bench.checks.append(exactness_check(bench, WHISPER, ours(), peer, mel))
    pair = (partial(model.encode, None, mel), partial(_without_gradients, peer, mel))
    section = f"{WHISPER}, {clips} clips, {config.num_layers} layers"
    return _compare(bench, section, pair, clips * audio_flops(config), "transformers")


def compare_projectors(bench: Bench, model: HumanOmni, clips: int) -> None:
    """Visual rows of all clips: forward, and with the gradients of all weights."""
    config, projector = model.config.vision, model.model.mm_projector
    shape = (clips, config.num_frames, config.grid**2, config.width)
    features = torch.randn(shape, device=bench.device).to(bench.dtype)
    gates = torch.full((clips, 3), 1 / 3, device=bench.device, dtype=bench.dtype)
    plain = _Plain(projector)
    with torch.no_grad():
        bench.checks.append(
            exactness_check(bench, "projector", projector(features, gates), plain, features, gates)
        )

    def with_gradients(module: nn.Module) -> None:
        module(features, gates).sum().backward()

    forward = (
        partial(_without_gradients, projector, features, gates),
        partial(_without_gradients, plain, features, gates),
    )
    training = (partial(with_gradients, projector), partial(with_gradients, plain))
    width = model.config.decoder.width
    flops, training_flops = (
        clips * projector_flops(config, width),
        clips * projector_training_flops(config, width),
    )
    _compare(bench, f"projector forward, {clips} clips", forward, flops, "plain")
    section = f"projector forward + backward, {clips} clips"
    _compare(bench, section, training, training_flops, "plain", prepare=projector.zero_grad)


def compare_rows(bench: Bench, model: HumanOmni, clips: int) -> None:
    """Prefix rows of all clips' prompts from ids and the modalities' rows, which lie ready."""
    width, vocabulary = model.config.decoder.width, model.config.decoder.vocab_size
    counts = {VIDEO_ROW: model.config.vision.num_tokens, AUDIO_ROW: model.config.audio.num_tokens}
    before, between, behind = (torch.randint(vocabulary, (count,)) for count in TEXT_TOKENS)
    video, audio = (torch.full((count,), row_id) for row_id, count in counts.items())
    ids_T = torch.cat([before, video, between, audio, behind]).repeat(clips)
    rows = {
        row_id: torch.randn(clips * count, width, device=bench.device).to(bench.dtype)
        for row_id, count in counts.items()
    }
    embedding = model.model.embed_tokens

    @torch.no_grad()
    def ours() -> Tensor:
        return interleave_rows(ids_T, {TEXT_ROWS: embedding(ids_T[ids_T >= 0].to(bench.device)), **rows})

    @torch.no_grad()
    def plain() -> Tensor:
        return plain_rows(ids_T.to(bench.device), embedding, rows)

    difference = float((ours().float() - plain().float()).abs().max())
    bench.checks.append(Check.at_most("prefix rows: |ours - plain|", difference, 0))
    _compare(bench, f"embedding and modality rows, {clips} prompts", (ours, plain), None, "plain")


@torch.no_grad()
def exactness_check(bench: Bench, name: str, ours: Tensor, peer: nn.Module, *inputs: Tensor) -> Check:
    """Equal in float32; else root mean square errors against the peer in float32. ``peer`` keeps its dtype."""
    theirs = peer(*inputs)
    if bench.dtype == torch.float32:
        return Check.at_most(f"{name}: |ours - theirs|", float((ours - theirs).abs().max()), EQUAL)
    exact = peer.float()(*(tensor.float() for tensor in inputs))
    peer.to(bench.dtype)
    mine, other = (float((x.float() - exact).square().mean().sqrt()) for x in (ours, theirs))
    return Check.at_most(f"{name}: error against float32 / theirs", mine / other, 2)


def speed_checks(device: str, towers: dict[str, tuple[Timing, Timing]]) -> list[Check]:
    """Transformers' time over ours, of each tower and of both, as far as the device has a target."""
    pairs = {name: (ours.seconds, theirs.seconds) for name, (ours, theirs) in towers.items()}
    sums = [tuple(map(sum, zip(*sides, strict=True))) for sides in zip(*pairs.values(), strict=True)]
    pairs[BOTH] = (sums[0], sums[1])
    return [
        Check.at_least(
            f"{name}: transformers' time / ours", paired_ratio(theirs, ours), TARGETS[device][name]
        )
        for name, (ours, theirs) in pairs.items()
        if name in TARGETS[device]
    ]


class _Plain(nn.Module):
    """The projector's weights, run the plain way."""

    def __init__(self, projector: AllInOneSmall) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, *inputs: Tensor) -> Tensor:
        """Visual rows."""
        return plain_projector(self.projector, *inputs)


def _compare(
    bench: Bench,
    section: str,
    pair: Pair,
    flops: float | None,
    peer: str,
    ideal: float | None = None,
    prepare: Callable[[], object] | None = None,
) -> tuple[Timing, Timing]:
    """One section of two rows, with the rate of each where FLOPs are counted."""
    variants = [
        Variant(name=name, run=run, flops=flops, prepare=prepare)
        for name, run in zip(("ours", peer), pair, strict=True)
    ]
    timings = bench.compare(section, variants, ideal_ratios=None if ideal is None else {peer: ideal})
    if flops is not None:
        bench.rows[-2:] = [
            replace(row, figures={"useful TFLOP/s": flops / row.median_seconds / 1e12})
            for row in bench.rows[-2:]
        ]
    return timings["ours"], timings[peer]


@torch.no_grad()
def _without_gradients(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs)


def _vision(features: ClipFeatures) -> Tensor:
    assert features.vision_FND is not None
    return features.vision_FND


def _audio(features: ClipFeatures) -> Tensor:
    assert features.audio_AD is not None
    return features.audio_AD


def _stacked(features: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(features))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--clips", type=int, help="clips of a step (default 1 on the CPU, 8 on CUDA)")
    parser.add_argument("--whisper-layers", type=int, help="of 32 (default 4 on the CPU, all on CUDA)")
    args = parse(parser, argv)
    args.clips = CLIPS[args.device] if args.clips is None else args.clips
    args.whisper_layers = WHISPER_LAYERS[args.device] if args.whisper_layers is None else args.whisper_layers
    for name in ("clips", "whisper_layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
