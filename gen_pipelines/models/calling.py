"""How a conditional denoiser is called, whatever its class, and how captions become what it is given.

A network's `forward` names its inputs after its family (`encoder_hidden_states`, `pooled_projections`, `added_cond_kwargs`, ...).
`predict` is the one place that knows those names, so that pipelines, objectives and likelihoods are written once.
"""

from __future__ import annotations

import logging
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
        size: height and width of the picture in pixels, shape (B, 2), or None. Only networks trained with it look at it.
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    size: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def map(self, function: Callable[[Tensor], Tensor]) -> TextCondition:
        """The same condition with `function` applied to every tensor that is there."""
        return replace(self, **{f.name: function(v) for f in fields(self) if (v := getattr(self, f.name)) is not None})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextCondition:
        """Moves every tensor to `device` and casts the floating point ones to `dtype`."""
        return self.map(lambda v: v.to(device=device, dtype=dtype if v.is_floating_point() else None))

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
    return network(x, t, class_labels=_labels("UNet2DModel", condition), return_dict=False)[0]


def _unet_2d_condition(network: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None, inner: nn.Module) -> Tensor:
    # Stable Diffusion's networks were trained to attend to the padding too, so they get no mask
    text = _text("UNet2DConditionModel", condition)
    return network(x, t, encoder_hidden_states=text.embeds, return_dict=False)[0]


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
    labels = _labels("DiTTransformer2DModel", condition)
    if labels is None:
        raise ValueError("DiTTransformer2DModel needs ClassCondition(labels=...); its null class is num_embeds_ada_norm.")
    return network(x, timestep=_time_per_sample(t, x), class_labels=labels, return_dict=False)[0]


def _sd3(network: nn.Module, x: Tensor, t: Tensor | float, condition: Condition | None, inner: nn.Module) -> Tensor:
    text = _text("SD3Transformer2DModel", condition)
    if text.pooled is None:
        raise ValueError("SD3Transformer2DModel needs TextCondition.pooled, one vector per caption of shape (B, P).")
    return network(
        x, encoder_hidden_states=text.embeds, pooled_projections=text.pooled, timestep=_time_per_sample(t, x), return_dict=False
    )[0]


# class name -> how it is called; by name, so that no network is imported that is not used
_CALLERS: dict[str, Callable[[nn.Module, Tensor, Tensor | float, Condition | None, nn.Module], Tensor]] = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet_2d_condition,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
}


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
    Returns: embeds (B, L, D), mask (B, L) and, where the encoder has one, the pooled vector (B, P).
    Raises:
        ValueError: the tokenizer knows no maximal length and none was given.
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
    device = device if device is not None else next(text_encoder.parameters()).device
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_attention_mask=True, return_tensors="pt")
    if warn and bool(tokens.attention_mask[:, -1].any()):  # only a caption that fills its row can have been cut
        _warn_of_truncation(tokenizer, prompts, length)
    mask = tokens.attention_mask.to(device)
    is_clip = type(text_encoder.config).__name__.startswith("CLIP") or "clip" in getattr(text_encoder.config, "model_type", "")
    inner_mask = None if is_clip and not getattr(text_encoder.config, "use_attention_mask", False) else mask
    output = text_encoder(tokens.input_ids.to(device), attention_mask=inner_mask)
    pooled = getattr(output, "text_embeds", None)
    if pooled is None:
        pooled = getattr(output, "pooler_output", None)
    return TextCondition(embeds=output.last_hidden_state, mask=mask.bool(), pooled=pooled)


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
