"""A pointwise non-linearity at a higher sampling rate, so that it makes no aliases."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .upfirdn import upfirdn2d


def filtered_lrelu(
    x: Tensor,
    up_filter: Tensor | None,
    down_filter: Tensor | None,
    bias: Tensor,
    up: int,
    down: int,
    padding: tuple[int, int],
    gain: float,
    slope: float,
    clamp: float | None,
) -> Tensor:
    """Bias, upsample, leaky ReLU, downsample: (B, C, H, W) -> (B, C, H', W').

    Args:
        up_filter, down_filter: (K,) for both axes in turn, (K, K), or None for none.
        padding: (before, after) of both axes, in pixels after upsampling.
        gain, slope, clamp: of the leaky ReLU: max(slope x, x) gain, then clipped to +-clamp.

    References: Karras et al. 2021, section 3.1 and figure 4b, https://arxiv.org/abs/2106.12423
    """
    x = x + bias.to(x.dtype)[:, None, None]
    x = _resample(x, up_filter, up=up, padding=padding, gain=up**2)
    x = (F.leaky_relu(x, slope) if slope != 1.0 else x) * gain
    x = x if clamp is None else x.clamp(-clamp, clamp)
    return _resample(x, down_filter, down=down)


def _resample(x: Tensor, taps: Tensor | None, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0), gain: float = 1.0) -> Tensor:
    if taps is None:
        taps = x.new_ones(1, 1)
    if taps.ndim == 2:
        return upfirdn2d(x, taps, up, down, padding, gain)
    return _along(_along(x, taps, up, down, padding, gain, vertical=False), taps, up, down, padding, gain, vertical=True)


def _along(x: Tensor, taps: Tensor, up: int, down: int, padding: tuple[int, int], gain: float, vertical: bool) -> Tensor:
    """One axis of a separable filter; the gain is shared between the axes."""
    batch, channels, height, width = x.shape
    kernel = (taps * gain**0.5).to(x)
    shape = (channels, 1, -1, 1) if vertical else (channels, 1, 1, -1)
    kernel = kernel.expand(channels, -1).reshape(shape)
    size, count = (height if vertical else width), len(taps)
    before, after = padding
    stride = (1, down) if not vertical else (down, 1)
    if up == 1:
        pad = (0, 0, before, after) if vertical else (before, after)
        return F.conv2d(F.pad(x, pad), kernel.flip((2, 3)), stride=stride, groups=channels)
    x = F.conv_transpose2d(x, kernel, stride=(up, 1) if vertical else (1, up), groups=channels)
    wanted = size * up + before + after - count + 1
    before = before - count + 1
    after = wanted - x.shape[2 if vertical else 3] - before
    x = F.pad(x, (0, 0, before, after) if vertical else (before, after))
    return x if down == 1 else (x[:, :, ::down] if vertical else x[:, :, :, ::down])
