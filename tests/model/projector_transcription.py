"""The visual projector, one clip and one frame at a time, from its definition."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def _norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Over the channels, which come first: [C, Y, X]."""
    centred = x - x.mean(0)
    scaled = centred / (centred.square().mean(0) + 1e-5).sqrt()
    return scaled * weights[f"{name}.bn.weight"][:, None, None] + weights[f"{name}.bn.bias"][:, None, None]


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("oi,iyx->oyx", weight[:, :, 0, 0], x)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    padded = functional.pad(x, (1, 1, 1, 1))
    height, width = x.shape[1:]
    out = torch.zeros_like(x)
    for dy in range(3):
        for dx in range(3):
            out += weight[:, 0, dy, dx][:, None, None] * padded[:, dy : dy + height, dx : dx + width]
    return out


def _block(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    shortcut = x
    if f"{name}.downsample.conv.weight" in w:
        shortcut = _norm(_pointwise(x, w[f"{name}.downsample.conv.weight"]), w, f"{name}.downsample")
    y = _silu(_norm(_pointwise(x, w[f"{name}.conv1.conv.weight"]), w, f"{name}.conv1"))
    y = _silu(_norm(_depthwise(y, w[f"{name}.conv2.conv.weight"]), w, f"{name}.conv2"))
    mean = y.mean((1, 2))
    hidden = _silu(w[f"{name}.se.fc1.weight"][:, :, 0, 0] @ mean + w[f"{name}.se.fc1.bias"])
    gate = 1 / (1 + torch.exp(-(w[f"{name}.se.fc2.weight"][:, :, 0, 0] @ hidden + w[f"{name}.se.fc2.bias"])))
    y = _norm(_pointwise(y * gate[:, None, None], w[f"{name}.conv3.conv.weight"]), w, f"{name}.conv3")
    return _silu(y + shortcut)


def mlp_with_gelu(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    hidden = x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]


def conv_branch(clip: Tensor, w: dict[str, Tensor], branch: str) -> Tensor:
    """As the reference writes it: time padded on both sides, the ninth of eight steps dropped."""
    grid = math.isqrt(clip.shape[1])
    frames = []
    for frame in clip:
        x = frame.T.reshape(-1, grid, grid)
        for block in ("b1", "b2"):
            x = _block(x, w, f"s1_{branch}.{block}")
        frames.append(x)
    volume = torch.stack(frames, 1)[None]
    weight, bias = w[f"sampler_{branch}.0.weight"], w[f"sampler_{branch}.0.bias"]
    sampled = _silu(functional.conv3d(volume, weight, bias, stride=(1, 2, 2), padding=(1, 0, 0)))[0, :, :-1]
    rows = []
    for t in range(len(clip)):
        x = sampled[:, t]
        for block in ("b1", "b2"):
            x = _block(x, w, f"s2_{branch}.{block}")
        rows += [x[:, y, z] for y in range(grid // 2) for z in range(grid // 2)]
    return mlp_with_gelu(torch.stack(rows), w, f"readout_{branch}")


def face_branch(clip: Tensor, w: dict[str, Tensor]) -> Tensor:
    grid = math.isqrt(clip.shape[1])
    images = mlp_with_gelu(clip, w, "mlp_2xgelu_face").reshape(len(clip), grid, grid, -1).permute(0, 3, 1, 2)
    halved = functional.interpolate(images, size=(grid // 2, grid // 2), mode="bilinear")
    return halved.permute(0, 2, 3, 1).flatten(0, 2)


def projected(clip: Tensor, gate: Tensor, w: dict[str, Tensor]) -> Tensor:
    """One clip's visual rows."""
    branches = (conv_branch(clip, w, "video"), conv_branch(clip, w, "body"), face_branch(clip, w))
    return torch.stack([p * branch for p, branch in zip(gate, branches, strict=True)]).sum(0)
