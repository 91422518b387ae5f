"""How a conditional denoiser is called, whatever its class, and how captions become what it is given.

A network's `forward` names its inputs after its family (`encoder_hidden_states`, `pooled_projections`, `added_cond_kwargs`, ...).
`predict` is the one place that knows those names, so that pipelines, objectives and likelihoods are written once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextCondition:
    """What a denoiser is told about its captions.

    Attributes:
        embeds: one vector per token, shape (B, L, D).
        mask: True where a token is text and False where it is padding, shape (B, L); or the same as a bias of 0 and -10000 that attention
            adds, shape (B, 1, L); or None where the network takes no mask.
        pooled: one vector per caption, shape (B, P), or None.
        size: height and width of the picture in pixels, shape (B, 2), or None. Only networks trained with it look at it. Stable Diffusion
            XL knows six numbers, shape (B, 6): height and width of the original, top and left of the crop, height and width of the target.
        guidance: the guidance scale s of uncond + s (cond - uncond) that a distilled network is told, shape (B,), float32, or None.
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    size: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def map(self, function: Callable[[Tensor], Tensor]) -> TextCondition:
        """The same condition with `function` applied to every tensor that is there."""
        return replace(self, **{f.name: function(v) for f in fields(self) if (v := getattr(self, f.name)) is not None})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextCondition:
        """Moves every tensor to `device` and casts the floating point ones to `dtype`, all but `guidance`, which is embedded in float32."""
        moved = self.map(lambda v: v.to(device=device, dtype=dtype if v.is_floating_point() else None))
        return moved if self.guidance is None else replace(moved, guidance=self.guidance.to(device))

    def repeat(self, count: int) -> TextCondition:
        """Every caption `count` times in a row: (B, ...) -> (B * count, ...)."""
        return self if count == 1 else self.map(lambda v: v.repeat_interleave(count, dim=0))

    def __getitem__(self, rows: Any) -> TextCondition:
        """The chosen rows of the batch (a slice, indices or a boolean mask, as for a tensor)."""
        return self.map(lambda v: v[rows])

    @staticmethod
    def cat(conditions: Sequence[TextCondition]) -> TextCondition:
        """One batch from several.

        Raises:
            ValueError: the conditions do not have the same parts, or not the same lengths or widths.
        """
        parts = {}
        for f in fields(TextCondition):
            values = [getattr(c, f.name) for c in conditions]
            if all(v is None for v in values):
                continue
            if any(v is None for v in values):
                raise ValueError(
                    f"TextCondition.cat: only some of the {len(values)} conditions have {f.name!r}; give it to all of them or to none."
                )
            shapes = {tuple(v.shape[1:]) for v in values}
            if len(shapes) > 1:
                raise ValueError(
                    f"TextCondition.cat: {f.name!r} has different shapes per caption, {sorted(shapes)}; encode all with one tokenizer."
                )
            parts[f.name] = torch.cat(values)
        return TextCondition(**parts)


@dataclass(frozen=True)
class ClassCondition:
    """What a denoiser is told about classes: `labels`, integers, shape (B,)."""

    labels: Tensor


Condition = TextCondition | ClassCondition


def _time_per_sample(t: Tensor | float, x: Tensor) -> Tensor:
    """Network time as shape (B,): several classes of diffusers accept nothing else."""
    t = torch.as_tensor(t, device=x.device)
    return t.expand(len(x)) if t.ndim == 0 else t


def _text(name: str, condition: Condition | None) -> TextCondition:
    if not isinstance(condition, TextCondition):
        raise ValueError(f"{name} needs a TextCondition and was given {type(condition).__name__}; make one with encode_text(...).")
    return condition


def _labels(name: str, condition: Condition | None) -> Tensor | None:
    if condition is None:
        return None
    if not isinstance(condition, ClassCondition):
        raise ValueError(
            f"{name} is conditioned on classes and was given a {type(condition).__name__}; pass ClassCondition(labels=...) or None."
        )
    return condition.labels


def _unet_2d(network: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None, inner: nn.Module) -> Tensor:
    return network(x, t, class_labels=_labels(type(inner).__name__, condition), return_dict=False)[0]


