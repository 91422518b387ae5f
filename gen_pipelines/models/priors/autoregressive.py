"""What the priors over codes share: one code after the other, in raster order, with or without a cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...processes.random import Generators, uniform
from ..base import GenerativeModel


class AutoregressivePrior(GenerativeModel):
    """p(codes) = prod_i p(code_i | codes before it, class, codes of the levels above), i row by row from the top left.

    A subclass has `forward`, and for sampling with a cache `start` and `next_logits`. Its config names `num_codes`, `shape`, `num_classes`,
    `condition_shapes`.
    """

    @abstractmethod
    def forward(self, codes: Tensor, labels: Tensor | None = None, condition: Sequence[Tensor] = ()) -> Tensor:
        """Logits of every code given those before it, (B, K, h, w).

        Args:
            codes: (B, h, w), int64.
            labels: classes (B,); the number `num_classes`, or None, is the class that says nothing.
            condition: codes of the levels above, from the top down.
        """

    @abstractmethod
    def start(self, batch_size: int, labels: Tensor | None, condition: Sequence[Tensor]) -> Any:
        """An empty cache for `batch_size` samples."""

    @abstractmethod
    def next_logits(self, cache: Any, codes: Tensor, row: int, column: int) -> Tensor:
        """Logits of the code at one position, (B, K), from the cache and the codes before it; called in raster order."""

    def log_prob(self, codes: Tensor, labels: Tensor | None = None, condition: Sequence[Tensor] = ()) -> Tensor:
        """log p(codes) in nats, (B,), float32."""
        logits = self(codes, labels, condition)
        return -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), codes, reduction="none").flatten(1).sum(1)

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        labels: Tensor | None = None,
        condition: Sequence[Tensor] = (),
        generator: Generators = None,
        temperature: float = 1.0,
        use_cache: bool = True,
        on_row: Any = None,
    ) -> Tensor:
        """Draws codes, (batch_size, h, w).

        Args:
            labels, condition: as in `forward`.
            generator: one, or one per sample.
            temperature: divides the logits; 0 takes the likeliest code each time.
            use_cache: False evaluates the whole network for every code: the same codes, slowly.
            on_row: called after each row of codes.
        """
        height, width = self.config.shape
        draws = uniform((batch_size, height * width), generator, self.device)                          # one for each code
        codes = torch.zeros(batch_size, height, width, dtype=torch.long, device=self.device)
        cache = self.start(batch_size, labels, condition) if use_cache else None
        for row in range(height):
            for column in range(width):
                if use_cache:
                    logits = self.next_logits(cache, codes, row, column)
                else:
                    logits = self(codes, labels, condition)[:, :, row, column]
                codes[:, row, column] = _draw(logits, draws[:, row * width + column], temperature)
            if on_row is not None:
                on_row()
        return codes

    def _check(self, batch_size: int, labels: Tensor | None, condition: Sequence[Tensor]) -> None:
        classes, shapes = self.config.num_classes, [tuple(shape) for shape in self.config.condition_shapes]
        if labels is not None and classes is None:
            raise ValueError(f"{type(self).__name__}: it knows no classes; leave out labels.")
        if labels is not None and tuple(labels.shape) != (batch_size,):
            raise ValueError(f"{type(self).__name__}: one label per sample, shape ({batch_size},), got {tuple(labels.shape)}.")
        if [tuple(codes.shape[1:]) for codes in condition] != shapes:
            got = [tuple(codes.shape) for codes in condition]
            raise ValueError(f"{type(self).__name__}: codes of the levels above have shapes (B, h, w) with (h, w) = {shapes}, got {got}.")


class CodeCondition(nn.Module):
    """Class and codes of the levels above as a map of features at this level's positions.

    Args:
        width: features.
        num_codes: K of the levels above.
        shape: height and width of this level.
        num_classes: None for none.
        condition_shapes: of the levels above, each dividing `shape`.
    """

    def __init__(
        self, width: int, num_codes: int, shape: Sequence[int], num_classes: int | None, condition_shapes: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        self.width, self.shape = width, tuple(shape)
        self.of_class = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.of_codes = nn.ModuleList([nn.Embedding(num_codes, width) for _ in condition_shapes])
        for above in condition_shapes:
            if shape[0] % above[0] or shape[1] % above[1]:
                raise ValueError(f"a prior over codes of {tuple(shape)}: the level above, {tuple(above)}, does not divide it.")
        if condition_shapes:
            self.mix = nn.Sequential(
                nn.Conv2d(width * len(condition_shapes), width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
            )

    def forward(self, batch_size: int, labels: Tensor | None, condition: Sequence[Tensor], like: Tensor) -> Tensor:
        """(B, width, h, w), of the device and dtype of `like`."""
        found = like.new_zeros(batch_size, self.width, *self.shape)
        if self.of_class is not None:
            if labels is None:
                labels = torch.full((batch_size,), self.of_class.num_embeddings - 1, device=like.device)
            found = found + self.of_class(labels)[:, :, None, None]
        if self.of_codes:
            maps = []
            for embed, codes in zip(self.of_codes, condition, strict=True):
                grown = codes.repeat_interleave(self.shape[0] // codes.shape[1], 1)
                maps.append(embed(grown.repeat_interleave(self.shape[1] // codes.shape[2], 2)).permute(0, 3, 1, 2))
            found = found + self.mix(torch.cat(maps, 1))
        return found


def _draw(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """The code whose interval of the cumulative distribution holds u; (B, K) and (B,) to (B,)."""
    if temperature == 0:
        return logits.argmax(1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cumulative = torch.softmax(logits / temperature, 1).cumsum(1)
    return (cumulative < u.to(cumulative)[:, None] * cumulative[:, -1:]).sum(1).clamp(max=logits.shape[1] - 1)
