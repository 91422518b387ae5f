"""A small convolutional classifier of pictures, whose last layer but one serves as features of a picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..base import ConfigMixin, GenerativeModel, ModelMixin

__all__ = ["ClassifierOutput", "ConfigMixin", "ConvClassifier", "ModelMixin"]


@dataclass
class ClassifierOutput(BaseOutput):
    """What a classifier says of B pictures.

    Attributes:
        logits: (B, num_classes), log-probabilities up to a constant.
        features: (B, feature_dim), what the logits are a function of, before its nonlinearity.
    """

    logits: Tensor
    features: Tensor


class ConvClassifier(GenerativeModel):
    """Two convolutions at each of two resolutions, then a vector of features, then logits. No normalisation: what it says of a picture
    depends on no other picture, in training as after it.

    Args:
        sample_size: height and width of the pictures, a multiple of 4.
        in_channels: 1 for grey, 3 for colour.
        num_classes: K.
        base_channels: channels of the first convolution; 2 and 4 times as many follow.
        feature_dim: length of the vector of features.
        dropout: of the features, in training.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        base_channels: int = 16,
        feature_dim: int = 64,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if sample_size < 4 or sample_size % 4:
            raise ValueError(f"ConvClassifier: sample_size {sample_size} is not allowed; it is halved twice: give a multiple of 4.")
        wide = (base_channels, 2 * base_channels, 2 * base_channels, 4 * base_channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, padding=1) for a, b, stride in zip((in_channels, *wide), wide, (1, 2, 1, 2), strict=False)
        )
        self.to_features = nn.Linear(wide[-1] * (sample_size // 4) ** 2, feature_dim)
        self.drop = nn.Dropout(dropout)  # `dropout` is an entry of the config
        self.head = nn.Linear(feature_dim, num_classes)
        for layer in [*self.convs, self.to_features]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, return_dict: bool = True) -> ClassifierOutput | tuple[Tensor, Tensor]:
        """x: pictures in [-1, 1], (B, in_channels, sample_size, sample_size)."""
        for conv in self.convs:
            x = F.silu(conv(x))                                                                        # (B, 4 C, H / 4, W / 4) at last
        features = self.to_features(x.flatten(1))                                                      # (B, feature_dim)
        logits = self.head(self.drop(F.silu(features)))                                             # (B, K)
        return ClassifierOutput(logits=logits, features=features) if return_dict else (logits, features)
