"""A state dict with the layout of rosinality's Glow, and what that network computes, written down from its description."""

import math

import torch
from torch.nn import functional as F

OPTIONS = {"sample_size": 8, "num_bits": 5}
MASKED = ("u_mask", "l_mask", "l_eye")


def state(affine=True, lu=True, channels=1, levels=2, steps=2, hidden=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape, scale=0.3: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    found = {}

    def zero_conv(name, inputs, outputs):
        found[f"{name}.scale"] = rand(1, outputs, 1, 1, scale=0.1)
        found[f"{name}.conv.weight"], found[f"{name}.conv.bias"] = rand(outputs, inputs, 3, 3, scale=0.1), rand(outputs, scale=0.1)

    for level in range(levels):
        c = 4 * channels * 2**level
        for step in range(steps):
            flow = f"blocks.{level}.flows.{step}."
            found[f"{flow}actnorm.loc"] = rand(1, c, 1, 1)
            found[f"{flow}actnorm.scale"] = (1 + rand(1, c, 1, 1)) * torch.where(rand(1, c, 1, 1) > 0, 1, -1)
            found[f"{flow}actnorm.initialized"] = torch.tensor(1, dtype=torch.uint8)
            if lu or level == levels - 1:
                eye = torch.eye(c, dtype=torch.float64)
                found[f"{flow}invconv.w_p"] = eye[torch.randperm(c, generator=generator)]
                found[f"{flow}invconv.u_mask"], found[f"{flow}invconv.l_mask"] = torch.ones(c, c).triu(1), torch.ones(c, c).tril(-1)
                found[f"{flow}invconv.l_eye"], found[f"{flow}invconv.s_sign"] = eye, rand(c).sign()
                # what the masks hide is noise: an optimiser with weight decay or momentum leaves some there
                found[f"{flow}invconv.w_l"], found[f"{flow}invconv.w_u"] = rand(c, c), rand(c, c)
                found[f"{flow}invconv.w_s"] = rand(c)
            else:
                found[f"{flow}invconv.weight"] = (torch.linalg.qr(rand(c, c))[0] + rand(c, c, scale=0.1))[:, :, None, None]
            for number, shape in ((0, (hidden, c // 2, 3, 3)), (2, (hidden, hidden, 1, 1))):
                found[f"{flow}coupling.net.{number}.weight"] = rand(*shape)
                found[f"{flow}coupling.net.{number}.bias"] = rand(hidden)
            zero_conv(f"{flow}coupling.net.4", hidden, c if affine else c // 2)
        last = level == levels - 1
        zero_conv(f"blocks.{level}.prior", c if last else c // 2, 2 * c if last else c)
    return found


def zero_conv(found, name, x):
    out = F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), found[f"{name}.conv.weight"], found[f"{name}.conv.bias"])
    return out * torch.exp(3 * found[f"{name}.scale"])


def log_prob(found, x, levels=2, steps=2):
    """log p(x) in nats of pictures in [-1/2, 1/2), and the normal numbers of every level."""
    total, normals = torch.zeros(len(x), dtype=x.dtype), []
    for level in range(levels):
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        places = h * w // 4
        for step in range(steps):
            flow = f"blocks.{level}.flows.{step}."
            scale = found[f"{flow}actnorm.scale"]
            x, total = scale * (x + found[f"{flow}actnorm.loc"]), total + places * scale.abs().log().sum()
            if f"{flow}invconv.weight" in found:
                weight = found[f"{flow}invconv.weight"][:, :, 0, 0]
            else:
                part = {name: found[f"{flow}invconv.{name}"] for name in ("w_p", "w_l", "w_u", "w_s", "s_sign")}
                upper = part["w_u"].triu(1) + torch.diag(part["s_sign"] * part["w_s"].exp())
                weight = part["w_p"] @ (part["w_l"].tril(-1) + torch.eye(len(upper), dtype=x.dtype)) @ upper
            x, total = torch.einsum("ij,bjhw->bihw", weight, x), total + places * torch.linalg.slogdet(weight).logabsdet
            kept, changed = x.chunk(2, 1)
            h1 = F.conv2d(kept, found[f"{flow}coupling.net.0.weight"], found[f"{flow}coupling.net.0.bias"], padding=1).relu()
            h2 = F.conv2d(h1, found[f"{flow}coupling.net.2.weight"], found[f"{flow}coupling.net.2.bias"]).relu()
            said = zero_conv(found, f"{flow}coupling.net.4", h2)
            if said.shape[1] == x.shape[1]:
                raw, shift = said.chunk(2, 1)
                s = torch.sigmoid(raw + 2)
                x, total = torch.cat([kept, (changed + shift) * s], 1), total + s.log().flatten(1).sum(1)
            else:
                x = torch.cat([kept, changed + said], 1)
        last = level == levels - 1
        x, z = (torch.zeros_like(x), x) if last else x.chunk(2, 1)
        mean, log_std = zero_conv(found, f"blocks.{level}.prior", x).chunk(2, 1)
        normals.append((z - mean) * torch.exp(-log_std))
        total = total + (-0.5 * math.log(2 * math.pi) - log_std - 0.5 * normals[-1].square()).flatten(1).sum(1)
    return total, normals


def write(folder, **changes):
    found = {f"module.{key}": value.float() if value.is_floating_point() else value for key, value in state(**changes).items()}
    path = folder / "model_100001.pt"
    torch.save(found, path)
    return path
