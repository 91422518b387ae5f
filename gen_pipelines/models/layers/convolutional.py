"""The convolutional halves of the autoencoders: strided encoders and transposed decoders with residual blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), the identity at the start. van den Oord et al. 2017, section 4.1."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, hidden_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(hidden_channels, channels, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return x + self.conv_out(F.relu(self.conv_in(F.relu(x))))


class _Halves(nn.Module):
    gradient_checkpointing = False

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


class ConvEncoder(_Halves):
    """Halves height and width once per entry of `block_out_channels`, with residual blocks at each size.

    Args:
        in_channels: of the input.
        block_out_channels: of each size, from the largest to the smallest; the output has the last.
        layers_per_block: residual blocks at each size.
        residual_channels: inside the residual blocks; as many as outside by default.
    """

    def __init__(
        self, in_channels: int, block_out_channels: Sequence[int], layers_per_block: int = 1, residual_channels: int | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for width in block_out_channels:
            residual = [ResidualBlock(width, residual_channels or width) for _ in range(layers_per_block)]
            self.blocks.append(nn.Sequential(nn.Conv2d(in_channels, width, 4, stride=2, padding=1), *residual))
            in_channels = width

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, c, H / f, W / f), f = 2^(number of blocks)."""
        for block in self.blocks:
            x = self._run(block, x)
            x = F.relu(x)
        return x


class ConvDecoder(_Halves):
    """The mirror of `ConvEncoder`: doubles height and width once per entry of `block_out_channels`, half as wide after the last.

    Args:
        in_channels: of the input.
        block_out_channels: of each size, from the largest to the smallest.
        out_channels: of the output.
        layers_per_block, residual_channels: as in the encoder.
    """

    def __init__(
        self,
        in_channels: int,
        block_out_channels: Sequence[int],
        out_channels: int,
        layers_per_block: int = 1,
        residual_channels: int | None = None,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)[::-1]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        last = max(widths[-1] // 2, 8)  # at full size, where a channel costs the most
        for width, after in zip(widths, [*widths[1:], last], strict=True):
            residual = [ResidualBlock(width, residual_channels or width) for _ in range(layers_per_block)]
            self.blocks.append(nn.Sequential(*residual, nn.ReLU(), nn.ConvTranspose2d(width, after, 4, stride=2, padding=1)))
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) to (B, C, f h, f w), f = 2^(number of blocks)."""
        x = self.conv_in(x)
        for block in self.blocks:
            x = self._run(block, x)
        return self.conv_out(F.relu(x))


def padding_to_multiple(height: int, width: int, factor: int) -> tuple[int, int, int, int]:
    """Pixels to add (left, right, top, bottom) so that both sides are multiples of `factor`."""
    down, right = -height % factor, -width % factor
    return right // 2, right - right // 2, down // 2, down - down // 2
