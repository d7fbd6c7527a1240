"""Pixels against transformers' SigLIP processor and a plain Pillow implementation of the padding."""

import numpy as np
import pytest
import torch
from PIL import Image

from omnigrpo.media.pixels import Aspect, siglip_pixels

ONE_STEP = 1 / 127.5
"""One step of an 8-bit image after normalisation to [-1, 1]."""


def _frames(num_frames: int, height: int, width: int, kind: str = "noise") -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    if kind == "noise":
        return torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator)
    rows = torch.linspace(0, 12, height)[:, None, None]
    columns = torch.linspace(0, 9, width)[None, :, None]
    waves = torch.sin(rows * columns + torch.arange(3)) * 127.5 + 127.5
    return waves.to(torch.uint8).expand(num_frames, -1, -1, -1).contiguous()


def _siglip_processor(size: int):
    processors = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    return processors.SiglipImageProcessorPil(size={"height": size, "width": size})


def _expand2square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _processed(images: list[Image.Image], size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack(_siglip_processor(size)(images=images)["pixel_values"]))


def _assert_within_two_steps(ours: torch.Tensor, expected: torch.Tensor):
    """At most 2/255 apart, and more than 1/255 only where rounding between the passes differs."""
    steps = (ours - expected).abs() / ONE_STEP
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
    expected = _processed([Image.fromarray(frame.numpy()) for frame in frames], size)
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
    expected = _processed([_expand2square(Image.fromarray(frame.numpy())) for frame in frames], size)
    ours = siglip_pixels(frames, image_size=size, aspect="pad")
    _assert_within_two_steps(ours, expected)


def test_a_narrow_frame_equals_the_processor_where_nothing_clips():
    """Pillow 13 resizes narrow frames vertically first; noise would clip between the passes."""
    frames = _frames(1, 333, 77, "waves") // 2 + 64
    expected = _processed([Image.fromarray(frame.numpy()) for frame in frames], 96)
    _assert_within_two_steps(siglip_pixels(frames, image_size=96, aspect="stretch"), expected)


def test_bars_are_grey_127_and_lie_above_and_below_a_wide_frame():
    pixels = siglip_pixels(torch.zeros(1, 48, 96, 3, dtype=torch.uint8), image_size=96, aspect="pad")
    grey = torch.tensor(127 / 127.5 - 1)
    assert torch.allclose(pixels[0, :, :20], grey.expand(3, 20, 96))
    assert torch.allclose(pixels[0, :, -20:], grey.expand(3, 20, 96))
    assert torch.equal(pixels[0, :, 30:66], torch.full((3, 36, 96), -1.0))


def test_square_frames_of_the_right_size_are_only_normalised():
    frames = _frames(3, 96, 96)
    expected = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    for aspect in ("pad", "stretch"):
        assert torch.equal(siglip_pixels(frames, image_size=96, aspect=aspect), expected)


def test_the_input_is_left_alone_and_frames_do_not_mix():
    frames = _frames(4, 50, 70)
    copy = frames.clone()
    together = siglip_pixels(frames, image_size=96, aspect="pad")
    alone = torch.cat([siglip_pixels(frame[None], image_size=96, aspect="pad") for frame in frames])
    assert torch.equal(together, alone)
    assert torch.equal(frames, copy)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 8, 8, 3),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["float", "no frame axis", "channels first"],
)
def test_other_layouts_are_refused(frames: torch.Tensor):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[frames, height, width, 3\], got"):
        siglip_pixels(frames, image_size=8, aspect="pad")


def test_an_unknown_aspect_is_refused():
    with pytest.raises(ValueError, match="aspect must be 'pad' or 'stretch', got 'crop'"):
        siglip_pixels(_frames(1, 8, 8), image_size=8, aspect="crop")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("aspect", ["pad", "stretch"])
def test_cuda_agrees_with_the_cpu(aspect: Aspect):
    frames = _frames(2, 240, 320, "waves")
    ours = siglip_pixels(frames, image_size=224, aspect=aspect, device="cuda").cpu()
    _assert_within_two_steps(ours, siglip_pixels(frames, image_size=224, aspect=aspect))
