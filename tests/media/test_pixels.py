"""Pixels against transformers' SigLIP and CLIP processors.

Its Pillow backend runs here. Its torchvision backend needs torchvision; what that computes is written out below.
"""

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from omnigrpo.media.pixels import (
    Aspect,
    ClipAspect,
    _resize,
    _resize_in_float,
    clip_pixels,
    siglip_pixels,
)

ONE_STEP = 1 / 127.5
"""One step of an 8-bit image after normalisation to [-1, 1]."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_STEP = 1 / 255 / min(CLIP_STD)
"""One step of an 8-bit image in the colour that CLIP scales most."""

GREY = (127, 127, 127)
CLIP_BARS = (122, 116, 104)
"""``tuple(int(255 * mean) for mean in image_mean)``."""

SIZES = [
    (224, 224, 224),
    (240, 320, 224),
    (720, 1280, 224),
    (1280, 720, 224),
    (640, 480, 224),
    (333, 77, 96),
    (321, 200, 96),
    (60, 50, 96),
    (7, 8, 96),
    (1, 9, 96),
    (97, 97, 384),
    (225, 224, 224),
    (17, 2000, 224),
    (48, 96, 2),
    (1, 1, 96),
]
"""Height and width of a frame, side of the result."""

LAYOUT = r"frames must be uint8 \[frames, height, width, 3\], got"


def _frames(num_frames: int, height: int, width: int, kind: str = "noise") -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    if kind == "noise":
        return torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator)
    if kind == "edges":
        return _frames(num_frames, height, width) // 128 * 255
    rows = torch.linspace(0, 12, height)[:, None, None]
    columns = torch.linspace(0, 9, width)[None, :, None]
    waves = torch.sin(rows * columns + torch.arange(3)) * 127.5 + 127.5
    return waves.to(torch.uint8).expand(num_frames, -1, -1, -1).contiguous()


def _siglip_processor(size: int):
    processors = import_module("transformers.models.siglip.image_processing_pil_siglip")
    return processors.SiglipImageProcessorPil(size={"height": size, "width": size})


def _clip_processor(size: int, *, whole: bool):
    processors = import_module("transformers.models.clip.image_processing_pil_clip")
    square = {"height": size, "width": size}
    return processors.CLIPImageProcessorPil(
        size=square if whole else {"shortest_edge": size}, crop_size=square
    )


def _expand2square(image: Image.Image, colour: tuple[int, int, int] = GREY) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _images(frames: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame.numpy()) for frame in frames]


def _processed(images: list[Image.Image], size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack(_siglip_processor(size)(images=images)["pixel_values"]))


def _clip_processed(images: list[Image.Image], size: int, *, whole: bool) -> torch.Tensor:
    return torch.from_numpy(np.stack(_clip_processor(size, whole=whole)(images=images)["pixel_values"]))


def _padded(frames: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
    """Whole padded squares, as plainly as can be."""
    _, height, width, _ = frames.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = torch.tensor(colour, dtype=torch.uint8).repeat(len(frames), side, side, 1)
    square[:, top : top + height, left : left + width] = frames
    return square


def _torchvision_backend(frames: torch.Tensor, size: int, *, crop: bool, mean, std) -> torch.Tensor:
    """What transformers' TorchvisionBackend computes on a CPU, with torchvision's functions written out."""
    images = frames.permute(0, 3, 1, 2).contiguous()
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    if crop:
        scaled_long = int(size * long / short)
        new_size = (size, scaled_long) if height <= width else (scaled_long, size)
    else:
        new_size = (size, size)
    if new_size != (height, width):
        images = F.interpolate(images, size=new_size, mode="bicubic", align_corners=False, antialias=True)
    top, left = int((new_size[0] - size) / 2.0), int((new_size[1] - size) / 2.0)
    images = images[..., top : top + size, left : left + size]
    scale = 1.0 / (1 / 255)
    mean_C11 = (torch.tensor(mean) * scale).view(-1, 1, 1)
    std_C11 = (torch.tensor(std) * scale).view(-1, 1, 1)
    return images.to(torch.float32).sub_(mean_C11).div_(std_C11)


def _assert_within_two_steps(ours: torch.Tensor, expected: torch.Tensor, step: float = ONE_STEP):
    """At most 2/255 apart, and more than 1/255 only where rounding between the passes differs."""
    steps = (ours - expected).abs() / step
    assert steps.max() <= 2.001
    assert (steps > 1.5).float().mean() <= 0.005
    assert steps.mean() <= 0.25


@pytest.mark.parametrize("kind", ["noise", "waves"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (224, 224, 224),
        (240, 320, 224),
        (720, 1280, 224),
        (640, 480, 224),
        (60, 50, 96),
        (1, 9, 96),
        (97, 97, 384),
    ],
)
def test_stretch_equals_the_siglip_processor(height: int, width: int, size: int, kind: str):
    frames = _frames(2, height, width, kind)
    expected = _processed(_images(frames), size)
    ours = siglip_pixels(frames, image_size=size, aspect="stretch")
    assert ours.dtype == torch.float32
    assert ours.shape == (2, 3, size, size)
    assert ours.is_contiguous()
    _assert_within_two_steps(ours, expected)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(240, 320, 224), (321, 200, 96), (7, 8, 96), (96, 96, 96)]
)
def test_pad_equals_expand2square_then_the_processor(height: int, width: int, size: int):
    frames = _frames(2, height, width, "waves")
    expected = _processed([_expand2square(image) for image in _images(frames)], size)
    ours = siglip_pixels(frames, image_size=size, aspect="pad")
    _assert_within_two_steps(ours, expected)


def test_a_narrow_frame_equals_the_processor_where_nothing_clips():
    """Pillow 13 resizes narrow frames vertically first; noise would clip between the passes."""
    frames = _frames(1, 333, 77, "waves") // 2 + 64
    expected = _processed(_images(frames), 96)
    _assert_within_two_steps(siglip_pixels(frames, image_size=96, aspect="stretch"), expected)


def test_bars_are_grey_127_and_lie_above_and_below_a_wide_frame():
    pixels = siglip_pixels(torch.zeros(1, 48, 96, 3, dtype=torch.uint8), image_size=96, aspect="pad")
    grey = torch.tensor(127 / 127.5 - 1)
    assert torch.allclose(pixels[0, :, :20], grey.expand(3, 20, 96))
    assert torch.allclose(pixels[0, :, -20:], grey.expand(3, 20, 96))
    assert torch.equal(pixels[0, :, 30:66], torch.full((3, 36, 96), -1.0))


@pytest.mark.parametrize("aspect", ["pad", "stretch"])
def test_square_frames_of_the_right_size_are_only_normalised(aspect: Aspect):
    frames = _frames(3, 96, 96)
    expected = (frames.permute(0, 3, 1, 2).float() - 127.5) / 127.5
    assert torch.equal(siglip_pixels(frames, image_size=96, aspect=aspect), expected)


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("aspect", ["pad", "stretch"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_siglip_equals_the_torchvision_backend_exactly(
    height: int, width: int, size: int, aspect: Aspect, kind: str
):
    frames = _frames(2, height, width, kind)
    whole = _padded(frames, GREY) if aspect == "pad" else frames
    expected = _torchvision_backend(whole, size, crop=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.equal(siglip_pixels(frames, image_size=size, aspect=aspect), expected)


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_clip_equals_the_torchvision_backend_exactly(
    height: int, width: int, size: int, aspect: ClipAspect, kind: str
):
    frames = _frames(2, height, width, kind)
    whole = _padded(frames, CLIP_BARS) if aspect == "pad" else frames
    expected = _torchvision_backend(whole, size, crop=aspect == "crop", mean=CLIP_MEAN, std=CLIP_STD)
    ours = clip_pixels(frames, image_size=size, aspect=aspect)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(224, 224, 224), (240, 320, 224), (721, 480, 224), (60, 50, 96), (97, 97, 336)],
)
@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
def test_clip_equals_the_clip_processor(height: int, width: int, size: int, aspect: ClipAspect):
    frames = (
        _frames(2, height, width, "waves") // 2 + 64
    )  # Pillow clips between its passes; nothing may clip.
    images = _images(frames)
    if aspect == "pad":
        images = [_expand2square(image, CLIP_BARS) for image in images]
    expected = _clip_processed(images, size, whole=aspect != "crop")
    ours = clip_pixels(frames, image_size=size, aspect=aspect)
    _assert_within_two_steps(ours, expected, CLIP_STEP)


def test_clip_crops_to_224_by_default():
    frames = _frames(1, 100, 300, "waves")
    assert torch.equal(clip_pixels(frames), clip_pixels(frames, image_size=224, aspect="crop"))


@pytest.mark.parametrize("aspect", ["pad", "stretch"])
def test_clips_of_several_sizes_in_one_call(aspect: Aspect):
    clips = [_frames(2, 50, 70), _frames(1, 70, 50), _frames(3, 96, 96), _frames(1, 50, 70, "waves")]
    together = siglip_pixels(clips, image_size=96, aspect=aspect)
    alone = [siglip_pixels(clip, image_size=96, aspect=aspect) for clip in clips]
    assert together.shape == (7, 3, 96, 96)
    assert torch.equal(together, torch.cat(alone))
    alone = [clip_pixels(clip, image_size=96) for clip in clips]
    assert torch.equal(clip_pixels(clips, image_size=96), torch.cat(alone))


@pytest.mark.parametrize("height", [50, 90])
def test_frames_that_are_no_block_of_memory(height: int):
    frames = _frames(2, 120, 140)[:, ::2, 3:73].flip(2)[:, :height]
    channels_first = frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for aspect in ("crop", "pad", "stretch"):
        expected = clip_pixels(frames.contiguous(), image_size=96, aspect=aspect)
        assert torch.equal(clip_pixels(frames, image_size=96, aspect=aspect), expected)
        assert torch.equal(clip_pixels(channels_first, image_size=96, aspect=aspect), expected)


def test_the_input_is_left_alone_and_frames_do_not_mix():
    frames = _frames(4, 50, 70)
    copy = frames.clone()
    together = siglip_pixels(frames, image_size=96, aspect="pad")
    alone = torch.cat([siglip_pixels(frame[None], image_size=96, aspect="pad") for frame in frames])
    assert torch.equal(together, alone)
    assert torch.equal(frames, copy)


@pytest.mark.parametrize(
    "pixels",
    [lambda frames: siglip_pixels(frames, image_size=8, aspect="pad"), clip_pixels],
    ids=["siglip", "clip"],
)
@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 8, 8, 3), LAYOUT),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), LAYOUT),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), LAYOUT),
        ([torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)], LAYOUT),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), r"frames must not be empty, got \[0, 8, 8, 3\]"),
        (torch.zeros(2, 0, 8, 3, dtype=torch.uint8), r"frames must not be empty, got \[2, 0, 8, 3\]"),
        ([], "there are no clips"),
    ],
    ids=["float", "no frame axis", "channels first", "second clip", "no frames", "no height", "no clips"],
)
def test_other_frames_are_refused(
    pixels: Callable[..., torch.Tensor], frames: torch.Tensor | list[torch.Tensor], message: str
):
    with pytest.raises(ValueError, match=message):
        pixels(frames)


def test_an_unknown_aspect_is_refused():
    with pytest.raises(ValueError, match="aspect must be 'pad' or 'stretch', got 'crop'"):
        siglip_pixels(_frames(1, 8, 8), image_size=8, aspect="crop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aspect must be 'crop', 'pad' or 'stretch', got 'squash'"):
        clip_pixels(_frames(1, 8, 8), image_size=8, aspect="squash")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 0, -3])
def test_a_side_below_two_pixels_is_refused(size: int):
    with pytest.raises(ValueError, match=f"image_size must be at least 2 pixels, got {size}"):
        clip_pixels(_frames(1, 8, 8), image_size=size)


@pytest.mark.gpu
def test_clips_on_two_devices_are_refused():
    clips = [_frames(1, 8, 8), _frames(1, 8, 8).cuda()]
    with pytest.raises(ValueError, match="the clips must lie on one device, got cpu, cuda:0"):
        clip_pixels(clips)
    assert clip_pixels(clips, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("kind", ["noise", "edges", "waves"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_float_passes_are_within_two_steps_of_the_uint8_kernel(height: int, width: int, size: int, kind: str):
    """What devices other than the CPU do, done on the CPU."""
    frames_FCHW = _frames(1, height, width, kind).permute(0, 3, 1, 2)
    steps = (_resize_in_float(frames_FCHW, size, size) - _resize(frames_FCHW, size, size).float()).abs()
    assert steps.max() <= 2
    assert (steps > 0).float().mean() <= 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["noise", "edges", "waves"])
@pytest.mark.parametrize("aspect", ["crop", "pad", "stretch"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_cuda_is_within_two_steps_of_the_cpu(
    height: int, width: int, size: int, aspect: ClipAspect, kind: str
):
    frames = _frames(2, height, width, kind)
    expected = clip_pixels(frames, image_size=size, aspect=aspect)
    ours = clip_pixels(frames, image_size=size, aspect=aspect, device="cuda")
    assert ours.device.type == "cuda"
    std_C11 = torch.tensor(CLIP_STD).view(3, 1, 1)
    steps = (ours.cpu() - expected).abs() * std_C11 * 255
    assert steps.max() <= 2.001
    assert (steps > 0.5).float().mean() <= 0.02
    if aspect != "crop":
        twice = siglip_pixels([frames, frames.cuda()], image_size=size, aspect=aspect, device="cuda")
        assert torch.equal(twice[:2], twice[2:])
