"""Coupling layers: half of the values stay, and say how the other half is scaled and shifted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("affine", "additive")
SCALES = ("sigmoid", "tanh")


class ScaledConv2d(nn.Conv2d):
    """A 3 x 3 convolution that starts at zero, its output times exp(3 gain) for each channel: it learns slowly first, then freely.

    Args:
        in_channels, out_channels: widths.
        edge_value: what every channel of x counts as around the picture; another one than 0 tells the convolution where the edge is.

    References: Kingma and Dhariwal 2018, section 3.3 and its code's "zeros" initialisation, https://arxiv.org/abs/1807.03039
    """

    def __init__(self, in_channels: int, out_channels: int, edge_value: float = 0.0) -> None:
        super().__init__(in_channels, out_channels, 3, padding=0 if edge_value else 1)
        self.edge_value = edge_value
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.gain = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in, H, W). Returns: (B, out, H, W)."""
        scale = torch.exp(3 * self.gain)
        weight, bias = self.weight * scale.view(-1, 1, 1, 1), self.bias * scale
        if self.edge_value:
            x = nn.functional.pad(x, (1, 1, 1, 1), value=self.edge_value)                             # (B, in, H + 2, W + 2)
        return self._conv_forward(x, weight, bias)


class CouplingNetwork(nn.Module):
    """What a coupling learns: 3 x 3 convolution, body, 3 x 3 convolution that starts at zero.

    Args:
        in_channels, out_channels, hidden_channels: widths.
        num_blocks: 0 for Glow's body, one 1 x 1 convolution; else that many residual blocks of a 3 x 3 and a 1 x 1 convolution.
        size: height and width for a learned bias at every place, which tells the network where it is; None for none.
        context_channels: channels of a second input that is concatenated to the first.
        edge_value: of the last convolution.

    References: Kingma and Dhariwal 2018, section 3.3; Dinh et al. 2017, section 4.1 (residual blocks)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        num_blocks: int = 0,
        size: tuple[int, int] | None = None,
        context_channels: int = 0,
        edge_value: float = 0.0,
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels + context_channels, hidden_channels, 3, padding=1)
        self.place = None if size is None else nn.Parameter(torch.zeros(hidden_channels, *size))
        if num_blocks == 0:
            self.body = nn.ModuleList([nn.Conv2d(hidden_channels, hidden_channels, 1)])
        else:
            self.body = nn.ModuleList(
                nn.Sequential(
                    nn.ReLU(),
                    nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv2d(hidden_channels, hidden_channels, 1),
                )
                for _ in range(num_blocks)
            )
        self.residual = num_blocks > 0
        self.last = ScaledConv2d(hidden_channels, out_channels, edge_value)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, in, H, W). Returns: (B, out, H, W), in the dtype of x or better."""
        dtype = x.dtype
        x = x if context is None else torch.cat([x, context], 1)
        h = self.first(x.to(self.first.weight.dtype))                                                 # (B, hidden, H, W)
        if self.place is not None:
            h = h + self.place
        for block in self.body:
            h = h + block(h) if self.residual else block(torch.relu_(h))                              # (B, hidden, H, W)
        return self.last(torch.relu_(h)).to(dtype)                                                    # (B, out, H, W)