def _unet_2d_condition(network: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None, inner: nn.Module) -> Tensor:
    if isinstance(condition, ClassCondition):
        return _class_as_context(network, x, t, condition.labels, inner)
    # Stable Diffusion's networks were trained to attend to the padding too, so they get no mask
    text = _text("UNet2DConditionModel", condition)
    options: dict[str, Any] = {}
    if inner.config.get("addition_embed_type") == "text_time":
        if text.pooled is None or text.size is None:
            raise ValueError(
                "this UNet2DConditionModel (Stable Diffusion XL) is told a pooled caption and picture sizes: set TextCondition.pooled, "
                "(B, P), and TextCondition.size, (B, 2) or (B, 6)."
            )
        options["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": _six_sizes(text.size)}
    if (width := inner.config.get("time_cond_proj_dim")) is not None and text.guidance is not None:
        options["timestep_cond"] = guidance_embedding(text.guidance, width).to(x.dtype)
    return network(x, t, encoder_hidden_states=text.embeds, **options, return_dict=False)[0]


def context_classes(config: Any) -> int | None:
    """The rows of the class table of a `UNet2DConditionModel` that attends to its class: its projection of the context is that table."""
    return config.get("encoder_hid_dim") if config.get("encoder_hid_dim_type") == "text_proj" else None


def _class_as_context(network: nn.Module, x: Tensor, t: Tensor | float, labels: Tensor, inner: nn.Module) -> Tensor:
    if (count := context_classes(inner.config)) is None:
        raise ValueError("this UNet2DConditionModel attends to captions and was given classes; pass a TextCondition.")
    one_hot = torch.nn.functional.one_hot(labels.to(x.device), count)[:, None].to(x.dtype)  # (B, 1, classes)
    return network(x, t, encoder_hidden_states=one_hot, return_dict=False)[0]


def _six_sizes(size: Tensor) -> Tensor:
    """The six numbers of Stable Diffusion XL, (B, 6), from a picture that was neither scaled nor cropped, (B, 2), or from themselves."""
    return size if size.shape[1] == 6 else torch.cat([size, torch.zeros_like(size), size], dim=1)


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Sines and cosines of 1000 w, w = s - 1, at `width` / 2 frequencies from 1 down to 1 / 10000: (B,) -> (B, width).

    References: Luo et al. 2023 (latent consistency models), section 4.2, https://arxiv.org/abs/2310.04378
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angles = (scale.float() - 1)[:, None] * 1000.0 * frequencies  # (B, width / 2)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return embedding if width % 2 == 0 else torch.nn.functional.pad(embedding, (0, 1))


def _pixart(network: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None, inner: nn.Module) -> Tensor:
    text = _text("PixArtTransformer2DModel", condition)
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if inner.use_additional_conditions:
        if text.size is None:
            raise ValueError(
                "this PixArtTransformer2DModel was trained with picture sizes (use_additional_conditions=True): "
                "set TextCondition.size, (B, 2)."
            )
        size = {"resolution": text.size.to(x.dtype), "aspect_ratio": (text.size[:, :1] / text.size[:, 1:]).to(x.dtype)}
    return network(
        x,
        encoder_hidden_states=text.embeds,
        encoder_attention_mask=text.mask,
        timestep=_time_per_sample(t, x),
        added_cond_kwargs=size,
        return_dict=False,
    )[0]


def _dit(network: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None, inner: nn.Module) -> Tensor:
    labels = _labels(type(inner).__name__, condition)
    if labels is None:
        raise ValueError(f"{type(inner).__name__} needs ClassCondition(labels=...); its null class is num_embeds_ada_norm.")
    return network(x, timestep=_time_per_sample(t, x), class_labels=labels, return_dict=False)[0]


def _sd3(network: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None, inner: nn.Module) -> Tensor:
    text = _text("SD3Transformer2DModel", condition)
    if text.pooled is None:
        raise ValueError("SD3Transformer2DModel needs TextCondition.pooled, one vector per caption of shape (B, P).")
    return network(
        x, encoder_hidden_states=text.embeds, pooled_projections=text.pooled, timestep=_time_per_sample(t, x), return_dict=False
    )[0]


def _flux(network: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None, inner: nn.Module) -> Tensor:
    text = _text("FluxTransformer2DModel", condition)
    if text.pooled is None:
        raise ValueError("FluxTransformer2DModel needs TextCondition.pooled, one vector per caption of shape (B, P).")
    if inner.config.guidance_embeds and text.guidance is None:
        raise ValueError("this FluxTransformer2DModel is told its guidance scale (guidance_embeds=True): set TextCondition.guidance, (B,).")
    height, width = x.shape[2] // FLUX_PATCH, x.shape[3] // FLUX_PATCH
    rows, columns = torch.meshgrid(torch.arange(height, device=x.device), torch.arange(width, device=x.device), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x.dtype)  # (h w, 3)
    tokens = network(
        pack_latents(x),
        encoder_hidden_states=text.embeds,
        pooled_projections=text.pooled,
        timestep=_time_per_sample(t, x) / 1000,  # multiplied by 1000 inside
        img_ids=places,
        txt_ids=places.new_zeros(text.embeds.shape[1], 3),
        guidance=text.guidance if inner.config.guidance_embeds else None,
        return_dict=False,
    )[0]  # (B, h w, 4 C)
    return unpack_latents(tokens, x.shape[2], x.shape[3])


