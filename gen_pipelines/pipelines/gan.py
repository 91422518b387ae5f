"""Pictures from a generator of an adversarial network, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .base import GenerativePipeline
from .checks import check_count, shape_of
from .pictures import crop

__all__ = ["GANPipeline"]

OUTPUTS = ("pil", "np", "pt", "latent")


class GANPipeline(GenerativePipeline):
    """Draws pictures from noise, or from noise and classes.

    Args:
        generator: a network of `gen_pipelines.models.gans`.
        discriminator: the network it was trained against; not needed to draw.
        image_size: height and width of the pictures, if the generator draws larger ones (28 in 32): they are cropped.
    """

    pipeline_tag = "unconditional-image-generation"
    card_example = "images = pipe(batch_size=16).images"
    model_cpu_offload_seq = "generator"
    _optional_components = ["discriminator"]

    def __init__(self, generator: nn.Module, discriminator: nn.Module | None = None, image_size: int | None = None) -> None:
        super().__init__()
        if (config := getattr(generator, "config", None)) is None or not ({"latent_dim", "z_dim"} & set(config)):
            raise TypeError(
                f"{type(self).__name__}: generator must be a network that draws from noise (DCGANGenerator, StyleGAN2Generator, ...), "
                f"got {type(generator).__name__}."
            )
        size = config.sample_size
        if image_size is not None and (image_size > size or (size - image_size) % 2):
            raise ValueError(f"{type(self).__name__}: image_size {image_size} cannot be cropped evenly from {size}.")
        self.register_modules(generator=generator, discriminator=discriminator)
        self.register_to_config(image_size=image_size)
        self.image_processor = VaeImageProcessor()
        generator.eval()

    # ------------------------------------------------------------------------------------------------------------------------ drawing

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        truncation: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws pictures.

        Args:
            batch_size: how many; one label and a `batch_size` give that many of it.
            class_labels: one class or one per picture; drawn from `generator` if the network has classes and none are given.
            num_images_per_label: pictures for every label.
            generator: one for all pictures, or one per picture, which then does not depend on the batch.
            latents: the noise (B, D), instead of drawing it.
            truncation: noise beyond +-truncation is drawn again (as one draw from the truncated normal): less variety, more typical
                pictures (Brock et al. 2019, section 3.1).
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], "latent" (the noise).
        Returns: `.images`, or a tuple.
        Raises:
            ValueError, TypeError: arguments that do not fit; raised before anything is drawn.
        """
        count, labels = self.check_inputs(batch_size, class_labels, num_images_per_label, generator, latents, output_type)
        self.check_truncation(truncation)
        labels = self.prepare_labels(labels, count, generator)
        latents = self.prepare_latents(count, generator, latents, truncation)
        if output_type == "latent":
            return self.finish(latents, output_type, return_dict)
        pictures = self.generator(latents, labels).sample
        return self.finish(self.crop(pictures), output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        start: Tensor,
        end: Tensor,
        num_images: int = 8,
        class_labels: int | None = None,
        output_type: str = "pil",
        truncation: float | None = None,
    ) -> list[Any] | Any:
        """Pictures on the great circle between two noises (D,), both ends included (White 2016, section 2.1).

        `truncation`: the two ends are moved into the truncated normal first, as in a call.
        """
        check_count("num_images", num_images, least=2)
        self.check_ends(start, end, class_labels, [(self.latent_dim,)])
        self.check_truncation(truncation)
        if truncation is not None:
            start, end = truncated(torch.stack([start, end]), truncation)
        z = torch.stack([slerp(start, end, i / (num_images - 1)) for i in range(num_images)]).to(self._execution_device)
        labels = self.prepare_labels(None if class_labels is None else [int(class_labels)], 1, None)
        labels = None if labels is None else labels.expand(num_images)  # one class for all
        return self.finish(self.crop(self.generator(z, labels).sample), output_type, True).images

    def walk(
        self,
        frames: int = 60,
        stops: int = 4,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        class_labels: int | None = None,
        truncation: float | None = None,
    ) -> list[Any]:
        """PIL pictures of a closed walk through `stops` noises, as many between each two: the last leads back to the first.

        `sequences.strip` lays them side by side, `sequences.save_animation` writes them as an animation. `generator` may be one per stop;
        `truncation` is as in a call.
        """
        check_count("frames", frames)
        check_count("stops", stops, least=2)
        self.check_class(class_labels)
        if isinstance(generator, (list, tuple)) and len(generator) != stops:
            raise ValueError(f"{len(generator)} generators for {stops} stops; give one, or one per stop.")
        self.check_truncation(truncation)
        first = [generator[0]] if isinstance(generator, (list, tuple)) else generator
        labels = self.prepare_labels(None if class_labels is None else [class_labels], 1, first)
        class_labels = None if labels is None else int(labels[0])  # one class for the whole walk
        z = self.prepare_latents(stops, generator, None, None)
        pictures: list[Any] = []
        for i in range(stops):
            share = frames * (i + 1) // stops - frames * i // stops
            between = (z[i], z[(i + 1) % stops], share + 1, class_labels, "pil", truncation)
            pictures += self.interpolate(*between)[:share] if share else []
        return pictures

    # ------------------------------------------------------------------------------------------------------------------------ the steps

    def check_inputs(
        self, batch_size: Any, class_labels: Any, num_images_per_label: Any, generator: Any, latents: Any, output_type: str
    ) -> tuple[int, list[int] | None]:
        """(number of pictures, one label per picture or None). Raises ValueError or TypeError."""
        check_count("batch_size", batch_size)
        check_count("num_images_per_label", num_images_per_label)
        labels = None
        if class_labels is not None:
            labels = [class_labels] if isinstance(class_labels, Integral) or not hasattr(class_labels, "__iter__") else list(class_labels)
            if not labels:
                raise ValueError("class_labels is empty; give at least one class.")
            for label in labels:
                self.check_class(label)
            if len(labels) == num_images_per_label == 1:
                num_images_per_label = batch_size
            labels = [int(label) for label in labels for _ in range(num_images_per_label)]
            if batch_size not in (1, len(labels)):
                raise ValueError(f"batch_size {batch_size}, but class_labels ask for {len(labels)} pictures; leave it out.")
        count = batch_size if labels is None else len(labels)
        if latents is not None:
            count = len(latents) if labels is None else count
            if latents.shape != (count, self.latent_dim):
                raise ValueError(f"latents have shape {tuple(latents.shape)}; give ({count}, {self.latent_dim}).")
        if isinstance(generator, (list, tuple)) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} pictures; give one, or one per picture.")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type {output_type!r} is none of {', '.join(OUTPUTS)}.")
        return count, labels

    def check_class(self, label: Any) -> None:
        """Raises ValueError for what is no class of this network; None is allowed."""
        classes = self.generator.config.get("num_classes")
        if label is None:
            return
        if classes is None:
            raise ValueError(f"class_labels: this {type(self.generator).__name__} has no classes; leave them out.")
        whole = isinstance(label, Integral) and not isinstance(label, bool) or _is_whole(label)
        if not whole or not 0 <= int(label) < classes:
            raise ValueError(f"class_labels: {label!r} is none of 0 to {classes - 1}.")

    def check_ends(self, start: Any, end: Any, label: Any, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raises ValueError unless both ends of a way have one of the shapes, and the label is a class or None."""
        self.check_class(label)
        got = [tuple(point.shape) if isinstance(point, Tensor) else None for point in (start, end)]
        if got[0] != got[1] or got[0] not in shapes:
            raise ValueError(
                f"start and end must be tensors of shape {' or '.join(map(str, shapes))}, got {shape_of(start)} and {shape_of(end)}."
            )

    def check_truncation(self, truncation: float | None) -> None:
        """Raises ValueError for a truncation that this network's noise cannot have."""
        number = isinstance(truncation, Real) and not isinstance(truncation, bool)
        if truncation is not None and not (number and math.isfinite(truncation) and truncation > 0):
            raise ValueError(f"truncation must be a positive number of standard deviations, got {truncation!r}.")

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures that come out, in pixels."""
        size = self.config.image_size or self.generator.config.sample_size
        return size, size

    @property
    def latent_dim(self) -> int:
        """D of the noise."""
        return self.generator.config.get("z_dim") or self.generator.config["latent_dim"]

    def prepare_labels(self, labels: Sequence[int] | None, count: int, generator: Any) -> Tensor | None:
        """(B,), on the device: the given ones, or uniformly drawn ones; None for a network without classes."""
        classes = self.generator.config.get("num_classes")
        if classes is None:
            return None
        if labels is None:
            draws = generator if isinstance(generator, (list, tuple)) else [generator] * count
            labels = [int(torch.randint(classes, (), generator=draw, device=draw.device if draw is not None else None)) for draw in draws]
        return torch.as_tensor(labels, device=self._execution_device)

    def prepare_latents(self, count: int, generator: Any, latents: Tensor | None, truncation: float | None) -> Tensor:
        """The noise (B, D), float32."""
        if latents is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            latents = randn_tensor((count, self.latent_dim), generator=generator, device=self._execution_device, dtype=torch.float32)
            latents = latents if truncation is None else truncated(latents, truncation)
        return latents.to(self._execution_device, self.generator.dtype)

    def crop(self, pictures: Tensor) -> Tensor:
        """The middle of drawn pictures (B, C, H, W), at `picture_size`."""
        return crop(pictures, self.picture_size)

    def finish(self, pictures: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
        """Pictures in [-1, 1] as what was asked for; what is not finite is counted and reported."""
        self.report_non_finite(pictures)
        images = pictures if output_type == "latent" else self.image_processor.postprocess(pictures.float(), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _is_whole(value: Any) -> bool:
    """Whether a value is a tensor of one integer, as those of a tensor of labels are."""
    return isinstance(value, Tensor) and value.numel() == 1 and not (value.is_floating_point() or value.is_complex())


def truncated(z: Tensor, limit: float) -> Tensor:
    """Normal noise of any shape moved into the normal truncated at +-limit, quantile by quantile: what drawing again converges to."""
    share = math.erf(limit / math.sqrt(2))
    uniform = torch.erf(z.double() / math.sqrt(2)).clamp(-1 + 1e-12, 1 - 1e-12)
    return (math.sqrt(2) * torch.erfinv(uniform * share)).to(z.dtype)


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """A point on the great circle from `start` to `end`, both (D,); on the line between them where they are parallel."""
    cosine = torch.dot(start.double(), end.double()) / (start.double().norm() * end.double().norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin().abs() < 1e-6:
        return torch.lerp(start, end, share)
    a, b = torch.sin((1 - share) * angle) / angle.sin(), torch.sin(share * angle) / angle.sin()
    return (a * start.double() + b * end.double()).to(start.dtype)
