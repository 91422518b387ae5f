"""OpenAI's U-Net over its own keys: random state dicts of the layout, and the forward pass said again, without any module.

Written from Dhariwal & Nichol 2021 (section 3 and appendix) and the key names; it shares no code with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def random_state(
    widths=(32, 64, 96), layers=1, attention=(False, True, True), resample="conv", scale_shift=True, classes=None, in_channels=3,
    out_channels=3, time_channels=None, attention_dims=1, context=None, depth=1, seed=0, dtype=torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """A state dict of the layout with random weights, in the order in which the original writes it.

    With `context`, the width of a condition, attention is latent diffusion's transformers of `depth` blocks, one number or one for each
    level (the middle has the last one's).
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    time_channels = time_channels or widths[0]
    time = 4 * time_channels

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        fan_in = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=generator).div(math.sqrt(fan_in)).to(dtype)
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator).mul(0.1).to(dtype)

    def norm(name: str, width: int) -> None:
        for part, mean in (("weight", 1.0), ("bias", 0.0)):
            state[f"{name}.{part}"] = (mean + 0.2 * torch.randn(width, generator=generator)).to(dtype)

    def residual(name: str, width: int, out: int) -> None:
        norm(f"{name}.in_layers.0", width)
        layer(f"{name}.in_layers.2", out, width, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * out if scale_shift else out, time)
        norm(f"{name}.out_layers.0", out)
        layer(f"{name}.out_layers.3", out, out, 3, 3)
        if width != out:
            layer(f"{name}.skip_connection", out, width, 1, 1)

    def transform(name: str, width: int, level: int) -> None:
        norm(f"{name}.norm", width)
        layer(f"{name}.proj_in", width, width, 1, 1)
        for d in range(depth if isinstance(depth, int) else depth[level]):
            block = f"{name}.transformer_blocks.{d}"
            for attn, source in (("attn1", width), ("attn2", context)):
                layer(f"{block}.{attn}.to_q", width, width, bias=False)
                layer(f"{block}.{attn}.to_k", width, source, bias=False)
                layer(f"{block}.{attn}.to_v", width, source, bias=False)
                layer(f"{block}.{attn}.to_out.0", width, width)
            layer(f"{block}.ff.net.0.proj", 8 * width, width)
            layer(f"{block}.ff.net.2", width, 4 * width)
            for i in (1, 2, 3):
                norm(f"{block}.norm{i}", width)
        layer(f"{name}.proj_out", width, width, 1, 1)

    def attend(name: str, width: int, level: int) -> None:
        if context is not None:
            transform(name, width, level)
            return
        norm(f"{name}.norm", width)
        layer(f"{name}.qkv", 3 * width, width, *(1,) * attention_dims)
        layer(f"{name}.proj_out", width, width, *(1,) * attention_dims)

    layer("time_embed.0", time, time_channels)
    layer("time_embed.2", time, time)
    if classes is not None:
        state["label_emb.weight"] = torch.randn(classes, time, generator=generator).to(dtype)
    layer("input_blocks.0.0", widths[0], in_channels, 3, 3)
    width, skips, k = widths[0], [widths[0]], 1
    for level, out in enumerate(widths):
        for _ in range(layers):
            residual(f"input_blocks.{k}.0", width, out)
            width, _ = out, skips.append(out)
            if attention[level]:
                attend(f"input_blocks.{k}.1", width, level)
            k += 1
        if level < len(widths) - 1:
            if resample == "conv":
                layer(f"input_blocks.{k}.0.op", width, width, 3, 3)
            elif resample == "residual":
                residual(f"input_blocks.{k}.0", width, width)
            skips.append(width)
            k += 1
    residual("middle_block.0", width, width)
    attend("middle_block.1", width, len(widths) - 1)
    residual("middle_block.2", width, width)
    k = 0
    for level in reversed(range(len(widths))):
        for i in range(layers + 1):
            residual(f"output_blocks.{k}.0", width + skips.pop(), widths[level])
            width, j = widths[level], 1
            if attention[level]:
                attend(f"output_blocks.{k}.1", width, level)
                j = 2
            if level and i == layers:
                if resample == "conv":
                    layer(f"output_blocks.{k}.{j}.conv", width, width, 3, 3)
                elif resample == "residual":
                    residual(f"output_blocks.{k}.{j}", width, width)
            k += 1
    norm("out.0", width)
    layer("out.2", out_channels, widths[0], 3, 3)
    return state


