"""Pictures from a VQ-VAE or VQ-VAE-2: codes drawn by priors from the top level down, then the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from torch import Tensor, nn

from ..likelihood.dequantization import Pictures
from ..likelihood.elbo import code_elbo
from ..likelihood.result import LikelihoodResult
from ..models.autoencoders.vq_vae import VQVAEModel
from ..models.calling import unwrap
from ..processes.random import Generators, uniform
from .autoencoding import PICTURE_TYPES, between, check_call, finish, levels_of, pictures_of
from .base import GenerativePipeline
from .checks import check_generator, check_output_type

__all__ = ["DiffusionPipeline", "ModelMixin", "VQVAEPipeline"]


class VQVAEPipeline(GenerativePipeline):
    """Draws pictures from a `VQVAEModel` and a prior over the codes of each of its levels.

    Args:
        vqvae: a `VQVAEModel`.
        prior, prior_2, prior_3: an `AutoregressivePrior` for each level, from the top down; the ones below the first are told the codes
            above them. Without them the pipeline encodes, decodes and reconstructs, and does not draw.
    """

    model_cpu_offload_seq = "prior->prior_2->prior_3->vqvae"
    pipeline_tag = "unconditional-image-generation"
    card_example = "images = pipe(batch_size=16).images"
    _optional_components = ["prior", "prior_2", "prior_3"]

    def __init__(self, vqvae: Any, prior: Any = None, prior_2: Any = None, prior_3: Any = None) -> None:
        super().__init__()
        if not isinstance(vqvae, nn.Module) or not isinstance(unwrap(vqvae), VQVAEModel):
            raise TypeError(f"VQVAEPipeline: vqvae must be a VQVAEModel, got {type(vqvae).__name__}.")
        given, levels = [p for p in (prior, prior_2, prior_3) if p is not None], len(vqvae.code_shapes)
        if given and len(given) != levels:
            raise ValueError(f"VQVAEPipeline: {len(given)} priors for {levels} levels of codes; give one for each level, or none.")
        if given and any(p is None for p in (prior, prior_2, prior_3)[:levels]):
            raise ValueError("VQVAEPipeline: priors are given from the top down, as prior, prior_2, prior_3, without a gap.")
        for number, (one, shape) in enumerate(zip(given, vqvae.code_shapes)):
            if (tuple(one.config.shape), one.config.num_codes) != (shape, vqvae.config.num_embeddings):
                raise ValueError(
                    f"VQVAEPipeline: prior {number + 1} is over {one.config.num_codes} codes of {tuple(one.config.shape)}, the model has "
                    f"{vqvae.config.num_embeddings} of {shape} there; was it trained on another model?"
                )
        if len(classes := {one.config.num_classes for one in given} - {None}) > 1:
            numbers = " and ".join(map(str, sorted(classes)))
            raise ValueError(f"VQVAEPipeline: the priors know {numbers} classes; they were trained on different labels.")
        self.register_modules(vqvae=vqvae, prior=prior, prior_2=prior_2, prior_3=prior_3)
        for module in (vqvae, *given):
            module.eval()

    @property
    def priors(self) -> list[Any]:
        """The priors from the top level down; empty where the pipeline has none."""
        return [one for one in (self.prior, self.prior_2, self.prior_3) if one is not None]

    @property
    def num_classes(self) -> int | None:
        """Classes that the priors know, or some of them; None for unconditional ones."""
        return next((one.config.num_classes for one in self.priors if one.config.num_classes is not None), None)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        return self.vqvae.height, self.vqvae.width

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images_per_label: int = 1,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        sample_pixels: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws pictures.

        Args:
            batch_size: how many; with a class-conditional prior their classes are drawn uniformly from `generator`. 1 by default. With
                `class_labels` it may be left out; one label and a `batch_size` give that many of it.
            class_labels: a class, or several.
            num_images_per_label: pictures of each of `class_labels`, those of one label next to each other.
            temperature: of the priors, one number or one for each level from the top down; 0 takes the likeliest code each time.
            generator: one for the whole batch, or one per picture: then a picture does not depend on the batch that it is drawn in.
            sample_pixels: draw the values of the picture from p(x | codes); by default the picture is the mean of it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (the codes, a list of (B, h, w)).
            return_dict: False returns a tuple.
        Returns: `.images`.
        """
        self._needs_priors("__call__")
        labels, count = self._labels(batch_size, class_labels, num_images_per_label)
        temperatures = [temperature] * len(self.priors) if isinstance(temperature, Real | str) else list(temperature)
        if len(temperatures) != len(self.priors):
            raise ValueError(f"VQVAEPipeline: {len(temperatures)} temperatures for {len(self.priors)} levels; give one, or one per level.")
        for one in temperatures:
            check_call("VQVAEPipeline", count, generator, one, output_type)
        if labels is None and self.num_classes is not None:
            drawn = uniform((count, 1), generator, self.device)[:, 0] * self.num_classes
            labels = drawn.long().clamp(max=self.num_classes - 1)                                      # (B,)
        codes: list[Tensor] = []
        with self.progress_bar(total=sum(height for height, _ in self.vqvae.code_shapes)) as bar:
            for prior, one in zip(self.priors, temperatures, strict=True):
                told = None if prior.config.num_classes is None else labels
                codes.append(prior.sample(count, told, codes, generator, one, on_row=bar.update))      # (B, h, w)
        if output_type == "latent":
            return ImagePipelineOutput(images=codes) if return_dict else (codes,)
        described = self.vqvae.decode_codes(codes)
        self.report_non_finite(described.sample)
        images = finish(described.distribution.sample(generator) if sample_pixels else described.sample, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(self, images: Pictures, generator: Generators = None) -> list[Tensor]:
        """Codes of pictures, (B, h, w) of every level from the top down.

        Args:
            images: PIL pictures, tensors (B, C, H, W) or arrays (B, H, W, C), uint8 or in [0, 1], of the model's size.
            generator: for the binarisation of grey pictures, where the model is over black and white.
        """
        return self.vqvae.encode(pictures_of(self.vqvae, images, generator)).codes

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor], output_type: str = "pil") -> Any:
        """The means of p(x | codes) for codes (B, h, w) of every level from the top down."""
        check_output_type(output_type, PICTURE_TYPES)
        known = self.vqvae.config.num_embeddings
        if any(level.is_floating_point() or level.min() < 0 or level.max() >= known for level in codes if level.numel()):
            raise ValueError(f"VQVAEPipeline.decode: codes are whole numbers from 0 to {known - 1}.")
        x = self.vqvae.decode_codes([level.to(self.device) for level in codes]).sample
        self.report_non_finite(x)
        return finish(x, output_type)

    def reconstruct(self, images: Pictures, generator: Generators = None, output_type: str = "pil") -> Any:
        """decode(encode(images))."""
        check_output_type(output_type, PICTURE_TYPES)
        return self.decode(self.encode(images, generator), output_type)

    @torch.no_grad()
    def interpolate(
        self,
        first: Pictures,
        second: Pictures,
        num_images: int = 8,
        mode: str = "lerp",
        generator: Generators = None,
        output_type: str = "pil",
    ) -> Any:
        """Pictures on the way from one to another: the codes' vectors are blended position by position and decoded as they are.

        Args:
            first, second: one picture each, or as many of one as of the other.
            num_images: pictures on each way, both ends included, which are the reconstructions.
            mode: "lerp" (straight) or "slerp" (turning).
        Returns: num_images pictures for each pair, those of a pair next to each other.
        """
        check_output_type(output_type, PICTURE_TYPES)
        ends = [self.encode(first, generator), self.encode(second, generator)]
        if len(ends[0][0]) != len(ends[1][0]):
            counts = f"{len(ends[0][0])} pictures at the start and {len(ends[1][0])} at the end"
            raise ValueError(f"VQVAEPipeline.interpolate: {counts}; give as many of each.")
        vectors = []
        for quantizer, start, end in zip(reversed(self.vqvae.quantizers), *ends, strict=True):
            a, b = (quantizer.decode(codes).permute(0, 2, 3, 1) for codes in (start, end))             # (B, h, w, d)
            path = between(a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1]), num_images, mode)   # (B h w, n, d)
            vectors.append(path.unflatten(0, a.shape[:3]).permute(0, 3, 4, 1, 2).flatten(0, 1))        # (B n, d, h, w)
        return finish(self.vqvae.decode(vectors).sample, output_type)

    def log_likelihood(
        self,
        images: Pictures,
        labels: int | Sequence[int] | Tensor | None = None,
        num_samples: int | None = None,
        generator: Generators = None,
    ) -> LikelihoodResult:
        """The evidence lower bound: log p(x | codes(x)) + log p(codes(x)).

        Args:
            images: PIL pictures, uint8 tensors, or float tensors in [-1, 1] that were 8-bit.
            labels: classes, one per picture, for class-conditional priors; without them every class is taken to be equally likely.
            num_samples: must be None or 1: nothing is drawn, the codes of a picture are what they are.
            generator: for dequantisation or binarisation, where the likelihood has them.
        Returns: kind "elbo", fields of shape (B,).
        """
        self._needs_priors("log_likelihood")
        if num_samples not in (None, 1):
            raise ValueError(f"VQVAEPipeline.log_likelihood: num_samples {num_samples}: the encoder draws nothing, leave it out.")
        levels = levels_of(self.vqvae, images)
        check_generator(generator, len(levels))
        if labels is not None:
            labels, count = self._labels(None, labels, 1)
            if count != len(levels):
                raise ValueError(f"VQVAEPipeline.log_likelihood: {count} labels for {len(levels)} pictures.")
        return code_elbo(self.vqvae, self.priors, levels, labels, generator)

    def _needs_priors(self, name: str) -> None:
        if not self.priors:
            raise ValueError(
                f"VQVAEPipeline.{name}: this pipeline has no prior over its codes, so it cannot draw pictures or say how likely they are; "
                "train one (task: prior in a recipe), or use encode, decode and reconstruct."
            )

    def _labels(self, batch_size: int | None, class_labels: Any, num_images_per_label: int) -> tuple[Tensor | None, int]:
        """Labels on the device, and the number of pictures."""
        if class_labels is None:
            return None, 1 if batch_size is None else batch_size
        if self.num_classes is None:
            raise ValueError("VQVAEPipeline: its priors know no classes; leave out labels.")
        if not isinstance(num_images_per_label, Integral) or num_images_per_label < 1:
            raise ValueError(f"VQVAEPipeline: num_images_per_label {num_images_per_label!r} is not allowed; give 1 or more.")
        try:
            labels = torch.as_tensor(class_labels, device=self.device).reshape(-1)
        except (TypeError, ValueError):  # words
            labels = torch.empty(0)
        if labels.is_floating_point() or not len(labels) or labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"VQVAEPipeline: classes are whole numbers from 0 to {self.num_classes - 1}, got {class_labels!r}.")
        if batch_size is not None and len(labels) * num_images_per_label == 1:
            num_images_per_label = batch_size
        labels = labels.long().repeat_interleave(num_images_per_label)
        if batch_size not in (None, len(labels)):
            raise ValueError(f"VQVAEPipeline: batch_size {batch_size}, but class_labels ask for {len(labels)} pictures; leave it out.")
        return labels, len(labels)
