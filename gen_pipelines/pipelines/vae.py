"""Pictures from a variational autoencoder: draw, encode, decode, reconstruct, walk between, measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from PIL import Image
from torch import Tensor, nn

from ..likelihood.dequantization import Pictures
from ..likelihood.elbo import elbo
from ..likelihood.iwae import iwae
from ..likelihood.result import LikelihoodResult
from ..models.autoencoders.vae import VAEModel
from ..models.calling import unwrap
from ..processes.random import Generators, normal
from .autoencoding import PICTURE_TYPES, between, check_call, finish, levels_of, picture_grid, pictures_of
from .base import GenerativePipeline
from .checks import check_count, check_output_type, shape_of

__all__ = ["DiffusionPipeline", "ModelMixin", "VAEPipeline"]


class VAEPipeline(GenerativePipeline):
    """Draws pictures from a `VAEModel`: latents from the prior, then the decoder.

    Args:
        vae: a `VAEModel`.
    """

    model_cpu_offload_seq = "vae"
    pipeline_tag = "unconditional-image-generation"
    card_example = "images = pipe(batch_size=16).images"

    def __init__(self, vae: Any) -> None:
        super().__init__()
        if not isinstance(vae, nn.Module) or not isinstance(unwrap(vae), VAEModel):
            raise TypeError(f"VAEPipeline: vae must be a VAEModel, got {type(vae).__name__}.")
        self.register_modules(vae=vae)
        vae.eval()

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        return self.vae.height, self.vae.width

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        sample_pixels: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws pictures.

        Args:
            batch_size: how many.
            temperature: the latents' standard deviation; below 1 the pictures are more usual and less varied.
            generator: one for the whole batch, or one per picture: then a picture does not depend on the batch that it is drawn in.
            latents: standard normal numbers to start from, (batch_size, d); drawn by default.
            sample_pixels: draw the values of the picture from p(x | z); by default the picture is the mean of it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (B, d).
            return_dict: False returns a tuple.
        Returns: `.images`.
        """
        batch_size = batch_size if latents is None else len(latents)
        check_call("VAEPipeline", batch_size, generator, temperature, output_type)
        shape = (batch_size, self.vae.config.latent_dim)
        if latents is None:
            latents = normal(shape, generator, self.device)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"VAEPipeline: latents have the shape (batch_size, {shape[1]}), got {tuple(latents.shape)}.")
        z = temperature * latents.to(self.device, torch.float32)                                       # (B, d)
        if output_type == "latent":
            images = z
        else:
            described = self.vae.decode(z)
            self.report_non_finite(described.sample)
            images = finish(described.distribution.sample(generator) if sample_pixels else described.sample, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(self, images: Pictures, sample: bool = False, generator: Generators = None) -> Tensor:
        """Latents of pictures: the mean of q(z | x), or a draw from it.

        Args:
            images: PIL pictures, tensors (B, C, H, W) or arrays (B, H, W, C), uint8 or in [0, 1], of the model's size.
            generator: for the draw, and for the binarisation of grey pictures.
        Returns: (B, d).
        """
        latent_dist = self.vae.encode(pictures_of(self.vae, images, generator)).latent_dist
        if not sample:
            return latent_dist.mean
        return latent_dist.sample(normal(latent_dist.mean.shape, generator, self.device, latent_dist.mean.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """The means of p(x | z) for latents (B, d), as `__call__` returns pictures."""
        check_output_type(output_type, PICTURE_TYPES)
        dim = self.vae.config.latent_dim
        if not isinstance(latents, Tensor) or latents.ndim != 2 or latents.shape[1] != dim or not len(latents):
            raise ValueError(f"VAEPipeline.decode: latents are a tensor of shape (B, {dim}), got {shape_of(latents)}.")
        x = self.vae.decode(latents.to(self.device)).sample
        self.report_non_finite(x)
        return finish(x, output_type)

    def reconstruct(self, images: Pictures, generator: Generators = None, output_type: str = "pil") -> Any:
        """decode(encode(images))."""
        check_output_type(output_type, PICTURE_TYPES)
        return self.decode(self.encode(images, generator=generator), output_type)

    def interpolate(
        self,
        first: Pictures,
        second: Pictures,
        num_images: int = 8,
        mode: str = "slerp",
        generator: Generators = None,
        output_type: str = "pil",
    ) -> Any:
        """Pictures on the way from one to another, the reconstructions of both at the ends.

        Args:
            first, second: one picture each, or as many of one as of the other.
            num_images: pictures on each way, both ends included.
            mode: "slerp" (on the sphere, where Gaussian latents lie) or "lerp" (straight).
        Returns: num_images pictures for each pair, those of a pair next to each other.
        """
        check_output_type(output_type, PICTURE_TYPES)
        start, end = self.encode(first, generator=generator), self.encode(second, generator=generator)
        if len(start) != len(end):
            counts = f"{len(start)} pictures at the start and {len(end)} at the end"
            raise ValueError(f"VAEPipeline.interpolate: {counts}; give as many of each.")
        return self.decode(between(start, end, num_images, mode).flatten(0, 1), output_type)

    @torch.no_grad()
    def traverse(
        self,
        image: Pictures | None = None,
        dimensions: Sequence[int] | None = None,
        num: int = 9,
        span: float = 3.0,
        generator: Generators = None,
    ) -> Image.Image:
        """A picture of what the latents mean: a row for each dimension, which runs from -span to span while the others stay.

        Args:
            image: where the others stay; the prior's mean by default.
            dimensions: which ones; by default all.
            num: pictures in a row.
        """
        dim = self.vae.config.latent_dim
        dimensions = list(range(dim)) if dimensions is None else list(dimensions)
        if not dimensions or not all(0 <= d < dim for d in dimensions):
            raise ValueError(f"VAEPipeline.traverse: dimensions are numbers from 0 to {dim - 1}, got {dimensions}.")
        centre = torch.zeros(1, dim, device=self.device) if image is None else self.encode(image, generator=generator)
        if len(centre) != 1:
            raise ValueError(f"VAEPipeline.traverse: one picture at a time, got {len(centre)}.")
        z = centre.repeat(len(dimensions) * num, 1)                                                    # (rows num, d)
        for row, dimension in enumerate(dimensions):
            z[row * num : (row + 1) * num, dimension] = torch.linspace(-span, span, num).to(z)
        return picture_grid(self.vae.decode(z).sample, columns=num)

    def log_likelihood(
        self,
        images: Pictures,
        labels: Any = None,
        num_samples: int | None = None,
        generator: Generators = None,
        kind: str = "elbo",
    ) -> LikelihoodResult:
        """A bound on the log-probability of 8-bit pictures, or of binarised ones.

        Args:
            images: PIL pictures, uint8 tensors, or float tensors in [-1, 1] that were 8-bit.
            labels: must be None: there are no classes.
            num_samples: draws of z; 16 by default for "elbo", 64 for "iwae".
            generator: one, or one per picture.
            kind: "elbo", or "iwae", which is tighter the more draws it has (5,000 in papers).
        Returns: fields of shape (B,); a Bernoulli model gives nats only, of pictures that were binarised at random.
        """
        if labels is not None:
            raise ValueError("VAEPipeline.log_likelihood: this model has no classes; leave out labels.")
        if kind not in ("elbo", "iwae"):
            raise ValueError(f"VAEPipeline.log_likelihood: kind {kind!r} is none of elbo, iwae.")
        if num_samples is not None:
            check_count("num_samples", num_samples)
        levels = levels_of(self.vae, images)
        if kind == "iwae":
            return iwae(self.vae, levels, num_samples or 64, generator)
        return elbo(self.vae, levels, num_samples or 16, generator)
