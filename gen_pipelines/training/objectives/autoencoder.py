"""The first stage of latent diffusion: reconstruction with a slight regularisation of the latents."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..random import Generators, normal
from .base import ObjectiveOutput


def pyramid_distance(x: Tensor, y: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference over a pyramid of `levels` halvings: a perceptual term without a pretrained network.

    x, y: (B, C, H, W). Returns: (B,).
    """
    total = torch.zeros(len(x), device=x.device, dtype=torch.float32)
    for _ in range(levels):
        x, y = nn.functional.avg_pool2d(x, 2), nn.functional.avg_pool2d(y, 2)
        total = total + (x - y).abs().flatten(1).mean(1)                                              # (B,)
    return total / levels


@dataclass(frozen=True)
class AutoencoderObjective:
    """Reconstruction + regularisation: KL to N(0, I) for a Gaussian latent, the commitment loss for a quantised one.

    loss = l1 |x - y| + l2 |x - y|^2 + kl KL(q(z | x), N(0, I)) / D + vq commit + perceptual d(x, y), means over the D values of a picture.

    Attributes:
        l1, l2, kl, vq: weights of the terms.
        perceptual: any distance (x, y) -> (B,), for instance `pyramid_distance` or an LPIPS network; None for none.
        perceptual_weight: its weight.

    References: Rombach et al. 2022, section 3.1 and appendix G, https://arxiv.org/abs/2112.10752
    """

    l1: float = 1.0
    l2: float = 0.0
    kl: float = 1e-6
    vq: float = 1.0
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    perceptual_weight: float = 1.0

    def __call__(self, model: nn.Module, x: Tensor, *, generator: Generators = None) -> ObjectiveOutput:
        """model: diffusers' AutoencoderKL or VQModel. x: (B, C, H, W) in [-1, 1]. Returns: losses of shape (B,)."""
        if hasattr(model, "quantize"):
            latents = model.encode(x).latents
            decoded = model.decode(latents)
            reconstruction, regulariser, name = decoded.sample, self.vq * decoded.commit_loss.expand(len(x)), "commit"
        else:
            posterior = model.encode(x).latent_dist
            noise = normal(posterior.mean.shape, generator, posterior.mean.device, posterior.mean.dtype)
            reconstruction = model.decode(posterior.mean + posterior.std * noise).sample               # (B, C, H, W)
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)       # (B,) nats
            regulariser, name = self.kl * kl / x[0].numel(), "kl"
        x, reconstruction = x.float(), reconstruction.float()
        error = reconstruction - x
        squared = error.square().flatten(1).mean(1)                                                    # (B,)
        loss = self.l1 * error.abs().flatten(1).mean(1) + self.l2 * squared + regulariser
        if self.perceptual is not None:
            loss = loss + self.perceptual_weight * self.perceptual(reconstruction, x)
        # pictures span [-1, 1]: peak signal 2, so PSNR = 10 log10(4 / MSE)
        metrics = {"psnr": 10 * torch.log10(4 / squared.detach().clamp_min(1e-12)), name: (kl if name == "kl" else regulariser).detach()}
        return ObjectiveOutput(per_sample=loss, metrics=metrics)
