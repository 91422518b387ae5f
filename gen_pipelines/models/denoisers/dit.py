"""The diffusion transformer: patches as tokens, and the time and the class in the norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..base import GenerativeModel
from ..layers.unet_blocks import TimeMLP

__all__ = ["DIT_SIZES", "ConfigMixin", "DiTModel", "ModelMixin"]

# size -> (depth, width, heads): Peebles & Xie 2023, table 1
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
TIME_FEATURES = 256


def positions(width: int, rows: int, columns: int) -> Tensor:
    """Sines and cosines of a patch's column and row, a quarter of the width each: (rows columns, width), float32.

    References: the two-dimensional form of Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762
    """
    quarter = width // 4
    frequencies = torch.exp(torch.arange(quarter, dtype=torch.float64) * (-math.log(10000.0) / quarter))

    def along(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (count, width / 2)

    row, column = along(rows)[:, None].expand(-1, columns, -1), along(columns)[None].expand(rows, -1, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift after a norm without weights, x (B, N, D), the others (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and a two-layer network, each shifted, scaled and gated by the condition, and the identity at the start.

    References: Peebles & Xie 2023, section 3.2, adaLN-Zero, https://arxiv.org/abs/2212.09748
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.condition = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.linear_1, self.linear_2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, N, D) and condition (B, D), after its SiLU, to tokens (B, N, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.condition(condition).chunk(6, dim=1)
        q, k, v = self.qkv(modulate(x, shift_1, scale_1)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        x = x + gate_1[:, None] * self.out(attended)
        hidden = F.gelu(self.linear_1(modulate(x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2[:, None] * self.linear_2(hidden)


class DiTModel(GenerativeModel):
    """A transformer over patches that is told a time and a class.

    diffusers' `DiTTransformer2DModel` spaces the frequencies of the time by 1 / 127 of the range and the published networks by 1 / 128,
    so that class is another function of the same weights; it also keeps a copy of both embeddings in every block.

    Args:
        sample_size: height and width of what is denoised, one number for a square.
        patch_size: side of a patch.
        in_channels, out_channels: of what is denoised; out_channels is twice in_channels where a variance was learned.
        width, depth, num_attention_heads: of the tokens and the blocks; `DIT_SIZES` has the published ones.
        mlp_ratio: width inside the two-layer network, over the width.
        num_embeds_ada_norm: classes. With `has_null_class` the table has one row more, the last, which means "no class".

    Raises:
        ValueError: sizes that cannot be dealt out to patches, heads or sines and cosines.

    References: Peebles & Xie 2023, https://arxiv.org/abs/2212.09748; Ma et al. 2024 (the same network for flows),
    https://arxiv.org/abs/2401.08740
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        width: int = 1152,
        depth: int = 28,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_embeds_ada_norm: int = 1000,
        has_null_class: bool = True,
    ) -> None:
        super().__init__()
        height, wide = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if height % patch_size or wide % patch_size:
            raise ValueError(f"DiTModel: {height} x {wide} cannot be dealt out to patches of {patch_size}.")
        if width % num_attention_heads or width % 4:
            raise ValueError(f"DiTModel: width {width} must be a multiple of num_attention_heads ({num_attention_heads}) and of 4.")
        self.rows, self.columns = height // patch_size, wide // patch_size
        self.embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.register_buffer("position", positions(width, self.rows, self.columns))
        self.time_embedding = TimeMLP(TIME_FEATURES, width)
        self.class_embedding = nn.Embedding(num_embeds_ada_norm + has_null_class, width)
        self.blocks = nn.ModuleList(DiTBlock(width, num_attention_heads, mlp_ratio) for _ in range(depth))
        self.condition_out = nn.Linear(width, 2 * width)
        self.linear_out = nn.Linear(width, patch_size**2 * out_channels)
        for layer in (self.condition_out, self.linear_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network's output at a time.

        Args:
            hidden_states: (B, C, H, W), of the size of the config.
            timestep: network time, a number, a 0-d tensor or (B,).
            class_labels: whole numbers, (B,).
            return_dict: False returns a tuple.
        Returns: `.sample`, (B, out_channels, H, W).
        Raises:
            ValueError: another size.
        """
        patch = self.config.patch_size
        if tuple(hidden_states.shape[2:]) != (self.rows * patch, self.columns * patch):
            raise ValueError(
                f"DiTModel: the input is {hidden_states.shape[2]} x {hidden_states.shape[3]}; its positions are for {self.rows * patch} x "
                f"{self.columns * patch}."
            )
        t = torch.as_tensor(timestep, device=hidden_states.device)
        time = self.time_embedding(t.expand(len(hidden_states)) if t.ndim == 0 else t)  # (B, D)
        condition = F.silu(time + self.class_embedding(class_labels))  # (B, D)
        x = self.embed(hidden_states).flatten(2).transpose(1, 2) + self.position  # (B, N, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)  # (B, N, D)
        shift, scale = self.condition_out(condition).chunk(2, dim=1)
        x = self.linear_out(modulate(x, shift, scale))  # (B, N, p p C)
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (self.rows, self.columns))  # (B, rows, columns, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)
