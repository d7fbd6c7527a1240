"""The trainable projectors: three visual branches fused into visual rows, and the audio MLP.

Images lie channels-last, as the towers' patch rows do: pointwise convolutions and the sampler are matrix products
of rows, and nothing is transposed between the towers and the decoder. The modules named ``conv`` hold weights in
the reference's shapes.

Shape suffixes: ``B`` clips, ``F`` frames, ``N`` patches of a frame, ``C`` tower width, ``D`` decoder width,
``Y``, ``X`` patch grid, ``V`` visual rows of a clip.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnigrpo.model.config import VisionConfig

STAGE_DEPTH = 2
SQUEEZE_RATIO = 0.25
CHANNEL_NORM_EPS = 1e-5


def mlp_2x_gelu(width_in: int, width_out: int) -> nn.Sequential:
    """Linear, exact GELU, Linear: the reference's ``mlp2x_gelu``."""
    return nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an image (timm's LayerNorm2d)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, image_BYXC: Tensor) -> Tensor:
        """Normalise over C at every place."""
        return functional.layer_norm(image_BYXC, self.weight.shape, self.weight, self.bias, CHANNEL_NORM_EPS)


class ConvNorm(nn.Module):
    """Convolution without bias, then ChannelNorm, then an optional SiLU; named as timm's ConvNormAct."""

    def __init__(
        self, channels_in: int, channels_out: int, *, kernel: int = 1, groups: int = 1, act: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in, channels_out, kernel, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = ChannelNorm(channels_out)
        self.act = act

    def forward(self, image_BYXC: Tensor) -> Tensor:
        """Keep the image's height and width."""
        if self.conv.kernel_size == (1, 1):
            image_BYXC = functional.linear(image_BYXC, self.conv.weight.flatten(1))
        else:
            image_BYXC = self.conv(image_BYXC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        image_BYXC = self.bn(image_BYXC)
        return functional.silu(image_BYXC) if self.act else image_BYXC


class SqueezeExcite(nn.Module):
    """Channel gates from the image's mean."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, image_BYXC: Tensor) -> Tensor:
        """Scale each channel by ``sigmoid(fc2(silu(fc1(mean))))``."""
        mean_BC = image_BYXC.mean((1, 2))
        hidden = functional.silu(functional.linear(mean_BC, self.fc1.weight.flatten(1), self.fc1.bias))
        gates_BC = functional.linear(hidden, self.fc2.weight.flatten(1), self.fc2.bias).sigmoid()
        return image_BYXC * gates_BC[:, None, None]


class Bottleneck(nn.Module):
    """RegNet bottleneck of ratio 1 with a depthwise 3x3 (timm's Bottleneck at group size 1)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels_in, channels_out, act=True)
        self.conv2 = ConvNorm(channels_out, channels_out, kernel=3, groups=channels_out, act=True)
        self.se = SqueezeExcite(channels_out, round(channels_in * SQUEEZE_RATIO))
        self.conv3 = ConvNorm(channels_out, channels_out, act=False)
        self.downsample = (
            ConvNorm(channels_in, channels_out, act=False) if channels_in != channels_out else None
        )

    def forward(self, image_BYXC: Tensor) -> Tensor:
        """Keep height and width; the shortcut is projected when the channel count changes."""
        shortcut = image_BYXC if self.downsample is None else self.downsample(image_BYXC)
        return functional.silu(self.conv3(self.se(self.conv2(self.conv1(image_BYXC)))) + shortcut)


class Stage(nn.Module):
    """Bottlenecks named ``b1``, ``b2`` (timm's RegStage)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        for index in range(STAGE_DEPTH):
            self.add_module(
                f"b{index + 1}", Bottleneck(channels_in if index == 0 else channels_out, channels_out)
            )

    def forward(self, image_BYXC: Tensor) -> Tensor:
        """Run the bottlenecks in order."""
        for block in self.children():
            image_BYXC = block(image_BYXC)
        return image_BYXC


class AllInOneSmall(nn.Module):
    """HumanOmni's ``all_in_one_small`` projector; all three branches see the same frames."""

    def __init__(self, config: VisionConfig, decoder_width: int) -> None:
        super().__init__()
        if config.grid % 2:
            raise ValueError(
                f"the visual projector halves the patch grid, got {config.grid} patches a side; "
                "choose image_size and patch_size with an even quotient"
            )
        self.grid = config.grid
        for branch in ("video", "body"):
            self.add_module(f"s1_{branch}", Stage(config.width, decoder_width))
            self.add_module(
                f"sampler_{branch}", nn.Sequential(nn.Conv3d(decoder_width, decoder_width, 2, (1, 2, 2)))
            )
            self.add_module(f"s2_{branch}", Stage(decoder_width, decoder_width))
            self.add_module(f"readout_{branch}", mlp_2x_gelu(decoder_width, decoder_width))
        self.mlp_2xgelu_face = mlp_2x_gelu(config.width, decoder_width)

    def forward(self, features_BFNC: Tensor, weights_B3: Tensor) -> Tensor:
        """Return the (video, body, face) branches' weighted sum, ``[B, V, D]``, V ordered (F, Y, X)."""
        video, body, face = weights_B3[:, :, None, None].unbind(1)
        fused_BVD = video * self._convolve(features_BFNC, "video")
        fused_BVD = torch.addcmul(fused_BVD, body, self._convolve(features_BFNC, "body"))
        return torch.addcmul(fused_BVD, face, self._pool(features_BFNC))

    def _convolve(self, features_BFNC: Tensor, branch: str) -> Tensor:
        """Stage, causal sampler over (previous frame, this frame) that halves the grid, stage, MLP."""
        clips = features_BFNC.shape[0]
        sampler = cast("nn.Conv3d", self.get_submodule(f"sampler_{branch}.0"))
        image = features_BFNC.flatten(0, 1).unflatten(1, (self.grid, self.grid))
        video_BFYXD = self.get_submodule(f"s1_{branch}")(image).unflatten(0, (clips, -1))
        video_BFYXD = functional.silu(_sample(video_BFYXD, sampler))
        image = self.get_submodule(f"s2_{branch}")(video_BFYXD.flatten(0, 1))
        rows_BVD = image.unflatten(0, (clips, -1)).flatten(1, 3)
        return self.get_submodule(f"readout_{branch}")(rows_BVD)

    def _pool(self, features_BFNC: Tensor) -> Tensor:
        """MLP per patch, then the mean of 2x2 patches (the reference's bilinear halving equals it).

        The mean is taken before the second linear layer, which commutes with it and then sees a quarter of the rows.
        """
        clips = features_BFNC.shape[0]
        first, activation, second = self.mlp_2xgelu_face
        image = activation(first(features_BFNC)).flatten(0, 1).unflatten(1, (self.grid, self.grid))
        halved = functional.avg_pool2d(image.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return second(halved.unflatten(0, (clips, -1)).flatten(1, 3))


def _sample(video_BFYXD: Tensor, conv: nn.Conv3d) -> Tensor:
    """The 2x2x2 convolution of strides (1, 2, 2) as one product; K is ordered (time, y, x, channel).

    The reference pads both ends of time and drops the last step: the same as a zero frame in front.
    """
    before = functional.pad(video_BFYXD, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    pairs_BFTYXD = torch.stack([before, video_BFYXD], dim=2)
    halves = pairs_BFTYXD.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    patches = halves.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
    return functional.linear(patches, conv.weight.permute(0, 2, 3, 4, 1).flatten(1), conv.bias)
