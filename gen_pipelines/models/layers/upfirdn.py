"""Resampling with a filter: upsample by zero insertion, filter, downsample, as depthwise convolutions of plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def fir_filter(taps: Sequence[float] | Tensor = (1, 3, 3, 1)) -> Tensor:
    """A two-dimensional low-pass filter of sum one, float32: the outer product of `taps` (K,) with itself, or `taps` (K, K) as it is.

    Raises:
        ValueError: the taps are of other dimensions, or sum to zero.
    """
    if not isinstance(taps, Tensor):
        taps = torch.tensor(taps, dtype=torch.float32, device="cpu")  # never on the meta device, whose numbers cannot be checked
    taps = taps.float()
    if taps.ndim == 1:
        taps = torch.outer(taps, taps)
    if taps.ndim != 2 or not taps.sum():
        raise ValueError(f"fir_filter: shape {tuple(taps.shape)} and sum {taps.sum().item():g}; give (K,) or (K, K) taps of a sum above 0.")
    return taps / taps.sum()


def upfirdn2d(
    x: Tensor, taps: Tensor, up: int = 1, down: int = 1, padding: tuple[int, int] | tuple[int, int, int, int] = (0, 0), gain: float = 1.0
) -> Tensor:
    """Insert up - 1 zeros after every pixel, pad, convolve with `taps`, keep every `down`-th pixel.

    Args:
        x: shape (B, C, H, W), any floating dtype.
        taps: the filter, shape (kh, kw); true convolution, so it is not mirrored.
        padding: (before, after) for both axes, or (left, right, top, bottom), in pixels after upsampling; negative crops.
        gain: multiplies the output. up^2 keeps the mean of a picture that is upsampled.
    Returns: shape (B, C, H', W'), H' = (H up + top + bottom - kh) // down + 1.

    References: Karras et al. 2020, appendix B (the operation), https://arxiv.org/abs/1912.04958; Vaidyanathan 1993, section 4.1
    """
    left, right, top, bottom = padding if len(padding) == 4 else (*padding, *padding)
    channels, (height, width), (kh, kw) = x.shape[1], x.shape[2:], taps.shape
    kernel = (taps * gain).to(x).expand(channels, 1, kh, kw)
    if up == 1:
        if left == right >= 0 and top == bottom >= 0:
            return F.conv2d(x, kernel.flip((2, 3)), stride=down, padding=(top, left), groups=channels)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), kernel.flip((2, 3)), stride=down, groups=channels)
    # a transposed convolution with a stride is the whole convolution of the signal with its zeros: nothing is multiplied by zero
    x = F.conv_transpose2d(x, kernel, stride=up, groups=channels)
    size = (height * up + top + bottom - kh + 1, width * up + left + right - kw + 1)
    left, top = left - kw + 1, top - kh + 1
    x = F.pad(x, (left, size[1] - x.shape[3] - left, top, size[0] - x.shape[2] - top))
    return x[:, :, ::down, ::down] if down > 1 else x


def upsample2d(x: Tensor, taps: Tensor, factor: int = 2) -> Tensor:
    """(B, C, H, W) -> (B, C, factor H, factor W), means kept."""
    before, after = (len(taps) + factor - 1) // 2, (len(taps) - factor) // 2
    return upfirdn2d(x, taps, up=factor, padding=(before, after), gain=factor**2)


def downsample2d(x: Tensor, taps: Tensor, factor: int = 2) -> Tensor:
    """(B, C, H, W) -> (B, C, H / factor, W / factor)."""
    return upfirdn2d(x, taps, down=factor, padding=((len(taps) - factor + 1) // 2, (len(taps) - factor) // 2))
