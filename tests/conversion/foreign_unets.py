"""The networks of score_sde_pytorch, EDM, EDM2 and k-diffusion, said again as functions of their weights by name.

Whoever runs one gets its weights too: they are drawn when they are first asked for, under the name and in the shape of the foreign layout.
"""

import math

import torch
import torch.nn.functional as F


class Weights(dict):
    """Weights by name, drawn where they are missing, in the order in which they are asked for."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name, *shape):
        if name not in self:
            draw = torch.randn(shape, generator=self.generator)
            self[name] = 0.3 * draw if len(shape) < 2 else draw / math.sqrt(draw[0].numel())
        return self[name]


def resample(x, direction, taps):
    """Zeros in between, a filter, every second pixel; the filter is symmetric and means are kept."""
    taps = torch.tensor(taps, dtype=x.dtype)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    if direction == "up":
        wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        wide[:, :, ::2, ::2] = 4 * x
        before, after = len(taps) // 2, (len(taps) - 1) // 2
        return each_channel(F.pad(wide, (before, after, before, after)), kernel)
    side = len(taps) // 2 - 1
    return each_channel(F.pad(x, (side,) * 4), kernel)[:, :, ::2, ::2]


def each_channel(x, kernel):
    return F.conv2d(x, kernel.expand(x.shape[1], 1, *kernel.shape), groups=x.shape[1])


def sinusoid(t, count, last_is_slowest):
    half = count // 2
    angles = t[:, None] * 10000.0 ** (-torch.arange(half) / (half - last_is_slowest))
    return angles.sin(), angles.cos()


def pointwise_attention(q, k, v, heads):
    """Each (B, C, H, W), its channels heads after one another."""
    split = lambda z: z.reshape(len(z), heads, -1, z.shape[2] * z.shape[3])
    q, k, v = split(q), split(k), split(v)
    return torch.einsum("bhcj,bhij->bhci", v, torch.softmax(torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(q.shape[2]), dim=-1))


class Song:
    """DDPM++ and NCSN++ (BigGAN's blocks), in the numbered layout of score_sde_pytorch or the named one of EDM."""

    eps = 1e-6

    def __init__(self, weights, numbered, *, base, widths, layers, attention, size, fourier=False, taps=(1, 1), input="none", output="none",
                 classes=0, channels=3):  # fmt: skip
        self.w, self.numbered, self.count = weights, numbered, 0
        self.base, self.widths, self.layers, self.attention, self.size = base, widths, layers, attention, size
        self.fourier, self.taps, self.input, self.output, self.classes, self.channels = fourier, taps, input, output, classes, channels

    def next(self, name):
        """The prefix of a module: its number, or its name."""
        self.count += 1
        return f"all_modules.{self.count - 1}" if self.numbered else name

    def affine(self, name, x, out, *kernel):
        weight = self.w(f"{name}.weight", out, x.shape[1], *kernel)
        bias = self.w(f"{name}.bias", out)
        return F.conv2d(x, weight, bias, padding=kernel[0] // 2) if kernel else F.linear(x, weight, bias)

    def nin(self, name, x, out):
        weight, bias = self.w(f"{name}.W", x.shape[1], out), self.w(f"{name}.b", out)
        return torch.einsum("bchw,cd->bdhw", x, weight) + bias[:, None, None]

    def norm(self, name, x):
        channels = x.shape[1]
        if f"{name}.weight" not in self.w:
            self.w[f"{name}.weight"] = 1 + self.w(f"{name}.weight", channels)
        return F.group_norm(x, min(channels // 4, 32), self.w[f"{name}.weight"], self.w(f"{name}.bias", channels), self.eps)

    def block(self, name, x, time, out, direction=None):
        name = self.next(name)
        part = dict(zip(("norm0", "conv0", "time", "norm1", "conv1", "skip"), (
            ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2") if self.numbered
            else ("norm0", "conv0", "affine", "norm1", "conv1", "skip")), strict=True))  # fmt: skip
        moved = (lambda z: resample(z, direction, self.taps)) if direction else (lambda z: z)
        h = self.affine(f"{name}.{part['conv0']}", moved(F.silu(self.norm(f"{name}.{part['norm0']}", x))), out, 3, 3)
        h = h + self.affine(f"{name}.{part['time']}", time, out)[:, :, None, None]
        h = self.affine(f"{name}.{part['conv1']}", F.silu(self.norm(f"{name}.{part['norm1']}", h)), out, 3, 3)
        if direction or x.shape[1] != out:
            x = self.affine(f"{name}.{part['skip']}", moved(x), out, 1, 1)
        return (x + h) / math.sqrt(2)

    def attend(self, name, x):
        channels = x.shape[1]
        if self.numbered:
            name = self.next("")
            h = self.norm(f"{name}.GroupNorm_0", x)
            q, k, v = (self.nin(f"{name}.NIN_{i}", h, channels) for i in range(3))
        else:  # a part of the block; queries, keys and values take turns
            qkv = self.affine(f"{name}.qkv", self.norm(f"{name}.norm2", x), 3 * channels, 1, 1)
            q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
        h = pointwise_attention(q, k, v, 1).reshape(x.shape)
        h = self.nin(f"{name}.NIN_3", h, channels) if self.numbered else self.affine(f"{name}.proj", h, channels, 1, 1)
        return (x + h) / math.sqrt(2)

    def time(self, t, labels):
        if self.fourier:
            name = f"{self.next('')}.W" if self.numbered else "map_noise.freqs"
            angles = 2 * math.pi * t[:, None] * self.w(name, self.base)
            features = torch.cat([angles.sin(), angles.cos()], 1)
        else:
            features = torch.cat(sinusoid(t, self.base, 1), 1)
        if self.classes:
            one_hot = F.one_hot(labels, self.classes).float() * math.sqrt(self.classes)
            features = features + self.affine("map_label", one_hot, features.shape[1])
        time = F.silu(self.affine(self.next("map_layer0"), features, 4 * self.base))
        return F.silu(self.affine(self.next("map_layer1"), time, 4 * self.base))

    def __call__(self, x, t, labels=None):
        """x: (B, C, size, size); t: what is embedded, (B,)."""
        self.count = 0
        time = self.time(t, labels)
        shrunk, size = x, self.size
        h = self.affine(self.next(f"enc.{size}x{size}_conv"), x, self.base, 3, 3)
        skips = [h]
        for i, width in enumerate(self.widths):
            if i:
                size //= 2
                h = self.block(f"enc.{size}x{size}_down", h, time, h.shape[1], "down")
                if self.input == "residual":
                    name = self.next(f"enc.{size}x{size}_aux_residual") + (".Conv2d_0" if self.numbered else "")
                    kernel = torch.outer(*2 * [torch.tensor(self.taps, dtype=x.dtype)]) / sum(self.taps) ** 2
                    weight, bias = self.w(f"{name}.weight", h.shape[1], shrunk.shape[1], 3, 3), self.w(f"{name}.bias", h.shape[1])
                    shrunk = F.conv2d(each_channel(F.pad(shrunk, (2, 2, 2, 2)), kernel), weight, bias, stride=2)
                    h = shrunk = (shrunk + h) / math.sqrt(2)
                elif self.input == "input_skip":
                    shrunk = resample(shrunk, "down", self.taps)
                    name = self.next(f"enc.{size}x{size}_aux_skip") + (".Conv_0" if self.numbered else "")
                    h = h + self.affine(name, shrunk, h.shape[1], 1, 1)
                skips.append(h)
            for j in range(self.layers):
                name = f"enc.{size}x{size}_block{j}"
                h = self.block(name, h, time, width)
                h = self.attend(name, h) if i in self.attention else h
                skips.append(h)
        name = f"dec.{size}x{size}_in"
        h = self.attend(f"{name}0", self.block(f"{name}0", h, time, h.shape[1]))
        h = self.block(f"{name}1", h, time, h.shape[1])
        grown = None
        for i in reversed(range(len(self.widths))):
            size = self.size >> i
            if i + 1 < len(self.widths):
                h = self.block(f"dec.{size}x{size}_up", h, time, h.shape[1], "up")
            for j in range(self.layers + 1):
                name = f"dec.{size}x{size}_block{j}"
                h = self.block(name, torch.cat([h, skips.pop()], 1), time, self.widths[i])
            h = self.attend(name, h) if i in self.attention else h
            if self.output == "output_skip" or i == 0:
                more = F.silu(self.norm(self.next(f"dec.{size}x{size}_aux_norm"), h))
                more = self.affine(self.next(f"dec.{size}x{size}_aux_conv"), more, self.channels, 3, 3)
                grown = more if grown is None else resample(grown, "up", self.taps) + more
        return grown


class Dhariwal(Song):
    """ADM in EDM's layout: scale and shift from the time, heads of 64 channels, attention behind each block of its resolutions."""

    eps = 1e-5

    def block(self, name, x, time, out, direction=None):
        moved = (lambda z: resample(z, direction, (1, 1))) if direction else (lambda z: z)
        h = self.affine(f"{name}.conv0", moved(F.silu(self.norm(f"{name}.norm0", x))), out, 3, 3)
        scale, shift = self.affine(f"{name}.affine", time, 2 * out)[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm(f"{name}.norm1", h) * (1 + scale) + shift)
        h = self.affine(f"{name}.conv1", h, out, 3, 3)
        return h + (self.affine(f"{name}.skip", moved(x), out, 1, 1) if x.shape[1] != out else moved(x))

    def attend(self, name, x):
        channels = x.shape[1]
        qkv = self.affine(f"{name}.qkv", self.norm(f"{name}.norm2", x), 3 * channels, 1, 1)
        h = pointwise_attention(qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3], channels // 64).reshape(x.shape)
        return x + self.affine(f"{name}.proj", h, channels, 1, 1)

    def __call__(self, x, t, labels=None):
        sin, cos = sinusoid(t, self.base, 0)
        time = self.affine("map_layer1", F.silu(self.affine("map_layer0", torch.cat([cos, sin], 1), 4 * self.base)), 4 * self.base)
        if self.classes:
            time = time + F.linear(F.one_hot(labels, self.classes).float(), self.w("map_label.weight", 4 * self.base, self.classes))
        time, size = F.silu(time), self.size
        h = self.affine(f"enc.{size}x{size}_conv", x, self.base, 3, 3)
        skips = [h]
        for i, width in enumerate(self.widths):
            if i:
                size //= 2
                h = self.block(f"enc.{size}x{size}_down", h, time, h.shape[1], "down")
                skips.append(h)
            for j in range(self.layers):
                h = self.block(f"enc.{size}x{size}_block{j}", h, time, width)
                h = self.attend(f"enc.{size}x{size}_block{j}", h) if i in self.attention else h
                skips.append(h)
        h = self.attend(f"dec.{size}x{size}_in0", self.block(f"dec.{size}x{size}_in0", h, time, h.shape[1]))
        h = self.block(f"dec.{size}x{size}_in1", h, time, h.shape[1])
        for i in reversed(range(len(self.widths))):
            size = self.size >> i
            if i + 1 < len(self.widths):
                h = self.block(f"dec.{size}x{size}_up", h, time, h.shape[1], "up")
            for j in range(self.layers + 1):
                h = self.block(f"dec.{size}x{size}_block{j}", torch.cat([h, skips.pop()], 1), time, self.widths[i])
                h = self.attend(f"dec.{size}x{size}_block{j}", h) if i in self.attention else h
        return self.affine("out_conv", F.silu(self.norm("out_norm", h)), self.channels, 3, 3)


class Magnitude:
    """EDM2's network, in its layout, with what its paper sets (figure 21 and appendix B)."""

    def __init__(self, weights, *, base, mults, layers, attention, size, head, classes=0, channels=4):
        self.w, self.base, self.mults, self.layers, self.attention = weights, base, mults, layers, attention
        self.size, self.head, self.classes, self.channels = size, head, classes, channels

    @staticmethod
    def unit(x, dim):
        return x / (1e-4 + x.pow(2).mean(dim, keepdim=True).sqrt())

    def weigh(self, name, x, out, *kernel, gain=1.0):
        weight = self.w(f"{name}.weight", out, x.shape[1], *kernel)
        weight = self.unit(weight.flatten(1), 1).view_as(weight) / math.sqrt(weight[0].numel()) * gain
        return F.conv2d(x, weight, padding=kernel[0] // 2) if kernel else x @ weight.T

    @staticmethod
    def act(x):
        return F.silu(x) / 0.596

    @staticmethod
    def mix(a, b, t):
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    def fourier(self, name, t, count):
        return math.sqrt(2) * torch.cos(torch.outer(t, self.w(f"{name}.freqs", count)) + self.w(f"{name}.phases", count))

    def block(self, name, x, time, out, encoder, direction=None, attention=False):
        x = resample(x, direction, (1, 1)) if direction else x
        brought = lambda z: self.weigh(f"{name}.conv_skip", z, out, 1, 1) if z.shape[1] != out else z
        x = self.unit(brought(x), 1) if encoder else x
        h = self.weigh(f"{name}.conv_res0", self.act(x), out, 3, 3)
        scale = 1 + self.weigh(f"{name}.emb_linear", time, out, gain=self.w(f"{name}.emb_gain"))
        h = self.weigh(f"{name}.conv_res1", self.act(h * scale[:, :, None, None]), out, 3, 3)
        x = self.mix(x if encoder else brought(x), h, 0.3)
        if attention:
            qkv = self.weigh(f"{name}.attn_qkv", x, 3 * out, 1, 1)
            q, k, v = (self.unit(part.reshape(len(x), out // self.head, self.head, -1), 2).reshape(x.shape)
                       for part in (qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]))  # fmt: skip
            h = pointwise_attention(q, k, v, out // self.head).reshape(x.shape)
            x = self.mix(x, self.weigh(f"{name}.attn_proj", h, out, 1, 1), 0.3)
        return x.clamp(-256, 256)

    def __call__(self, x, t, labels=None):
        widths = [self.base * mult for mult in self.mults]
        time = self.weigh("unet.emb_noise", self.fourier("unet.emb_fourier", t, self.base), max(widths))
        if self.classes:
            one_hot = F.one_hot(labels, self.classes).float() * math.sqrt(self.classes)
            time = self.mix(time, self.weigh("unet.emb_label", one_hot, max(widths)), 0.5)
        time, size = self.act(time), self.size
        h = self.weigh(f"unet.enc.{size}x{size}_conv", torch.cat([x, torch.ones_like(x[:, :1])], 1), self.base, 3, 3)
        skips = [h]
        for i, width in enumerate(widths):
            size = self.size >> i
            if i:
                h = self.block(f"unet.enc.{size}x{size}_down", h, time, h.shape[1], True, "down")
                skips.append(h)
            for j in range(self.layers):
                h = self.block(f"unet.enc.{size}x{size}_block{j}", h, time, width, True, attention=i in self.attention)
                skips.append(h)
        h = self.block(f"unet.dec.{size}x{size}_in0", h, time, h.shape[1], False, attention=True)
        h = self.block(f"unet.dec.{size}x{size}_in1", h, time, h.shape[1], False)
        for i in reversed(range(len(widths))):
            size = self.size >> i
            if i + 1 < len(widths):
                h = self.block(f"unet.dec.{size}x{size}_up", h, time, h.shape[1], False, "up")
            for j in range(self.layers + 1):
                skip = skips.pop()
                a, b = h.shape[1], skip.shape[1]
                h = torch.cat([h * math.sqrt((a + b) / (2 * a)), skip * math.sqrt((a + b) / (2 * b))], 1)
                h = self.block(f"unet.dec.{size}x{size}_block{j}", h, time, widths[i], False, attention=i in self.attention)
        return self.weigh("unet.out_conv", h, self.channels, 3, 3, gain=self.w("unet.out_gain"))

    def uncertainty(self, t):
        return self.weigh("logvar_linear", self.fourier("logvar_fourier", t, 128), 1)[:, 0]


class KImage:
    """k-diffusion's image_v1, by its keys; `classes` are numbers of the vector behind the nine of augmentations."""

    def __init__(self, weights, *, widths, layers, attention, mapping=32, channels=3, patch=1, skipped=0, variance=False, given=0,
                 condition=0, wrapped=True):  # fmt: skip
        self.w, self.widths, self.layers, self.attention, self.mapping = weights, widths, layers, attention, mapping
        self.channels, self.patch, self.skipped, self.variance, self.given = channels, patch, skipped, variance, given
        self.vector = condition + (9 if wrapped else 0)

    def affine(self, name, x, out, *kernel, bias=True):
        weight = self.w(f"{name}.weight", out, x.shape[1], *kernel)
        bias = self.w(f"{name}.bias", out) if bias else None
        return F.conv2d(x, weight, bias, padding=kernel[0] // 2) if kernel else F.linear(x, weight, bias)

    def norm(self, name, x):
        weight, bias = self.affine(f"{name}.mapper", self.embedding, 2 * x.shape[1])[:, :, None, None].chunk(2, 1)
        grouped = x.reshape(len(x), max(1, x.shape[1] // 32), -1)
        mean, var = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
        return ((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape) * (1 + weight) + bias

    def level(self, name, x, width, outs, attention):
        j = 1 if ".d_blocks." in name else 0  # the change of size is the first on the way down, the last on the way up
        for out in outs:
            skip = self.affine(f"{name}.{j}.skip", x, out, 1, 1, bias=False) if x.shape[1] != out else x
            h = self.affine(f"{name}.{j}.main.2", F.gelu(self.norm(f"{name}.{j}.main.0", x)), width, 3, 3)
            x = skip + self.affine(f"{name}.{j}.main.6", F.gelu(self.norm(f"{name}.{j}.main.4", h)), out, 3, 3)
            j += 1
            if attention:
                q, k, v = self.affine(f"{name}.{j}.qkv_proj", self.norm(f"{name}.{j}.norm_in", x), 3 * out, 1, 1).chunk(3, 1)
                h = pointwise_attention(q, k, v, max(1, out // 64)).reshape(x.shape)
                x = x + self.affine(f"{name}.{j}.out_proj", h, out, 1, 1)
                j += 1
        return x

    @staticmethod
    def halve(x):
        for _ in range(2):  # columns, then rows
            p = F.pad(x, (1, 1, 0, 0), "reflect")
            x = ((p[..., :-3:2] + p[..., 3::2] + 3 * (p[..., 1:-2:2] + p[..., 2:-1:2])) / 8).transpose(2, 3)
        return x

    @staticmethod
    def double(x):
        for _ in range(2):
            p = F.pad(x, (1, 1, 0, 0), "reflect")
            x = torch.stack([p[..., :-2] + 3 * x, 3 * x + p[..., 2:]], -1).flatten(3).transpose(2, 3) / 4
        return x

    def __call__(self, x, sigma, vector=None, second=None):
        angles = 2 * math.pi * sigma.log()[:, None] / 4 * self.w("timestep_embed.weight", self.mapping // 2, 1).T
        h = torch.cat([angles.cos(), angles.sin()], 1)
        if self.vector:
            table = self.w("mapping_cond.weight", self.mapping, self.vector)
            h = h if vector is None else h + vector @ table.T
        self.embedding = F.gelu(self.affine("mapping.2", F.gelu(self.affine("mapping.0", h, self.mapping)), self.mapping))
        count, used = len(self.widths), range(self.skipped, len(self.widths))
        before = [self.widths[max(0, i - 1)] for i in range(count)]
        x = x if second is None else torch.cat([x, second], 1)
        x, skips = self.affine("proj_in", F.pixel_unshuffle(x, self.patch), before[self.skipped], 1, 1), []
        for i in used:
            x = self.halve(x) if i > self.skipped else x
            x = self.level(f"u_net.d_blocks.{i}", x, self.widths[i], [self.widths[i]] * self.layers[i], self.attention[i])
            skips.append(x)
        skips.pop()
        for i in reversed(used):
            x = x if i == count - 1 else torch.cat([x, skips.pop()], 1)
            outs = [self.widths[i]] * (self.layers[i] - 1) + [before[i]]
            x = self.level(f"u_net.u_blocks.{count - 1 - i}", x, self.widths[i], outs, self.attention[i])
            x = self.double(x) if i > self.skipped else x
        out = self.affine("proj_out", x, self.channels * self.patch**2 + self.variance, 1, 1)
        return F.pixel_shuffle(out[:, : self.channels * self.patch**2], self.patch)


def neighbourhood_attention(q, k, v, size):
    """One query after the other: q, k, v (B, heads, H, W, E), the window shifted to stay inside."""
    out = torch.empty_like(v)
    height, width = q.shape[2:4]
    for i in range(height):
        for j in range(width):
            top, left = (min(max(place - size // 2, 0), length - size) for place, length in ((i, height), (j, width)))
            keys, values = (x[:, :, top : top + size, left : left + size].flatten(2, 3) for x in (k, v))
            weights = torch.softmax((keys @ q[:, :, i, j, :, None])[..., 0], -1)
            out[:, :, i, j] = (weights[..., None] * values).sum(2)
    return out


def window_attention(q, k, v, size, shift):
    """Query after query again: tokens of one window see each other where no edge of the picture lies between them."""
    out = torch.empty_like(v)
    height, width = q.shape[2:4]
    window = lambda place, length: ((place + shift) % length // size, (place + shift) >= length)
    places = [(i, j) for i in range(height) for j in range(width)]
    for i, j in places:
        seen = [(a, b) for a, b in places if window(a, height) == window(i, height) and window(b, width) == window(j, width)]
        a, b = torch.tensor(seen).T
        weights = torch.softmax((k[:, :, a, b] @ q[:, :, i, j, :, None])[..., 0], -1)
        out[:, :, i, j] = (weights[..., None] * v[:, :, a, b]).sum(2)
    return out


class HourglassTransformer:
    """k-diffusion's image_transformer_v2, by its keys; `attention` has (type, size, channels of a head) of every level."""

    def __init__(self, weights, *, widths, layers, attention, mapping=32, mapping_layers=2, channels=3, patch=2, classes=0, condition=0):
        self.w, self.widths, self.layers, self.attention, self.mapping = weights, widths, layers, attention, mapping
        self.mapping_layers, self.channels, self.patch, self.classes, self.condition = mapping_layers, channels, patch, classes, condition

    def linear(self, name, x, out):
        return x @ self.w(f"{name}.weight", out, x.shape[-1]).T

    @staticmethod
    def rms(x, scale):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale

    def norm(self, name, x):
        return self.rms(x, 1 + self.linear(f"{name}.norm.linear", self.embedding, x.shape[-1])[:, None, None])

    def gated(self, name, x, hidden, width):
        up = self.linear(f"{name}.up_proj", x, 2 * hidden)
        return self.linear(f"{name}.down_proj", up[..., :hidden] * F.gelu(up[..., hidden:]), width)

    def attend(self, name, x, kind, size, head, odd):
        width, (height, columns) = x.shape[-1], x.shape[1:3]
        heads = width // head
        q, k, v = (part.unflatten(-1, (heads, head)).permute(0, 3, 1, 2, 4)
                   for part in self.linear(f"{name}.qkv_proj", self.norm(name, x), 3 * width).chunk(3, -1))  # fmt: skip
        scale = self.w.setdefault(f"{name}.scale", torch.linspace(4, 12, heads)).view(-1, 1, 1, 1)
        freqs = self.w.setdefault(f"{name}.pos_emb.freqs", math.pi * 10 ** torch.rand(heads, head // 8, generator=self.w.generator))
        centres = lambda count: ((torch.arange(count, dtype=x.dtype) + 0.5) * 2 - count) / max(height, columns)
        rows, across = (centres(count)[:, None] * freqs[:, None] for count in (height, columns))  # (heads, count, head / 8)
        angles = torch.cat([rows[:, :, None].expand(-1, -1, columns, -1), across[:, None].expand(-1, height, -1, -1)], -1)
        turn = torch.polar(torch.ones_like(angles), angles)
        rotated = []
        for y in (q, k):
            y = y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() * scale.sqrt()
            z = torch.complex(y[..., : head // 4], y[..., head // 4 : head // 2]) * turn
            rotated.append(torch.cat([z.real, z.imag, y[..., head // 2 :]], -1))
        q, k = rotated
        if kind == "global":
            h = (torch.softmax(q.flatten(2, 3) @ k.flatten(2, 3).mT, -1) @ v.flatten(2, 3)).view_as(v)
        elif kind == "neighborhood":
            h = neighbourhood_attention(q, k, v, size)
        else:
            h = window_attention(q, k, v, size, size // 2 if odd else 0)
        return self.linear(f"{name}.out_proj", h.permute(0, 2, 3, 1, 4).flatten(3), width)

    def level(self, name, x, level, first=0):
        kind, size, head = self.attention[level]
        width = x.shape[-1]
        for j in range(self.layers[level]):
            if kind != "none":
                x = x + self.attend(f"{name}.{j}.self_attn", x, kind, size, head, (first + j) % 2 == 1)
            x = x + self.gated(f"{name}.{j}.ff", self.norm(f"{name}.{j}.ff", x), 2 * width, width)
        return x

    def fourier(self, name, x):
        angles = 2 * math.pi * x @ self.w(f"{name}.weight", self.mapping // 2, x.shape[1]).T
        return torch.cat([angles.cos(), angles.sin()], 1)

    @staticmethod
    def merge(x, side):
        return torch.cat([x[:, i::side, j::side] for i in range(side) for j in range(side)], -1)

    @staticmethod
    def split(x, side):
        out = x.new_empty(len(x), x.shape[1] * side, x.shape[2] * side, x.shape[3] // side**2)
        for n, part in enumerate(x.chunk(side**2, -1)):
            out[:, n // side :: side, n % side :: side] = part
        return out

    def __call__(self, x, sigma, labels=None, vector=None, augmentation=None):
        augmentation = x.new_zeros(len(x), 9) if augmentation is None else augmentation
        h = self.linear("time_in_proj", self.fourier("time_emb", sigma.log()[:, None] / 4), self.mapping)
        h = h + self.linear("aug_in_proj", self.fourier("aug_emb", augmentation), self.mapping)
        if self.classes:
            table = self.w("class_emb.weight", self.classes + 1, self.mapping)
            h = h + table[torch.zeros(len(x), dtype=torch.long) if labels is None else labels]
        if self.condition:
            h = h + self.linear("mapping_cond_in_proj", x.new_zeros(len(x), self.condition) if vector is None else vector, self.mapping)
        h = self.rms(h, self.w("mapping.in_norm.scale", self.mapping))
        for i in range(self.mapping_layers):
            name = f"mapping.blocks.{i}"
            h = h + self.gated(name, self.rms(h, self.w(f"{name}.norm.scale", self.mapping)), 2 * self.mapping, self.mapping)
        self.embedding = self.rms(h, self.w("mapping.out_norm.scale", self.mapping))
        x, skips = self.linear("patch_in.proj", self.merge(x.permute(0, 2, 3, 1), self.patch), self.widths[0]), []
        last = len(self.widths) - 1
        for i in range(last):
            x = self.level(f"down_levels.{i}", x, i)
            skips.append(x)
            x = self.linear(f"merges.{i}.proj", self.merge(x, 2), self.widths[i + 1])
        x = self.level("mid_level", x, last)
        for i in reversed(range(last)):
            below = self.split(self.linear(f"splits.{i}.proj", x, 4 * self.widths[i]), 2)
            weight = self.w(f"splits.{i}.fac", 1)
            x = self.level(f"up_levels.{i}", (1 - weight) * skips.pop() + weight * below, i, self.layers[i])
        out = self.linear("patch_out.proj", self.rms(x, self.w("out_norm.scale", self.widths[0])), self.channels * self.patch**2)
        return self.split(out, self.patch).permute(0, 3, 1, 2)
