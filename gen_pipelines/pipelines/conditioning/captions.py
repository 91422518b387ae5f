"""Everything that the caller of a pipeline says in words, or in tensors that take the place of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .encoding import TextEncoding

Words = str | Sequence[str] | None

_SUFFIXES = ("", "_2", "_3")


@dataclass(frozen=True)
class Captions:
    """The captions of one call, as its caller gave them.

    Attributes:
        prompt: one caption or a list of them; or `prompt_embeds` instead.
        prompt_2, prompt_3: what the second and the third text encoder read; `prompt` by default.
        negative_prompt, negative_prompt_2, negative_prompt_3: what takes the place of the empty caption, one for all prompts or one each.
        prompt_embeds, negative_prompt_embeds: what the text encoders would have said, (number of prompts, L, D).
        pooled_prompt_embeds, negative_pooled_prompt_embeds: and their pooled vectors, (number of prompts, P).
        prompt_attention_mask, negative_prompt_attention_mask: which tokens of the embeddings are text, (number of prompts, L).
        num_images_per_prompt: pictures per prompt.
        clip_skip: how many of the last layers of the CLIP encoders are left out for the prompt.
        max_sequence_length: tokens per caption of a T5 encoder.
    """

    prompt: Words = None
    prompt_2: Words = None
    prompt_3: Words = None
    negative_prompt: Words = None
    negative_prompt_2: Words = None
    negative_prompt_3: Words = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    num_images_per_prompt: int = 1
    clip_skip: int | None = None
    max_sequence_length: int | None = None

    def __len__(self) -> int:
        """The number of prompts."""
        if self.prompt is None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    @property
    def batch(self) -> int:
        """The number of pictures."""
        return len(self) * self.num_images_per_prompt

    @property
    def has_negative(self) -> bool:
        """Whether the caller said anything about what is not wanted, be it the empty caption."""
        negatives = (self.negative_prompt, self.negative_prompt_2, self.negative_prompt_3, self.negative_prompt_embeds)
        return any(value is not None for value in negatives)

    def positive_texts(self, encoders: int) -> list[tuple[str, ...]]:
        """For every prompt what each of the text encoders reads."""
        return self._texts("prompt", encoders)

    def negative_texts(self, encoders: int) -> list[tuple[str, ...]]:
        """For every prompt what each of the text encoders reads in place of the empty caption."""
        return self._texts("negative_prompt", encoders)

    def _texts(self, name: str, encoders: int) -> list[tuple[str, ...]]:
        first = getattr(self, name) or ""
        columns = []
        for suffix in _SUFFIXES[:encoders]:
            words = getattr(self, name + suffix) or first
            columns.append([words] * len(self) if isinstance(words, str) else list(words))
        return list(zip(*columns, strict=True))

    def check(self, encoding: TextEncoding) -> None:
        """Raises ValueError or TypeError on what cannot work with these text encoders: what came, what is allowed."""
        for suffix in _SUFFIXES:
            for name in (f"prompt{suffix}", f"negative_prompt{suffix}"):
                _check_words(name, getattr(self, name))
                if suffix in _SUFFIXES[encoding.encoders :] and getattr(self, name) is not None:
                    raise ValueError(f"{name} has nowhere to go: this pipeline reads {encoding.encoders} of its captions; leave it out.")
        check_count("num_images_per_prompt", self.num_images_per_prompt)
        self._check_options(encoding)
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ValueError(f"give prompt or prompt_embeds, got {'neither' if self.prompt is None else 'both'}.")
        for suffix in _SUFFIXES:
            if suffix and getattr(self, f"prompt{suffix}") is not None and self.prompt is None:
                raise ValueError(f"give prompt{suffix} together with prompt; prompt_embeds take the place of both.")
            if getattr(self, f"negative_prompt{suffix}") is not None and self.negative_prompt_embeds is not None:
                raise ValueError(f"give negative_prompt{suffix} or negative_prompt_embeds, got both.")
        for name in ("prompt", "negative_prompt"):
            self._check_embeds(name, encoding)
        self._check_counts()
        if self.prompt is not None and (missing := encoding.missing()):
            raise ValueError(f"captions need {', '.join(missing)}, which this pipeline was loaded without; give prompt_embeds instead.")

    def _check_options(self, encoding: TextEncoding) -> None:
        if self.clip_skip is not None:
            check_count("clip_skip", self.clip_skip, least=0)
            if (layers := encoding.clip_layers()) is None:
                raise ValueError(f"clip_skip = {self.clip_skip} has no effect: this pipeline has no CLIP encoder whose layers it reads.")
            if self.clip_skip >= layers:
                raise ValueError(f"clip_skip must be less than the {layers} layers of the text encoder, got {self.clip_skip}.")
        if self.max_sequence_length is not None:
            check_count("max_sequence_length", self.max_sequence_length)
            if not encoding.takes_length:
                raise ValueError(
                    f"max_sequence_length = {self.max_sequence_length} has no effect: this pipeline has no T5 encoder; its captions have "
                    "the length of the tokenizer."
                )

    def _check_embeds(self, name: str, encoding: TextEncoding) -> None:
        embeds, mask = getattr(self, f"{name}_embeds"), getattr(self, f"{name}_attention_mask")
        pooled = self.pooled_prompt_embeds if name == "prompt" else self.negative_pooled_prompt_embeds
        pooled_name = "pooled_prompt_embeds" if name == "prompt" else "negative_pooled_prompt_embeds"
        if embeds is not None and (not isinstance(embeds, Tensor) or embeds.ndim != 3):
            raise ValueError(f"{name}_embeds must be a tensor of shape (prompts, tokens, width), got {shape_of(embeds)}.")
        if mask is not None and (embeds is None or tuple(mask.shape) != tuple(embeds.shape[:2])):
            raise ValueError(
                f"{name}_attention_mask must come with {name}_embeds and have its first two dimensions, "
                f"got {shape_of(mask)} and {shape_of(embeds)}."
            )
        if pooled is not None:
            if not encoding.pooled:
                raise ValueError(f"{pooled_name} has no effect: the network of this pipeline takes no pooled vector; leave it out.")
            if embeds is None or not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != len(embeds):
                raise ValueError(
                    f"{pooled_name} must come with {name}_embeds, one vector per prompt, got {shape_of(pooled)} and {shape_of(embeds)}."
                )
        elif encoding.pooled and embeds is not None:
            raise ValueError(f"{name}_embeds need {pooled_name} beside them: this network is told a pooled vector, (prompts, width).")

    def _check_counts(self) -> None:
        prompts = len(self)
        for suffix in _SUFFIXES:
            for name in (f"prompt{suffix}", f"negative_prompt{suffix}"):
                words = getattr(self, name)
                if isinstance(words, (list, tuple)) and len(words) != prompts:
                    raise ValueError(f"{name} must be one caption or {prompts}, one per prompt; got {len(words)}.")
        embeds, negative = self.prompt_embeds, self.negative_prompt_embeds
        if negative is not None and embeds is not None and negative.shape != embeds.shape:
            raise ValueError(f"negative_prompt_embeds must have the shape of prompt_embeds, {shape_of(embeds)}, got {shape_of(negative)}.")
        if negative is not None and len(negative) != prompts:
            raise ValueError(f"negative_prompt_embeds must be one per prompt, {prompts}, got {len(negative)}.")


def _check_words(name: str, words: Any) -> None:
    if words is None or isinstance(words, str):
        return
    if not isinstance(words, (list, tuple)):
        raise TypeError(f"{name} must be a string or a list of strings, got a {type(words).__name__}.")
    if not words:
        raise ValueError(f"{name} is an empty list; give at least one caption.")
    if wrong := [(i, type(c).__name__) for i, c in enumerate(words) if not isinstance(c, str)]:
        raise TypeError(f"{name} must hold strings only; number {wrong[0][0]} is of type {wrong[0][1]}.")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raises TypeError or ValueError unless `value` is a whole number (of Python or NumPy) of at least `least` and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}.")


def shape_of(value: Any) -> str:
    """The shape of a tensor for a message, or the name of what is none."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
