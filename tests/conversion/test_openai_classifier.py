"""Guided diffusion's classifiers against the way down, said again, and four poolings."""

import pytest
import torch
from conversion.checkpoints.openai_classifier import classifier_state
from openai_layout import Forward
from torch.nn import functional as F

from gen_pipelines import ADMClassifier, convert
from gen_pipelines.conversion.unet_layout import _fits


def restated(state, x, t, pooling):
    forward = Forward(state, lambda width: width // 32, True, "residual", 2, 2)
    features, _ = forward.down(x, t)
    means = torch.cat([f.mean(dim=(2, 3)) for f in features], dim=1)
    if pooling == "levels":
        return forward.linear(F.relu(forward.linear(means, "out.0")), "out.2")
    if pooling == "normed_levels":
        hidden = F.group_norm(forward.linear(means, "out.0"), 32, state["out.1.weight"], state["out.1.bias"])
        return forward.linear(F.silu(hidden), "out.3")
    pixels = F.silu(forward.norm(features[-1], "out.0")).flatten(2)  # (B, C, N)
    if pooling == "mean":
        return forward.linear(pixels.mean(2), "out.3")
    tokens = (torch.cat([pixels.mean(2, keepdim=True), pixels], 2) + state["out.2.positional_embedding"]).transpose(1, 2)
    q, k, v = forward.linear(tokens, "out.2.qkv_proj").view(len(x), -1, 3, 2, 32).permute(2, 0, 3, 1, 4)
    pooled = torch.softmax(q @ k.transpose(2, 3) / 32**0.5, dim=-1) @ v
    return forward.linear(pooled.transpose(1, 2).flatten(2), "out.2.c_proj")[:, 0]


@pytest.mark.parametrize("pooling", ["attention", "mean", "levels", "normed_levels"])
def test_every_pooling_computes_the_same(tmp_path, pooling):
    state = classifier_state(pooling)
    torch.save(state, tmp_path / "c.pt")
    options = {"num_head_channels": 32} | ({} if pooling == "attention" else {"image_size": 8})
    plan = convert(tmp_path / "c.pt", tmp_path / "out", options=options)
    assert plan.format == "openai_classifier" and plan.pipeline is None
    network = ADMClassifier.from_pretrained(tmp_path / "out")
    assert network.config.sample_size == 8 and network.config.pooling == pooling
    x, t = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([3.0, 900.0])
    wanted = restated(state, x, t, pooling)
    got = network(x, t).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.detach().abs().max()))
    gradients = [torch.autograd.grad(out.log_softmax(1)[:, 0].sum(), x, retain_graph=True)[0] for out in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


PUBLISHED = {64: ((1, 2, 3, 4), 4), 128: ((1, 1, 2, 3, 4), 2), 256: ((1, 1, 2, 2, 4, 4), 2), 512: ((0.5, 1, 1, 2, 2, 4, 4), 2)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_shapes_say_how_deep_the_published_ones_are(size):
    multiples, layers = PUBLISHED[size]
    state, k = {}, 1
    for level, multiple in enumerate(multiples):
        for i in range(layers + (level < len(multiples) - 1)):
            state[f"input_blocks.{k}.0.out_layers.3.weight"] = torch.empty(int(128 * multiple), 1, device="meta")
            if i < layers and size // 2**level in (32, 16, 8):
                state[f"input_blocks.{k}.1.norm.weight"] = torch.empty(1)
            k += 1
    assert [n for n in range(1, k) if k % (n + 1) == 0 and _fits(state, k, n)] == [layers]


def test_what_is_missing_is_named(tmp_path):
    for name, state, options, message in (
        ("a", classifier_state("mean"), {"num_head_channels": 32}, "image_size=N"),
        ("b", classifier_state(), {}, "num_head_channels = 64|64 does not fit"),
        ("c", classifier_state(), {"num_head_channels": 32, "image_size": 16}, "is for 8"),
        ("d", classifier_state(widths=(32, 32), attention=(False, False), layers=5), {"num_head_channels": 32}, "give classifier_depth"),
        ("e", classifier_state(), {"num_head_channels": 32, "classifier_depth": 4}, "levels of 4 residual blocks"),
    ):
        if name == "b":
            state = classifier_state(widths=(32, 96))
        torch.save(state, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / f"{name}.pt", tmp_path / "out", options=options)
    with pytest.raises(ValueError, match="pooling of attention"):
        ADMClassifier(pooling="max")
