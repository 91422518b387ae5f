"""Pictures from noise, of a class or of none, in pixels or in an autoencoder's latents."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..likelihood.denoiser import Denoiser
from ..likelihood.dequantization import from_levels, to_levels
from ..likelihood.observation import own_generators
from ..likelihood.ode import ode_log_density, ode_log_likelihood
from ..likelihood.result import LikelihoodResult
from ..likelihood.vlb import variational_bound
from ..models.calling import ClassCondition, context_classes, is_a, predict
from ..models.latent_space import decode_latents, encode_pictures
from ..processes.grids import MAX_STEPS
from ..processes.level import Level
from ..schedulers.ddim import DDIMScheduler
from ..schedulers.ddim_inverse import DDIMInverseScheduler
from ..schedulers.updates import raise_level
from .base import GenerativePipeline
from .checks import check_callback, check_count, check_eta, check_generator, check_output_type, latents_from_callback, shape_of
from .guidance import ClassifierFreeGuidance, Guidance, as_guidance, evaluation, guided, needed_branches
from .interpolation import spherical
from .pictures import as_mask, as_pictures, crop, pad

__all__ = ["DiffusionImagePipeline", "DiffusionPipeline", "ModelMixin", "SchedulerMixin"]

logger = logging.getLogger(__name__)

_NO_GUIDANCE = ClassifierFreeGuidance(1.0)


class DiffusionImagePipeline(GenerativePipeline):
    """Draws pictures from noise: one denoiser, any scheduler, with or without classes, in pixels or in latents.

    Components carry the names of diffusers' DDPM, DDIM, PNDM, DiT, ConsistencyModel and LDM pipelines, whose folders load here.

    Args:
        scheduler: one of gen_pipelines or of diffusers; its config says what the denoiser was trained to do.
        unet, transformer: the denoiser, exactly one of them: UNet2DModel, ADMUNet2DModel, or UNet2DConditionModel where it attends to a
            class; DiTTransformer2DModel or DiTModel.
        vae, vqvae: decodes latents to pictures (AutoencoderKL, VQModel); at most one. None: the denoiser works on pixels.
        image_size: height and width of the pictures, if less than what the network draws (28 where that draws 32): pictures are framed in
            black on the way in, and cropped on the way out.
        null_class: the label that means "no class", which guidance needs: the last row of a U-Net's class table. A DiT says it itself.
        id2label: class -> name, or several names with commas between, as in diffusers' DiTPipeline.
        default_num_inference_steps, default_guidance_scale: what a call uses unless told otherwise.
    """

    model_cpu_offload_seq = "unet->transformer->vae->vqvae"
    pipeline_tag = "unconditional-image-generation"
    _optional_components = ["unet", "transformer", "vae", "vqvae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        vae: Any = None,
        vqvae: Any = None,
        image_size: int | None = None,
        null_class: int | None = None,
        id2label: Mapping[Any, str] | None = None,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError(
                f"DiffusionImagePipeline: give exactly one of unet and transformer, got {'neither' if unet is None else 'both'}."
            )
        if vae is not None and vqvae is not None:
            raise ValueError("DiffusionImagePipeline: give vae or vqvae, got both.")
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae, vqvae=vqvae)
        self.register_to_config(
            image_size=image_size,
            null_class=null_class,
            id2label=None if id2label is None else {str(key): name for key, name in id2label.items()},
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        self.labels = _names(id2label or {})
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._check_components()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Guidance | Any = None,
        num_images_per_label: int = 1,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        mask_image: Any = None,
        num_resamples: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws `batch_size` pictures, or `num_images_per_label` of each label, those of one label next to each other.

        Args:
            batch_size: pictures; 1 by default. A network with classes is then given the null label where it has one, and else labels drawn
                uniformly from `generator`. With `class_labels` it may be left out; one label and a `batch_size` give that many of it.
            class_labels: classes, by number or by the names of `id2label`; one or several.
            num_inference_steps: network evaluations (pairs of them under guidance, in one batch).
            timesteps, sigmas: an explicit grid instead, as in the scheduler's `set_timesteps`.
            guidance_scale: s in uncond + s (cond - uncond), where uncond has the null label. Up to 1 there is no guidance. Or a guidance
                object: `ClassifierFreeGuidance`, anything with its two methods, or a guider of diffusers.
            num_images_per_label: pictures of each label.
            eta: noise of DDIM, 0 to 1; used by schedulers whose `step` has it.
            use_clipped_model_output: DDIM's: whether eps follows a clipped x_0 (by default not, as in diffusers).
            generator: one for the whole batch, or one per picture: then a picture does not depend on the batch it is drawn in.
            latents: standard normal noise to start from, (B, C, h, w), the network's own size.
            image, mask_image: inpainting in pixels. `image` is kept where `mask_image` is black and drawn anew where it is white; one
                picture, or one for each to be drawn. At each level what is kept is replaced by the picture, noised to that level.
            num_resamples: how often each step of inpainting is taken, going back by noise in between, so that what is drawn fits what is
                kept (RePaint's jumps of one step).
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": what the loop ends with.
            return_dict: False returns a tuple.
            callback_on_step_end: called as f(pipe, step, timestep, tensors) after each step; `latents` in its answer replace those here.
            callback_on_step_end_tensor_inputs: ("latents",) or ().
        Returns: an output with `.images`.
        Raises:
            ValueError, TypeError: an argument makes no sense; nothing has been computed then.

        References: inpainting: Lugmayr et al. 2022, eqs. 8a to 8c and algorithm 1, https://arxiv.org/abs/2201.09865
        """
        # 1. Check everything before anything is computed
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        num_inference_steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        labels, batch = self.plan_batch(batch_size, class_labels, num_images_per_label, latents, generator)
        self.check_inputs(
            batch, num_inference_steps, timesteps, sigmas, eta, generator, latents, num_resamples, output_type, callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        guidance = self.start_guidance(guidance_scale, labels)
        inpainting = self.check_inpainting(batch, image, mask_image, num_resamples)

        # 2. The grid
        device = self._execution_device
        scheduler = self.scheduler
        self.set_timesteps(scheduler, num_inference_steps, timesteps, sigmas, device)
        steps = scheduler.timesteps
        self._num_timesteps = len(steps)

        try:
            # 3. Noise, then labels where none were given
            generator = list(generator) if isinstance(generator, tuple) else generator
            latents = self.prepare_latents(batch, generator, latents, device)  # (B, C, h, w)
            conditions = self.conditions(self.draw_labels(batch, generator) if labels is None else labels, device)
            step_options = self.step_options(eta, use_clipped_model_output, generator)
            known, anew = self.prepare_inpainting(inpainting, device)

            # 4. Denoise
            levels = scheduler.levels
            with self.progress_bar(total=len(steps)) as bar:
                for i, t in enumerate(steps):
                    if self._interrupt:
                        break
                    for again in reversed(range(self.times_to_take(i, known, num_resamples))):
                        if known is not None:
                            latents = torch.where(anew, latents, self.noised(known, levels[i], latents, generator))
                        output = self.predict_guided(scheduler, latents, t, i, conditions, guidance)  # (B, C', h, w)
                        latents = scheduler.step(output, t, latents, **step_options).prev_sample  # (B, C, h, w)
                        if again:  # back to where this step began, by noise
                            noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=latents.dtype)
                            latents = raise_level(latents, levels[i + 1], levels[i], noise)
                    if callback_on_step_end is not None:
                        latents, guidance = self.call_back(
                            callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents, guidance
                        )
                    bar.update()
            if known is not None:
                latents = torch.where(anew, latents, known)

            # 5. Decode, and say so if something went wrong
            images = latents if output_type == "latent" else self.to_pictures(latents)  # (B, C, H, W)
            self.report_non_finite(latents, images)
            images = self.image_processor.postprocess(images, output_type=output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def card_example(self) -> str:
        """The call in the model card's snippet."""
        return f"image = pipe({'' if self.num_classes is None else 'class_labels=0'}).images[0]"

    # -------------------------------------------------------------------------------------------------- noise of a picture, and back

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Guidance | Any = 1.0,
    ) -> Tensor:
        """The noise that deterministic sampling would have made these pictures of: DDIM backwards, on the pipeline's own grid.

        Args:
            image: pictures: PIL, a list of them, a tensor (B, C, H, W) or an array (B, H, W, C), uint8 or in [0, 1].
            class_labels: their classes, one or one each; by default the null label, which a network with classes must then have.
            num_inference_steps: network evaluations. A round trip closes with an error of first order in the step.
            guidance_scale: as in the call; guided inversion is less exact.
        Returns: unit noise (B, C, h, w), float32 on the pipeline's device: `latents=` of a call, or what `decode` takes.
        Raises:
            ValueError, TypeError: an argument makes no sense; a consistency network, which follows no path from data to noise.

        References: Song et al. 2021, section 4.3, https://arxiv.org/abs/2010.02502
        """
        check_count("num_inference_steps", num_inference_steps, most=MAX_STEPS)
        pictures = self.check_pictures(image)
        labels = self.labels_of(class_labels, len(pictures))
        guidance = self.start_guidance(guidance_scale, labels)
        device = self._execution_device
        forward, backward = self.path_schedulers()
        self.set_timesteps(forward, num_inference_steps, None, None, device)
        self.set_timesteps(backward, num_inference_steps, None, None, device)
        try:
            conditions = self.conditions(self.null_labels(len(pictures), "invert") if labels is None else labels, device)
            x = self.from_pictures(pictures.to(device))  # (B, C, h, w)
            return self.follow(backward, x, conditions, guidance) / forward.init_noise_sigma
        finally:
            self.maybe_free_model_hooks()

    def encode(self, image: Any, **options: Any) -> Tensor:
        """`invert`, under the name that every pipeline with latents has; (B, C, h, w)."""
        return self.invert(image, **options)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Guidance | Any = 1.0,
        output_type: str = "pil",
    ) -> Any:
        """The pictures that deterministic sampling makes of noise: the other way of `invert`, on the same grid, whatever the scheduler is.

        Args:
            latents: unit noise (B, C, h, w).
            class_labels, num_inference_steps, guidance_scale: as given to `invert`.
            output_type: "pil", "np", "pt" or "latent".
        Returns: the pictures.
        """
        check_count("num_inference_steps", num_inference_steps, most=MAX_STEPS)
        check_output_type(output_type)
        if not isinstance(latents, Tensor) or tuple(latents.shape[1:]) != self.latents_shape(1)[1:]:
            raise ValueError(f"latents must be a tensor of shape {('B', *self.latents_shape(1)[1:])}, got {shape_of(latents)}.")
        labels = self.labels_of(class_labels, len(latents))
        guidance = self.start_guidance(guidance_scale, labels)
        device = self._execution_device
        forward, _ = self.path_schedulers()
        self.set_timesteps(forward, num_inference_steps, None, None, device)
        try:
            conditions = self.conditions(self.null_labels(len(latents), "decode") if labels is None else labels, device)
            x = latents.to(device=device, dtype=torch.float32) * forward.init_noise_sigma
            x = self.follow(forward, x, conditions, guidance)
            images = x if output_type == "latent" else self.to_pictures(x)
        finally:
            self.maybe_free_model_hooks()
        return self.image_processor.postprocess(images, output_type=output_type)

    @torch.no_grad()
    def interpolate(
        self,
        start: Any = None,
        end: Any = None,
        num_images: int = 8,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Guidance | Any = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Pictures on the way from one to another, by spherical interpolation of their noise.

        Args:
            start, end: pictures, which are inverted; None draws the noise of that end from `generator`.
            num_images: pictures, both ends among them; at least 2.
            class_labels: one for the whole way, or one for each end (the first half of the pictures has the first); by default the null
                label, which a network with classes must then have.
            num_inference_steps, guidance_scale: as in `invert` and `decode`.
            generator: for ends that are drawn.
            output_type: "pil", "np", "pt" or "latent".
        Returns: `num_images` pictures.

        References: Song et al. 2021, section 5.3 and appendix D.5, https://arxiv.org/abs/2010.02502
        """
        check_count("num_images", num_images, least=2)
        check_output_type(output_type)
        check_generator(generator, 1)
        labels = self.labels_of(class_labels, 2)
        ends = []
        for name, picture, label in (("start", start, labels and labels[0]), ("end", end, labels and labels[1])):
            if picture is None:
                ends.append(self.noise(1, generator, self._execution_device))
                continue
            if len(self.check_pictures(picture, name)) != 1:
                raise ValueError(f"{name} must be one picture.")
            ends.append(self.invert(picture, label, num_inference_steps, guidance_scale))
        weights = torch.linspace(0, 1, num_images)
        noise = torch.cat([spherical(*ends, weight) for weight in weights.tolist()])
        way = None if labels is None else [labels[0] if weight < 0.5 else labels[1] for weight in weights.tolist()]
        return self.decode(noise, way, num_inference_steps, guidance_scale, output_type)

    def path_schedulers(self) -> tuple[DDIMScheduler, DDIMInverseScheduler]:
        """Deterministic DDIM towards data and towards noise on the pipeline's grid, unclipped: the two directions of one path.

        Raises:
            ValueError: a consistency network, whose x_0 is where the path ends and not its direction.
        """
        network = self.parameterization
        if not network.has_path:
            raise ValueError(
                "DiffusionImagePipeline: a consistency network jumps to data and follows no path to noise: nothing can be inverted; "
                "use the diffusion network that it was distilled from."
            )
        network = network.with_(clip_sample=False, thresholding=False)
        known = {key: self.scheduler.config[key] for key in ("set_alpha_to_one",) if self.scheduler.config.get(key) is not None}
        return tuple(cls(**known).bind(network, grid=self.scheduler.config) for cls in (DDIMScheduler, DDIMInverseScheduler))

    def follow(self, scheduler: Any, x: Tensor, conditions: dict[str, ClassCondition | None], guidance: Guidance) -> Tensor:
        """The state at the end of a deterministic scheduler's grid, (B, C, h, w), from `x` at its start."""
        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            output = self.predict_guided(scheduler, x, t, i, conditions, guidance)
            x = scheduler.step(output, t, x).prev_sample
        return x

    # ----------------------------------------------------------------------------------------------------------------- likelihood

    def log_likelihood(
        self,
        images: Any,
        labels: Any = None,
        num_samples: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        kind: str = "ode",
        batch_size: int = 32,
        **options: Any,
    ) -> LikelihoodResult:
        """Log-likelihoods of 8-bit pictures, of any network on any path (without guidance, which is no density).

        Args:
            images: PIL pictures, a list of them, uint8 tensors, or float tensors in [-1, 1] that were 8-bit. They are not resized; what a
                frame around smaller pictures costs is counted in the nats.
            labels: their classes, one or one each; the null label by default.
            num_samples: draws, averaged, with a standard error over them; 1 by default.
            generator: one, or one per picture.
            kind: "ode", by the probability flow, or "vlb", the variational bound of ancestral sampling.
            batch_size: pictures at once.
            options: of `ode_log_likelihood` (steps, solver, tolerance, trace, closing, lambda_range) or of `variational_bound` (steps,
                lambda_range).
        Returns: for a denoiser in latents, the density of the latents (the posterior's means): a number about latents, not about pictures,
            without bits; `dequantization` says so.
        Raises:
            ValueError, TypeError: pictures, labels or options that do not fit; a result that is not finite.
            NotImplementedError: a consistency network, which follows no path from data to noise.

        References: Song et al. 2021, section 4.3, https://arxiv.org/abs/2011.13456; Kingma et al. 2021, https://arxiv.org/abs/2107.00630
        """
        functions = {"ode": ode_log_likelihood, "vlb": variational_bound}
        if kind not in functions:
            raise ValueError(f"kind {kind!r} is none of {', '.join(functions)}.")
        if not self.parameterization.has_path:
            raise NotImplementedError("a consistency network has no likelihood; compare its pictures by FID, precision and recall instead.")
        if self.autoencoder is not None and kind != "ode":
            raise ValueError(f"kind {kind!r} is about pictures; a denoiser in latents has kind 'ode' alone, the density of the latents.")
        known = set(inspect.signature(functions[kind]).parameters)
        known -= {"network", "parameterization", "levels", "num_dims", "num_samples", "generator", "num_bits"}
        if unknown := sorted(set(options) - known):
            raise TypeError(f"log_likelihood: kind {kind!r} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}.")
        check_count("batch_size", batch_size)
        device = self._execution_device
        channels = self.denoiser.config.in_channels if self.autoencoder is None else self.autoencoder.config.in_channels
        levels = to_levels(images, channels, self.picture_size)
        check_generator(generator, len(levels))
        classes = self.labels_of(labels, len(levels)) or self.null_labels(len(levels), "log_likelihood")
        generators = own_generators(generator, len(levels))
        parts = []
        for first in self.progress_bar(range(0, len(levels), batch_size)):
            rows = slice(first, first + batch_size)
            condition = None if classes is None else ClassCondition(torch.tensor(classes[rows], device=device))

            def network(x: Tensor, t: Tensor, condition: ClassCondition | None = condition) -> Tensor:
                return predict(self.denoiser, x, t, condition).float()

            own = None if generators is None else generators[rows]
            part = levels[rows].to(device)
            if self.autoencoder is not None:
                parts.append(self._latents_density(network, part, num_samples, own, options))
                continue
            framed = pad(part, self.latents_shape(1)[2:], value=0)
            parts.append(
                functions[kind](network, self.parameterization, framed, part[0].numel(), num_samples, own, **options)
            )
        return LikelihoodResult.cat(parts)

    def _latents_density(self, network: Any, levels: Tensor, num_samples: int | None, generator: Any, options: dict[str, Any]) -> Any:
        with torch.no_grad():
            x = self.from_pictures(from_levels(levels))
        denoiser = Denoiser(network, self.parameterization)
        own = dict(options)
        low, high = denoiser.lambda_range(*own.pop("lambda_range", (None, None)))
        if own.pop("closing", "uniform") != "uniform":
            raise ValueError("closing 'decoder' is for pictures; latents are no integers.")
        draws, evaluations = [], 0
        for _ in range(num_samples or 1):
            nats, evaluations = ode_log_density(denoiser, x, low, high, generator, **own)
            draws.append(nats)
        about = "none (density of the latents)"
        evaluations *= len(draws)
        return LikelihoodResult.from_draws(torch.stack(draws), "ode", None, num_function_evaluations=evaluations, dequantization=about)

    # ------------------------------------------------------------------------------------------------------------ what the network is

    @property
    def autoencoder(self) -> Any:
        """The autoencoder, whatever its component is called; None where the denoiser works on pixels."""
        return self.vae if self.vae is not None else self.vqvae

    @property
    def num_classes(self) -> int | None:
        """Classes that a picture can be asked of, the null label not counted; None for a network without classes."""
        if self.transformer is not None:
            return self.transformer.config.num_embeds_ada_norm or None
        config = self.unet.config
        count = config.get("num_class_embeds") or (context_classes(config) if is_a(self.unet, "UNet2DConditionModel") else None)
        return count - 1 if count is not None and self.config.null_class is not None else count

    @property
    def null_class(self) -> int | None:
        """The label that means "no class"; None where there is none."""
        if self.transformer is None:
            return self.config.null_class
        return self.transformer.config.num_embeds_ada_norm if self.transformer.config.get("has_null_class", True) else None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels in a picture per latent, along a side; 1 without an autoencoder."""
        levels = None if self.autoencoder is None else self.autoencoder.config.get("block_out_channels")
        return 2 ** (len(levels) - 1) if levels else 1

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures that come out, in pixels."""
        if (size := self.config.image_size) is not None:
            return size, size
        height, width = self.latents_shape(1)[2:]
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def latents_shape(self, batch: int) -> tuple[int, int, int, int]:
        """(B, C, h, w) of what is denoised.

        Raises:
            ValueError: the network's config does not say what size it was trained on.
        """
        config = self.denoiser.config
        if (size := config.sample_size) is None:
            raise ValueError(
                f"DiffusionImagePipeline: the {type(self.denoiser).__name__} does not say its size; set sample_size in its config."
            )
        return (batch, config.in_channels, *((size, size) if isinstance(size, int) else size))

    def _check_components(self) -> None:
        """What cannot work is said when the pipeline is made."""
        config, count = self.denoiser.config, self.num_classes
        if (kind := config.get("class_embed_type")) is not None:
            raise ValueError(f"DiffusionImagePipeline: class_embed_type={kind!r} takes vectors or times as classes; only labels are known.")
        if self.config.null_class is not None and self.transformer is None and self.config.null_class != count:
            table = "has no classes" if count is None else f"has a table of {count + 1} classes, the last of which is {count}"
            raise ValueError(f"DiffusionImagePipeline: null_class={self.config.null_class}, but the U-Net {table}.")
        if (size := self.config.image_size) is not None:
            check_count("image_size", size)
            height, width = (side * self.vae_scale_factor for side in self.latents_shape(1)[2:])
            if size > min(height, width):
                raise ValueError(f"DiffusionImagePipeline: image_size {size}, but the network draws {height} x {width}.")

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The classes of names of `id2label`, as in diffusers' DiTPipeline.

        Raises:
            ValueError: no class has the name; a few that are near are listed.
        """
        names = [label] if isinstance(label, str) else list(label)
        if missing := [name for name in names if name not in self.labels]:
            import difflib

            near = difflib.get_close_matches(missing[0], self.labels, n=5, cutoff=0.5) or list(self.labels)[:10]
            known = f"near it are {', '.join(near)}" if near else "the model names no classes (id2label); give their numbers"
            raise ValueError(f"class_labels: no class is called {missing[0]!r}; {known}.")
        return [self.labels[name] for name in names]

    # --------------------------------------------------------------------------------------------------------------------- the inputs

    def labels_of(self, class_labels: Any, batch: int | None = None) -> list[int] | None:
        """Labels as numbers; one is repeated to `batch`. None for None.

        Raises:
            TypeError, ValueError: not labels, not of this network, or not as many as `batch`.
        """
        if class_labels is None:
            return None
        if self.num_classes is None:
            raise ValueError("class_labels: this model has no classes; call it with batch_size.")
        given = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        if not given:
            raise ValueError("class_labels is empty; give at least one, or batch_size.")
        labels = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in given]
        labels = [label.item() if isinstance(label, Tensor) and label.numel() == 1 else label for label in labels]
        if wrong := [label for label in labels if isinstance(label, bool) or not hasattr(label, "__index__")]:
            raise TypeError(f"class_labels must be whole numbers or names, got {wrong[0]!r}.")
        labels, null = [int(label) for label in labels], self.null_class
        if wrong := [label for label in labels if not (0 <= label < self.num_classes or label == null)]:
            more = "" if null is None else f", or {null} for none"
            raise ValueError(f"class_labels must be from 0 to {self.num_classes - 1}{more}; got {wrong[0]}.")
        if batch is not None and len(labels) not in (1, batch):
            raise ValueError(f"class_labels must be one, or {batch}, one per picture; got {len(labels)}.")
        return labels * batch if batch is not None and len(labels) == 1 else labels

    def plan_batch(
        self, batch_size: int | None, class_labels: Any, num_images_per_label: int, latents: Any, generator: Any
    ) -> tuple[list[int] | None, int]:
        """(one label per picture or None, number of pictures).

        Raises:
            TypeError, ValueError: labels and batch size contradict each other.
        """
        check_count("num_images_per_label", num_images_per_label)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        labels = self.labels_of(class_labels)
        if labels is None:
            return None, batch_size or (len(latents) if isinstance(latents, Tensor) else 1)
        labels = [label for label in labels for _ in range(num_images_per_label)]
        if batch_size is not None and len(labels) == 1:
            labels *= batch_size
        if batch_size is not None and batch_size != len(labels):
            raise ValueError(
                f"batch_size is {batch_size} and class_labels ask for {len(labels)} pictures; leave batch_size out, or give one label."
            )
        return labels, len(labels)

    def check_inputs(
        self,
        batch: int,
        num_inference_steps: int,
        timesteps: Any = None,
        sigmas: Any = None,
        eta: float = 0.0,
        generator: Any = None,
        latents: Any = None,
        num_resamples: int = 1,
        output_type: str = "pil",
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> None:
        """Raises ValueError or TypeError on anything that cannot work: what came, what is allowed."""
        check_count("num_inference_steps", num_inference_steps, most=MAX_STEPS)
        check_count("num_resamples", num_resamples)
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps or sigmas, not both.")
        check_eta(eta)
        check_output_type(output_type)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_generator(generator, batch)
        if latents is not None and (not isinstance(latents, Tensor) or tuple(latents.shape) != self.latents_shape(batch)):
            raise ValueError(f"latents must be a tensor of shape {self.latents_shape(batch)}, got {shape_of(latents)}.")

    def check_pictures(self, image: Any, name: str = "image") -> Tensor:
        """Pictures as a tensor (B, C, H, W) in [-1, 1] of the model's size."""
        autoencoder = self.autoencoder
        channels = self.denoiser.config.in_channels if autoencoder is None else autoencoder.config.get("in_channels", 3)
        pictures = as_pictures(image, channels, name)
        if (size := self.picture_size) != (came := tuple(pictures.shape[-2:])):
            raise ValueError(f"{name} must be {size[0]} x {size[1]} pixels for this model, got {came[0]} x {came[1]}; resize it first.")
        return pictures

    def check_inpainting(self, batch: int, image: Any, mask_image: Any, num_resamples: int) -> tuple[Tensor, Tensor] | None:
        """(pictures, mask), each (1 or B, ., H, W) at the user's size, or None where nothing is inpainted."""
        if (image is None) != (mask_image is None):
            raise ValueError(f"inpainting takes image and mask_image, got only {'mask_image' if image is None else 'image'}.")
        if image is None:
            if num_resamples != 1:
                raise ValueError("num_resamples is for inpainting; give image and mask_image.")
            return None
        if self.autoencoder is not None:
            raise ValueError("inpainting here is in pixels, and this model draws latents: a mask of pixels does not cut them cleanly.")
        pictures, mask = self.check_pictures(image), as_mask(mask_image, self.picture_size)
        for name, value in (("image", pictures), ("mask_image", mask)):
            if len(value) not in (1, batch):
                raise ValueError(f"{name} must be one, or one per picture: {batch} here, got {len(value)}.")
        return pictures, mask

    def start_guidance(self, guidance_scale: Any, labels: list[int] | None) -> Guidance:
        """The guidance of this call; a callback may change `pipe._guidance_scale` or set `pipe._interrupt`."""
        asked = guidance_scale is not None
        guidance_scale = guidance_scale if asked else self.config.default_guidance_scale
        guidance = as_guidance(guidance_scale)
        self._guidance_scale, self._interrupt = guidance_scale, False
        if guidance == _NO_GUIDANCE:
            return guidance
        if self.null_class is None and isinstance(guidance, ClassifierFreeGuidance):
            if asked:
                raise ValueError(
                    f"guidance_scale = {guidance_scale}: this model has no null class to guide away from; leave guidance_scale out."
                )
            return _NO_GUIDANCE
        if labels is None and self.null_class is not None:  # with and without class are the same there
            if asked:
                logger.warning("guidance_scale = %s has no effect without class_labels.", guidance_scale)
            return _NO_GUIDANCE
        return guidance

    @property
    def guidance_scale(self) -> Any:
        """What the current or last call was guided by."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the current or last call, those of resampling not counted."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after its step; the picture is what has been reached."""
        return self._interrupt

    # --------------------------------------------------------------------------------------------------------------- grid, noise, labels

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, timesteps: Any, sigmas: Any, device: torch.device) -> None:
        """Lays a scheduler's grid; where it shifts with the size of the picture, says how many tokens there are."""
        options: dict[str, Any] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            config, patch = scheduler.config, self.denoiser.config.get("patch_size") or 1
            tokens = self.latents_shape(1)[2] * self.latents_shape(1)[3] // patch**2
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            options["mu"] = low + (high - low) * (tokens - few) / (many - few)
        steps = num_inference_steps if timesteps is None and sigmas is None else None
        scheduler.set_timesteps(steps, device=device, timesteps=timesteps, sigmas=sigmas, **options)

    def noise(self, batch: int, generator: Any, device: torch.device) -> Tensor:
        """Unit noise (B, C, h, w), float32 whatever the network's dtype."""
        return randn_tensor(self.latents_shape(batch), generator=generator, device=device, dtype=torch.float32)

    def prepare_latents(self, batch: int, generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        """The state that sampling starts from, (B, C, h, w)."""
        latents = self.noise(batch, generator, device) if latents is None else latents.to(device=device, dtype=torch.float32)
        return latents * self.scheduler.init_noise_sigma

    def draw_labels(self, batch: int, generator: Any) -> list[int] | None:
        """Labels where none were given: the null label, or uniform ones from `generator`; None for a network without classes."""
        count = self.num_classes
        if self.null_class is not None:
            return [self.null_class] * batch
        if count is None:
            return None
        sources = generator if isinstance(generator, list) else None
        draw = lambda g, n: torch.randint(0, count, (n,), generator=g, device="cpu" if g is None else g.device).tolist()
        return draw(generator, batch) if sources is None else [draw(g, 1)[0] for g in sources]

    def null_labels(self, batch: int, what: str) -> list[int] | None:
        """The null label for every picture; None for a network without classes.

        Raises:
            ValueError: a network with classes and no null label, which must be told the classes.
        """
        if self.num_classes is not None and self.null_class is None:
            raise ValueError(f"{what}: this model has classes and no null class; give class_labels.")
        return None if self.null_class is None else [self.null_class] * batch

    def conditions(self, labels: list[int] | None, device: torch.device) -> dict[str, ClassCondition | None]:
        """What each branch of a guidance tells the network: "cond" the labels, "uncond" the null label where there is one."""
        if labels is None:
            return {"cond": None}
        conditions: dict[str, ClassCondition | None] = {"cond": ClassCondition(torch.tensor(labels, device=device))}
        if self.null_class is not None:
            conditions["uncond"] = ClassCondition(torch.full((len(labels),), self.null_class, device=device))
        return conditions

    def step_options(self, eta: float, use_clipped_model_output: bool | None, generator: Any) -> dict[str, Any]:
        """What `scheduler.step` takes of these."""
        known = inspect.signature(self.scheduler.step).parameters
        options: dict[str, Any] = {"eta": eta, "generator": generator}
        if eta != 0.0 and "eta" not in known:
            logger.warning("eta = %s has no effect: %s.step does not take it.", eta, type(self.scheduler).__name__)
        if use_clipped_model_output is not None:
            options["use_clipped_model_output"] = use_clipped_model_output
            if "use_clipped_model_output" not in known:
                logger.warning("use_clipped_model_output has no effect: %s.step does not take it.", type(self.scheduler).__name__)
        return {name: value for name, value in options.items() if name in known}

    # ----------------------------------------------------------------------------------------------------------------------- one step

    def predict_guided(
        self,
        scheduler: Any,
        x: Tensor,
        t: Tensor,
        step: int,
        conditions: dict[str, ClassCondition | None],
        guidance: Guidance,
    ) -> Tensor:
        """The network's guided output for the state `x` (B, C, h, w), float32: (B, C, h, w), or (B, 2 C, h, w) with a learned variance,
        which is not guided."""
        at = evaluation(scheduler, x, t, step, len(scheduler.timesteps))
        branches = needed_branches(guidance, at)
        if missing := [branch for branch in branches if branch not in conditions]:
            raise ValueError(f"{type(guidance).__name__} asks for the branch {missing[0]!r}, but this model has no null class.")
        model_input = scheduler.scale_model_input(x, t)  # (B, C, h, w)
        if getattr(guidance, "hooks_network", False):
            outputs = []
            for branch in branches:
                with guidance.around(self.denoiser):
                    outputs.append(predict(self.denoiser, model_input, t, conditions[branch]).float())
        elif len(branches) == 1:
            outputs = [predict(self.denoiser, model_input, t, conditions[branches[0]]).float()]
        else:
            labels = ClassCondition(torch.cat([conditions[branch].labels for branch in branches]))
            outputs = predict(self.denoiser, torch.cat([model_input] * len(branches)), t, labels).float().chunk(len(branches))
        output = guided(guidance, outputs, branches, at)  # (B, C', h, w)
        # a variance that the scheduler's config does not know of is dropped (DiT under a deterministic sampler)
        return output if self.parameterization.learned_variance else output[:, : x.shape[1]]

    def call_back(
        self,
        callback: Callable[..., dict[str, Tensor] | None],
        names: Sequence[str],
        step: int,
        t: Tensor,
        latents: Tensor,
        guidance: Guidance,
    ) -> tuple[Tensor, Guidance]:
        """Calls the callback and takes over what it changed.

        Raises:
            ValueError: it returned what it may not.
        """
        scale = self._guidance_scale
        answer = callback(self, step, t, dict.fromkeys(names, latents)) or {}
        if unknown := sorted(set(answer) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"callback_on_step_end returned {', '.join(unknown)}; it may return {', '.join(self._callback_tensor_inputs)}."
            )
        if self._guidance_scale is not scale:
            guidance = as_guidance(self._guidance_scale)
        return latents_from_callback(answer.get("latents", latents), latents), guidance

    # --------------------------------------------------------------------------------------------------------------------- inpainting

    def prepare_inpainting(
        self, inpainting: tuple[Tensor, Tensor] | None, device: torch.device
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(what is kept, where to draw anew) at the network's size; the frame around a smaller picture is kept too."""
        if inpainting is None:
            return None, None
        pictures, mask = inpainting
        size = self.latents_shape(1)[2:]
        return pad(pictures, size).to(device), pad(mask.float(), size, 0.0).to(device).bool()

    def times_to_take(self, step: int, known: Tensor | None, num_resamples: int) -> int:
        """How often this evaluation is done: again and again in inpainting, where it begins a step and the next one does too."""
        if known is None or num_resamples == 1:
            return 1
        starts, last = self.scheduler.starts, self._num_timesteps - 1
        return num_resamples if step in starts and (step == last or step + 1 in starts) else 1

    def noised(self, pictures: Tensor, level: Level, like: Tensor, generator: Any) -> Tensor:
        """The pictures at a level, with fresh noise for each of the state `like`, (B, C, h, w): Lugmayr et al. 2022, eq. 8a."""
        noise = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return level.alpha * pictures + level.sigma * noise

    # -------------------------------------------------------------------------------------------------------- pictures and what is denoised

    def to_pictures(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in about [-1, 1] from what was denoised, (B, C, h, w): decoded, and cropped where they were framed."""
        pictures = x if self.autoencoder is None else decode_latents(self.autoencoder, x)
        return crop(pictures, self.picture_size)

    def from_pictures(self, pictures: Tensor) -> Tensor:
        """What is denoised, (B, C, h, w), from pictures (B, C, H, W) in [-1, 1]: framed, and encoded where there is an autoencoder."""
        height, width = (side * self.vae_scale_factor for side in self.latents_shape(1)[2:])
        framed = pad(pictures, (height, width))
        return framed if self.autoencoder is None else encode_pictures(self.autoencoder, framed)


def _names(id2label: Mapping[Any, str]) -> dict[str, int]:
    """name -> class, sorted; a class may have several names with commas between."""
    names = {name.strip(): int(key) for key, value in id2label.items() for name in value.split(",")}
    return dict(sorted(names.items()))