class Forward:
    """The forward pass over the keys of a state dict.

    Args:
        heads: channels -> heads, on the way down and in the middle; `up_heads` on the way up.
        by_head: the order of the rows of q, k and v: head by head, or all q first.
        resample: "conv", "pool" or "residual".
    """

    def __init__(self, state, heads, by_head: bool, resample: str, layers: int, levels: int, up_heads=None) -> None:
        self.s = {key: value.float() for key, value in state.items()}
        self.heads, self.up_heads, self.by_head = heads, up_heads or heads, by_head
        self.resample, self.layers, self.levels = resample, layers, levels

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.s[f"{name}.weight"]
        return F.conv2d(x, weight, self.s[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.s[f"{name}.weight"].flatten(1).T + self.s[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
        x = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * self.s[f"{name}.weight"].view(shape) + self.s[f"{name}.bias"].view(shape)

    def change(self, x: Tensor, way: str | None) -> Tensor:
        if way == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if way == "up" else x

    def residual(self, x: Tensor, time: Tensor, name: str, way: str | None = None) -> Tensor:
        h = self.conv(self.change(F.silu(self.norm(x, f"{name}.in_layers.0")), way), f"{name}.in_layers.2")
        emb = self.linear(F.silu(time), f"{name}.emb_layers.1")[..., None, None]
        if emb.shape[1] == 2 * h.shape[1]:
            scale, shift = emb[:, : h.shape[1]], emb[:, h.shape[1] :]
            h = self.norm(h, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            h = self.norm(h + emb, f"{name}.out_layers.0")
        h = self.conv(F.silu(h), f"{name}.out_layers.3")
        x = self.change(x, way)
        return h + (self.conv(x, f"{name}.skip_connection") if f"{name}.skip_connection.weight" in self.s else x)

    def cross(self, x: Tensor, seen: Tensor, name: str, count: int) -> Tensor:
        parts = [v @ self.s[f"{name}.{key}.weight"].T for v, key in ((x, "to_q"), (seen, "to_k"), (seen, "to_v"))]
        q, k, v = (p.view(*p.shape[:2], count, -1).transpose(1, 2) for p in parts)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1)
        return self.linear((weights @ v).transpose(1, 2).reshape(x.shape), f"{name}.to_out.0")

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def transformer(self, x: Tensor, name: str, heads) -> Tensor:
        """Rombach et al. 2022, appendix E.2.1."""
        tokens = self.linear(self.norm(x, f"{name}.norm", 1e-6).flatten(2).transpose(1, 2), f"{name}.proj_in")
        for d in range(sum(f"{name}.transformer_blocks.{d}.norm1.weight" in self.s for d in range(9))):
            block, count = f"{name}.transformer_blocks.{d}", heads(x.shape[1])
            own = self.layer_norm(tokens, f"{block}.norm1")
            tokens = tokens + self.cross(own, own, f"{block}.attn1", count)
            tokens = tokens + self.cross(self.layer_norm(tokens, f"{block}.norm2"), self.context, f"{block}.attn2", count)
            value, gate = self.linear(self.layer_norm(tokens, f"{block}.norm3"), f"{block}.ff.net.0.proj").chunk(2, dim=-1)
            tokens = tokens + self.linear(value * F.gelu(gate), f"{block}.ff.net.2")
        return x + self.linear(tokens, f"{name}.proj_out").transpose(1, 2).view(x.shape)

    def attention(self, x: Tensor, name: str, heads) -> Tensor:
        if f"{name}.proj_in.weight" in self.s:
            return self.transformer(x, name, heads)
        batch, width, height, wide = x.shape
        qkv = self.linear(self.norm(x.flatten(2), f"{name}.norm").transpose(1, 2), f"{name}.qkv")  # (B, N, 3 C)
        count = heads(width)
        if self.by_head:
            q, k, v = qkv.view(batch, -1, count, 3, width // count).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = qkv.view(batch, -1, 3, count, width // count).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(width // count), dim=-1)
        out = (weights @ v).transpose(1, 2).reshape(batch, -1, width)
        return x + self.linear(out, f"{name}.proj_out").transpose(1, 2).view(x.shape)

    def block(self, x: Tensor, time: Tensor, name: str, way: str | None, heads) -> Tensor:
        """One entry of input_blocks or output_blocks: what is there is read off the keys."""
        here = [j for j in range(3) if any(key.startswith(f"{name}.{j}.") for key in self.s)]
        for n, j in enumerate(here):
            prefix = f"{name}.{j}"
            if f"{prefix}.in_layers.0.weight" in self.s:
                alone = way is not None and (len(here) == 1 if way == "down" else n > 0)
                x = self.residual(x, time, prefix, way if alone else None)
            elif f"{prefix}.proj_out.weight" in self.s:
                x = self.attention(x, prefix, heads)
            elif way == "down":
                x = self.conv(x, f"{prefix}.op", stride=2)
            else:
                x = self.conv(self.change(x, "up"), f"{prefix}.conv")
        return self.change(x, way) if way is not None and self.resample == "pool" else x

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        self.context = context  # (B, L, width), for latent diffusion's transformers
        skips, time = self.down(x, t, labels)
        x, period = skips.pop(), self.layers + 1
        for k in range(self.levels * period):
            last = k % period == self.layers and k < self.levels * period - 1
            x = self.block(torch.cat([x, skips.pop()], 1), time, f"output_blocks.{k}", "up" if last else None, self.up_heads)
        return self.conv(F.silu(self.norm(x, "out.0")), "out.2")

    def down(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """What every input block gives, then the middle; and the embedded time."""
        width = self.s["time_embed.0.weight"].shape[1]
        angles = t.float()[:, None] * 10000.0 ** (-torch.arange(width // 2) / (width // 2))
        time = self.linear(F.silu(self.linear(torch.cat([angles.cos(), angles.sin()], 1), "time_embed.0")), "time_embed.2")
        if labels is not None:
            time = time + self.s["label_emb.weight"][labels]
        period = self.layers + 1
        x = self.conv(x, "input_blocks.0.0")
        skips = [x]
        for k in range(1, self.levels * period):
            x = self.block(x, time, f"input_blocks.{k}", "down" if k % period == 0 else None, self.heads)
            skips.append(x)
        x = self.residual(x, time, "middle_block.0")
        x = self.residual(self.attention(x, "middle_block.1", self.heads), time, "middle_block.2")
        return [*skips, x], time
