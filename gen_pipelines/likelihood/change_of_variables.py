"""The log-likelihood of pictures under a normalizing flow: change of variables, on dequantised pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..processes.random import Generators
from .dequantization import Pictures, dequantize, to_levels
from .result import LikelihoodResult

if TYPE_CHECKING:
    from ..models.flows.base import NormalizingFlowModel


@torch.no_grad()
def flow_log_likelihood(
    model: NormalizingFlowModel,
    images: Pictures,
    labels: Tensor | None = None,
    num_samples: int | None = None,
    generator: Generators = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    batch_size: int = 64,
) -> LikelihoodResult:
    """log P(levels) >= E_u [log N(f(x)) + log |det df/dx| + weight], x the levels dequantised by u; see `dequantization`.

    The density is exact; that pictures are integers and x is not makes the number a bound, which the result says. It does not depend on
    how pictures are grouped: networks are in evaluation mode, and noise is drawn for all pictures before any of them is evaluated.

    Args:
        model: a flow; its mode is put back afterwards.
        images: as in `to_levels`, of the model's size and channels.
        labels: (B,), for a class-conditional flow.
        num_samples: draws of the noise, averaged; 1 by default.
        generator: one for the batch, or one per picture.
        value_range: of float pictures.
        batch_size: pictures that are evaluated at once.
    Raises:
        TypeError, ValueError: pictures or labels that the model does not take, or a result that is not finite.

    References: Dinh et al. 2017, eqs. 2 and 3, https://arxiv.org/abs/1605.08803
    """
    count = 1 if num_samples is None else num_samples
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_samples is a whole number of at least 1, got {num_samples!r}.")
    levels = to_levels(images, model.config.in_channels, model.size, model.config.num_bits, value_range).to(model.device)
    labels = None if labels is None else torch.as_tensor(labels, device=model.device)
    model.check_labels(len(levels), labels)
    was_training = model.training
    model.eval()
    try:
        draws = []
        for _ in range(count):
            x, weight = dequantize(levels, model.config.num_bits, generator, model.dequantizer, model.stream_dtype)
            parts = [
                model.log_prob(x[i : i + batch_size], None if labels is None else labels[i : i + batch_size])
                for i in range(0, len(x), batch_size)
            ]
            draws.append(torch.cat(parts) + weight)                                                   # (B,)
    finally:
        model.train(was_training)
    return LikelihoodResult.from_draws(
        torch.stack(draws), "exact", levels[0].numel(), num_function_evaluations=count, dequantization=model.config.dequantization
    )
