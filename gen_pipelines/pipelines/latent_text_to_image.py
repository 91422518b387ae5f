"""Text to image in the latents of an autoencoder: Stable Diffusion, PixArt and their like."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models.calling import TextCondition, encode_text, predict
from ..models.text_cache import TextCache, cached_text
from .base import GenerativePipeline
from .guidance import ClassifierFreeGuidance, Guidance, as_guidance, evaluation, guided, needed_branches

__all__ = ["DiffusionPipeline", "LatentTextToImagePipeline", "ModelMixin", "SchedulerMixin"]

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LatentTextToImagePipeline(GenerativePipeline):
    """Draws pictures for captions: noise in latent space, a denoiser guided by the text, a decoder.

    Components carry diffusers' names, so folders of Stable Diffusion 1 and 2 load here and ours load there.

    Args:
        vae: decodes latents to pictures (AutoencoderKL or another with `decode`).
        text_encoder: CLIPTextModel or T5EncoderModel.
        tokenizer: the text encoder's.
        scheduler: one of gen_pipelines or of diffusers; its config says what the denoiser was trained to do.
        unet, transformer: the denoiser, exactly one of them: UNet2DConditionModel, or PixArtTransformer2DModel.
        max_text_tokens: tokens per caption where the tokenizer does not say (T5).
        default_num_inference_steps, default_guidance_scale: what a call uses unless told otherwise.
    """

    model_cpu_offload_seq = "text_encoder->unet->transformer->vae"
    pipeline_tag = "text-to-image"
    card_example = 'image = pipe("a red apple").images[0]'
    _optional_components = ["unet", "transformer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        max_text_tokens: int | None = None,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 7.5,
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError(
                f"LatentTextToImagePipeline: give exactly one of unet and transformer, got {'neither' if unet is None else 'both'}."
            )
        _refuse_unsupported(unet)
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler, unet=unet, transformer=transformer
        )
        self.register_to_config(
            max_text_tokens=max_text_tokens,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        levels = getattr(vae.config, "block_out_channels", None) or getattr(vae.config, "encoder_block_out_channels", (0,) * 4)
        self.vae_scale_factor = 2 ** (len(levels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

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
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws `num_images_per_prompt` pictures for each prompt, those of one prompt next to each other.

        Args:
            prompt: one caption or a list of them; or give `prompt_embeds`.
            height, width: of the picture in pixels; by default the size the denoiser was trained on.
            num_inference_steps: network evaluations (pairs of them under guidance, in one batch).
            timesteps, sigmas: an explicit grid instead, as in the scheduler's `set_timesteps`.
            guidance_scale: s in uncond + s (cond - uncond). Up to 1 there is no guidance and the unconditional branch is not evaluated.
                Or a guidance object: `ClassifierFreeGuidance`, anything with its two methods, or a guider of diffusers.
            negative_prompt: what takes the place of the empty caption, one for all prompts or one each.
            num_images_per_prompt: pictures per prompt.
            eta: noise of DDIM, 0 to 1; used by schedulers whose `step` has it.
            generator: one for the whole batch, or one per picture: then a picture does not depend on the batch it is drawn in.
            latents: standard normal noise to start from, (B, C, height / f, width / f) with f = `vae_scale_factor`.
            prompt_embeds, negative_prompt_embeds: the text encoder's output instead of captions, (number of prompts, L, D).
            prompt_attention_mask, negative_prompt_attention_mask: which tokens of these are text, (number of prompts, L).
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called as f(pipe, step, timestep, tensors) after each step; tensors in its answer replace those here.
            callback_on_step_end_tensor_inputs: names of these tensors, of "latents", "prompt_embeds", "negative_prompt_embeds". Under
                guidance `prompt_embeds` holds the unconditional and the conditional half, as in diffusers.
        Returns: an output with `.images`.
        Raises:
            ValueError, TypeError: an argument makes no sense; nothing has been computed then.
        """
        # 1. Check everything before anything is computed
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        num_inference_steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        default_height, default_width = self.default_size
        height, width = height if height is not None else default_height, width if width is not None else default_width
        self.check_inputs(
            prompt, height, width, num_inference_steps, timesteps, sigmas, negative_prompt, num_images_per_prompt, eta, generator, latents,
            prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask, output_type,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        guidance = self.start_guidance(guidance_scale)

        # 2. The grid
        device = self._execution_device
        self.set_timesteps(num_inference_steps, timesteps, sigmas, height, width, device)

        try:
            # 3. Encode the captions, once
            conditions = self.encode_prompts(
                prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask,
                num_images_per_prompt, needs_unconditional=guidance != ClassifierFreeGuidance(1.0), device=device,
            )  # fmt: skip
            conditions = self.with_size(conditions, height, width)

            # 4. Noise
            latents = self.prepare_latents(len(conditions["cond"]), height, width, generator, latents, device)  # (B, C, h, w)
            step_options = self.step_options(eta, generator)

            # 5. Denoise
            latents = self.denoise(
                latents, conditions, guidance, step_options, callback_on_step_end, callback_on_step_end_tensor_inputs
            )  # (B, C, h, w)

            # 6. Decode, and say so if something went wrong
            images = latents if output_type == "latent" else self.decode_latents(latents)  # (B, 3, H, W)
            self.report_non_finite(latents, images)
            images = self.image_processor.postprocess(images, output_type=output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ------------------------------------------------------------------------------------------------------------------- 1. the inputs

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the denoiser was trained on."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        """Height and width are multiples of this many pixels."""
        return self.vae_scale_factor * (getattr(self.denoiser.config, "patch_size", None) or 1)

    def check_inputs(
        self,
        prompt: Any,
        height: int,
        width: int,
        num_inference_steps: int,
        timesteps: Any = None,
        sigmas: Any = None,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> None:
        """Raises ValueError or TypeError on anything that cannot work: what came, what is allowed."""
        _check_captions("prompt", prompt)
        _check_captions("negative_prompt", negative_prompt)
        _check_count("num_inference_steps", num_inference_steps)
        _check_count("num_images_per_prompt", num_images_per_prompt)
        for name, value in (("height", height), ("width", width)):
            _check_count(name, value)
            if value % self.size_multiple:
                raise ValueError(
                    f"{name} must be a multiple of {self.size_multiple} pixels for this model, got {value}; "
                    f"near it is {_near(value, self.size_multiple)}."
                )
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps or sigmas, not both.")
        if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be a number from 0 (deterministic) to 1, got {eta!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end must be callable, got a {type(callback_on_step_end).__name__}.")
        if unknown := [n for n in callback_on_step_end_tensor_inputs if n not in self._callback_tensor_inputs]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {', '.join(self._callback_tensor_inputs)}, "
                f"got {', '.join(map(str, unknown))}."
            )

        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(f"give prompt or prompt_embeds, got {'neither' if prompt is None else 'both'}.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, got both.")
        for name, embeds, mask in (
            ("prompt", prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            if embeds is not None and (not isinstance(embeds, Tensor) or embeds.ndim != 3):
                raise ValueError(f"{name}_embeds must be a tensor of shape (prompts, tokens, width), got {_shape(embeds)}.")
            if mask is not None and (embeds is None or tuple(mask.shape) != tuple(embeds.shape[:2])):
                raise ValueError(
                    f"{name}_attention_mask must come with {name}_embeds and have its first two dimensions, "
                    f"got {_shape(mask)} and {_shape(embeds)}."
                )
        prompts = 1 if isinstance(prompt, str) else len(prompt) if prompt is not None else len(prompt_embeds)
        if isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) != prompts:
            raise ValueError(f"negative_prompt must be one caption or {prompts}, one per prompt; got {len(negative_prompt)}.")
        if negative_prompt_embeds is not None and prompt_embeds is not None and negative_prompt_embeds.shape != prompt_embeds.shape:
            raise ValueError(
                f"negative_prompt_embeds must have the shape of prompt_embeds, {_shape(prompt_embeds)}, "
                f"got {_shape(negative_prompt_embeds)}."
            )
        if negative_prompt_embeds is not None and len(negative_prompt_embeds) != prompts:
            raise ValueError(f"negative_prompt_embeds must be one per prompt, {prompts}, got {len(negative_prompt_embeds)}.")

        batch = prompts * num_images_per_prompt
        if generator is not None:
            generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
            if wrong := [type(g).__name__ for g in generators if not isinstance(g, torch.Generator)]:
                raise TypeError(f"generator must be a torch.Generator or a list of them, got {wrong[0]}.")
            if isinstance(generator, (list, tuple)) and len(generators) != batch:
                raise ValueError(f"generator must be one, or one per picture: {batch} here, got {len(generators)}.")
        if latents is not None:
            wanted = self.latents_shape(batch, height, width)
            if not isinstance(latents, Tensor) or tuple(latents.shape) != wanted:
                raise ValueError(
                    f"latents must be a tensor of shape {wanted} for {batch} pictures of {height} x {width}, got {_shape(latents)}."
                )

    def start_guidance(self, guidance_scale: Any) -> Guidance:
        """The guidance of this call; a callback may change `pipe._guidance_scale` or set `pipe._interrupt`."""
        guidance = as_guidance(guidance_scale)
        self._guidance_scale = guidance_scale
        self._interrupt = False
        return guidance

    @property
    def guidance_scale(self) -> Any:
        """What the current or last call was guided by."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current or last call has an unconditional branch."""
        return as_guidance(self._guidance_scale) != ClassifierFreeGuidance(1.0)

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the current or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after its step; the picture is what has been reached."""
        return self._interrupt

    # --------------------------------------------------------------------------------------------------------------------- 2. the grid

    def set_timesteps(self, num_inference_steps: int, timesteps: Any, sigmas: Any, height: int, width: int, device: torch.device) -> None:
        """Lays the scheduler's grid; where it shifts with the size of the picture, says how many tokens there are."""
        options: dict[str, Any] = {}
        if self.scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self.dynamic_shift(height, width)
        steps = num_inference_steps if timesteps is None and sigmas is None else None
        self.scheduler.set_timesteps(steps, device=device, timesteps=timesteps, sigmas=sigmas, **options)

    def dynamic_shift(self, height: int, width: int) -> float:
        """mu of the shift exp(mu), linear in the number of tokens (Esser et al. 2024, section 5.3.2, https://arxiv.org/abs/2403.03206)."""
        config = self.scheduler.config
        tokens = (height // self.size_multiple) * (width // self.size_multiple)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return low + (high - low) * (tokens - few) / (many - few)

    # ----------------------------------------------------------------------------------------------------------------- 3. the captions

    def encode_prompts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        negative_prompt_attention_mask: Tensor | None,
        num_images_per_prompt: int,
        needs_unconditional: bool,
        device: torch.device,
    ) -> dict[str, TextCondition]:
        """The conditions "cond" and, where it is needed, "uncond", each (B, ...), the pictures of one prompt next to each other."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt) if prompt is not None else None
        count = len(prompts) if prompts is not None else len(prompt_embeds)
        negatives = (
            [negative_prompt or ""] * count if negative_prompt is None or isinstance(negative_prompt, str) else list(negative_prompt)
        )
        if not needs_unconditional and (negative_prompt or negative_prompt_embeds is not None):
            logger.warning("the negative prompt has no effect: there is no guidance at guidance_scale = %s.", self._guidance_scale)

        captions = [] if prompts is None else list(prompts)
        captions += negatives if needs_unconditional and negative_prompt_embeds is None else []
        rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        encoded = encode_text(self.tokenizer, self.text_encoder, list(rows), device, self.config.max_text_tokens) if rows else None

        def condition(texts: list[str] | None, embeds: Tensor | None, mask: Tensor | None) -> TextCondition:
            if embeds is not None:
                made = TextCondition(embeds.to(device), None if mask is None else mask.to(device).bool())
            else:
                made = encoded[[rows[text] for text in texts]]
            return made.repeat(num_images_per_prompt)

        conditions = {"cond": condition(prompts, prompt_embeds, prompt_attention_mask)}
        if needs_unconditional:
            conditions["uncond"] = condition(negatives, negative_prompt_embeds, negative_prompt_attention_mask)
        return _alike(conditions)

    def with_size(self, conditions: dict[str, TextCondition], height: int, width: int) -> dict[str, TextCondition]:
        """Adds the picture's size for the networks that were trained with it."""
        if not getattr(self.denoiser, "use_additional_conditions", False):
            return conditions
        sized = {}
        for name, c in conditions.items():
            size = torch.tensor([[float(height), float(width)]], device=c.embeds.device).expand(len(c), 2)
            sized[name] = TextCondition(c.embeds, c.mask, c.pooled, size)
        return sized

    # -------------------------------------------------------------------------------------------------------------------- 4. the noise

    def latents_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(B, C, h, w) of the latents of a batch of pictures."""
        return batch, self.denoiser.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def prepare_latents(self, batch: int, height: int, width: int, generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        """The state that sampling starts from, (B, C, h, w), float32 whatever the network's dtype."""
        if latents is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            latents = randn_tensor(self.latents_shape(batch, height, width), generator=generator, device=device, dtype=torch.float32)
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def step_options(self, eta: float, generator: Any) -> dict[str, Any]:
        """What `scheduler.step` takes of `eta` and `generator`."""
        known = inspect.signature(self.scheduler.step).parameters
        if eta != 0.0 and "eta" not in known:
            logger.warning("eta = %s has no effect: %s.step does not take it.", eta, type(self.scheduler).__name__)
        generator = list(generator) if isinstance(generator, tuple) else generator
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}

    # --------------------------------------------------------------------------------------------------------------------- 5. the loop

    def denoise(
        self,
        latents: Tensor,
        conditions: dict[str, TextCondition],
        guidance: Guidance,
        step_options: dict[str, Any],
        callback: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_names: Sequence[str] = ("latents",),
        positions: Sequence[int] | None = None,
        beside: Tensor | None = None,
        after_step: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Runs the loop over the scheduler's timesteps.

        Args:
            latents: the state at the first of them, (B, C, h, w), float32.
            positions: which of `scheduler.timesteps` to run, in this order; all of them by default.
            beside: further channels of the network's input, (B, C', h, w).
            after_step: called as f(n, latents) after the step at `positions[n]`; what it returns takes the place of the latents.
        Returns: (B, C, h, w), float32.
        """
        steps = self.scheduler.timesteps
        positions = range(len(steps)) if positions is None else positions
        first = positions[0] if len(positions) else 0
        self._num_timesteps = len(positions)
        hooked = getattr(guidance, "hooks_network", False)
        with (
            contextlib.nullcontext(TextCache()) if hooked else cached_text(self.denoiser) as cache,
            self.progress_bar(total=len(positions)) as bar,
        ):
            batches: dict[tuple[str, ...], TextCondition] = {}
            for n, position in enumerate(positions):
                if self._interrupt:
                    break
                t = steps[position]
                at = evaluation(self.scheduler, latents, t, position - first, len(steps) - first)
                branches = needed_branches(guidance, at)
                if branches not in batches:
                    batches[branches] = cache.prepare(TextCondition.cat([conditions[branch] for branch in branches]))
                model_input = self.scheduler.scale_model_input(latents, t)  # (B, C, h, w)
                if beside is not None:
                    model_input = torch.cat([model_input, beside], dim=1)
                if hooked:
                    outputs = self.predict_one_by_one(guidance, branches, conditions, model_input, t)
                else:
                    outputs = self.predict_together(len(branches), batches[branches], model_input, t)
                output = guided(guidance, outputs, branches, at)  # (B, C', h, w)
                latents = self.scheduler.step(output, t, latents, **step_options, return_dict=False)[0]  # (B, C, h, w)
                if after_step is not None:
                    latents = after_step(n, latents)
                if callback is not None:
                    latents, conditions, guidance = self.call_back(callback, callback_names, n, t, latents, conditions, guidance, batches)
                bar.update()
        return latents

    def predict_together(self, branches: int, condition: TextCondition, x: Tensor, t: Tensor) -> list[Tensor]:
        """All branches in one batch of the network; float32, each (B, C', h, w)."""
        output = predict(self.denoiser, x if branches == 1 else torch.cat([x] * branches), t, condition).float()
        return list(self.without_variance(output, x).chunk(branches)) if branches > 1 else [self.without_variance(output, x)]

    def predict_one_by_one(
        self, guidance: Any, branches: Sequence[str], conditions: dict[str, TextCondition], x: Tensor, t: Tensor
    ) -> list[Tensor]:
        """Each branch by itself, for guiders that change the network in between; float32, each (B, C', h, w)."""
        outputs = []
        for branch in branches:
            with guidance.around(self.denoiser):
                outputs.append(self.without_variance(predict(self.denoiser, x, t, conditions[branch]).float(), x))
        return outputs

    def without_variance(self, output: Tensor, x: Tensor) -> Tensor:
        """Drops a learned variance that the scheduler's config does not know of (PixArt under a deterministic sampler)."""
        if output.shape[1] == x.shape[1] or self.parameterization.learned_variance:
            return output
        return output[:, : x.shape[1]]

    def call_back(
        self,
        callback: Callable[..., dict[str, Tensor] | None],
        names: Sequence[str],
        step: int,
        t: Tensor,
        latents: Tensor,
        conditions: dict[str, TextCondition],
        guidance: Guidance,
        batches: dict[tuple[str, ...], TextCondition],
    ) -> tuple[Tensor, dict[str, TextCondition], Guidance]:
        """Calls the callback and takes over what it changed.

        Raises:
            ValueError: it returned what it may not, or switched guidance on, for which nothing was encoded.
        """
        negative = conditions["uncond"].embeds if "uncond" in conditions else None
        both = conditions["cond"].embeds if negative is None else torch.cat([negative, conditions["cond"].embeds])
        tensors = {"latents": latents, "prompt_embeds": both, "negative_prompt_embeds": negative}
        scale = self._guidance_scale
        answer = callback(self, step, t, {name: tensors[name] for name in names}) or {}
        if unknown := sorted(set(answer) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"callback_on_step_end returned {', '.join(unknown)}; it may return {', '.join(self._callback_tensor_inputs)}."
            )
        if self._guidance_scale is not scale:
            guidance = as_guidance(self._guidance_scale)
            if "uncond" not in conditions and guidance != ClassifierFreeGuidance(1.0):
                raise ValueError("callback_on_step_end switched guidance on in a call that began without it; begin with a scale above 1.")
        if answer.get("prompt_embeds", both) is not both or answer.get("negative_prompt_embeds", negative) is not negative:
            conditions = _with_embeds(
                conditions, answer.get("prompt_embeds", both), both, answer.get("negative_prompt_embeds", negative), negative
            )
            batches.clear()
        return answer.get("latents", latents), conditions, guidance

    # -------------------------------------------------------------------------------------------------------------------- 6. the decoder

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures in about [-1, 1], (B, 3, H, W), float32, from latents (B, C, h, w) as the denoiser knows them."""
        config = self.vae.config
        shift, mean, std = (config.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
        z = latents / config.scaling_factor
        if mean is not None and std is not None:
            z = z * torch.tensor(std, device=z.device).view(1, -1, 1, 1) + torch.tensor(mean, device=z.device).view(1, -1, 1, 1)
        if shift:
            z = z + shift
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()


def _refuse_unsupported(unet: Any) -> None:
    """U-Nets that need more than a caption and a time."""
    for option in ("time_cond_proj_dim", "addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if unet is not None and (value := getattr(unet.config, option, None)) is not None:
            raise ValueError(
                f"LatentTextToImagePipeline: this U-Net has {option}={value!r}, which it cannot be given here; "
                "AutoPipeline.from_pretrained loads such a repository as diffusers' own pipeline."
            )


def _check_captions(name: str, captions: Any) -> None:
    if captions is None or isinstance(captions, str):
        return
    if not isinstance(captions, (list, tuple)):
        raise TypeError(f"{name} must be a string or a list of strings, got a {type(captions).__name__}.")
    if not captions:
        raise ValueError(f"{name} is an empty list; give at least one caption.")
    if wrong := [(i, type(c).__name__) for i, c in enumerate(captions) if not isinstance(c, str)]:
        raise TypeError(f"{name} must hold strings only; number {wrong[0][0]} is of type {wrong[0][1]}.")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _near(value: int, multiple: int) -> int:
    return max(multiple, math.floor(value / multiple + 0.5) * multiple)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _alike(conditions: dict[str, TextCondition]) -> dict[str, TextCondition]:
    """Gives every condition the parts that one of them has: given embeddings come without a mask and without a pooled vector."""
    masked = any(c.mask is not None for c in conditions.values())
    pooled = all(c.pooled is not None for c in conditions.values())
    return {
        name: TextCondition(
            c.embeds,
            torch.ones(c.embeds.shape[:2], dtype=torch.bool, device=c.embeds.device) if masked and c.mask is None else c.mask,
            c.pooled if pooled else None,
        )
        for name, c in conditions.items()
    }


def _with_embeds(
    conditions: dict[str, TextCondition], prompt: Tensor, both: Tensor, negative: Tensor | None, old_negative: Tensor | None
) -> dict[str, TextCondition]:
    """The conditions with what a callback put in place of their embeddings."""
    cond = conditions["cond"]
    new = {name: c.embeds for name, c in conditions.items()}
    if prompt is not both:
        if len(prompt) == 2 * len(cond) and "uncond" in conditions:
            new["uncond"], new["cond"] = prompt.chunk(2)
        elif len(prompt) in (1, len(cond)):
            new["cond"] = prompt.expand(len(cond), *prompt.shape[1:])
        else:
            raise ValueError(f"callback_on_step_end returned prompt_embeds of shape {_shape(prompt)}; the batch has {len(cond)} pictures.")
    if negative is not old_negative and negative is not None and "uncond" in conditions:
        new["uncond"] = negative
    if wrong := [name for name, c in conditions.items() if new[name].shape != c.embeds.shape]:
        raise ValueError(
            f"callback_on_step_end returned embeddings of shape {_shape(new[wrong[0]])}; they must keep {_shape(cond.embeds)}."
        )
    return {name: TextCondition(new[name], c.mask, c.pooled, c.size) for name, c in conditions.items()}
