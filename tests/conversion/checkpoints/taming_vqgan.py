"""A Lightning checkpoint with the layout of taming-transformers' VQGAN, and what that network computes, written from its description."""

import torch
from torch.nn import functional as F

OPTIONS = {"sample_size": 16}
WIDTHS, DEPTH, LATENT, DIM, CODES, COLOURS = (32, 64), 1, 6, 4, 9, 3
ATTENDS = (False, True)  # the levels, from the largest size down
YAML = {
    "model": {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": DIM, "n_embed": CODES,
            "ddconfig": {"double_z": False, "z_channels": LATENT, "resolution": 16, "in_channels": COLOURS, "out_ch": COLOURS, "ch": 32,
                         "ch_mult": [1, 2], "num_res_blocks": DEPTH, "attn_resolutions": [8], "dropout": 0.0},
        },
    },
}  # fmt: skip


def state(seed=0):
    generator, found = torch.Generator().manual_seed(seed), {}

    def conv(name, inputs, outputs, size=3):
        found[f"{name}.weight"] = torch.randn(outputs, inputs, size, size, generator=generator) / (size * inputs**0.5)
        found[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    def norm(name, width):
        found[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        found[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def resnet(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def levels(side, part, order, depth, resample, now):
        for level in order:
            for number in range(depth):
                resnet(f"{side}.{part}.{level}.block.{number}", now, WIDTHS[level])
                now = WIDTHS[level]
                if ATTENDS[level]:
                    attention(f"{side}.{part}.{level}.attn.{number}", now)
            if level != order[-1]:
                conv(f"{side}.{part}.{level}.{resample}.conv", now, now)
        return now

    def middle(side, width):
        resnet(f"{side}.mid.block_1", width, width)
        attention(f"{side}.mid.attn_1", width)
        resnet(f"{side}.mid.block_2", width, width)

    conv("encoder.conv_in", COLOURS, WIDTHS[0])
    middle("encoder", levels("encoder", "down", range(len(WIDTHS)), DEPTH, "downsample", WIDTHS[0]))
    norm("encoder.norm_out", WIDTHS[-1])
    conv("encoder.conv_out", WIDTHS[-1], LATENT)
    conv("quant_conv", LATENT, DIM, 1)
    found["quantize.embedding.weight"] = torch.randn(CODES, DIM, generator=generator)
    conv("post_quant_conv", DIM, LATENT, 1)
    conv("decoder.conv_in", LATENT, WIDTHS[-1])
    middle("decoder", WIDTHS[-1])
    last = levels("decoder", "up", range(len(WIDTHS) - 1, -1, -1), DEPTH + 1, "upsample", WIDTHS[-1])
    norm("decoder.norm_out", last)
    conv("decoder.conv_out", last, COLOURS)
    return found


def reconstruct(s, x):
    """What is quantised, the codes and the picture."""
    conv = lambda name, x, **k: F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], **k)
    norm = lambda name, x: F.group_norm(x, 32, s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def resnet(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in s else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        share = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, 2)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", share, v).unflatten(2, x.shape[2:]))

    def block(side, level, number, x):
        x = resnet(f"{side}.{level}.block.{number}", x)
        return attention(f"{side}.{level}.attn.{number}", x) if ATTENDS[level] else x

    middle = lambda side, x: resnet(f"{side}.mid.block_2", attention(f"{side}.mid.attn_1", resnet(f"{side}.mid.block_1", x)))
    h = conv("encoder.conv_in", x, padding=1)
    for level in range(len(WIDTHS)):
        for number in range(DEPTH):
            h = block("encoder.down", level, number, h)
        if level + 1 < len(WIDTHS):  # padded at the right and the bottom alone
            h = conv(f"encoder.down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
    h = conv("encoder.conv_out", F.silu(norm("encoder.norm_out", middle("encoder", h))), padding=1)
    z = conv("quant_conv", h)
    book = s["quantize.embedding.weight"]
    codes = torch.cdist(z.permute(0, 2, 3, 1), book).argmin(3)
    h = middle("decoder", conv("decoder.conv_in", conv("post_quant_conv", book[codes].permute(0, 3, 1, 2)), padding=1))
    for level in reversed(range(len(WIDTHS))):
        for number in range(DEPTH + 1):
            h = block("decoder.up", level, number, h)
        if level:
            h = conv(f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0), padding=1)
    return z, codes, conv("decoder.conv_out", F.silu(norm("decoder.norm_out", h)), padding=1)


def write(folder):
    loss = {"loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4), "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)}
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    content = {"epoch": 1, "global_step": 7, "pytorch-lightning_version": "1.0.8", "callbacks": {}, "lr_schedulers": [],
               "state_dict": state() | loss, "optimizer_states": [optimizer]}  # fmt: skip
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"