class Coupling(nn.Module):
    """(a, b) -> (a, (b + t) s) where (log s, t) = network(a); a are the first channels. Additive couplings have s = 1.

    log_det is the sum of log s. "sigmoid": s = sigmoid(r + 2), below one, so that a layer never blows up what it undoes; "tanh":
    s = exp(c tanh(r)) with a learned c for each channel. Everything but the network is in float32 or better.

    Args:
        channels: of a and b together; a has the first half of them (rounded down).
        network: from a to 2 x channels of b (affine; r first) or channels of b (additive).
        kind: "affine" or "additive".
        scale: "sigmoid" or "tanh".

    References: Dinh et al. 2017, section 3.2, https://arxiv.org/abs/1605.08803 (tanh: section 4.1); Kingma and Dhariwal 2018, table 1
    """

    def __init__(self, channels: int, network: nn.Module, kind: str = "affine", scale: str = "sigmoid") -> None:
        super().__init__()
        if kind not in KINDS or scale not in SCALES:
            raise ValueError(f"Coupling: kind is one of {', '.join(KINDS)} and scale one of {', '.join(SCALES)}; got {kind!r}, {scale!r}.")
        self.kept, self.changed = channels // 2, channels - channels // 2
        self.kind, self.scale = kind, scale
        self.network = network
        self.range = nn.Parameter(torch.ones(self.changed)) if (kind, scale) == ("affine", "tanh") else None

    def scale_and_shift(self, raw: Tensor) -> tuple[Tensor | None, Tensor]:
        """What the network said, as log s (None: s = 1) and t, (B, changed, H, W) each."""
        if self.kind == "additive":
            return None, raw
        r, t = raw.chunk(2, 1)
        if self.range is None:
            return nn.functional.logsigmoid(r + 2), t
        return torch.tanh(r) * self.range.view(-1, 1, 1), t

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W). Returns: y of that shape, log_det (B,)."""
        y, log_s = self.move(x, context)
        return y, x.new_zeros(len(x)) if log_s is None else log_s.sum((1, 2, 3))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`."""
        x, log_s = self.move_back(y, context)
        return x, y.new_zeros(len(y)) if log_s is None else -log_s.sum((1, 2, 3))

    def move(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y, and log s at every value, (B, changed, H, W), which a chain of couplings sums once at its end; None where s = 1."""
        a, b = x.split([self.kept, self.changed], 1)
        log_s, t = self.scale_and_shift(self.network(a, context))
        return torch.cat([a, b + t if log_s is None else (b + t) * log_s.exp()], 1), log_s

    def move_back(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x, and the log s of `move` there."""
        a, b = y.split([self.kept, self.changed], 1)
        log_s, t = self.scale_and_shift(self.network(a, context))
        return torch.cat([a, b - t if log_s is None else b / log_s.exp() - t], 1), log_s


def masked_parts(x: Tensor, mask: str, flipped: bool) -> Tensor:
    """x (B, C, H, W) with the values that a mask keeps as its first half of channels.

    "checkerboard": pixels whose row and column numbers add up to an even number are kept; the result is (B, 4 C, H / 2, W / 2), so that
    the network looks at the kept pixels alone instead of a picture that is half zeros. "channel": the first half of channels is kept.
    `flipped` exchanges the two parts.

    References: Dinh et al. 2017, section 3.4 and figure 3, https://arxiv.org/abs/1605.08803
    """
    if mask == "checkerboard":
        parts = nn.functional.pixel_unshuffle(x, 2)                                                   # (B, 4 C, H / 2, W / 2)
        parts = parts.unflatten(1, (x.shape[1], 4))
        even, odd = parts[:, :, [0, 3]].flatten(1, 2), parts[:, :, [1, 2]].flatten(1, 2)              # (B, 2 C, H / 2, W / 2)
        return torch.cat([odd, even] if flipped else [even, odd], 1)
    return torch.cat(x.chunk(2, 1)[::-1], 1) if flipped else x


def merged_parts(parts: Tensor, mask: str, flipped: bool) -> Tensor:
    """The inverse of `masked_parts`."""
    if mask == "checkerboard":
        even, odd = parts.chunk(2, 1)[:: -1 if flipped else 1]
        even, odd = even.unflatten(1, (-1, 2)), odd.unflatten(1, (-1, 2))
        whole = torch.stack([even[:, :, 0], odd[:, :, 0], odd[:, :, 1], even[:, :, 1]], 2)            # (B, C, 4, H / 2, W / 2)
        return nn.functional.pixel_shuffle(whole.flatten(1, 2), 2)
    return torch.cat(parts.chunk(2, 1)[::-1], 1) if flipped else parts


class MaskedCoupling(nn.Module):
    """A coupling between the two parts of a checkerboard or channel mask.

    Args:
        channels: of the input.
        mask: "checkerboard" or "channel".
        flipped: which part changes: the odd pixels or the second channels, or the others where True.
        hidden_channels, num_blocks, size: of the network; `size` is that of the input, None for no bias at every place.
        kind, scale: as in `Coupling`.
    """

    def __init__(
        self,
        channels: int,
        mask: str,
        flipped: bool,
        hidden_channels: int,
        num_blocks: int,
        size: tuple[int, int] | None = None,
        kind: str = "affine",
        scale: str = "tanh",
    ) -> None:
        super().__init__()
        if mask not in ("checkerboard", "channel"):
            raise ValueError(f"MaskedCoupling: mask {mask!r} is neither checkerboard nor channel.")
        if mask == "channel" and channels % 2:
            raise ValueError(f"MaskedCoupling: a channel mask needs an even number of channels, got {channels}.")
        self.mask, self.flipped = mask, flipped
        inner = 4 * channels if mask == "checkerboard" else channels
        if size is not None and mask == "checkerboard":
            size = (size[0] // 2, size[1] // 2)
        outputs = inner if kind == "affine" else inner // 2
        self.coupling = Coupling(inner, CouplingNetwork(inner // 2, outputs, hidden_channels, num_blocks, size), kind, scale)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W). Returns: y of that shape, log_det (B,)."""
        y, log_det = self.coupling(masked_parts(x, self.mask, self.flipped))
        return merged_parts(y, self.mask, self.flipped), log_det                                      # (B, C, H, W), (B,)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`."""
        x, log_det = self.coupling.inverse(masked_parts(y, self.mask, self.flipped))
        return merged_parts(x, self.mask, self.flipped), log_det
