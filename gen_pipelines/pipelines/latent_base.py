"""What the pipelines share that draw from captions in the latents of an autoencoder: components, captions, noise, one step, the decoder."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models.calling import TextCondition, is_a, latent_layout, predict, unpack_latents, unwrap
from ..models.text_cache import TextCache, cached_text
from ..processes.grids import MAX_STEPS
from .adapters import LoraAdapters
from .base import GenerativePipeline
from .checks import check_eta, latents_from_callback, version_of
from .conditioning import Captions, text_encoding
from .conditioning.captions import check_count, shape_of
from .conditioning.resolution_bins import has_bins, nearest_bin
from .from_diffusers import CannotRun
from .guidance import ClassifierFreeGuidance, Guidance, as_guidance, evaluation, guided, needed_branches

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# what a callback may see and change: name -> (part of the condition, whether it holds the negative half alone)
_PARTS = {
    "prompt_embeds": ("embeds", False),
    "negative_prompt_embeds": ("embeds", True),
    "pooled_prompt_embeds": ("pooled", False),
    "negative_pooled_prompt_embeds": ("pooled", True),
    "add_text_embeds": ("pooled", False),  # Stable Diffusion XL's names in diffusers
    "add_time_ids": ("size", False),
}


class LatentPipeline(LoraAdapters, GenerativePipeline):
    """The parts of a pipeline that draws from captions in latents; each task is a class with a `__call__` of its own.

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

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components = [
        "text_encoder",
        "tokenizer",
        "unet",
        "transformer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ]
    _callback_tensor_inputs = ["latents", *_PARTS]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        max_text_tokens: int | None = None,
        force_zeros_for_empty_prompt: bool = False,
        lower_case_captions: bool = False,
        resolution_binning: bool = False,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 7.5,
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError(
                f"{type(self).__name__}: give exactly one of unet and transformer, got {'neither' if unet is None else 'both'}."
            )
        refuse_unsupported(type(self).__name__, unet)
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler, unet=unet, transformer=transformer,
            text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
        )  # fmt: skip
        self.register_to_config(
            max_text_tokens=max_text_tokens,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            lower_case_captions=lower_case_captions,
            resolution_binning=resolution_binning,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        levels = getattr(vae.config, "block_out_channels", None) or getattr(vae.config, "encoder_block_out_channels", (0,) * 4)
        self.vae_scale_factor = 2 ** (len(levels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # ---------------------------------------------------------------------------------------------------------------------- the inputs

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the denoiser was trained on."""
        size = self.denoiser.config.get("sample_size") or 128  # Flux does not say
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        """Height and width are multiples of this many pixels."""
        return self.vae_scale_factor * latent_layout(self.denoiser)[1]

    def drawn_size(self, height: Any, width: Any, use_resolution_binning: bool | None) -> tuple[int, int]:
        """Height and width to draw at for a picture of this size: its own, or the nearest that the network was trained on.

        Raises:
            ValueError, TypeError: no size; or binning is asked for where the network's trained sizes are not known.
        """
        check_count("height", height)
        check_count("width", width)
        sample_size = unwrap(self.denoiser).config.get("sample_size")
        if use_resolution_binning is None:
            use_resolution_binning = self.config.resolution_binning and has_bins(sample_size)
        return nearest_bin(sample_size, height, width) if use_resolution_binning else (height, width)

    def check_size(self, height: Any, width: Any) -> None:
        """Raises ValueError or TypeError on a size in pixels that the network cannot draw."""
        for name, value in (("height", height), ("width", width)):
            check_count(name, value)
            if value % self.size_multiple:
                raise ValueError(
                    f"{name} must be a multiple of {self.size_multiple} pixels for this model, got {value}; "
                    f"near it is {_near(value, self.size_multiple)}."
                )

    def check_sampling(
        self, num_inference_steps: int, timesteps: Any, sigmas: Any, eta: float, output_type: str, callback: Any, tensors: Sequence[str]
    ) -> None:
        """Raises ValueError or TypeError on a grid, an eta, an output type or a callback that cannot work."""
        check_count("num_inference_steps", num_inference_steps, most=MAX_STEPS)
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps or sigmas, not both.")
        check_eta(eta)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end must be callable, got a {type(callback).__name__}.")
        if unknown := [n for n in tensors if n not in self._callback_tensor_inputs]:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {', '.join(self._callback_tensor_inputs)}, "
                f"got {', '.join(map(str, unknown))}."
            )

    def check_noise(self, batch: int, height: int, width: int, generator: Any, latents: Any) -> None:
        """Raises ValueError or TypeError on generators or latents that do not fit a batch of pictures."""
        if generator is not None:
            generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
            if wrong := [type(g).__name__ for g in generators if not isinstance(g, torch.Generator)]:
                raise TypeError(f"generator must be a torch.Generator or a list of them, got {wrong[0]}.")
            if isinstance(generator, (list, tuple)) and len(generators) != batch:
                raise ValueError(f"generator must be one, or one per picture: {batch} here, got {len(generators)}.")
        if latents is not None:
            wanted = self.latents_shape(batch, height, width)
            if not isinstance(latents, Tensor) or tuple(latents.shape) not in (wanted, self.packed_shape(wanted)):
                raise ValueError(
                    f"latents must be a tensor of shape {wanted} for {batch} pictures of {height} x {width}, got {shape_of(latents)}."
                )

    # -------------------------------------------------------------------------------------------------------------------- the guidance

    @property
    def is_told_guidance(self) -> bool:
        """Whether `guidance_scale` goes to the network, which was distilled from a guided one (LCM, Flux), instead of to two branches."""
        denoiser = unwrap(self.denoiser)
        return is_a(denoiser, "FluxTransformer2DModel") or denoiser.config.get("time_cond_proj_dim") is not None

    def start_guidance(self, guidance_scale: Any, true_cfg_scale: Any = None, has_negative: bool = True) -> Guidance:
        """The guidance of this call's branches; a callback may change `pipe._guidance_scale` or set `pipe._interrupt`.

        Raises:
            ValueError, TypeError: no scale, or one that this network cannot be given.
        """
        if self.is_told_guidance:
            if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
                raise TypeError(
                    f"guidance_scale must be a finite number: this network was distilled and is told it, got {guidance_scale!r}; give "
                    "another guidance as true_cfg_scale."
                )
            guidance = as_guidance(1.0 if true_cfg_scale is None else true_cfg_scale)
            if isinstance(guidance, ClassifierFreeGuidance) and guidance.scale != 1.0 and not has_negative:
                logger.warning("true_cfg_scale = %s has no effect without a negative prompt; '' is the empty one.", true_cfg_scale)
                guidance = ClassifierFreeGuidance(1.0)
        elif true_cfg_scale is not None:
            raise ValueError(
                f"true_cfg_scale = {true_cfg_scale!r} is for networks that were distilled with guidance (Flux, LCM); give this one "
                "guidance_scale."
            )
        else:
            guidance = as_guidance(guidance_scale)
        self._guidance_scale, self._guidance = guidance_scale, guidance
        self._interrupt = False
        return guidance

    @property
    def guidance_scale(self) -> Any:
        """What the current or last call was guided by."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current or last call has an unconditional branch."""
        return self._guidance != ClassifierFreeGuidance(1.0)

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the current or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after its step; the picture is what has been reached."""
        return self._interrupt

    # ------------------------------------------------------------------------------------------------------------------------ the grid

    def set_timesteps(self, num_inference_steps: int, timesteps: Any, sigmas: Any, height: int, width: int, device: torch.device) -> None:
        """Lays the scheduler's grid; where it shifts with the size of the picture, says how many tokens there are."""
        options: dict[str, Any] = {}
        if self.scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self.dynamic_shift(height, width)
        if timesteps is None and sigmas is None and self._even_in_sigma():
            sigmas = [1.0 - i / num_inference_steps for i in range(num_inference_steps)]
        steps = num_inference_steps if timesteps is None and sigmas is None else None
        self.scheduler.set_timesteps(steps, device=device, timesteps=timesteps, sigmas=sigmas, **options)

    def _even_in_sigma(self) -> bool:
        """Flux steps evenly from 1 to 1 / N, where the flow-matching schedulers by themselves end at their least level."""
        names = {self.scheduler.config.get("_class_name"), type(self.scheduler).__name__}
        steps_evenly = bool(names & {"FlowMatchEulerDiscreteScheduler", "FlowMatchEulerScheduler"})
        return steps_evenly and is_a(self.denoiser, "FluxTransformer2DModel")

    def dynamic_shift(self, height: int, width: int) -> float:
        """mu of the shift exp(mu), linear in the number of tokens (Esser et al. 2024, section 5.3.2, https://arxiv.org/abs/2403.03206)."""
        config = self.scheduler.config
        tokens = (height // self.size_multiple) * (width // self.size_multiple)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return low + (high - low) * (tokens - few) / (many - few)

    # -------------------------------------------------------------------------------------------------------------------- the captions

    def encode_captions(self, captions: Captions, needs_unconditional: bool, device: torch.device) -> dict[str, TextCondition]:
        """The conditions "cond" and, where it is needed, "uncond", each (B, ...), the pictures of one prompt next to each other."""
        if not needs_unconditional and (captions.negative_prompt or captions.negative_prompt_embeds is not None):
            because = "without a true_cfg_scale" if self.is_told_guidance else f"at guidance_scale = {self._guidance_scale}"
            logger.warning("the negative prompt has no effect: there is no guidance %s.", because)
        encoding = text_encoding(self)
        no_negative = needs_unconditional and not captions.has_negative and self.config.force_zeros_for_empty_prompt
        texts: dict[str, list[tuple[str, ...]]] = {}
        if captions.prompt is not None:
            texts["cond"] = captions.positive_texts(encoding.encoders)
        if needs_unconditional and captions.negative_prompt_embeds is None and not no_negative:
            texts["uncond"] = captions.negative_texts(encoding.encoders)

        conditions: dict[str, TextCondition] = {}
        together = [list(texts)] if captions.clip_skip is None else [[name] for name in texts]
        for names in together:  # the negative prompt never skips a layer
            rows = {text: row for row, text in enumerate(dict.fromkeys(text for name in names for text in texts[name]))}
            skip = captions.clip_skip if names == ["cond"] else None
            encoded = encoding.encode(list(rows), device, skip, captions.max_sequence_length) if rows else None
            conditions |= {name: encoded[[rows[text] for text in texts[name]]] for name in names}
        if captions.prompt_embeds is not None:
            conditions["cond"] = _given(captions.prompt_embeds, captions.prompt_attention_mask, captions.pooled_prompt_embeds, device)
        if needs_unconditional and captions.negative_prompt_embeds is not None:
            conditions["uncond"] = _given(
                captions.negative_prompt_embeds, captions.negative_prompt_attention_mask, captions.negative_pooled_prompt_embeds, device
            )
        if no_negative:
            conditions["uncond"] = conditions["cond"].map(torch.zeros_like)
        return {name: condition.repeat(captions.num_images_per_prompt) for name, condition in _alike(conditions).items()}

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        *,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor | None, ...]:
        """What the text encoders say of captions: given to a call under these names, it draws the picture of the captions.

        Args:
            prompt, negative_prompt, prompt_2 and so on, clip_skip, max_sequence_length: as in the call.
            device: where the captions are encoded; by default where the pipeline runs.
            num_images_per_prompt: how often each caption is repeated, next to each other; the call then takes each as a prompt of its own.
            do_classifier_free_guidance: False leaves out the negative half, which is None then.
        Returns: as diffusers' pipelines of the same networks do:
            (prompt_embeds, negative_prompt_embeds), each (B, L, D); after these, where the network is told a pooled vector (Stable
            Diffusion XL and 3, Flux), (pooled_prompt_embeds, negative_pooled_prompt_embeds), each (B, P);
            where it is told which tokens are text (PixArt, and with it bundled:emoji), (prompt_embeds, prompt_attention_mask,
            negative_prompt_embeds, negative_prompt_attention_mask), the masks (B, L).
        Raises:
            ValueError, TypeError: an argument makes no sense.
        """
        negatives = (negative_prompt, negative_prompt_2, negative_prompt_3, negative_prompt_embeds, negative_pooled_prompt_embeds,
                     negative_prompt_attention_mask)  # fmt: skip
        negative, negative_2, negative_3, negative_embeds, negative_pooled, negative_mask = (
            negatives if do_classifier_free_guidance else (None,) * len(negatives)
        )
        captions = Captions(
            prompt, prompt_2, prompt_3, negative, negative_2, negative_3, prompt_embeds, negative_embeds, pooled_prompt_embeds,
            negative_pooled, prompt_attention_mask, negative_mask, num_images_per_prompt, clip_skip, max_sequence_length,
        )  # fmt: skip
        encoding = text_encoding(self)
        captions.check(encoding)
        device = self._execution_device if device is None else torch.device(device)
        conditions = self.encode_captions(captions, do_classifier_free_guidance, device)
        part = lambda name: [getattr(conditions[half], name) if half in conditions else None for half in ("cond", "uncond")]
        if encoding.pooled:
            return (*part("embeds"), *part("pooled"))
        if is_a(unwrap(self.denoiser), "PixArtTransformer2DModel"):
            (cond, uncond), (mask, negative_mask) = part("embeds"), part("mask")
            return cond, mask, uncond, negative_mask
        return tuple(part("embeds"))

    def with_guidance(self, conditions: dict[str, TextCondition], guidance_scale: Any) -> dict[str, TextCondition]:
        """Adds the guidance scale for the networks that are told it."""
        if not self.is_told_guidance:
            return conditions
        told = lambda c: torch.full((len(c),), float(guidance_scale), device=c.embeds.device, dtype=torch.float32)
        return {name: replace(c, guidance=told(c)) for name, c in conditions.items()}

    # ----------------------------------------------------------------------------------------------------------------------- the noise

    def latents_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(B, C, h, w) of the latents of a batch of pictures."""
        channels, _ = latent_layout(self.denoiser)
        return batch, channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def packed_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, ...] | None:
        """The shape of the same latents as Flux's tokens; None for the other networks."""
        batch, channels, height, width = shape
        return (batch, height * width // 4, 4 * channels) if is_a(self.denoiser, "FluxTransformer2DModel") else None

    def prepare_latents(self, batch: int, height: int, width: int, generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        """The state that sampling starts from, (B, C, h, w), float32 whatever the network's dtype."""
        shape = self.latents_shape(batch, height, width)
        if latents is None:
            generator = list(generator) if isinstance(generator, tuple) else generator
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.ndim == 3:  # as diffusers' Flux keeps them
            latents = unpack_latents(latents, *shape[2:])
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def step_options(self, eta: float, generator: Any) -> dict[str, Any]:
        """What `scheduler.step` takes of `eta` and `generator`."""
        known = inspect.signature(self.scheduler.step).parameters
        if eta != 0.0 and "eta" not in known:
            logger.warning("eta = %s has no effect: %s.step does not take it.", eta, type(self.scheduler).__name__)
        generator = list(generator) if isinstance(generator, tuple) else generator
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}

    # ----------------------------------------------------------------------------------------------------------------------- the loop

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
        count = len(steps)
        positions = range(count) if positions is None else positions
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
                at = evaluation(self.scheduler, latents, t, position - first, count - first)
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
                latents = self.scheduler.step(output, t, latents, **step_options).prev_sample  # (B, C, h, w)
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
        tensors = {"latents": latents, **{name: _part(conditions, name) for name in names if name != "latents"}}
        versions = {name: version_of(tensor) for name, tensor in tensors.items()}
        scale = self._guidance_scale
        answer = callback(self, step, t, {name: tensors[name] for name in names}) or {}
        if unknown := sorted(set(answer) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"callback_on_step_end returned {', '.join(unknown)}; it may return {', '.join(self._callback_tensor_inputs)}."
            )
        if self._guidance_scale is not scale and not self.is_told_guidance:
            guidance = self._guidance = as_guidance(self._guidance_scale)
            if "uncond" not in conditions and guidance != ClassifierFreeGuidance(1.0):
                raise ValueError("callback_on_step_end switched guidance on in a call that began without it; begin with a scale above 1.")
        for name, value in (tensors | answer).items():  # a tensor that was written into counts as well as one that was returned
            if name != "latents" and (value is not tensors.get(name) or version_of(value) != versions[name]):
                conditions = _with_part(conditions, name, value)
                batches.clear()
        return latents_from_callback(answer.get("latents", latents), latents), conditions, guidance

    # --------------------------------------------------------------------------------------------------------------------- the decoder

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures in about [-1, 1], (B, 3, H, W), float32, from latents (B, C, h, w) as the denoiser knows them."""
        config = self.vae.config
        shift, mean, std = (config.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
        z = latents / config.scaling_factor
        if mean is not None and std is not None:
            z = z * torch.tensor(std, device=z.device).view(1, -1, 1, 1) + torch.tensor(mean, device=z.device).view(1, -1, 1, 1)
        if shift:
            z = z + shift
        is_xl = is_a(self.denoiser, "UNet2DConditionModel") and unwrap(self.denoiser).config.get("addition_embed_type") == "text_time"
        if not (is_xl and self.vae.dtype == torch.float16 and config.get("force_upcast")):
            return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
        self.vae.to(torch.float32)  # Stable Diffusion XL's first decoder overflows in half precision
        try:
            return self.vae.decode(z.float(), return_dict=False)[0]
        finally:
            self.vae.to(torch.float16)


def refuse_unsupported(pipeline: str, unet: Any) -> None:
    """Raises CannotRun, a ValueError, for a U-Net that needs more than captions, a size and a guidance scale."""
    for option, known in (("addition_embed_type", (None, "text_time")), ("class_embed_type", (None,)), ("encoder_hid_dim_type", (None,))):
        if unet is not None and (value := getattr(unet.config, option, None)) not in known:
            raise CannotRun(
                f"{pipeline}: this U-Net has {option}={value!r}, which it cannot be given here; "
                "AutoPipeline.from_pretrained loads such a repository as diffusers' own pipeline."
            )


def tensors_of(callback: Any, tensors: Sequence[str]) -> Sequence[str]:
    """What a callback wants to see: diffusers' own callbacks say it themselves."""
    return callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else tensors


def _near(value: int, multiple: int) -> int:
    return max(multiple, math.floor(value / multiple + 0.5) * multiple)


def _given(embeds: Tensor, mask: Tensor | None, pooled: Tensor | None, device: torch.device) -> TextCondition:
    return TextCondition(embeds.to(device), None if mask is None else mask.to(device).bool(), None if pooled is None else pooled.to(device))


def _alike(conditions: dict[str, TextCondition]) -> dict[str, TextCondition]:
    """Gives every condition the parts that one of them has: given embeddings may come without a mask and without a pooled vector."""
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


def _part(conditions: dict[str, TextCondition], name: str) -> Tensor | None:
    """What a callback is shown under a name: the negative half first, then the prompts', where the name is not of one half alone."""
    part, negative_only = _PARTS[name]
    if negative_only:
        return getattr(conditions["uncond"], part) if "uncond" in conditions else None
    halves = [getattr(conditions[branch], part) for branch in ("uncond", "cond") if branch in conditions]
    return None if halves[0] is None else torch.cat(halves) if len(halves) == 2 else halves[0]


def _with_part(conditions: dict[str, TextCondition], name: str, value: Tensor) -> dict[str, TextCondition]:
    """The conditions with what a callback put in place of a part."""
    part, negative_only = _PARTS[name]
    cond = conditions["cond"]
    new: dict[str, Tensor] = {}
    if negative_only:
        new = {"uncond": value} if "uncond" in conditions else {}
    elif len(value) == 2 * len(cond) and "uncond" in conditions:
        new["uncond"], new["cond"] = value.chunk(2)
    elif len(value) == 1 < len(cond) and torch.equal(value, (told := getattr(cond, part))[-1:]):
        new["cond"] = told  # diffusers' SDCFGCutoffCallback means the half with the prompts by its last row
    elif len(value) in (1, len(cond)):
        new["cond"] = value.expand(len(cond), *value.shape[1:])
    else:
        raise ValueError(f"callback_on_step_end returned {name} of shape {shape_of(value)}; the batch has {len(cond)} pictures.")
    for branch, tensor in new.items():
        if tensor.shape != (before := getattr(conditions[branch], part)).shape:
            raise ValueError(f"callback_on_step_end returned {name} of shape {shape_of(tensor)} per half; it must keep {shape_of(before)}.")
    return conditions | {branch: replace(conditions[branch], **{part: tensor}) for branch, tensor in new.items()}
