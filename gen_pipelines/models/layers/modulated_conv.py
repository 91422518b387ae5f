"""Convolution whose input channels a style scales, and whose output it brings back to variance one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .upfirdn import upfirdn2d


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    demodulate: bool = True,
    up: int = 1,
    resample_filter: Tensor | None = None,
    padding: int | None = None,
    input_gain: Tensor | None = None,
) -> Tensor:
    """Weight modulation and demodulation.

    Scaling the input's channels by s and the output's by d_o = (sum_i s_i^2 sum_k w_oik^2 + 1e-8)^(-1/2) is the convolution with the
    weights d_o s_i w_oik of each sample, without ever making those: the norms are one matrix product of s^2 with the weights' squares
    summed over the taps.

    Args:
        x: shape (B, I, H, W).
        weight: shape (O, I, k, k), odd k.
        style: s, shape (B, I).
        up: 2 doubles the size: transposed convolution, then `resample_filter` with its gain of 4.
        padding: for up = 1; k // 2 by default.
        input_gain: multiplies the input after demodulation was computed (StyleGAN3's magnitudes), a scalar.
    Returns: shape (B, O, up H, up W).

    References: Karras et al. 2020, eq. 1 and 3, https://arxiv.org/abs/1912.04958
    """
    style, weight = style.float(), weight.float()
    if demodulate and x.dtype in (torch.float16, torch.bfloat16):
        # half precision overflows where weights and styles are large; demodulation cancels any scale of either
        weight = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
        style = style * style.square().mean(dim=1, keepdim=True).rsqrt()
    scale = style if input_gain is None else style * input_gain
    norm = ((style.square() @ weight.square().sum((2, 3)).T) + 1e-8).rsqrt() if demodulate else None
    if weight.shape[-1] == 1 and up == 1 and not padding:
        # pointwise, a sample's own weights are smaller than its picture: scaled, they are one matrix product and no pass over x
        weight = weight[:, :, 0, 0] * scale[:, None]                                                   # (B, O, I)
        weight = weight if norm is None else weight * norm[:, :, None]
        return (weight.to(x.dtype) @ x.flatten(2)).unflatten(2, x.shape[2:])
    x = x * scale.to(x.dtype)[:, :, None, None]
    weight = weight.to(x.dtype)
    if up == 1:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2 if padding is None else padding)
    else:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=up)
        # the filter centred on the upsampled grid: what is left over of kernel, filter and stride is cropped from both ends
        taps, kernel = len(resample_filter), weight.shape[-1]
        before = (taps + up - 1) // 2 - (kernel - 1 - kernel // 2)
        after = up - kernel + taps - 1 - before
        x = upfirdn2d(x, resample_filter, padding=(before, after), gain=up**2)
    if norm is None:
        return x
    norm = norm.to(x.dtype)[:, :, None, None]
    return x * norm if torch.is_grad_enabled() else x.mul_(norm)  # autograd needs both factors
