"""A folder with rosinality's VQ-VAE-2 and two PixelSNAILs, and what those networks compute, written down from their description."""

import argparse
import math

import torch
from torch.nn import functional as F

OPTIONS = {}
CHANNEL, RES, DIM, CODES = 8, 4, 5, 7
TOP = {"shape": (4, 4), "channel": 16, "residual": 6, "kernel": 5, "blocks": 2, "layers": 1, "attention": True, "out": 1, "condition": 0}
BOTTOM = {"shape": (8, 8), "channel": 6, "residual": 4, "kernel": 5, "blocks": 1, "layers": 2, "attention": False, "out": 0, "condition": 3}


class Maker(dict):
    """A state dict that is filled with random numbers."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, *shape, scale=0.3):
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def conv(self, name, inputs, outputs, size, transposed=False):
        self[f"{name}.weight"] = self.rand(*((inputs, outputs) if transposed else (outputs, inputs)), size, size)
        self[f"{name}.bias"] = self.rand(outputs)

    def normed(self, name, outputs, *shape, bias=True):
        self[f"{name}.weight_g"] = 1 + self.rand(outputs, *[1] * len(shape))
        self[f"{name}.weight_v"] = self.rand(outputs, *shape)
        if bias:
            self[f"{name}.bias"] = self.rand(outputs)


def vqvae_state(seed=0):
    m = Maker(seed)

    def residual(name, first):
        m.conv(f"{name}.blocks.{first}.conv.1", CHANNEL, RES, 3)
        m.conv(f"{name}.blocks.{first}.conv.3", RES, CHANNEL, 1)

    m.conv("enc_b.blocks.0", 3, CHANNEL // 2, 4)
    m.conv("enc_b.blocks.2", CHANNEL // 2, CHANNEL, 4)
    m.conv("enc_b.blocks.4", CHANNEL, CHANNEL, 3)
    residual("enc_b", 5)
    residual("enc_b", 6)
    m.conv("enc_t.blocks.0", CHANNEL, CHANNEL // 2, 4)
    m.conv("enc_t.blocks.2", CHANNEL // 2, CHANNEL, 3)
    residual("enc_t", 3)
    residual("enc_t", 4)
    m.conv("quantize_conv_t", CHANNEL, DIM, 1)
    m.conv("dec_t.blocks.0", DIM, CHANNEL, 3)
    residual("dec_t", 1)
    residual("dec_t", 2)
    m.conv("dec_t.blocks.4", CHANNEL, DIM, 4, transposed=True)
    m.conv("quantize_conv_b", DIM + CHANNEL, DIM, 1)
    m.conv("upsample_t", DIM, DIM, 4, transposed=True)
    m.conv("dec.blocks.0", 2 * DIM, CHANNEL, 3)
    residual("dec", 1)
    residual("dec", 2)
    m.conv("dec.blocks.4", CHANNEL, CHANNEL // 2, 4, transposed=True)
    m.conv("dec.blocks.6", CHANNEL // 2, 3, 4, transposed=True)
    for level in "tb":
        m[f"quantize_{level}.embed"] = m.rand(DIM, CODES)
        m[f"quantize_{level}.cluster_size"] = 1 + m.rand(CODES).abs()
        m[f"quantize_{level}.embed_avg"] = m[f"quantize_{level}.embed"] * m[f"quantize_{level}.cluster_size"]
    return dict(m)


def reconstruct(s, x, inplace=False):
    """Codes of the top and the bottom, (B, h, w), and the picture that they make."""
    conv = lambda name, x, **k: F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], **k)
    grow = lambda name, x: F.conv_transpose2d(x, s[f"{name}.weight"], s[f"{name}.bias"], stride=2, padding=1)

    def residual(name, x):
        inner = conv(f"{name}.conv.3", conv(f"{name}.conv.1", x.relu(), padding=1).relu())
        return inner + (x.relu() if inplace else x)

    def quantise(level, z):
        book = s[f"quantize_{level}.embed"].t()
        codes = torch.cdist(z.permute(0, 2, 3, 1), book).argmin(3)
        return codes, book[codes].permute(0, 3, 1, 2)

    h = conv("enc_b.blocks.4", conv("enc_b.blocks.2", conv("enc_b.blocks.0", x, stride=2, padding=1).relu(), stride=2, padding=1).relu(),
             padding=1)  # fmt: skip
    bottom = residual("enc_b.blocks.6", residual("enc_b.blocks.5", h)).relu()
    h = conv("enc_t.blocks.2", conv("enc_t.blocks.0", bottom, stride=2, padding=1).relu(), padding=1)
    top = residual("enc_t.blocks.4", residual("enc_t.blocks.3", h)).relu()
    codes_t, q_t = quantise("t", conv("quantize_conv_t", top))
    h = residual("dec_t.blocks.2", residual("dec_t.blocks.1", conv("dec_t.blocks.0", q_t, padding=1))).relu()
    codes_b, q_b = quantise("b", conv("quantize_conv_b", torch.cat([grow("dec_t.blocks.4", h), bottom], 1)))
    h = conv("dec.blocks.0", torch.cat([grow("upsample_t", q_t), q_b], 1), padding=1)
    h = residual("dec.blocks.2", residual("dec.blocks.1", h)).relu()
    return codes_t, codes_b, grow("dec.blocks.6", grow("dec.blocks.4", h).relu())


def prior_state(shape, channel, residual, kernel, blocks, layers, attention, out, condition, seed=1):
    m = Maker(seed)

    def gated(name, channels, hidden, size, tail="conv"):
        m.normed(f"{name}.conv1.{tail}", hidden, channels, size, size)
        m.normed(f"{name}.conv2.{tail}", 2 * channels, hidden, size, size)

    m.normed("horizontal.conv.conv", channel, CODES, kernel // 2, kernel)
    m.normed("vertical.conv.conv", channel, CODES, (kernel + 1) // 2, kernel // 2)
    m["background"] = places(shape)
    for block in range(blocks):
        name = f"blocks.{block}"
        for layer in range(layers):
            gated(f"{name}.resblocks.{layer}", channel, residual, kernel, "conv.conv")
            if condition:
                m.normed(f"{name}.resblocks.{layer}.condition.conv", 2 * channel, condition, 1, 1, bias=False)
        if attention:
            gated(f"{name}.key_resblock", 2 * channel + 2, channel, 1)
            gated(f"{name}.query_resblock", channel + 2, channel, 1)
            gated(f"{name}.out_resblock", channel, channel, 1)
            m.normed(f"{name}.out_resblock.aux_conv.conv", channel, channel // 2, 1, 1)
            for part, inputs in (("query", channel + 2), ("key", 2 * channel + 2), ("value", 2 * channel + 2)):
                m.normed(f"{name}.causal_attention.{part}", channel // 2, inputs)
        else:
            m.normed(f"{name}.out.conv", channel, channel + 2, 1, 1)
    if condition:
        m.normed("cond_resnet.blocks.0.conv", condition, CODES, 3, 3)
        gated("cond_resnet.blocks.1", condition, condition, 3)
    for layer in range(out):
        gated(f"out.{layer}", channel, residual, 1)
    m.normed(f"out.{out + 1}.conv", CODES, channel, 1, 1)
    return dict(m)


def places(shape):
    rows, columns = ((torch.arange(n, dtype=torch.float64) - n / 2) / n for n in shape)
    return torch.stack([rows[:, None].expand(shape), columns[None].expand(shape)])[None]


def logits(s, codes, above=None, blocks=1, layers=1, out=0, **_):
    """Logits (B, K, h, w) of a PixelSNAIL: plain convolutions with masks on their weights, and attention by a loop over the places."""

    def weight(name, mask=None):
        v = s[f"{name}.weight_v"] if mask is None else s[f"{name}.weight_v"] * mask
        return s[f"{name}.weight_g"] * v / v.flatten(1).norm(dim=1).view(s[f"{name}.weight_g"].shape)

    conv = lambda name, x, **k: F.conv2d(x, weight(name), s.get(f"{name}.bias"), **k)

    def causal(name, x):
        size = s[f"{name}.weight_v"].shape[2]
        mask = torch.ones(size, size, dtype=x.dtype)
        mask[-1, size // 2 :] = 0
        return F.conv2d(F.pad(x, (size // 2, size // 2, size - 1, 0)), weight(name, mask), s[f"{name}.bias"])

    def gated(name, x, first=None, auxiliary=None, condition=None):
        tail = "conv.conv" if first is causal else "conv"
        run = first or (lambda key, h: conv(key, h, padding=s[f"{key}.weight_v"].shape[2] // 2))
        h = run(f"{name}.conv1.{tail}", F.elu(x))
        if auxiliary is not None:
            h = h + conv(f"{name}.aux_conv.conv", F.elu(auxiliary))
        h = run(f"{name}.conv2.{tail}", F.elu(h))
        if condition is not None:
            h = h + conv(f"{name}.condition.conv", condition)
        a, b = h.chunk(2, 1)
        return x + a * torch.sigmoid(b)

    def attend(name, query, key):
        project = lambda part, x: torch.einsum("oc,bct->bto", weight(f"{name}.{part}"), x.flatten(2)) + s[f"{name}.{part}.bias"]
        q, k, v = (project(part, x).unflatten(2, (8, -1)) for part, x in (("query", query), ("key", key), ("value", key)))
        mixed = torch.zeros_like(q)
        for t in range(1, q.shape[1]):
            share = torch.softmax(torch.einsum("bhd,bshd->bhs", q[:, t], k[:, :t]) / math.sqrt(q.shape[3]), 2)
            mixed[:, t] = torch.einsum("bhs,bshd->bhd", share, v[:, :t])
        return mixed.flatten(2).transpose(1, 2).unflatten(2, query.shape[2:])

    x = F.one_hot(codes, CODES).permute(0, 3, 1, 2).double()
    kernel = s["horizontal.conv.conv.weight_v"].shape[3]
    down = conv("horizontal.conv.conv", F.pad(x, (kernel // 2, kernel // 2, kernel // 2 - 1, 0)))
    right = conv("vertical.conv.conv", F.pad(x, (kernel // 2 - 1, 0, (kernel + 1) // 2 - 1, 0)))
    x = F.pad(down, (0, 0, 1, 0))[:, :, :-1] + F.pad(right, (1, 0))[:, :, :, :-1]
    place, given = s["background"].expand(len(x), -1, -1, -1), None
    if above is not None:
        given = conv("cond_resnet.blocks.0.conv", F.one_hot(above, CODES).permute(0, 3, 1, 2).double(), padding=1)
        given = F.interpolate(gated("cond_resnet.blocks.1", given), scale_factor=2)
    for block in range(blocks):
        inside, name = x, f"blocks.{block}"
        for layer in range(layers):
            inside = gated(f"{name}.resblocks.{layer}", inside, causal, condition=given)
        if f"{name}.out.conv.weight_v" in s:
            x = conv(f"{name}.out.conv", torch.cat([inside, place], 1))
        else:
            key = gated(f"{name}.key_resblock", torch.cat([x, inside, place], 1))
            query = gated(f"{name}.query_resblock", torch.cat([inside, place], 1))
            x = gated(f"{name}.out_resblock", inside, auxiliary=attend(f"{name}.causal_attention", query, key))
    for layer in range(out):
        x = gated(f"out.{layer}", x)
    return conv(f"out.{out + 1}.conv", F.elu(x))


def write(folder):
    source = folder / "checkpoint"
    source.mkdir()
    single = lambda state: {key: value.float() for key, value in state.items()}
    torch.save(single(vqvae_state()), source / "vqvae_560.pt")
    for name, settings in (("top", TOP), ("bottom", BOTTOM)):
        args = argparse.Namespace(hier=name, dropout=0.2, channel=settings["channel"])
        torch.save({"model": single(prior_state(**settings)), "args": args}, source / f"pixelsnail_{name}_420.pt")
    return source
