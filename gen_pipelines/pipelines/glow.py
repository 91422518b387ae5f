"""Pictures from a normalizing flow, RealNVP or Glow: sampled, encoded, interpolated, changed along directions, and their likelihood."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ..likelihood.change_of_variables import flow_log_likelihood
from ..likelihood.dequantization import Pictures, from_levels, nearest_levels, to_levels
from ..likelihood.result import LikelihoodResult
from ..models.flows.base import NormalizingFlowModel
from ..processes.random import Generators, uniform
from .base import GenerativePipeline
from .checks import check_count, check_generator, check_output_type, shape_of
from .interpolation import spherical
from .pictures import as_8_bit

__all__ = ["DiffusionPipeline", "GlowPipeline", "ModelMixin"]

logger = logging.getLogger(__name__)


class GlowPipeline(GenerativePipeline):
    """Everything a normalizing flow of pictures can do; for any `NormalizingFlowModel` (GlowModel, RealNVPModel).

    Latents are the values of all levels in one row, (B, D) with D = C H W, standard normal under the model, the finest level first.

    Args:
        flow: the model.
        default_temperature: of a call that is not told otherwise. Pictures are cleaner below 1, and less varied.

    References: Kingma and Dhariwal 2018, https://arxiv.org/abs/1807.03039; Dinh et al. 2017, https://arxiv.org/abs/1605.08803
    """

    model_cpu_offload_seq = "flow"
    pipeline_tag = "unconditional-image-generation"
    card_example = "image = pipe().images[0]"

    def __init__(self, flow: Any, default_temperature: float = 0.7) -> None:
        super().__init__()
        if not isinstance(flow, NormalizingFlowModel):
            raise TypeError(f"GlowPipeline: flow must be a NormalizingFlowModel (GlowModel, RealNVPModel), got {type(flow).__name__}.")
        flow.eval()
        self.register_modules(flow=flow)
        self.register_to_config(default_temperature=default_temperature)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        return tuple(self.flow.size)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images_per_label: int = 1,
        temperature: float | Sequence[float] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws `batch_size` pictures, or `num_images_per_label` of each label, those of one label next to each other.

        Args:
            batch_size: pictures; 1 by default. A flow with classes then draws labels uniformly from `generator`. One label and a
                `batch_size` give that many of it.
            class_labels: classes, one or several, of a class-conditional flow.
            num_images_per_label: pictures of each label.
            temperature: the deviation of the latents: one number, or one for each level, the finest first. Several below 1 at the fine
                levels keep the strokes and calm the noise.
            generator: one for the whole batch, or one per picture: then a picture does not depend on the batch it is drawn in.
            latents: standard normal numbers to use instead, (B, D); the temperature multiplies them.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": the latents themselves, (B, D).
            return_dict: False returns a tuple.
        Returns: an output with `.images`.
        Raises:
            TypeError, ValueError: an argument makes no sense; nothing has been computed then.
        """
        # 1. Check everything before anything is computed
        check_output_type(output_type)
        labels, batch = self.plan_batch(batch_size, class_labels, num_images_per_label, latents)
        check_generator(generator, batch)
        temperatures = self.temperatures(self.config.default_temperature if temperature is None else temperature)
        try:
            # 2. Latents, then labels where none were given
            drawn = self.flow.draw_latents(batch, 1.0, generator) if latents is None else self.split(latents)
            levels = [scale * latent for scale, latent in zip(temperatures, drawn, strict=True)]           # L x (B, c, h, w)
            if labels is None and self.num_classes is not None:
                labels = (uniform((batch, 1), generator)[:, 0] * self.num_classes).long()
            # 3. The flow, backwards
            images = self.join(levels) if output_type == "latent" else self.pictures(levels, labels, output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # --------------------------------------------------------------------------------------------------------------- latents and back

    @torch.no_grad()
    def encode(self, images: Pictures, class_labels: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """The latents of pictures, (B, D): standard normal if the flow knows pictures like these. Each level is taken at its bin's middle.

        Args:
            images: PIL, a list of them, a tensor (B, C, H, W) or an array (B, H, W, C), uint8 or in [0, 1].
            class_labels: their classes, for a class-conditional flow: one or one each.
        """
        bits = self.flow.config.num_bits
        levels = to_levels(as_8_bit(images), self.flow.config.in_channels, self.flow.size, bits)
        labels = self.labels_of(class_labels, len(levels), "encode")
        x = (levels.to(self.flow.device, self.flow.stream_dtype) + 0.5) * (2 / 2**bits) - 1               # (B, C, H, W)
        return self.join(self.flow.encode(x, None if labels is None else labels.to(self.flow.device))[0])

    @torch.no_grad()
    def decode(self, latents: Tensor, class_labels: int | Sequence[int] | Tensor | None = None, output_type: str = "pil") -> Any:
        """The pictures of latents (B, D): what `encode` inverts. `output_type`: "pil", "np" or "pt"."""
        check_output_type(output_type, ("pil", "np", "pt"))
        levels = self.split(latents)
        return self.pictures(levels, self.labels_of(class_labels, len(latents), "decode"), output_type)

    def reconstruct(self, images: Pictures, class_labels: int | Sequence[int] | Tensor | None = None, output_type: str = "pil") -> Any:
        """decode(encode(images)): the pictures themselves, up to rounding; how far off they are says how well the flow inverts."""
        return self.decode(self.encode(images, class_labels), class_labels, output_type)

    # ---------------------------------------------------------------------------------------------------------- ways through the space

    def interpolate(
        self,
        start: Pictures,
        end: Pictures,
        num_images: int = 8,
        class_labels: int | Sequence[int] | Tensor | None = None,
        mode: str = "linear",
        output_type: str = "pil",
    ) -> Any:
        """Pictures on the way from one to another, through their latents.

        Args:
            start, end: one picture each.
            num_images: pictures, both ends among them; at least 2.
            class_labels: for a class-conditional flow, one for the whole way or one for each end (the first half has the first).
            mode: "linear", as in the paper, or "spherical", which keeps the latents as long as draws of the prior are.
            output_type: "pil", "np" or "pt".

        References: Kingma and Dhariwal 2018, section 5.2 (figure 5)
        """
        check_count("num_images", num_images, least=2)
        if mode not in ("linear", "spherical"):
            raise ValueError(f"mode must be linear or spherical, got {mode!r}.")
        check_output_type(output_type, ("pil", "np", "pt"))
        labels = self.labels_of(class_labels, 2, "interpolate")
        ends = []
        for number, (name, picture) in enumerate((("start", start), ("end", end))):
            latent = self.encode(picture, None if labels is None else labels[number : number + 1])
            if len(latent) != 1:
                raise ValueError(f"{name} must be one picture, got {len(latent)}.")
            ends.append(latent)
        weights = torch.linspace(0, 1, num_images).tolist()
        between = spherical if mode == "spherical" else torch.lerp
        way = torch.cat([between(ends[0], ends[1], weight) for weight in weights])                         # (num_images, D)
        return self.decode(way, None if labels is None else [int(labels[int(weight >= 0.5)]) for weight in weights], output_type)

    def attribute_direction(
        self, images: Pictures, has_attribute: Sequence[bool] | Tensor, class_labels: int | Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """The direction of an attribute: the mean latent of the pictures that have it minus that of those that do not, (D,).

        Args:
            images: labelled pictures, some with the attribute and some without.
            has_attribute: one truth value per picture.

        References: Kingma and Dhariwal 2018, section 5.3 (figure 6)
        """
        latents = self.encode(images, class_labels)                                                        # (B, D)
        mask = torch.as_tensor(has_attribute, device=latents.device).bool()
        if tuple(mask.shape) != (len(latents),) or mask.all() or not mask.any():
            raise ValueError(
                f"has_attribute has one truth value per picture, some of each kind; got {int(mask.sum())} true of {mask.numel()} for "
                f"{len(latents)} pictures."
            )
        return latents[mask].mean(0) - latents[~mask].mean(0)

    def manipulate(
        self,
        images: Pictures,
        direction: Tensor,
        strength: float | Sequence[float] = 1.0,
        class_labels: int | Sequence[int] | Tensor | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Pictures moved along a direction of the latents: more of an attribute for a positive strength, less for a negative one.

        Args:
            images: B pictures.
            direction: (D,), as `attribute_direction` gives it.
            strength: multiples of the direction: 0 reconstructs, 1 goes as far as the two kinds of pictures are apart on average. Several
                give each picture at every strength, those of one picture next to each other.
        """
        check_output_type(output_type, ("pil", "np", "pt"))
        strengths = torch.as_tensor(strength, dtype=torch.float32).reshape(-1)
        if not len(strengths) or not torch.isfinite(strengths).all():
            raise ValueError(f"strength must be a finite number or several, got {strength!r}.")
        latents = self.encode(images, class_labels)                                                        # (B, D)
        if not isinstance(direction, Tensor) or tuple(direction.shape) != tuple(latents.shape[1:]):
            raise ValueError(f"direction must be a tensor of shape {tuple(latents.shape[1:])}, got {shape_of(direction)}.")
        labels = self.labels_of(class_labels, len(latents), "manipulate")
        labels = None if labels is None else labels.repeat_interleave(len(strengths))
        steps = strengths.to(latents)[:, None] * direction.to(latents)                                     # (S, D)
        return self.decode((latents[:, None] + steps).flatten(0, 1), labels, output_type)

    @torch.no_grad()
    def resample_levels(
        self,
        images: Pictures,
        levels: Sequence[int],
        class_labels: int | Sequence[int] | Tensor | None = None,
        temperature: float | Sequence[float] | None = None,
        generator: Generators = None,
        output_type: str = "pil",
    ) -> Any:
        """Pictures with the latents of some levels drawn anew and the others kept: what each level holds.

        Args:
            images: B pictures.
            levels: which levels are drawn: 0 is the finest, -1 the coarsest.
            temperature: of what is drawn, as in the call.
            generator: one, or one per picture.
        """
        check_output_type(output_type, ("pil", "np", "pt"))
        count = len(self.flow.latent_shapes)
        if not levels or not all(isinstance(level, int) and -count <= level < count for level in levels):
            raise ValueError(f"levels names some of the levels 0 (finest) to {count - 1} (coarsest), got {levels!r}.")
        temperatures = self.temperatures(self.config.default_temperature if temperature is None else temperature)
        kept = self.split(self.encode(images, class_labels))
        check_generator(generator, len(kept[0]))
        drawn = self.flow.draw_latents(len(kept[0]), 1.0, generator)
        for level in levels:
            kept[level] = temperatures[level] * drawn[level]
        return self.pictures(kept, self.labels_of(class_labels, len(kept[0]), "resample_levels"), output_type)

    # ------------------------------------------------------------------------------------------------------------------- the likelihood

    def log_likelihood(
        self,
        images: Pictures,
        labels: int | Sequence[int] | Tensor | None = None,
        num_samples: int | None = None,
        generator: Generators = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> LikelihoodResult:
        """log p of pictures: exact as a density, a bound for 8-bit pictures by their dequantisation; see `LikelihoodResult`.

        Args:
            images: PIL, a list of them, uint8 (B, C, H, W), or float that was 8-bit, in `value_range`.
            labels: their classes, for a class-conditional flow.
            num_samples: draws of the dequantisation noise, averaged; 1 by default.
            generator: one, or one per picture.
            value_range: (-1, 1) or (0, 1).
        """
        labels = None if labels is None else self.labels_of(labels, None, "log_likelihood")
        return flow_log_likelihood(self.flow, images, labels, num_samples, generator, value_range)

    # ------------------------------------------------------------------------------------------------------------------------ helpers

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional flow; None for one without."""
        return self.flow.config.num_class_labels

    def plan_batch(
        self, batch_size: int | None, class_labels: Any, num_images_per_label: int, latents: Tensor | None
    ) -> tuple[Tensor | None, int]:
        """The labels of a call, (B,), or None where it named none, and B."""
        check_count("num_images_per_label", num_images_per_label)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if latents is not None:
            self.split(latents)
            if batch_size not in (None, len(latents)):
                raise ValueError(f"batch_size {batch_size} and {len(latents)} latents: leave out batch_size.")
            batch_size = len(latents)
        if class_labels is None:
            if num_images_per_label != 1:
                raise ValueError("num_images_per_label needs class_labels; for pictures of any kind give batch_size.")
            return None, batch_size or 1
        labels = self.labels_of(class_labels, None, "__call__").repeat_interleave(num_images_per_label)
        if batch_size is not None and len(labels) == 1:
            labels = labels.expand(batch_size)
        if batch_size not in (None, len(labels)):
            raise ValueError(f"batch_size {batch_size} and {len(labels)} labels: leave out batch_size, or give one label.")
        return labels, len(labels)

    def labels_of(self, class_labels: Any, batch: int | None, where: str) -> Tensor | None:
        """Labels (B,) from one or several; None for a flow without classes.

        Raises:
            ValueError: labels that are missing, superfluous, out of range, or neither one nor one per picture.
        """
        if self.num_classes is None:
            if class_labels is not None:
                raise ValueError(f"GlowPipeline.{where}: this flow has no classes; leave out the labels.")
            return None
        if class_labels is None:
            raise ValueError(f"GlowPipeline.{where}: this flow has {self.num_classes} classes; give class_labels.")
        labels = torch.as_tensor(class_labels).reshape(-1)
        whole = not labels.is_floating_point() and labels.dtype != torch.bool and len(labels) > 0
        if not whole or labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"GlowPipeline.{where}: labels are whole numbers from 0 to {self.num_classes - 1}, got {class_labels!r}.")
        if batch is not None and len(labels) not in (1, batch):
            raise ValueError(f"GlowPipeline.{where}: one label or {batch} are needed, got {len(labels)}.")
        return labels.long() if batch is None else labels.long().expand(batch)

    def temperatures(self, temperature: Any) -> list[float]:
        """One temperature for each level.

        Raises:
            ValueError: another count of them, or one that is negative or not finite.
        """
        count = len(self.flow.latent_shapes)
        try:
            values = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1)
        except (TypeError, ValueError):  # words
            values = torch.empty(0)
        if len(values) not in (1, count) or not (torch.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"temperature is one number of at least 0, or {count} (one per level, the finest first); got {temperature!r}.")
        return values.expand(count).tolist()

    def split(self, latents: Tensor) -> list[Tensor]:
        """Latents (B, D) by level, the finest first, (B, c, h, w) each, on the flow's device."""
        shapes = self.flow.latent_shapes
        sizes = [shape[0] * shape[1] * shape[2] for shape in shapes]
        if not isinstance(latents, Tensor) or latents.ndim != 2 or latents.shape[1] != sum(sizes) or not len(latents):
            raise ValueError(f"latents must be a tensor of shape (B, {sum(sizes)}), got {shape_of(latents)}.")
        parts = latents.to(self.flow.device, self.flow.stream_dtype).split(sizes, 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, levels: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([level.flatten(1) for level in levels], 1)

    def pictures(self, levels: Sequence[Tensor], labels: Tensor | None, output_type: str) -> Any:
        """The pictures of latents by level, rounded to the flow's levels."""
        with torch.no_grad():
            x, _ = self.flow.decode(levels, None if labels is None else labels.to(self.flow.device))      # (B, C, H, W)
        self.report_non_finite(x)
        bits = self.flow.config.num_bits
        return self.image_processor.postprocess(from_levels(nearest_levels(x.nan_to_num(), bits), bits), output_type=output_type)
