"""Inpainting and outpainting in the latents of an autoencoder: a part of a picture is drawn, the rest is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from ..models.calling import latent_layout
from ..schedulers.choice import scheduler_class
from .conditioning import Captions, PictureSize, text_encoding
from .editing import (
    RePaint,
    check_strength,
    encode_latents,
    logger,
    positions_for,
    renoise,
    size_of,
    to_mask,
    to_pixels,
)
from .guidance import ClassifierFreeGuidance, Guidance
from .latent_base import tensors_of
from .latent_editing import LatentEditingPipeline
from .pictures import check_range, read_pictures

__all__ = ["DiffusionPipeline", "LatentInpaintPipeline", "ModelMixin", "SchedulerMixin"]

_SIDES = ("left", "top", "right", "bottom")


class LatentInpaintPipeline(LatentEditingPipeline):
    """Draws what a mask marks, after a caption, and keeps the rest; with `expand`, draws beyond the picture's frame.

    Works with every denoiser of `LatentTextToImagePipeline`: after each step the known part is put back at that step's noise level
    (Song et al. 2021, appendix I.2, https://arxiv.org/abs/2011.13456; Lugmayr et al. 2022, eq. 8, https://arxiv.org/abs/2201.09865). A
    denoiser trained for inpainting, whose input has the latents, the mask and the masked picture's latents (2 C + 1 channels: 9 in Stable
    Diffusion's), is given these instead. Any folder of the one loads as the other; `from_pipe` shares the components.
    """

    card_example = 'image = pipe("a red apple", image=picture, mask_image=mask).images[0]'

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Guidance | Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        expand: int | Sequence[int] | None = None,
        resampling: RePaint | None = None,
        keep_known: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
        true_cfg_scale: float | Guidance | Any = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] | None = None,
        negative_target_size: tuple[int, int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws `num_images_per_prompt` times for each prompt, those of one prompt next to each other.

        Args:
            prompt: one caption or a list of them, of the whole picture; or give `prompt_embeds`.
            image: a PIL picture (transparency becomes white), an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or a list of these.
                One for all prompts, one per prompt, or several for one prompt.
            mask_image: white is drawn, black is kept; a PIL picture (transparency is black), an array (B, H, W, 1) or a tensor (B, 1, H, W)
                in [0, 1], or a list of these: one, or one per picture. It is resized to the picture and cut at half white. May be left
                out with `expand`.
            height, width: of the result; the picture is resized so that it fits in, without what `expand` adds. By default the picture's
                own size and what is added, rounded down to what the model can draw.
            strength: 1 draws the masked part from noise, less begins with what is there; 0 returns the picture through the autoencoder.
            num_inference_steps: of the whole grid.
            latents: standard normal noise for the start, (B, C, height / f, width / f).
            expand: pixels to draw beyond the frame: one number for all sides, or (left, top, right, bottom).
            resampling: `RePaint(repeats, jump)` runs stretches of the loop again, for a better fit at the seam.
            keep_known: put the picture's own pixels back where nothing was to be drawn, so that they are exactly as they were. False
                returns the autoencoder's rendering of them, as diffusers does. Latents are returned as they are.
            Everything else: as in `LatentTextToImagePipeline`.
        Returns: an output with `.images`.
        Raises:
            ValueError, TypeError: an argument makes no sense, or the scheduler cannot start part of the way; nothing has been computed.
        """
        # 1. Check everything before anything is computed
        callback_on_step_end_tensor_inputs = tensors_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        num_inference_steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        strength = check_strength(strength)
        pictures, is_latent = self.check_pictures(image)
        if is_latent:
            raise ValueError("image must be a picture: latents cannot be masked in pixels.")
        border = self.check_border(expand)
        masks = self.check_masks(mask_image, pictures, any(border))
        height, width = self.canvas_for(pictures, border, height, width)
        captions = Captions(
            prompt, prompt_2, prompt_3, negative_prompt, negative_prompt_2, negative_prompt_3, prompt_embeds, negative_prompt_embeds,
            pooled_prompt_embeds, negative_pooled_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask,
            num_images_per_prompt, clip_skip, max_sequence_length,
        )  # fmt: skip
        size = PictureSize(
            height, width, original_size, crops_coords_top_left, target_size,
            negative_original_size, negative_crops_coords_top_left, negative_target_size,
        )  # fmt: skip
        captions.check(text_encoding(self))
        captions = self.per_picture(len(pictures), captions)
        if resampling is not None and not isinstance(resampling, RePaint):
            raise TypeError(f"resampling must be RePaint(repeats, jump) or None, got a {type(resampling).__name__}.")
        self.check_size(height, width)
        size.check(self.denoiser)
        self.check_sampling(
            num_inference_steps, timesteps, sigmas, eta, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        self.check_noise(captions.batch, height, width, generator, latents)
        takes_mask = self.takes_mask
        guidance = self.start_guidance(guidance_scale, true_cfg_scale, captions.has_negative)

        # 2. The grid, and the way along it
        device = self._execution_device
        self.set_timesteps(num_inference_steps, timesteps, sigmas, height, width, device)
        positions = positions_for(self.scheduler, strength)
        if resampling is not None and positions:
            positions = self.resampled(resampling, positions)

        try:
            # 3. Encode the captions, once
            conditions = self.encode_captions(captions, guidance != ClassifierFreeGuidance(1.0), device)
            conditions = self.with_guidance(size.on(conditions, self.denoiser), guidance_scale)
            batch = captions.batch
            copies = batch // len(pictures)

            # 4. The picture and the mask on the canvas, and in latents; noise
            pixels, mask = self.on_canvas(pictures, masks, border, height, width, device)  # (n, 3, H, W), (n, 1, H, W)
            clean = None
            if strength < 1.0 or not takes_mask:
                clean = encode_latents(self.vae, pixels, generator, copies)  # (B, C, h, w)
            noise = self.standard_noise(batch, height, width, generator, latents, device)  # (B, C, h, w)
            if strength == 1.0:
                latents = noise * self.scheduler.init_noise_sigma
            else:
                latents = self.noise_to(positions, clean, generator, noise)
            beside = None
            if takes_mask:
                beside = self.beside(pixels, mask, generator, copies)  # (B, 1 + C, h, w)
            else:  # diffusers encodes the masked picture here for every denoiser: the numbers that follow must be the same
                rows = batch if isinstance(generator, (list, tuple)) else len(pixels)
                self.standard_noise(rows, height, width, generator, None, device)
            step_options = self.step_options(eta, generator)

            # 5. Denoise, and put back what is known
            latents = self.denoise(
                latents,
                conditions,
                guidance,
                step_options,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                positions,
                beside,
                self.keeper(positions, clean, noise, mask, copies, generator, takes_mask, resampling is not None),
            )  # (B, C, h, w)

            # 6. Decode, put the known pixels back, and say so if something went wrong
            images = latents if output_type == "latent" else self.decode_latents(latents)  # (B, 3, H, W)
            self.report_non_finite(latents, images)
            if keep_known and output_type != "latent":
                known, drawn = (v.to(images.device).repeat_interleave(copies, dim=0) for v in (pixels, mask))
                images = torch.where(drawn == 1.0, images, known)
            images = self.image_processor.postprocess(images, output_type=output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ------------------------------------------------------------------------------------------------------------------- 1. the inputs

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser was trained for inpainting: its input has the mask and the masked picture's latents too.

        Raises:
            ValueError: its input is neither that nor the latents alone.
        """
        channels, latent = latent_layout(self.denoiser)[0], self.latent_channels
        if channels not in (latent, 2 * latent + 1):
            raise ValueError(
                f"LatentInpaintPipeline: this denoiser's input has {channels} channels; it must have {latent} (the latents) or "
                f"{2 * latent + 1} (the latents, a mask and the masked picture's latents)."
            )
        return channels != latent

    def check_border(self, expand: Any) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) pixels beyond the frame.

        Raises:
            ValueError: these are not whole numbers of at least 0.
        """
        sides = (0,) * 4 if expand is None else (expand,) * 4 if isinstance(expand, Integral) else tuple(expand)
        if len(sides) != 4 or any(isinstance(s, bool) or not isinstance(s, Integral) or s < 0 for s in sides):
            raise ValueError(f"expand must be a number of pixels, or one for each of ({', '.join(_SIDES)}), at least 0; got {expand!r}.")
        return sides

    def check_masks(self, mask_image: Any, pictures: Any, expands: bool) -> Any:
        """The masks in one form, or None where only the border is drawn.

        Raises:
            ValueError, TypeError: there are none, or they do not fit the pictures.
        """
        if mask_image is None:
            if not expands:
                raise ValueError("give mask_image (white is drawn, black is kept), expand, or both.")
            return None
        masks = read_pictures("mask_image", mask_image, background="black")
        check_range("mask_image", masks, (1, 3))
        if len(masks) not in (1, len(pictures)):
            raise ValueError(f"mask_image must be one mask, or one per picture: {len(pictures)} here, got {len(masks)}.")
        (h, w), (height, width) = size_of(masks), size_of(pictures)
        if abs(h * width - w * height) > max(h * width, w * height) // 50:  # 2 % is rounding
            raise ValueError(
                f"mask_image has {h} x {w} pixels and image {height} x {width}: give a mask of the picture's size or of its shape."
            )
        return masks

    def canvas_for(self, pictures: Any, border: tuple[int, ...], height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the result in pixels.

        Raises:
            ValueError: nothing is left of the picture.
        """
        own = size_of(pictures)
        added = border[1] + border[3], border[0] + border[2]
        full = tuple(side + more for side, more in zip(own, added, strict=True))
        fitting = tuple(max(side // self.size_multiple, 1) * self.size_multiple for side in full)
        wanted = height if height is not None else fitting[0], width if width is not None else fitting[1]
        for name, side, more in zip(("height", "width"), wanted, added, strict=True):
            if isinstance(side, int) and side <= more:
                raise ValueError(f"{name} = {side} pixels leaves nothing of the picture: expand adds {more}.")
        if (height is None and full[0] != fitting[0]) or (width is None and full[1] != fitting[1]):
            logger.warning(
                "the result would have %d x %d pixels and this model draws multiples of %d: the picture of %d x %d is resized to %d x %d.",
                *full, self.size_multiple, *own, wanted[0] - added[0], wanted[1] - added[1],
            )  # fmt: skip
        return wanted

    # ------------------------------------------------------------------------------------------------------------ 2. the way along the grid

    def resampled(self, resampling: RePaint, positions: Sequence[int]) -> list[int]:
        """The positions in the order in which they are run.

        Raises:
            ValueError: the scheduler cannot go back.
        """
        starts = [p for p in self.scheduler.starts if p >= positions[0]]
        if len(starts) == 1 and self.scheduler.num_inference_steps > 1 and positions[0] == 0:
            name = scheduler_class(self.scheduler).__name__
            raise ValueError(f"{name} can only be run once from its first timestep: leave out resampling, or take another scheduler.")
        if resampling.repeats > 1 and len(starts) <= resampling.jump:
            logger.warning("resampling has no effect: %d steps are run, and a stretch has %d.", len(starts), resampling.jump)
        return resampling.positions(starts, len(self.scheduler.timesteps))

    # -------------------------------------------------------------------------------------------------- 4. the picture, the mask, the noise

    def on_canvas(
        self, pictures: Any, masks: Any, border: tuple[int, ...], height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The pictures (n, 3, H, W) in [-1, 1] with their edges drawn out over the border, and the masks (n, 1, H, W), 1 where to draw."""
        left, top, right, bottom = border
        inner = height - top - bottom, width - left - right
        pixels = to_pixels(pictures, *inner)
        mask = torch.zeros(1, 1, *inner) if masks is None else to_mask(masks, *inner)
        pixels = F.pad(pixels, (left, right, top, bottom), mode="replicate")
        mask = F.pad(mask, (left, right, top, bottom), value=1.0).expand(len(pixels), -1, -1, -1)
        if not bool(mask.any()):
            logger.warning("mask_image marks nothing to draw: the picture is returned as it is.")
        return pixels.to(device), mask.to(device)

    def standard_noise(self, batch: int, height: int, width: int, generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        """Standard normal noise in the shape of the latents, float32: what was given, or drawn."""
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        return self.draw(torch.empty(self.latents_shape(batch, height, width), device=device), generator)

    def beside(self, pixels: Tensor, mask: Tensor, generator: Any, copies: int) -> Tensor:
        """The mask and the masked picture's latents, (B, 1 + C, h, w), for denoisers that take them."""
        small = F.interpolate(mask, scale_factor=1 / self.vae_scale_factor).repeat_interleave(copies, dim=0)  # nearest, as in training
        return torch.cat([small, encode_latents(self.vae, pixels * (mask < 0.5), generator, copies).to(small)], dim=1)

    def keeper(
        self,
        positions: Sequence[int],
        clean: Tensor | None,
        noise: Tensor,
        mask: Tensor,
        copies: int,
        generator: Any,
        takes_mask: bool,
        resamples: bool,
    ) -> Callable[[int, Tensor], Tensor]:
        """What is done after each step: the known latents at the level that was reached, and the way back where the loop goes back.

        A latent of which the mask marks any pixel is drawn; the pixels around it are put back after decoding.
        """
        scheduler, steps = self.scheduler, self.scheduler.timesteps
        drawn = F.max_pool2d(mask, self.vae_scale_factor).repeat_interleave(copies, dim=0)  # (B, 1, h, w)

        def after_step(n: int, latents: Tensor) -> Tensor:
            reached = positions[n] + 1
            level = scheduler.at(steps[reached])[0] if reached < len(steps) else None
            if not takes_mask:
                known = clean
                if level is not None:
                    fresh = self.draw(clean, generator) if resamples else noise
                    known = torch.add(level.alpha * clean, fresh, alpha=level.sigma)
                latents = torch.where(drawn == 1.0, latents, known)
            following = positions[n + 1] if n + 1 < len(positions) else reached
            if following != reached:
                latents = renoise(latents, level, scheduler.at(steps[following])[0], self.draw(latents, generator))
            return latents

        return after_step
