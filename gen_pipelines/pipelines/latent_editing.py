"""What the pipelines share that edit pictures in latents: the pictures, one per prompt or several, and their noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .conditioning import Captions
from .editing import encode_latents, logger, size_of, to_pixels
from .latent_base import LatentPipeline
from .pictures import check_range, read_pictures


class LatentEditingPipeline(LatentPipeline):
    """The parts of a pipeline that begins with a picture; each task is a class with a `__call__` of its own."""

    pipeline_tag = "image-to-image"

    # ------------------------------------------------------------------------------------------------------------------- -- the inputs

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are drawn."""
        return self.vae.config.latent_channels

    def check_pictures(self, image: Any) -> tuple[Any, bool]:
        """The pictures in one form, and whether they are latents.

        Raises:
            ValueError, TypeError: they are no pictures.
        """
        if image is None:
            raise ValueError("give image, the picture to start from.")
        pictures = read_pictures("image", image)
        is_latent = isinstance(pictures, Tensor) and isinstance(image, Tensor) and pictures.shape[1] == self.latent_channels not in (1, 3)
        if not is_latent:
            check_range("image", pictures, (1, 3))
        return pictures, is_latent

    def size_for(self, pictures: Any, is_latent: bool, height: int | None, width: int | None) -> tuple[int, int]:
        """The picture's size in pixels: what was asked for, else the pictures' own, rounded down to what the model can draw."""
        own = size_of(pictures)
        if is_latent:
            own = own[0] * self.vae_scale_factor, own[1] * self.vae_scale_factor
            if (height, width) not in ((None, None), own):
                raise ValueError(f"image holds latents of {own[0]} x {own[1]} pixels, which cannot be resized; leave out height and width.")
            return own
        fitting = tuple(max(side // self.size_multiple, 1) * self.size_multiple for side in own)
        wanted = height if height is not None else fitting[0], width if width is not None else fitting[1]
        if (height is None and own[0] != fitting[0]) or (width is None and own[1] != fitting[1]):
            logger.warning(
                "the picture has %d x %d pixels and this model draws multiples of %d: it is resized to %d x %d.",
                *own, self.size_multiple, *wanted,
            )  # fmt: skip
        return wanted

    def per_picture(self, count: int, captions: Captions) -> Captions:
        """The captions, where one prompt for several pictures becomes one per picture.

        Raises:
            ValueError: the numbers of prompts and pictures do not fit.
        """
        if count in (1, len(captions)):
            return captions
        if len(captions) != 1:
            raise ValueError(f"image must be one picture, or one per prompt: {len(captions)} here, got {count}.")
        repeated: dict[str, Any] = {}
        for name, value in vars(captions).items():
            if isinstance(value, Tensor):
                repeated[name] = value.expand(count, *value.shape[1:])
            elif isinstance(value, (list, tuple)) or name == "prompt" and value is not None:
                repeated[name] = [value] * count if isinstance(value, str) else list(value) * count
        return replace(captions, **repeated)

    # -------------------------------------------------------------------------------------------------------------------- -- the noise

    def latents_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(B, C, h, w) of the latents of a batch of pictures."""
        return batch, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def encode_pictures(
        self, pictures: Any, is_latent: bool, height: int, width: int, batch: int, generator: Any, device: torch.device
    ) -> Tensor:
        """Latents of the pictures, (B, C, h, w), those of one picture next to each other."""
        copies = batch // len(pictures)
        if is_latent:
            return pictures.to(device).repeat_interleave(copies, dim=0)
        return encode_latents(self.vae, to_pixels(pictures, height, width).to(device), generator, copies)

    def noise_to(self, positions: Sequence[int], clean: Tensor, generator: Any, noise: Tensor | None) -> Tensor:
        """The clean latents at the level of the first position, (B, C, h, w), float32; themselves where there is none."""
        if noise is None:
            noise = self.draw(clean, generator)
        if not positions:
            return clean
        self.scheduler.set_begin_index(positions[0])
        return self.scheduler.add_noise(clean, noise.to(clean), self.scheduler.timesteps[positions[0] : positions[0] + 1])

    def draw(self, like: Tensor, generator: Any) -> Tensor:
        """Standard normal noise of a shape, float32."""
        generator = list(generator) if isinstance(generator, tuple) else generator
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=torch.float32)
