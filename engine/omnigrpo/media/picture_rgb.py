"""A decoded picture as upright RGB.

Chroma is interpolated bilinearly, as DALI does on either device, so that both decoders give the same frames.
"""

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from omnigrpo.media.sampling import Colour

_FLAGS = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


class RgbConverter:
    """Converts the pictures of one clip; keeps swscale's tables from one to the next."""

    def __init__(self, colour: Colour) -> None:
        self._source = Colorspace.ITU601 if colour == "bt601" else None
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> Tensor:
        """uint8 RGB ``[height, width, 3]``; rotation is a counter-clockwise angle, quarter turns only."""
        rgb = self._reformatter.reformat(
            frame, format="rgb24", src_colorspace=self._source, interpolation=_FLAGS
        )
        image_HWC = np.rot90(rgb.to_ndarray(), k=round(frame.rotation / 90))
        return torch.from_numpy(np.ascontiguousarray(image_HWC))
