"""Text to image in the latents of an autoencoder: Stable Diffusion 1, 2, XL and 3, Flux, PixArt, latent diffusion and their like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from .conditioning import Captions, PictureSize, text_encoding
from .conditioning.resolution_bins import cut_to
from .guidance import ClassifierFreeGuidance, Guidance
from .latent_base import LatentPipeline, tensors_of

__all__ = ["DiffusionPipeline", "LatentTextToImagePipeline", "ModelMixin", "SchedulerMixin"]


class LatentTextToImagePipeline(LatentPipeline):
    """Draws pictures for captions: noise in latent space, a denoiser guided by the text, a decoder.

    Components carry diffusers' names, so folders of Stable Diffusion 1, 2, XL and 3, of Flux and of PixArt load here, and ours load there.

    Args:
        vae: decodes latents to pictures (AutoencoderKL or another with `decode`).
        text_encoder, text_encoder_2, text_encoder_3: those that the denoiser was trained with: CLIP or T5 alone, two CLIPs (Stable
            Diffusion XL), two CLIPs and T5 (Stable Diffusion 3), CLIP and T5 (Flux). None where captions come as embeddings.
        tokenizer, tokenizer_2, tokenizer_3: the text encoders'.
        scheduler: one of gen_pipelines or of diffusers; its config says what the denoiser was trained to do.
        unet, transformer: the denoiser, exactly one of them: UNet2DConditionModel, or PixArtTransformer2DModel, SD3Transformer2DModel,
            FluxTransformer2DModel.
        max_text_tokens: tokens per caption of T5.
        force_zeros_for_empty_prompt: zeros take the place of the embeddings of a negative prompt that is not given (Stable Diffusion XL).
        lower_case_captions: captions are trimmed and put in lower case first (PixArt).
        resolution_binning: pictures are drawn at the nearest size that the network was trained on, and cut to the wanted one (PixArt).
        default_num_inference_steps, default_guidance_scale: what a call uses unless told otherwise.
    """

    pipeline_tag = "text-to-image"
    card_example = 'image = pipe("a red apple").images[0]'

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
        use_resolution_binning: bool | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws `num_images_per_prompt` pictures for each prompt, those of one prompt next to each other.

        Args:
            prompt: one caption or a list of them; or give `prompt_embeds`.
            height, width: of the picture in pixels; by default the size the denoiser was trained on.
            num_inference_steps: network evaluations (pairs of them under guidance, in one batch).
            timesteps, sigmas: an explicit grid instead, as in the scheduler's `set_timesteps`.
            guidance_scale: s in uncond + s (cond - uncond). At 1, and at 0 as in diffusers, there is no guidance and the unconditional
                branch is not evaluated. Or a guidance object: `ClassifierFreeGuidance`, anything with its two methods, or a guider of
                diffusers. A network that was distilled with guidance (LCM, Flux) is told the number instead.
            negative_prompt: what takes the place of the empty caption, one for all prompts or one each.
            num_images_per_prompt: pictures per prompt.
            eta: noise of DDIM, 0 to 1; used by schedulers whose `step` has it.
            generator: one for the whole batch, or one per picture: then a picture does not depend on the batch it is drawn in.
            latents: standard normal noise to start from, (B, C, height / f, width / f) with f = `vae_scale_factor`. For Flux also as
                diffusers packs them, (B, tokens, 4 C).
            prompt_embeds, negative_prompt_embeds: the text encoders' output instead of captions, (number of prompts, L, D).
            prompt_attention_mask, negative_prompt_attention_mask: which tokens of these are text, (number of prompts, L).
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called as f(pipe, step, timestep, tensors) after each step; tensors in its answer replace those here.
            callback_on_step_end_tensor_inputs: names of these tensors: "latents", "prompt_embeds", "pooled_prompt_embeds", and with
                "negative_" before them the negative half alone; Stable Diffusion XL's "add_text_embeds" and "add_time_ids". Under guidance
                the others hold the unconditional and the conditional half, as in diffusers.
            prompt_2, prompt_3: what the second and the third text encoder read, where there are several; `prompt` by default.
            negative_prompt_2, negative_prompt_3: the same in place of the empty caption; `negative_prompt` by default.
            pooled_prompt_embeds, negative_pooled_prompt_embeds: beside given embeddings, (number of prompts, P), where the network is told
                a pooled vector (Stable Diffusion XL and 3, Flux).
            clip_skip: layers of the CLIP encoders to leave out for the prompt, counted from the one that is read.
            max_sequence_length: tokens per caption of T5; by default what the pipeline was trained with.
            true_cfg_scale: guidance by two branches for a network that is told `guidance_scale`; it needs a negative prompt.
            original_size, crops_coords_top_left, target_size: what Stable Diffusion XL is told of the picture, rows first; by default a
                picture of this size, whole. With "negative_" before them the same for the negative prompt, if both sizes are given.
            use_resolution_binning: draw at the nearest size that PixArt was trained on, then scale and cut; by default the pipeline's
                `resolution_binning`. Latents are of the size that is drawn.
        Returns: an output with `.images`.
        Raises:
            ValueError, TypeError: an argument makes no sense; nothing has been computed then.
        """
        # 1. Check everything before anything is computed
        callback_on_step_end_tensor_inputs = tensors_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        num_inference_steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        default_height, default_width = self.default_size
        wanted = height if height is not None else default_height, width if width is not None else default_width
        height, width = self.drawn_size(*wanted, use_resolution_binning)
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
        self.check_size(height, width)
        size.check(self.denoiser)
        self.check_sampling(
            num_inference_steps, timesteps, sigmas, eta, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        self.check_noise(captions.batch, height, width, generator, latents)
        guidance = self.start_guidance(guidance_scale, true_cfg_scale, captions.has_negative)

        # 2. The grid
        device = self._execution_device
        self.set_timesteps(num_inference_steps, timesteps, sigmas, height, width, device)

        try:
            # 3. Encode the captions, once
            conditions = self.encode_captions(captions, guidance != ClassifierFreeGuidance(1.0), device)
            conditions = self.with_guidance(size.on(conditions, self.denoiser), guidance_scale)

            # 4. Noise
            latents = self.prepare_latents(captions.batch, height, width, generator, latents, device)  # (B, C, h, w)
            step_options = self.step_options(eta, generator)

            # 5. Denoise
            latents = self.denoise(
                latents, conditions, guidance, step_options, callback_on_step_end, callback_on_step_end_tensor_inputs
            )  # (B, C, h, w)

            # 6. Decode, and say so if something went wrong
            images = latents if output_type == "latent" else self.decode_latents(latents)  # (B, 3, H, W)
            self.report_non_finite(latents, images)
            images = images if output_type == "latent" or wanted == (height, width) else cut_to(images, *wanted)
            images = self.image_processor.postprocess(images, output_type=output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
