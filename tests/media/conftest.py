"""Fixtures that write clips, and the decoders that the tests of clips run over."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

sys.path.append(
    str(Path(__file__).parent)
)  # tests/ is no package: its modules find each other as scripts do.

from clip_files import ClipRecipe, read_numbers, write_clip
from dali_at_hand import require_dali

from omnigrpo.media.decode import decode as decode_clips
from omnigrpo.schema import DecodedBatch


@pytest.fixture
def clip_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a clip in this test's directory: ``clip_file("name.mp4", num_frames=3)``."""

    def write(name: str = "clip.mp4", **changes: object) -> Path:
        return write_clip(tmp_path / name, ClipRecipe(**changes))  # type: ignore[arg-type]

    return write


@pytest.fixture
def frame_numbers() -> Callable[[Tensor], list[int]]:
    """The function that reads the numbers of decoded frames."""
    return read_numbers


@pytest.fixture(params=["pyav", "both"])
def decode(request: pytest.FixtureRequest) -> Callable[..., DecodedBatch]:
    """``omnigrpo.media.decode.decode``: by PyAV alone, and by DALI's operators for the CPU besides."""
    if request.param == "both":
        require_dali()
    return partial(decode_clips, decoder=request.param)
