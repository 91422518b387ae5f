"""Adaptive discriminator augmentation: pictures are changed before the discriminator sees them, as often as it overfits.

References: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", https://arxiv.org/abs/2006.06676 (section 3;
appendix B: the transformations and their ranges). Here the picture is resampled through a Kaiser low-pass filter at twice its size,
where the paper takes a wavelet's.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers.filter_design import lowpass
from ..models.layers.upfirdn import downsample2d, upsample2d
from .random import Generators, normal, uniform


class AdaptiveAugmentation(nn.Module):
    """Mirrors, turns, moves, scales and recolours, each with probability `strength`, which follows how sure the discriminator is.

    `strength` and the counts behind it are buffers: they are saved, resumed, and the same on every process.

    Args:
        target: the mean sign of the discriminator's logits on real pictures that is aimed at; None keeps `strength` where it is.
        strength: the probability of each transformation, at the start.
        images: how many real pictures it takes for the strength to go from 0 to 1.
        geometry, colour: which groups are used. Colours of a grey picture change in brightness and contrast alone.
    """

    def __init__(
        self, target: float | None = 0.6, strength: float = 0.0, images: int = 500_000, geometry: bool = True, colour: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= strength <= 1:
            raise ValueError(f"AdaptiveAugmentation: strength = {strength}; give a probability, 0 to 1.")
        self.target, self.images, self.geometry, self.colour = target, images, geometry, colour
        self.register_buffer("strength", torch.tensor(float(strength)))
        self.register_buffer("signs", torch.zeros(2))  # (sum of signs, number of logits) since the last adjustment
        taps = lowpass(12, 0.5, 0.4, 2.0)
        self.register_buffer("taps", torch.outer(taps, taps), persistent=False)

    # ------------------------------------------------------------------------------------------------------------------ strength

    @torch.no_grad()
    def watch(self, real_logits: Tensor) -> None:
        """Count the signs of the logits of real pictures, any shape."""
        self.signs += torch.stack([real_logits.sign().sum(), torch.tensor(float(real_logits.numel()), device=real_logits.device)])

    @torch.no_grad()
    def adjust(self) -> None:
        """Move the strength by what all processes have counted; once per discriminator update."""
        signs = self.signs.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(signs)
        if self.target is not None and signs[1] > 0:
            direction = torch.sign(signs[0] / signs[1] - self.target)
            self.strength.add_(direction * signs[1] / self.images).clamp_(0, 1)
        self.signs.zero_()

    # ------------------------------------------------------------------------------------------------------------- the pictures

    def forward(self, x: Tensor, random: Generators = None) -> Tensor:
        """Pictures (B, C, H, W), differentiably changed; sample i's numbers come from generator i."""
        batch = len(x)
        chance = uniform((batch, 12), random, x.device)
        size = normal((batch, 14), random, x.device)
        happens = (chance < self.strength).to(x.dtype)                                                 # (B, 12)
        if self.geometry:
            x = self._move(x, happens, size)
        return self._recolour(x, happens, size) if self.colour else x

    def _move(self, x: Tensor, happens: Tensor, size: Tensor) -> Tensor:
        """All geometric changes as one map of the plane, sampled once."""
        batch, channels, height, width = x.shape
        mirror, quarter, whole, scale, turn, stretch, shift = (happens[:, i] for i in range(7))
        maps = torch.eye(3, device=x.device).repeat(batch, 1, 1)
        fraction = torch.erf(size / math.sqrt(2)) / 2 + 0.5  # uniform on (0, 1)
        maps = maps @ _scaling(1 - 2 * mirror * (fraction[:, 0] < 0.5).float(), torch.ones_like(mirror))
        maps = maps @ _rotation(math.pi / 2 * quarter * (fraction[:, 1] * 4).floor())
        # whole pixels, up to an eighth of the picture
        steps = [(whole * (2 * fraction[:, i] - 1) * n / 8).round() * 2 / n for i, n in ((2, width), (3, height))]
        maps = maps @ _translation(*steps)
        factor = torch.exp2(0.2 * scale * size[:, 4])
        maps = maps @ _scaling(factor, factor)
        maps = maps @ _rotation(math.pi * turn * (2 * fraction[:, 5] - 1))
        factor = torch.exp2(0.2 * stretch * size[:, 6])
        maps = maps @ _scaling(factor, 1 / factor)
        maps = maps @ _translation(2 * 0.125 * shift * size[:, 12], 2 * 0.125 * shift * size[:, 13])
        margin = max(height, width) // 2
        wide = F.pad(x, (margin,) * 4, mode="reflect" if margin < min(height, width) else "replicate")
        wide = upsample2d(wide, self.taps)                                                             # (B, C, 2 (H + 2 m), ...)
        # the map is in units of the picture's half; the padded picture is larger
        ratio = torch.tensor([width / (width + 2 * margin), height / (height + 2 * margin)], device=x.device)
        grid = F.affine_grid((maps[:, :2] * ratio[:, None]).to(x.dtype), [batch, channels, 2 * height, 2 * width], align_corners=False)
        moved = F.grid_sample(wide, grid, padding_mode="zeros", align_corners=False)
        changed = happens[:, :7].amax(1).view(-1, 1, 1, 1) > 0
        return torch.where(changed, downsample2d(moved, self.taps), x)  # what is not moved is not filtered either

    def _recolour(self, x: Tensor, happens: Tensor, size: Tensor) -> Tensor:
        """Brightness, contrast and, in colour, inverted luma, hue and saturation, as one affine map of the colours."""
        batch, channels = x.shape[:2]
        brightness, contrast, luma, hue, saturation = (happens[:, i] for i in range(7, 12))
        maps = torch.eye(4, device=x.device).repeat(batch, 1, 1)
        maps[:, :3, 3] = 0.2 * (brightness * size[:, 7])[:, None]
        factor = torch.exp2(0.5 * contrast * size[:, 8])
        maps = maps * torch.stack([factor, factor, factor, torch.ones_like(factor)], 1)[:, :, None]
        axis = torch.full((3,), 1 / math.sqrt(3), device=x.device)
        along = torch.outer(axis, axis)
        if channels == 3:
            invert = luma * (size[:, 9] < 0).float()
            maps = _colour(torch.eye(3, device=x.device) - 2 * along * invert[:, None, None]) @ maps
            angle = math.pi * hue * torch.erf(size[:, 10] / math.sqrt(2))
            cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=x.device) / math.sqrt(3)
            turn = angle.cos()[:, None, None] * (torch.eye(3, device=x.device) - along) + angle.sin()[:, None, None] * cross + along
            maps = _colour(turn) @ maps
            factor = torch.exp2(saturation * size[:, 11])
            maps = _colour(along + (torch.eye(3, device=x.device) - along) * factor[:, None, None]) @ maps
            return torch.einsum("bij,bjhw->bihw", maps[:, :3, :3].to(x.dtype), x) + maps[:, :3, 3, None, None].to(x.dtype)
        grey = maps[:, :3].mean(1)
        return x * grey[:, :3].sum(1)[:, None, None, None].to(x.dtype) + grey[:, 3, None, None, None].to(x.dtype)


def _stack(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _stack([[1 / x, zero, zero], [zero, 1 / y, zero], [zero, zero, one]])


def _rotation(angle: Tensor) -> Tensor:
    cosine, sine, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _stack([[cosine, -sine, zero], [sine, cosine, zero], [zero, zero, one]])


def _translation(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _stack([[one, zero, x], [zero, one, y], [zero, zero, one]])


def _colour(linear: Tensor) -> Tensor:
    """(B, 3, 3) -> (B, 4, 4)."""
    whole = torch.eye(4, device=linear.device).repeat(len(linear), 1, 1)
    whole[:, :3, :3] = linear
    return whole
