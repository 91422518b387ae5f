"""What editing a picture needs besides drawing one: its pixels and latents, where the loop begins, the way back to more noise."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..processes.level import Level
from ..schedulers.choice import scheduler_class

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------------------- 1. pictures


def size_of(pictures: Tensor | list[PIL.Image.Image]) -> tuple[int, int]:
    """(height, width) of pictures as `read_pictures` returns them."""
    return tuple(pictures.shape[-2:]) if isinstance(pictures, Tensor) else (pictures[0].height, pictures[0].width)


def to_pixels(pictures: Tensor | list[PIL.Image.Image], height: int, width: int) -> Tensor:
    """Pictures as the autoencoder takes them: (B, 3, height, width) in [-1, 1], float32; any size, a part of the canvas too."""
    processor = VaeImageProcessor(vae_scale_factor=1)  # a pipeline's own rounds the size down to whole latents
    if isinstance(pictures, Tensor) and pictures.shape[1] == 1:
        pictures = pictures.expand(-1, 3, -1, -1)
    return processor.preprocess(pictures, height=height, width=width).float()


def to_mask(pictures: Tensor | list[PIL.Image.Image], height: int, width: int) -> Tensor:
    """Masks as (B, 1, height, width), exactly 0 or 1, float32: 1 where the picture is at least half white."""
    processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    if isinstance(pictures, Tensor):
        pictures = pictures.mean(dim=1, keepdim=True)
    return processor.preprocess(pictures, height=height, width=width).float()


# -------------------------------------------------------------------------------------------------------------------------- 2. latents


def encode_latents(vae: Any, pixels: Tensor, generator: Any, copies: int = 1) -> Tensor:
    """Latents as the denoiser knows them, (B, C, h, w), float32: samples of the autoencoder's posterior; the inverse of `decode_latents`.

    Args:
        vae: AutoencoderKL, or another whose `encode` returns `latent_dist` or `latents`.
        pixels: (n, 3, H, W) in [-1, 1].
        generator: one for all, which draws once per picture, as in diffusers; or one for each of the B = n copies; or None.
        copies: of each picture, next to each other.
    """
    config = vae.config
    encoded = vae.encode(pixels.to(vae.dtype))
    each = copies if isinstance(generator, (list, tuple)) else 1
    if hasattr(encoded, "latent_dist"):
        # not `latent_dist.sample`, which draws in the encoder's dtype and takes one generator alone
        mean, std = (v.float().repeat_interleave(each, dim=0) for v in (encoded.latent_dist.mean, encoded.latent_dist.std))
        generator = list(generator) if isinstance(generator, tuple) else generator
        z = mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=torch.float32)
    else:
        z = encoded.latents.float().repeat_interleave(each, dim=0)
    if shift := config.get("shift_factor"):
        z = z - shift
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        z = (z - torch.tensor(mean, device=z.device).view(1, -1, 1, 1)) / torch.tensor(std, device=z.device).view(1, -1, 1, 1)
    return (z * config.scaling_factor).repeat_interleave(copies // each, dim=0)


# ------------------------------------------------------------------------------------------------------------------------- 3. the loop


def check_strength(strength: Any) -> float:
    """The strength as a float.

    Raises:
        ValueError: it is not a number from 0 to 1.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be a number from 0 (the picture itself) to 1 (drawn from noise), got {strength!r}.")
    return float(strength)


def positions_for(scheduler: Any, strength: float) -> list[int]:
    """The positions of `scheduler.timesteps` that a strength leaves: the last floor(strength n) of its n steps, as in diffusers.

    Raises:
        ValueError: the scheduler cannot start there; it goes from data to noise.
    """
    starts, count = scheduler.starts, len(scheduler.timesteps)
    name = scheduler_class(scheduler).__name__
    if float(scheduler.sigmas[0]) < float(scheduler.sigmas[-1]):
        raise ValueError(f"{name} goes from data to noise; editing needs one that goes from noise to data.")
    steps = scheduler.num_inference_steps if len(starts) == 1 else len(starts)
    run = min(int(steps * strength), steps)
    if run == steps:
        return list(range(count))
    if len(starts) == 1 and steps > 1:
        raise ValueError(f"{name} can only be run from its first timestep: strength must be 1 (got {strength}), or take another scheduler.")
    if run == 0:
        if strength > 0.0:
            logger.warning("strength %s of %d steps is none: the picture is only encoded and decoded.", strength, steps)
        return []
    return list(range(starts[steps - run], count))


def renoise(x: Tensor, here: Level, there: Level, noise: Tensor) -> Tensor:
    """A sample of q(x_there | x_here) for a noisier level `there`, on any Gaussian path.

    x_there = r x_here + sqrt(sigma_there^2 - r^2 sigma_here^2) noise with r = alpha_there / alpha_here: the mean keeps alpha_there x_0, and
    the two independent noises add up to sigma_there^2.

    References: Lugmayr et al. 2022, algorithm 1, line 10, https://arxiv.org/abs/2201.09865, for more than one step and any path.
    """
    r = there.alpha / here.alpha
    return torch.add(x * r, noise, alpha=math.sqrt(max(there.sigma**2 - (r * here.sigma) ** 2, 0.0)))


@dataclass(frozen=True)
class RePaint:
    """Resampling for inpainting: the loop goes back `jump` steps by adding noise and runs them again, so that what is drawn and what is
    known come to agree.

    References: Lugmayr et al. 2022, section 4.2 and appendix B, https://arxiv.org/abs/2201.09865

    Args:
        repeats: how often each stretch is run; 1 is no resampling.
        jump: length of a stretch in steps.
    Raises:
        ValueError: one of them is less than 1.
    """

    repeats: int = 10
    jump: int = 10

    def __post_init__(self) -> None:
        for name in ("repeats", "jump"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"RePaint: {name} must be a whole number of at least 1, got {value!r}.")

    def positions(self, starts: Sequence[int], count: int) -> list[int]:
        """The positions of `timesteps` in the order in which they are run.

        Args:
            starts: where each step begins.
            count: number of timesteps.
        """
        n = len(starts)
        ends = [*starts[1:], count]
        left = {m: self.repeats - 1 for m in range(self.jump, n) if (n - 1 - m) % self.jump == 0}
        order: list[int] = []
        m = 0
        while m < n:
            order += range(starts[m], ends[m])
            m += 1
            if left.get(m, 0) > 0:
                left[m] -= 1
                m -= self.jump
        return order
