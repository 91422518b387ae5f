"""What every generator and discriminator shares: outputs, the check of labels, the ladder of resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class GeneratorOutput(BaseOutput):
    """`sample`: pictures in about [-1, 1], shape (B, C, H, W)."""

    sample: Tensor


@dataclass
class DiscriminatorOutput(BaseOutput):
    """`logits`: how real each picture looks, shape (B,), float32 or the network's dtype; a critic's value for a Wasserstein GAN."""

    logits: Tensor


def check_labels(owner: str, labels: Tensor | None, num_classes: int | None, batch: int, device: torch.device) -> Tensor | None:
    """Labels as int64 (B,) on the device, or None for a network without classes.

    Raises:
        ValueError: labels for a network without classes, none for one with, another number than pictures.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError(f"{owner}: this network was built without classes (num_classes=None); leave the labels out.")
        return None
    if labels is None:
        raise ValueError(f"{owner}: this network is conditioned on {num_classes} classes; give labels of shape ({batch},).")
    labels = torch.as_tensor(labels, device=device)
    if labels.shape != (batch,) or labels.is_floating_point():
        raise ValueError(f"{owner}: labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; give {batch} whole numbers.")
    return labels.long()


def ladder(sample_size: int) -> tuple[int, int]:
    """(smallest size, number of doublings) of a square picture: the smallest is 4 to 7 (28 = 7 * 2^2, 64 = 4 * 2^4).

    Raises:
        ValueError: no such size.
    """
    size, doublings = sample_size, 0
    while size > 7 and size % 2 == 0:
        size, doublings = size // 2, doublings + 1
    if not 4 <= size <= 7 or not doublings:
        raise ValueError(f"sample_size = {sample_size}: give 4, 5, 6 or 7 times a power of two, such as 28, 32, 48 or 64.")
    return size, doublings


def widths(base_channels: int, max_channels: int, doublings: int) -> list[int]:
    """Channels from the largest resolution to the smallest: `base_channels`, doubled at every halving, up to `max_channels`."""
    return [min(base_channels * 2**level, max_channels) for level in range(doublings + 1)]


def normal_init(network: nn.Module, std: float = 0.02) -> None:
    """Convolutions and linear layers from N(0, std^2), biases zero (Radford et al. 2016, section 4)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
