"""Low-pass filters designed to a cutoff and a transition width: Kaiser windows, separable or radial."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kaiser_beta(taps: int, width: float, rate: float) -> float:
    """The shape of the window whose filter of `taps` taps has a transition band `width` wide, at sampling rate `rate`.

    References: Kaiser 1974; Oppenheim & Schafer 2009, eq. 7.75 and 7.76
    """
    attenuation = 2.285 * (taps - 1) * math.pi * width / (rate / 2) + 7.95
    if attenuation > 50:
        return 0.1102 * (attenuation - 8.7)
    return 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21) if attenuation > 21 else 0.0


def lowpass(taps: int, cutoff: float, width: float, rate: float, radial: bool = False) -> Tensor | None:
    """A low-pass filter of sum one, float32: (taps,) for both axes in turn, or (taps, taps) and rotationally symmetric.

    Args:
        taps: its length; 1 gives None, no filter.
        cutoff, width, rate: the cutoff frequency, the width of the transition band, the sampling rate, in one unit.
        radial: the jinc function instead of the product of two sincs (needed for equivariance to rotations).

    References: Karras et al. 2021, appendix C.1, https://arxiv.org/abs/2106.12423
    """
    if taps == 1:
        return None
    beta = kaiser_beta(taps, width, rate)
    at = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    window = torch.special.i0(beta * (1 - (2 * at / (taps - 1)).square()).clamp_min(0).sqrt())
    if not radial:
        ideal = torch.sinc(2 * cutoff / rate * at) * window
        return (ideal / ideal.sum()).float()
    x = at / rate
    r = torch.hypot(x[:, None], x[None, :])
    # at the centre the quotient has the limit pi cutoff, which an even number of taps never meets
    ideal = torch.special.bessel_j1(2 * cutoff * math.pi * r) / (math.pi * r.clamp_min(1e-300))
    ideal = torch.where(r > 0, ideal, torch.full_like(r, cutoff))
    ideal = ideal * torch.outer(window, window)
    return (ideal / ideal.sum()).float()
