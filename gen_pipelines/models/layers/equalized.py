"""Layers of equalised learning rate: weights are stored with deviation one and scaled when they are used.

References: Karras et al. 2018, section 4.1, https://arxiv.org/abs/1710.10196
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .upfirdn import fir_filter, upfirdn2d

SLOPE = 0.2  # of the leaky rectifier, in all of StyleGAN


def leaky_relu_(x: Tensor, gain: float = math.sqrt(2), clamp: float | None = None) -> Tensor:
    """gain * leaky rectifier, of slope 0.2 below zero; a gain of sqrt(2) keeps the variance. Clamped to +-clamp where it is given.

    In place, as is what adds to a layer's output before it: on a CPU a new tensor of this size costs ten times the arithmetic.
    """
    x = F.leaky_relu_(x.mul_(gain), SLOPE)  # a positive gain commutes with it, and in this order autograd needs no copy
    return x if clamp is None else x.clamp(-clamp, clamp)


class EqualizedLinear(nn.Module):
    """(..., in) -> (..., out).

    Args:
        activation: "linear" or "lrelu".
        lr_multiplier: the learning rate of this layer, relative to that of the network: parameters are stored divided by it.
        bias_init: what the bias starts from, as it is used.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
        weight_init: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * (weight_init / lr_multiplier))
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier)) if bias else None
        self.activation, self.lr_multiplier = activation, lr_multiplier
        self.gain = lr_multiplier / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else (self.bias * self.lr_multiplier).to(x.dtype)
        x = F.linear(x, (self.weight * self.gain).to(x.dtype), bias)
        return leaky_relu_(x) if self.activation == "lrelu" else x


class EqualizedConv2d(nn.Module):
    """(B, in, H, W) -> (B, out, H, W), or (B, out, H / 2, W / 2) after a low-pass filter with down=2. Odd kernel sizes.

    Args:
        resample_taps: the filter before downsampling.
        clamp: limits the output, for half precision.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        down: int = 1,
        resample_taps: tuple[float, ...] = (1, 3, 3, 1),
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", fir_filter(resample_taps), persistent=False)
        self.activation, self.down, self.padding, self.clamp = activation, down, kernel_size // 2, clamp
        self.gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """`gain` multiplies the output (a branch of a residual block)."""
        weight = (self.weight * self.gain).to(x.dtype)
        if self.down > 1:
            taps = len(self.resample_filter)
            before, after = self.padding + (taps - self.down + 1) // 2, self.padding + (taps - self.down) // 2
            if weight.shape[-1] == 1:  # the filter and the downsampling commute with a pointwise convolution
                x = F.conv2d(upfirdn2d(x, self.resample_filter, down=self.down, padding=(before, after)), weight)
            else:
                x = F.conv2d(upfirdn2d(x, self.resample_filter, padding=(before, after)), weight, stride=self.down)
        else:
            x = F.conv2d(x, weight, padding=self.padding)
        if self.bias is not None:
            x = x.add_(self.bias.to(x.dtype).view(-1, 1, 1))
        clamp = None if self.clamp is None else self.clamp * gain
        if self.activation == "lrelu":
            return leaky_relu_(x, math.sqrt(2) * gain, clamp)
        x = x * gain if gain != 1.0 else x
        return x if clamp is None else x.clamp(-clamp, clamp)
