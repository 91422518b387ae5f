"""Exponential moving averages of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import EMAConfig


class Average:
    """The moving average of one network's parameters; buffers are copied, not averaged.

    At update s (from 1) the decay is min(decay, 1 - (1 + s)^-power), so that the first weights are forgotten soon. One pass over memory an
    update: on a CPU the usual three cost as much as a good part of the network.

    References: Karras et al. 2024, section 3.1 (why the decay grows), https://arxiv.org/abs/2312.02696
    """

    def __init__(self, network: nn.Module, config: EMAConfig) -> None:
        self.network, self.config, self.updates = network, config, 0
        self.shadow = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        self._trained: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's present weights."""
        self.updates += 1
        decay = min(self.config.decay, 1 - (1 + self.updates) ** -self.config.power)
        parameters = [parameter.detach() for parameter in self.network.parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    @torch.no_grad()
    def put(self) -> None:
        """Exchange the network's weights for their average; `take_back` undoes it."""
        for name, parameter in self.network.named_parameters():
            self._trained[name] = parameter.detach().clone()
            parameter.copy_(self.shadow[name])

    @torch.no_grad()
    def take_back(self) -> None:
        """Bring the trained weights back."""
        for name, parameter in self.network.named_parameters():
            parameter.copy_(self._trained.pop(name))

    @torch.no_grad()
    def load(self, shadow: dict[str, Tensor], updates: int) -> None:
        """Continue from a stored average."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
        self.updates = updates
