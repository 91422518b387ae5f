"""Image to image in the latents of an autoencoder: a picture is noised part of the way and drawn again from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from .conditioning import Captions, PictureSize, text_encoding
from .editing import check_strength, positions_for
from .guidance import ClassifierFreeGuidance, Guidance
from .latent_base import tensors_of
from .latent_editing import LatentEditingPipeline

__all__ = ["DiffusionPipeline", "LatentImageToImagePipeline", "ModelMixin", "SchedulerMixin"]


class LatentImageToImagePipeline(LatentEditingPipeline):
    """Redraws pictures after a caption: the picture's latents are noised up to `strength` of the way and denoised from there.

    The components and options are those of `LatentTextToImagePipeline`: any folder of the one loads as the other, and `from_pipe` shares
    the components.
    """

    card_example = 'image = pipe("a red apple", image=picture, strength=0.6).images[0]'

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Guidance | Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
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
        """Redraws `num_images_per_prompt` times for each prompt, those of one prompt next to each other.

        Args:
            prompt: one caption or a list of them; or give `prompt_embeds`.
            image: what is redrawn: a PIL picture (transparency becomes white), an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], a
                list of these, or latents (B, C, h, w). One for all prompts, one per prompt, or several for one prompt.
            strength: 0 returns the picture through the autoencoder, 1 draws from noise alone and does not look at the picture. In between
                the last floor(strength n) of the n steps are run.
            num_inference_steps: of the whole grid.
            height, width: the picture is resized to it; by default its own size, rounded down to what the model can draw.
            latents: standard normal noise for the start, (B, C, height / f, width / f).
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
        height, width = self.size_for(pictures, is_latent, height, width)
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
        self.check_size(height, width)
        size.check(self.denoiser)
        self.check_sampling(
            num_inference_steps, timesteps, sigmas, eta, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        self.check_noise(captions.batch, height, width, generator, latents)
        guidance = self.start_guidance(guidance_scale, true_cfg_scale, captions.has_negative)

        # 2. The grid, and where to begin on it
        device = self._execution_device
        self.set_timesteps(num_inference_steps, timesteps, sigmas, height, width, device)
        positions = positions_for(self.scheduler, strength)

        try:
            # 3. Encode the captions, once
            conditions = self.encode_captions(captions, guidance != ClassifierFreeGuidance(1.0), device)
            conditions = self.with_guidance(size.on(conditions, self.denoiser), guidance_scale)
            batch = captions.batch

            # 4. The picture, noised
            if strength == 1.0:
                latents = self.prepare_latents(batch, height, width, generator, latents, device)  # (B, C, h, w)
            else:
                clean = self.encode_pictures(pictures, is_latent, height, width, batch, generator, device)  # (B, C, h, w)
                latents = self.noise_to(positions, clean, generator, latents)  # (B, C, h, w)
            step_options = self.step_options(eta, generator)

            # 5. Denoise
            latents = self.denoise(
                latents, conditions, guidance, step_options, callback_on_step_end, callback_on_step_end_tensor_inputs, positions
            )  # (B, C, h, w)

            # 6. Decode, and say so if something went wrong
            images = latents if output_type == "latent" else self.decode_latents(latents)  # (B, 3, H, W)
            self.report_non_finite(latents, images)
            images = self.image_processor.postprocess(images, output_type=output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
