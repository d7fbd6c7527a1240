"""YUV 4:2:0 to RGB: by hand, against the plain PyTorch form and against FFmpeg's swscale, on every instruction set."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

from omnigrpo_kernels import extension
from omnigrpo_kernels.yuv_to_rgb import MATRICES, coefficients, yuv420_to_rgb, yuv420_to_rgb_reference

SIZES = [(2, 2), (4, 2), (2, 4), (8, 30), (16, 32), (6, 34), (38, 62), (10, 64), (18, 1282)]
"""Height and width; the vector code takes 32 pixels at a time, the last ones of a row twice."""
ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline")
_FLAGS = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
_FULL_RANGE = 2


@pytest.fixture(params=["widest", "baseline"])
def compiled(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The extension on one instruction set; afterwards it is what it was."""
    module = extension.load()
    before = module.cpu_isa()
    module.use_cpu_isa(before if request.param == "widest" else "baseline")
    yield module
    module.use_cpu_isa(before)


def random_planes(height: int, width: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((height, width), (height // 2, width // 2), (height // 2, width // 2))
    y, u, v = (torch.randint(256, size, generator=generator, dtype=torch.uint8) for size in sizes)
    return y, u, v


def natural_planes(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Luma over the whole range; chroma that keeps away from where swscale overflows."""
    y, u, v = random_planes(height, width)
    return y, (u.int() * 7 // 8).to(torch.uint8), v


def swscale(y: Tensor, u: Tensor, v: Tensor, *, matrix: int, is_full_range: bool) -> Tensor:
    frame = VideoFrame(y.shape[1], y.shape[0], "yuv420p")
    for plane, values in zip(frame.planes, (y, u, v), strict=True):
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        padded[:, : plane.width] = values
        plane.update(padded.tobytes())
    frame.colorspace = matrix
    if is_full_range:
        frame.color_range = _FULL_RANGE
    rgb = VideoReformatter().reformat(frame, format="rgb24", interpolation=_FLAGS)
    return torch.from_numpy(rgb.to_ndarray())


@pytest.mark.parametrize(
    ("yuv", "rgb"),
    [
        ((16, 128, 128), (0, 0, 0)),
        ((235, 128, 128), (255, 255, 255)),
        ((126, 128, 128), (128, 128, 128)),
        ((81, 90, 240), (254, 0, 0)),  # Red of BT.601, by the matrix's own decimals 254.4, -0.3, 0.2.
        ((41, 240, 110), (0, 0, 255)),
    ],
)
def test_a_plain_colour(compiled: ModuleType, yuv: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    y, u, v = (
        torch.full(size, value, dtype=torch.uint8)
        for size, value in zip(((2, 2), (1, 1), (1, 1)), yuv, strict=True)
    )
    image = yuv420_to_rgb(y, u, v, matrix=6, is_full_range=False)
    assert (image.int() - torch.tensor(rgb)).abs().max() <= 1
    assert (image == image[0, 0]).all()


def test_a_pixel_between_chroma_samples(compiled: ModuleType) -> None:
    """Full range, and no red: the blue channel of mid-grey is 128 + 1.772 (u / 16 - 128)."""
    y, v = torch.full((4, 4), 128, dtype=torch.uint8), torch.full((2, 2), 128, dtype=torch.uint8)
    u = torch.tensor([[128, 144], [160, 128]], dtype=torch.uint8)
    image = yuv420_to_rgb(y, u, v, matrix=6, is_full_range=True)
    weighted = (9 * 128 + 3 * 144 + 3 * 160 + 128) / 16
    assert abs(int(image[1, 1, 2]) - (128 + 1.772 * (weighted - 128))) <= 0.6
    assert abs(int(image[0, 0, 2]) - 128) <= 0.6
    assert abs(int(image[0, 3, 2]) - (128 + 1.772 * 16)) <= 0.6


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("is_full_range", [False, True], ids=["video", "full"])
def test_equals_the_reference(compiled: ModuleType, height: int, width: int, is_full_range: bool) -> None:
    planes = random_planes(height, width)
    for matrix in MATRICES:
        expected = yuv420_to_rgb_reference(*planes, matrix=matrix, is_full_range=is_full_range)
        assert torch.equal(yuv420_to_rgb(*planes, matrix=matrix, is_full_range=is_full_range), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 30), (16, 32), (38, 62), (18, 1282)])
@pytest.mark.parametrize("matrix", sorted(MATRICES))
@pytest.mark.parametrize("is_full_range", [False, True], ids=["video", "full"])
def test_equals_swscale(
    compiled: ModuleType, height: int, width: int, matrix: int, is_full_range: bool
) -> None:
    planes = natural_planes(height, width)
    expected = swscale(*planes, matrix=matrix, is_full_range=is_full_range)
    assert torch.equal(yuv420_to_rgb(*planes, matrix=matrix, is_full_range=is_full_range), expected)


def test_white_with_much_blue_stays_blue(compiled: ModuleType) -> None:
    """Where swscale's 32 bits overflow."""
    y, chroma = torch.full((8, 40), 255, dtype=torch.uint8), torch.full((4, 20), 255, dtype=torch.uint8)
    image = yuv420_to_rgb(y, chroma, torch.full_like(chroma, 128), matrix=1, is_full_range=False)
    assert (image[..., 2] == 255).all()


@pytest.mark.parametrize("width", [2, 30, 32, 46, 96])
def test_reads_padded_rows_and_writes_nothing_but_the_slice(compiled: ModuleType, width: int) -> None:
    planes = random_planes(6, width)
    padded = [torch.nn.functional.pad(plane, (0, 13), value=77)[:, : plane.shape[1]] for plane in planes]
    frames = torch.full((3, 6, width, 3), 201, dtype=torch.uint8)
    result = yuv420_to_rgb(*padded, matrix=1, is_full_range=False, out=frames[1])
    assert result.data_ptr() == frames[1].data_ptr()
    assert torch.equal(frames[1], yuv420_to_rgb_reference(*planes, matrix=1, is_full_range=False))
    assert (frames[0] == 201).all()
    assert (frames[2] == 201).all()


def test_every_instruction_set_gives_the_same() -> None:
    module, planes = extension.load(), random_planes(34, 100)
    before, images = module.cpu_isa(), {}
    for isa in ISAS[ISAS.index(before) :]:
        module.use_cpu_isa(isa)
        images[isa] = yuv420_to_rgb(*planes, matrix=9, is_full_range=True)
    module.use_cpu_isa(before)
    assert all(torch.equal(image, images["baseline"]) for image in images.values())


def test_coefficients_are_those_of_the_standard() -> None:
    """BT.709: 1.164 and 1.793, -0.213, -0.533, 2.112, with 13 bits behind the point."""
    offset, *rest = coefficients(1, is_full_range=False)
    assert offset == 256
    assert [round(value / (1 << 13), 3) for value in rest] == [1.164, 1.793, -0.213, -0.533, 2.112]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_HW": torch.zeros(5, 8, dtype=torch.uint8)}, "even"),
        ({"y_HW": torch.zeros(8, dtype=torch.uint8)}, "even"),
        ({"u_hw": torch.zeros(4, 3, dtype=torch.uint8)}, r"u_hw must be uint8 \[4, 4\]"),
        ({"v_hw": torch.zeros(4, 4)}, "v_hw must be uint8"),
        ({"v_hw": torch.zeros(4, 4, dtype=torch.uint8).t()}, "dense rows"),
        ({"out": torch.zeros(8, 8, 4, dtype=torch.uint8)}, "out must be uint8"),
        ({"out": torch.zeros(8, 8, 6, dtype=torch.uint8)[..., :3]}, "contiguous"),
        ({"matrix": 8}, "matrix must be one of"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    y, u, v = random_planes(8, 8)
    arguments = {"y_HW": y, "u_hw": u, "v_hw": v, "matrix": 1, "is_full_range": False} | changes
    with pytest.raises(ValueError, match=message):
        yuv420_to_rgb(**arguments)
