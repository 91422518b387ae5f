"""The convolutional halves of the autoencoders: strided encoders and transposed decoders with residual blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), the identity at the start. van den Oord et al. 2017, section 4.1.

    Args:
        channels, hidden_channels: outside and inside.
        rectified_skip: what is added to is relu(x) in place of x, as where the first activation overwrites its input.
    """

    def __init__(self, channels: int, hidden_channels: int, rectified_skip: bool = False) -> None:
        super().__init__()
        self.rectified_skip = rectified_skip
        self.conv_in = nn.Conv2d(channels, hidden_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(hidden_channels, channels, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        h = F.relu(x)
        return (h if self.rectified_skip else x) + self.conv_out(F.relu(self.conv_in(h)))


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


class CompactEncoder(_Halves):
    """Halves height and width `halvings` times by convolutions alone; all residual blocks are at the smallest size.

    Args:
        in_channels: of the input.
        channels: of the output, and between; the first convolution, at the largest size, has half as many.
        halvings: 1 or more.
        num_blocks, residual_channels: residual blocks, and channels inside them.
        rectified_skip: of the residual blocks.

    References: van den Oord et al. 2017, section 4.1, https://arxiv.org/abs/1711.00937
    """

    def __init__(
        self, in_channels: int, channels: int, halvings: int, num_blocks: int, residual_channels: int, rectified_skip: bool = False
    ) -> None:
        super().__init__()
        widths = [in_channels, channels // 2, *[channels] * (halvings - 1)]
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.conv = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, residual_channels, rectified_skip) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, channels, H / f, W / f), f = 2^halvings."""
        for conv in self.halve:
            x = F.relu(conv(x))
        x = self.conv(x)
        for block in self.blocks:
            x = self._run(block, x)
        return F.relu(x)


class CompactDecoder(_Halves):
    """The mirror of `CompactEncoder`; its last transposed convolution gives the output.

    Args:
        in_channels, out_channels: of input and output.
        channels, halvings, num_blocks, residual_channels, rectified_skip: as in the encoder; height and width double `halvings` times.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        halvings: int,
        num_blocks: int,
        residual_channels: int,
        rectified_skip: bool = False,
    ) -> None:
        super().__init__()
        widths = [*[channels] * (halvings - 1), channels // 2, out_channels] if halvings > 1 else [channels, out_channels]
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, residual_channels, rectified_skip) for _ in range(num_blocks))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) to (B, C, f h, f w), f = 2^halvings."""
        x = self.conv(x)
        for block in self.blocks:
            x = self._run(block, x)
        for conv in self.grow:
            x = conv(F.relu(x))
        return x


def padding_to_multiple(height: int, width: int, factor: int) -> tuple[int, int, int, int]:
    """Pixels to add (left, right, top, bottom) so that both sides are multiples of `factor`."""
    down, right = -height % factor, -width % factor
    return right // 2, right - right // 2, down // 2, down - down // 2
