"""StyleGAN 1 to 3: truncation, style mixing, projection of pictures, and edits along directions of the style space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from ..models.gans.stylegan2 import NOISE
from .checks import check_count, shape_of
from .gan import GANPipeline
from .pictures import as_pictures

__all__ = ["Directions", "StyleGANPipeline"]


@dataclass(frozen=True)
class Directions:
    """Principal directions of the styles: `vectors` (K, w_dim) of length one, and the styles' deviations along them, (K,)."""

    vectors: Tensor
    deviations: Tensor


class StyleGANPipeline(GANPipeline):
    """Draws pictures from noise by way of styles w, which can be truncated, mixed, found for a picture, and edited.

    `truncation` is psi here: styles are w_avg + psi (w - w_avg) (Karras et al. 2019, section 2 and appendix B).
    """

    card_example = "images = pipe(batch_size=16, truncation=0.7).images"

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        truncation: float | None = None,
        truncation_cutoff: int | None = None,
        styles: Tensor | None = None,
        noise: str = "const",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws pictures; arguments as in `GANPipeline`, and

        Args:
            truncation: psi; 1 or None for none, 0 for the average picture.
            truncation_cutoff: truncate only the first so many layers.
            styles: (B, num_ws, w_dim), instead of noise: what `output_type="latent"` returned; truncated like others.
            noise: of the layers: "const" (stored with the network), "random" (from `generator`), "none".
            output_type: "latent" gives the styles (B, num_ws, w_dim).
        """
        if styles is not None:
            self.check_styles("styles", styles)
            if given := [name for name, value in (("class_labels", class_labels), ("latents", latents)) if value is not None]:
                raise ValueError(f"{given[0]} and styles: a picture is made of styles alone; leave out one of them.")
            batch_size = len(styles)
        count, labels = self.check_inputs(batch_size, class_labels, num_images_per_label, generator, latents, output_type)
        self.check_truncation(truncation)
        if truncation_cutoff is not None:
            check_count("truncation_cutoff", truncation_cutoff, least=0, most=self.generator.num_ws)
        if noise not in NOISE:
            raise ValueError(f"noise {noise!r} is none of {', '.join(NOISE)}.")
        psi = 1.0 if truncation is None else float(truncation)
        if styles is None:
            labels = self.prepare_labels(labels, count, generator)
            z = self.prepare_latents(count, generator, latents, None)
            styles = self.generator.map(z, labels, psi, truncation_cutoff)
        else:
            styles = self.generator.mapping.truncate(styles.to(self._execution_device), psi, truncation_cutoff)
        if output_type == "latent":
            return self.finish(styles, output_type, return_dict)
        return self.finish(self.crop(self.render(styles, noise, generator)), output_type, return_dict)

    def check_truncation(self, truncation: float | None) -> None:
        """Raises ValueError for a psi that is not finite."""
        number = isinstance(truncation, Real) and not isinstance(truncation, bool)
        if truncation is not None and not (number and math.isfinite(truncation)):
            raise ValueError(f"truncation must be a finite number (1 for none, 0 for the average picture), got {truncation!r}.")

    def check_styles(self, name: str, styles: Any) -> None:
        """Raises ValueError unless styles are a tensor (B, num_ws, w_dim) of at least one picture."""
        wanted = (self.generator.num_ws, self.generator.config.w_dim)
        if not isinstance(styles, Tensor) or styles.ndim != 3 or tuple(styles.shape[1:]) != wanted or not len(styles):
            raise ValueError(f"{name}: styles have shape {shape_of(styles)}; give (at least 1, {wanted[0]}, {wanted[1]}).")

    def render(self, styles: Tensor, noise: str = "const", generator: Any = None) -> Tensor:
        """Pictures (B, C, H, W) in about [-1, 1], of styles (B, num_ws, w_dim)."""
        generator = list(generator) if isinstance(generator, tuple) else generator
        return self.generator.synthesize(styles.to(self._execution_device, self.generator.dtype), noise, generator)

    def average_style(self) -> Tensor:
        """w_avg for every layer, (num_ws, w_dim)."""
        return self.generator.mapping.w_avg.expand(self.generator.num_ws, -1)

    # ------------------------------------------------------------------------------------------------------------------ between pictures

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
        """Pictures on the line between two styles (num_ws, w_dim), or between the styles of two noises (z_dim,), both ends included.

        `truncation` is psi, as in a call.
        """
        check_count("num_images", num_images, least=2)
        self.check_ends(start, end, class_labels, [(self.generator.num_ws, self.generator.config.w_dim), (self.latent_dim,)])
        self.check_truncation(truncation)
        ends = torch.stack([start, end]).to(self._execution_device)
        if ends.ndim == 2:
            ends = self.generator.map(ends, self.prepare_labels(None if class_labels is None else [class_labels] * 2, 2, None))
        if truncation is not None:
            ends = self.generator.mapping.truncate(ends, float(truncation))
        shares = torch.linspace(0, 1, num_images, device=ends.device).view(-1, 1, 1)
        return self.finish(self.crop(self.render(torch.lerp(ends[:1], ends[1:], shares))), output_type, True).images

    @torch.no_grad()
    def mix(self, rows: Tensor, columns: Tensor, layers: str | Sequence[int] = "all", noise: str = "const") -> Image.Image:
        """Style mixing as one picture: the top row and left column show the sources, a cell inside the mixture of its two.

        Args:
            rows, columns: styles (R, num_ws, w_dim) and (C, num_ws, w_dim), such as `pipe(4, output_type="latent").images`.
            layers: which layers the columns give, the rows giving the rest: "coarse" (4 to 8 pixels), "middle" (16 to 32), "fine" (64 and
                up; thirds of the layers in a network that has fewer than ten), or their numbers; "all" shows the table of the coarse
                ones, below it that of the middle and that of the fine ones.

        References: Karras et al. 2019, section 3.1 and figure 3
        """
        tables = [self.layers(which) for which in (("coarse", "middle", "fine") if layers == "all" else (layers,))]
        for name, styles in (("rows", rows), ("columns", columns)):
            self.check_styles(name, styles)
        left, top = (self.crop(self.render(styles, noise)) for styles in (rows, columns))              # (R or C, c, h, w)
        cells = [torch.ones_like(top[:1]), *top.split(1)]
        for chosen in tables:
            mixed = rows[:, None].repeat(1, len(columns), 1, 1)                                        # (R, C, L, D)
            mixed[:, :, chosen] = columns[None, :, chosen]
            for i, styles in enumerate(mixed):
                cells += [left[i : i + 1], *self.crop(self.render(styles, noise)).split(1)]
        whole = torch.cat(cells).unflatten(0, (len(tables) * len(rows) + 1, len(columns) + 1))         # (T R + 1, C + 1, c, h, w)
        whole = whole.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        return self.image_processor.postprocess(whole[None].float())[0]

    def layers(self, which: str | Sequence[int]) -> list[int]:
        """The numbers of "coarse", "middle" or "fine" layers, or the given ones, checked."""
        count = self.generator.num_ws
        if not isinstance(which, str):
            if wrong := [i for i in which if not 0 <= i < count]:
                raise ValueError(f"layers: {wrong[0]} is none of 0 to {count - 1}.")
            return list(which)
        bounds = {"coarse": (0, 4), "middle": (4, 8), "fine": (8, count)} if count > 9 else {
            "coarse": (0, count // 3), "middle": (count // 3, 2 * count // 3), "fine": (2 * count // 3, count),
        }  # fmt: skip
        if which not in bounds:
            raise ValueError(f"layers: {which!r} is none of {', '.join(bounds)}, nor a list of numbers.")
        return list(range(*bounds[which]))

    # ------------------------------------------------------------------------------------------------------------------------- projection

    def project(
        self,
        picture: Any,
        steps: int = 500,
        space: str = "w",
        learning_rate: float = 0.1,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> Tensor:
        """The styles whose picture is nearest to a given one, (1, num_ws, w_dim).

        Begins at the average style, with noise on the styles that fades over the first three quarters; the learning rate rises and falls.

        Args:
            picture: of the pipeline's size: a PIL picture; an array (H, W, C), uint8 or in [0, 1]; or a tensor (C, H, W) or (1, C, H, W),
                in [-1, 1] here, as `render` returns it: what `output_type="pt"` returned is that as 2 x - 1.
            space: "w" (one style for all layers) or "w+" (one for each: nearer to the picture, worse to edit).
            distance: (drawn, given) -> a number; squared differences over a pyramid of sizes by default.
            generator: draws the styles that their deviation is measured on, and the fading noise.

        References: Karras et al. 2020, appendix D, https://arxiv.org/abs/1912.04958; W+: Abdal et al. 2019, https://arxiv.org/abs/1904.03189
        """
        from tqdm.auto import tqdm

        if space not in ("w", "w+"):
            raise ValueError(f"space {space!r} is none of w, w+.")
        check_count("steps", steps)
        if not isinstance(picture, Tensor):
            picture = as_pictures(picture, self.generator.config.out_channels, "picture")
        picture = picture if picture.ndim == 4 else picture[None]
        wanted = (1, self.generator.config.out_channels, *self.picture_size)
        if picture.shape != wanted:
            raise ValueError(f"picture has shape {tuple(picture.shape)}; give {wanted} with values in [-1, 1].")
        distance = distance or pyramid_distance
        device = self._execution_device
        picture = picture.detach().to(device).float()
        with torch.no_grad():
            labels = None if self.generator.config.get("num_classes") is None else self.prepare_labels(None, 1000, generator)
            w = self.generator.mapping(self.prepare_latents(1000, generator, None, None), labels)
            deviation = (w - w.mean(0)).square().sum(1).mean().sqrt()
        layers = self.generator.num_ws if space == "w+" else 1
        style = self.generator.mapping.w_avg.expand(1, layers, -1).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([style], lr=learning_rate, betas=(0.9, 0.999))
        frozen = [p for p in self.generator.parameters() if p.requires_grad]
        for p in frozen:
            p.requires_grad_(False)
        try:
            with torch.enable_grad():
                for step in tqdm(range(steps), disable=not progress, desc="projecting"):
                    share = step / steps
                    fade = max(0.0, 1 - share / 0.75) ** 2
                    ramp = min(1.0, (1 - share) / 0.25, share / 0.05 + 1 / steps)
                    optimizer.param_groups[0]["lr"] = learning_rate * (0.5 - 0.5 * math.cos(math.pi * ramp))
                    shaken = torch.randn(style.shape, generator=generator).to(device) * (0.05 * deviation * fade)
                    drawn = self.crop(self.render((style + shaken).expand(-1, self.generator.num_ws, -1)))
                    optimizer.zero_grad()
                    distance(drawn.float(), picture).backward()
                    optimizer.step()
        finally:
            for p in frozen:
                p.requires_grad_(True)
        return style.detach().expand(-1, self.generator.num_ws, -1).clone()

    # ------------------------------------------------------------------------------------------------------------------------------ edits

    @torch.no_grad()
    def directions(self, count: int = 10, samples: int = 4096, generator: torch.Generator | None = None) -> Directions:
        """The `count` directions along which styles vary most: principal components of W.

        References: Härkönen et al. 2020, section 2.1, https://arxiv.org/abs/2004.02546
        """
        check_count("count", count)
        check_count("samples", samples, least=count + 1)
        if count > self.generator.config.w_dim:
            raise ValueError(f"count = {count}; styles have {self.generator.config.w_dim} dimensions.")
        labels = self.prepare_labels(None, samples, generator)
        w = self.generator.mapping(self.prepare_latents(samples, generator, None, None), labels).double()
        _, values, vectors = torch.linalg.svd(w - w.mean(0), full_matrices=False)
        return Directions(vectors[:count].float(), (values[:count] / math.sqrt(samples - 1)).float())

    @torch.no_grad()
    def edit(self, styles: Tensor, direction: Tensor, strengths: Sequence[float], layers: str | Sequence[int] | None = None) -> list[Any]:
        """PIL pictures of styles (1, num_ws, w_dim) moved along a direction (w_dim,) by each strength, in some layers or in all."""
        self.check_styles("styles", styles)
        if len(styles) != 1 or not isinstance(direction, Tensor) or direction.shape != styles.shape[2:]:
            wanted = f"(1, {self.generator.num_ws}, {self.generator.config.w_dim}) and a direction ({self.generator.config.w_dim},)"
            raise ValueError(f"edit takes styles {wanted}, got {tuple(styles.shape)} and {shape_of(direction)}.")
        moved = styles.repeat(len(strengths), 1, 1)
        chosen = list(range(self.generator.num_ws)) if layers is None else self.layers(layers)
        steps = torch.tensor(strengths, dtype=styles.dtype, device=styles.device)[:, None, None] * direction.to(styles)
        moved[:, chosen] += steps
        return self.finish(self.crop(self.render(moved)), "pil", True).images


def pyramid_distance(drawn: Tensor, given: Tensor) -> Tensor:
    """Mean squared differences of pictures (1, C, H, W), added over halved sizes down to 4 pixels: a number."""
    total = F.mse_loss(drawn, given)
    while min(drawn.shape[2:]) >= 8:
        drawn, given = F.avg_pool2d(drawn, 2), F.avg_pool2d(given, 2)
        total = total + F.mse_loss(drawn, given)
    return total