FLUX_PATCH = 2  # Flux's transformer is given squares of 2 x 2 latent pixels


def pack_latents(x: Tensor) -> Tensor:
    """Squares of 2 x 2 pixels as tokens, in Flux's order: (B, C, H, W) -> (B, H W / 4, 4 C)."""
    x = x.unflatten(2, (-1, FLUX_PATCH)).unflatten(4, (-1, FLUX_PATCH))  # (B, C, H / 2, 2, W / 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents`: (B, H W / 4, 4 C) -> (B, C, H, W)."""
    x = tokens.unflatten(1, (height // FLUX_PATCH, width // FLUX_PATCH)).unflatten(3, (-1, FLUX_PATCH, FLUX_PATCH))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (B, C, H / 2, 2, W / 2, 2), then (B, C, H, W)


# class name -> how it is called; by name, so that no network is imported that is not used
_CALLERS: dict[str, Callable[[nn.Module, Tensor, Tensor | float, Condition | None, nn.Module], Tensor]] = {
    "UNet2DModel": _unet_2d,
    "ADMUNet2DModel": _unet_2d,
    "ScoreUNetModel": _unet_2d,
    "EDM2UNetModel": _unet_2d,
    "KDiffusionUNetModel": _unet_2d,
    "HDiTModel": _unet_2d,
    "UNet2DConditionModel": _unet_2d_condition,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "DiTModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}


def is_a(network: nn.Module, name: str) -> bool:
    """Whether a network, wrapped or not, is of the class of this name or of a subclass."""
    return any(cls.__name__ == name for cls in type(unwrap(network)).__mro__)


def latent_layout(denoiser: nn.Module) -> tuple[int, int]:
    """(channels, patch) of the latents that `predict` is given: how many channels, and of how many pixels their sides are a multiple."""
    config = unwrap(denoiser).config
    if is_a(denoiser, "FluxTransformer2DModel"):
        return config.in_channels // FLUX_PATCH**2, FLUX_PATCH
    return config.in_channels, config.get("patch_size") or 1


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, DDP and other wrappers, which keep it in `_orig_mod` or `module`."""
    while True:
        inner = network._modules.get("_orig_mod") or network._modules.get("module")
        if inner is None:
            return network
        network = inner


def caller_of(network: nn.Module) -> Callable[..., Tensor]:
    """The function that calls networks of this class.

    Raises:
        TypeError: no way to call this class is known; the message names the classes that are.
    """
    for cls in type(network).__mro__:
        if cls.__name__ in _CALLERS:
            return _CALLERS[cls.__name__]
    raise TypeError(
        f"predict: no way to call a {type(network).__name__} is known; known networks are {', '.join(_CALLERS)} and their subclasses."
    )


def predict(denoiser: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None = None) -> Tensor:
    """The raw output of a denoiser: what it means is the business of its `Parameterization`.

    Args:
        denoiser: a network of one of the known classes, bare or inside `torch.compile`, DDP or an accelerate wrapper. Gradients flow.
        x: its input, already scaled, shape (B, C, H, W); cast to the dtype of the denoiser's parameters.
        t: network time, a number, a 0-d tensor or one per sample (B,).
        condition: captions, classes, or None for an unconditional network. Floating point parts are cast like `x`.
    Returns: shape (B, C', H, W) in the denoiser's dtype; C' = 2 C where a variance was learned too.
    Raises:
        TypeError: the class of the network is not known.
        ValueError: the condition is not of the kind that the network takes.
    """
    inner = unwrap(denoiser)
    call = caller_of(inner)
    parameter = next(inner.parameters(), None)
    if parameter is not None and parameter.dtype != x.dtype and parameter.dtype.is_floating_point:
        x = x.to(parameter.dtype)
    if isinstance(condition, TextCondition) and condition.embeds.dtype != x.dtype:
        condition = condition.to(dtype=x.dtype)
    return call(denoiser, x, t, condition, inner)


def encode_text(
    tokenizer: Any,
    text_encoder: nn.Module,
    prompts: Sequence[str],
    device: torch.device | str | None = None,
    max_length: int | None = None,
    warn: bool = True,
    clip_skip: int | None = None,
) -> TextCondition:
    """Encodes captions the way Stable Diffusion does: every caption padded to one length, nothing masked inside a CLIP encoder.

    Args:
        tokenizer: a tokenizer of transformers.
        text_encoder: CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, or another that returns `last_hidden_state`.
            Gradients flow through it. An encoder whose attention looks both ways (T5) is told which tokens are padding.
        prompts: B captions.
        device: where the tokens go; the encoder's own device by default.
        max_length: tokens per caption; `tokenizer.model_max_length` by default. What is longer is cut, with a warning that names it.
        warn: False cuts without a word (in training, where captions are spoilt on purpose).
        clip_skip: how many of a CLIP encoder's last layers are left out; its last normalisation is applied all the same.
    Returns: embeds (B, L, D), mask (B, L) and, where the encoder has one, the pooled vector (B, P).
    Raises:
        ValueError: the tokenizer knows no maximal length and none was given.
    """
    device = device if device is not None else next(text_encoder.parameters()).device
    tokens = tokenize(tokenizer, text_encoder, prompts, max_length, warn)
    mask = tokens.attention_mask.to(device)
    inner_mask = None if sees_padding(text_encoder) else mask
    options = {} if clip_skip is None else {"output_hidden_states": True}
    output = text_encoder(tokens.input_ids.to(device), attention_mask=inner_mask, **options)
    embeds = output.last_hidden_state
    if clip_skip is not None:
        layer = -(clip_skip + 1 + getattr(text_encoder.config, "skip_layers", 0))
        embeds = getattr(text_encoder, "text_model", text_encoder).final_layer_norm(output.hidden_states[layer])
    pooled = getattr(output, "text_embeds", None)
    if pooled is None:
        pooled = getattr(output, "pooler_output", None)
    return TextCondition(embeds=embeds, mask=mask.bool(), pooled=pooled)


def tokenize(tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str], max_length: int | None = None, warn: bool = True) -> Any:
    """The tokens of captions as a text encoder wants them, all padded to one length: `input_ids` and `attention_mask`, each (B, L).

    Arguments and errors are those of `encode_text`.
    """
    prompts = list(prompts)
    length = max_length or tokenizer.model_max_length
    positions = getattr(text_encoder.config, "max_position_embeddings", None)
    if max_length is None and positions is not None:
        length = min(length, positions)
    if length > 100_000:  # transformers' stand-in for "no limit"
        raise ValueError(
            "encode_text: this tokenizer has no model_max_length; pass max_length=, the number of tokens the denoiser was trained with."
        )
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_attention_mask=True, return_tensors="pt")
    if warn and bool(tokens.attention_mask[:, -1].any()):  # only a caption that fills its row can have been cut
        _warn_of_truncation(tokenizer, prompts, length)
    return tokens


def is_clip(text_encoder: nn.Module) -> bool:
    """Whether a text encoder is one of CLIP's, of transformers or open_clip."""
    config = text_encoder.config
    if any(cls.__name__ == "OpenCLIPTextEncoder" for cls in type(text_encoder).__mro__):
        return True
    return type(config).__name__.startswith("CLIP") or "clip" in getattr(config, "model_type", "")


def clip_layers(text_encoder: nn.Module | None) -> int | None:
    """How many layers of a CLIP encoder there are up to the one that is read; None for another encoder, or none."""
    if text_encoder is None or not is_clip(text_encoder):
        return None
    config = text_encoder.config
    layers = getattr(config, "num_hidden_layers", None)
    return config.text_config.get("layers", 12) - config.skip_layers if layers is None else layers


def sees_padding(text_encoder: nn.Module) -> bool:
    """Whether a text encoder is given no mask: CLIP's look one way only, and latent diffusion's BERT was trained without one."""
    if type(text_encoder.config).__name__ == "LDMBertConfig":
        return True
    return is_clip(text_encoder) and not getattr(text_encoder.config, "use_attention_mask", False)


def _warn_of_truncation(tokenizer: Any, prompts: list[str], length: int) -> None:
    for prompt, ids in zip(prompts, tokenizer(prompts, add_special_tokens=False, truncation=False, verbose=False).input_ids, strict=True):
        room = length - tokenizer.num_special_tokens_to_add()
        if len(ids) > room:
            logger.warning(
                "the prompt %r has %d tokens and the model reads %d: this part was cut: %r",
                prompt,
                len(ids),
                room,
                tokenizer.decode(ids[room:]).strip(),
            )
