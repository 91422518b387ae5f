"""The evidence lower bound of variational autoencoders, and of discrete codes with a prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..processes.random import Generators
from .iwae import draw_log_weights, log_mean_exp
from .observation import observe, own_generators
from .result import LikelihoodResult


@torch.no_grad()
def elbo(model: Any, levels: Tensor, num_samples: int = 16, generator: Generators = None, batch_size: int = 64) -> LikelihoodResult:
    """E_q(z | x) [log p(x | z)] - KL(q(z | x), p(z)), the mean of `num_samples` draws of z with the divergence in closed form.

    Args:
        model: a `VAEModel` in evaluation mode.
        levels: pictures as integers, (N, C, H, W), as many levels as the model has.
        num_samples: K.
        generator: one, or one per picture; with either the result does not depend on `batch_size`.
    Returns: kind "elbo", with the standard error over the draws.

    References: Kingma & Welling 2014, eq. 3 and appendix B, https://arxiv.org/abs/1312.6114
    """
    generators = own_generators(generator, len(levels))
    draws, seen = [], None
    for start in range(0, len(levels), batch_size):
        part = slice(start, start + batch_size)
        own = None if generators is None else generators[part]
        seen = observe(levels[part].to(model.device), model.config.likelihood, model.config.num_bits, own)
        draws.append((draw_log_weights(model, seen.x, num_samples, own, analytic=True) + seen.weight).cpu())
    return LikelihoodResult.from_draws(
        torch.cat(draws, 1), "elbo", seen.num_dims, num_function_evaluations=num_samples, dequantization=seen.dequantization
    )


@torch.no_grad()
def code_elbo(
    model: Any, priors: list[Any], levels: Tensor, labels: Tensor | None = None, generator: Generators = None
) -> LikelihoodResult:
    """log p(x | codes(x)) + log p(codes(x)): the ELBO of a VQ-VAE, whose q(codes | x) is one point and so has no entropy.

    Args:
        model: a `VQVAEModel` in evaluation mode.
        priors: one for each level of codes, from the top down.
        levels: pictures as integers, (N, C, H, W).
        labels: classes, (N,), for class-conditional priors; without them p(codes) is the mean over all classes.
        generator: for the noise of dequantisation or binarisation, where the likelihood has one.
    Returns: kind "elbo".

    References: van den Oord et al. 2017, section 3.2, https://arxiv.org/abs/1711.00937
    """
    generators = own_generators(generator, len(levels))
    nats, seen = [], None
    for start in range(0, len(levels), 64):
        part = slice(start, start + 64)
        own = None if generators is None else generators[part]
        seen = observe(levels[part].to(model.device), model.config.likelihood, model.config.num_bits, own)
        codes = model.encode(seen.x).codes
        total = model.decode_codes(codes).distribution.log_prob(seen.x) + seen.weight
        classes = next((prior.config.num_classes for prior in priors if prior.config.num_classes is not None), None)
        if labels is not None or classes is None:
            total = total + _log_prior(priors, codes, None if labels is None else labels[part].to(model.device))
        else:  # each class as likely as any other
            every = [_log_prior(priors, codes, torch.full((len(total),), label, device=model.device)) for label in range(classes)]
            total = total + log_mean_exp(torch.stack(every))
        nats.append(total.cpu())
    return LikelihoodResult.from_nats(
        torch.cat(nats), "elbo", seen.num_dims, num_function_evaluations=1 + len(priors), dequantization=seen.dequantization
    )


def _log_prior(priors: list[Any], codes: list[Tensor], labels: Tensor | None) -> Tensor:
    """log p(codes of all levels | labels), (B,)."""
    total = torch.zeros(len(codes[0]), device=codes[0].device)
    for number, prior in enumerate(priors):
        total = total + prior.log_prob(codes[number], None if prior.config.num_classes is None else labels, codes[:number])
    return total
