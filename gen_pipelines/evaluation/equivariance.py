"""How well a StyleGAN moves and turns with its input: EQ-T and EQ-R, in decibels.

References: Karras et al. 2021, "Alias-Free Generative Adversarial Networks", section 2.2 and appendix E, https://arxiv.org/abs/2106.12423
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Equivariance", "measure_equivariance", "moved_input", "resample"]

RADIUS, CUTOFF = 6, 0.4  # of the reconstruction filter: taps to each side, and cycles per pixel (0.5 is the sampling limit)


@dataclass(frozen=True)
class Equivariance:
    """Peak signal-to-noise ratios, in dB: `translation` is EQ-T (whole pixels), `rotation` EQ-R; `peak` is the range they refer to."""

    translation: float
    rotation: float
    samples: int
    peak: float


@torch.no_grad()
def measure_equivariance(
    network: nn.Module,
    samples: int = 64,
    batch_size: int = 4,
    generator: torch.Generator | None = None,
    labels: Tensor | None = None,
    max_shift: float = 1 / 8,
    peak: float | None = 2.0,
) -> Equivariance:
    """EQ-T and EQ-R of a styled generator: 10 log10(peak^2 / E (g(m z_0; w) - m g(z_0; w))^2) over motions m, styles w and valid pixels.

    EQ-T moves the input by as much as whole pixels of the picture, up to `max_shift` of its size along both axes, and shifts the picture.
    EQ-R turns it by any angle. There both pictures pass the same rotationally symmetric low-pass filter (the one of the unturned picture is
    evaluated at the turned places, so nothing is filtered twice): of a rotation, only frequencies inside the circle exist in both
    (appendix E.3; filters of another shape, so that numbers differ a little from published ones).

    StyleGAN3's input is moved by its `transform`. The learned constant of StyleGAN 1 and 2 is resampled (bicubic, border repeated), without
    the noise of the layers, which stays where it is.

    Args:
        network: `StyleGAN3Generator`, `StyleGAN2Generator` or `StyleGAN1Generator`.
        samples: styles; `batch_size` of them share a motion.
        generator: draws styles and motions, on the CPU.
        labels: (samples,), for a network with classes.
        peak: the range of the pictures, 2 in [-1, 1]; None measures it as sqrt(12) deviations of the pictures, which is 2 where they fill
            [-1, 1] evenly: for networks that are not trained, whose pictures may be faint.
    Raises:
        TypeError: a network without styles.
        ValueError: no samples; shifts that are not from 0 to 1/4.
    """
    if not hasattr(network, "synthesize"):
        raise TypeError(f"measure_equivariance: {type(network).__name__} has no styles; it is for the StyleGAN generators.")
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples = {samples}, batch_size = {batch_size}; give at least 1.")
    if not 0 <= max_shift <= 0.25:
        raise ValueError(f"max_shift = {max_shift}; give a part of the picture, from 0 to 0.25.")
    size, device = network.config.sample_size, next(network.parameters()).device
    errors, counts, moments = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    was_training = network.training
    network.eval()
    try:
        for first in range(0, samples, batch_size):
            count = min(batch_size, samples - first)
            z = torch.randn(count, network.config.z_dim, generator=generator).to(device)
            ws = network.map(z, None if labels is None else labels[first : first + count].to(device))
            still = network.synthesize(ws, "none").double()                                            # (B, C, H, W)
            moments += torch.stack([still.sum(), still.square().sum(), torch.tensor(float(still.numel()))]).cpu()

            dx, dy = ((torch.rand(2, generator=generator) * 2 - 1) * max_shift * size).round().int().tolist()
            with moved_input(network, torch.tensor([[1.0, 0.0, -dx / size], [0.0, 1.0, -dy / size], [0.0, 0.0, 1.0]])):
                moved = network.synthesize(ws, "none").double()
            here = moved[..., max(dy, 0) : size + min(dy, 0), max(dx, 0) : size + min(dx, 0)]
            there = still[..., max(-dy, 0) : size + min(-dy, 0), max(-dx, 0) : size + min(-dx, 0)]
            errors[0] += (here - there).square().sum().cpu()
            counts[0] += here.numel()

            angle = 2 * math.pi * torch.rand((), generator=generator).item()
            turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
            with moved_input(network, turn):
                turned = network.synthesize(ws, "none").double()
            here, valid = resample(turned, torch.eye(3))
            there, valid_there = resample(still, turn)
            valid = (valid & valid_there).expand_as(here)
            errors[1] += (here - there)[valid].square().sum().cpu()
            counts[1] += valid.sum().cpu()
    finally:
        network.train(was_training)
    if peak is None:
        variance = moments[1] / moments[2] - (moments[0] / moments[2]).square()
        peak = math.sqrt(12 * max(variance.item(), 1e-30))
    ratios = 10 * torch.log10(peak**2 / (errors / counts).clamp_min(1e-30))
    return Equivariance(ratios[0].item(), ratios[1].item(), samples, peak)


@contextlib.contextmanager
def moved_input(network: nn.Module, motion: Tensor) -> Iterator[None]:
    """A styled generator whose input signal is read at motion p instead of p; (3, 3), p = (x, y, 1), pixel centres from -0.5 to 0.5."""
    signal = getattr(getattr(network, "synthesis", None), "input", None)
    if signal is not None:
        before = signal.transform.clone()
        signal.transform.copy_(motion)
        try:
            yield
        finally:
            signal.transform.copy_(before)
        return
    constant = next(value for name, value in network.named_parameters() if name.split(".")[-1] == "const")
    before = constant.detach().clone()
    theta = torch.cat([motion[:2, :2], 2 * motion[:2, 2:]], 1).to(before)[None]                        # in [-1, 1]
    grid = F.affine_grid(theta, [1, *before.shape[-3:]], align_corners=False)
    sampled = F.grid_sample(before.reshape(1, *before.shape[-3:]), grid, "bicubic", "border", align_corners=False)
    with torch.no_grad():
        constant.copy_(sampled.reshape(before.shape))
    try:
        yield
    finally:
        with torch.no_grad():
            constant.copy_(before)


def resample(pictures: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, H, H), low-passed by a rotationally symmetric filter and read at motion p; and where that is valid, (1, 1, H, H).

    The filter is a jinc of cutoff 0.4 cycles per pixel under a radial Kaiser window of radius 6 pixels. Valid are places whose
    neighbourhood lies inside the picture.
    """
    size = pictures.shape[-1]
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], -1) @ motion.double().T                           # (H, W, 3)
    places = (places[..., :2] + 0.5) * size - 0.5                                                      # in pixels
    corner = places.floor()
    valid = ((corner >= RADIUS - 1) & (corner <= size - 1 - RADIUS)).all(-1)                           # (H, W)
    near = torch.arange(1 - RADIUS, RADIUS + 1, dtype=torch.float64)                                   # (2 r,)
    columns, rows = (corner[..., i : i + 1] + near for i in (0, 1))                                    # (H, W, 2 r)
    distance = torch.hypot((columns - places[..., :1])[..., None, :], (rows - places[..., 1:])[..., :, None])
    weights = _jinc(distance)                                                                          # (H, W, 2 r, 2 r)
    weights = (weights / weights.sum((-2, -1), keepdim=True)).to(pictures)
    index = rows.clamp(0, size - 1).long()[..., :, None] * size + columns.clamp(0, size - 1).long()[..., None, :]
    neighbours = pictures.flatten(2)[..., index.to(pictures.device)]                                   # (B, C, H, W, 2 r, 2 r)
    return (neighbours * weights).sum((-2, -1)), valid[None, None].to(pictures.device)


def _jinc(distance: Tensor) -> Tensor:
    """The kernel of an ideal circular low-pass, windowed; zero beyond the radius."""
    beta = 8.0
    window = torch.special.i0(beta * (1 - (distance / RADIUS).square()).clamp_min(0).sqrt()) * (distance < RADIUS)
    scaled = 2 * math.pi * CUTOFF * distance
    return torch.where(scaled > 1e-9, 2 * torch.special.bessel_j1(scaled) / scaled.clamp_min(1e-9), torch.ones_like(scaled)) * window
