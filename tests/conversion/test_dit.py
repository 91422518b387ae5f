"""DiT and SiT against the forward pass said again from the paper, and their samplers."""

import math

import pytest
import torch
from conversion.checkpoints.dit import container, random_state
from torch.nn import functional as F

from gen_pipelines import AutoPipeline, DiTModel, convert
from gen_pipelines.conversion.dit import config_from, first_half, parameterization_of
from gen_pipelines.models.denoisers.dit import DIT_SIZES, positions

X, LABELS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 9, 10])


def restated(state, x, t, labels, heads=4):
    """Peebles & Xie 2023, section 3, over the keys: float64, loops instead of reshapes."""
    s = {key: value.double() for key, value in state.items()}
    linear = lambda v, name: v @ s[f"{name}.weight"].flatten(1).T + s[f"{name}.bias"]
    norm = lambda v: (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    patch, width = s["x_embedder.proj.weight"].shape[-1], s["pos_embed"].shape[-1]
    side = x.shape[-1] // patch
    squares = [x[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)].flatten(1) for i in range(side) for j in range(side)]
    tokens = linear(torch.stack(squares, 1).double(), "x_embedder.proj") + s["pos_embed"]
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    time = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    condition = F.silu(time + s["y_embedder.embedding_table.weight"][labels])
    depth = sum(key.endswith("attn.qkv.weight") for key in s)
    for i in range(depth):
        parts = linear(condition, f"blocks.{i}.adaLN_modulation.1").unsqueeze(1).split(width, 2)
        q, k, v = linear(norm(tokens) * (1 + parts[1]) + parts[0], f"blocks.{i}.attn.qkv").split(width, 2)
        out = []
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width // heads), -1)
            out.append(weights @ v[..., part])
        tokens = tokens + parts[2] * linear(torch.cat(out, 2), f"blocks.{i}.attn.proj")
        hidden = linear(norm(tokens) * (1 + parts[4]) + parts[3], f"blocks.{i}.mlp.fc1")
        tokens = tokens + parts[5] * linear(F.gelu(hidden, approximate="tanh"), f"blocks.{i}.mlp.fc2")
    shift, scale = linear(condition, "final_layer.adaLN_modulation.1").unsqueeze(1).split(width, 2)
    tokens = linear(norm(tokens) * (1 + scale) + shift, "final_layer.linear")
    channels = tokens.shape[2] // patch**2
    picture = torch.zeros(len(x), channels, *x.shape[2:], dtype=torch.float64)
    for n in range(side * side):
        i, j = divmod(n, side)
        square = tokens[:, n].view(-1, patch, patch, channels).permute(0, 3, 1, 2)
        picture[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)] = square
    return picture


def converted(folder, tree, name, **options):
    torch.save(tree, folder / name)
    plan = convert(folder / name, folder / "out", options={"num_heads": 4, "vae": "none", **options})
    return plan, AutoPipeline.from_pretrained(folder / "out")


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize(("codebase", "out_channels"), [("dit", 8), ("dit", 4), ("sit", 8), ("sit", 4)])
def test_it_computes_the_same(tmp_path, codebase, out_channels, patch):
    state = random_state(patch=patch, out_channels=out_channels)
    options = {"path_type": "Linear", "prediction": "velocity"} if codebase == "sit" else {}
    _, pipe = converted(tmp_path, state, "w.pt", codebase=codebase, **options)
    t = torch.tensor([0.0, 37.0, 999.0]) if codebase == "dit" else torch.tensor([0.0, 0.3, 1.0])
    wanted = restated(state, X, t, LABELS)
    if codebase == "sit":  # its forward throws the second half away
        wanted = wanted[:, :4]
    with torch.no_grad():
        got = pipe.transformer(X, t, class_labels=LABELS).sample
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert pipe.num_classes == 10 and pipe.null_class == 10


def test_diffusers_class_spaces_the_time_otherwise():
    """Why there is a DiTModel: 127 intervals instead of 128 in diffusers 0.42.1."""
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

    from gen_pipelines.models.layers.unet_blocks import sinusoids

    theirs = CombinedTimestepLabelEmbeddings(10, 16).time_proj(torch.tensor([999]))
    assert float((theirs - sinusoids(torch.tensor([999]), 256)).abs().max()) > 0.5


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_average_or_the_last_step(tmp_path, weights):
    tree = container()
    plan, pipe = converted(tmp_path, tree, "0050000.pt", weights=weights)
    with torch.no_grad():
        got = pipe.transformer(X, torch.tensor([3.0] * 3), class_labels=LABELS).sample
    wanted = restated(tree[weights], X, torch.tensor([3.0] * 3), LABELS)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert set(plan.dropped) == {"opt.*", f"{'model' if weights == 'ema' else 'ema'}.*"}


def test_a_sit_is_sampled_from_noise_at_zero_to_data_at_one(tmp_path):
    state = random_state(out_channels=4)
    _, pipe = converted(tmp_path, state, "SiT-XL-2-256x256.pt")  # the published name says path and prediction
    noise = torch.randn(2, 4, 8, 8)
    x = noise.clone().double()
    for i in range(5):
        x = x + 0.2 * restated(state, x, torch.full((2,), 0.2 * i), torch.tensor([1, 2]))
    got = pipe(class_labels=[1, 2], num_inference_steps=5, guidance_scale=1.0, latents=noise, output_type="latent")
    with pytest.raises(AssertionError):  # the comparison can fail
        torch.testing.assert_close(noise.double(), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.images.double(), x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def test_paths_and_predictions_of_sit(tmp_path):
    for path_type in ("Linear", "GVP", "VP"):
        for prediction in ("velocity", "score", "noise"):
            p = parameterization_of("sit", False, path_type, prediction)
            assert p.time_input == "1 - t" and p.sign == (-1 if prediction == "velocity" else 1)
    tree = container("SiT-S/2", path_type="GVP", prediction="velocity")
    _, pipe = converted(tmp_path, tree, "1.pt")
    assert pipe.parameterization.path.name == "cosine"
    with pytest.raises(ValueError, match="paths are Linear, GVP, VP"):
        parameterization_of("sit", False, "Cubic", "velocity")


def test_published_sizes_say_their_heads():
    for depth, width, heads in DIT_SIZES.values():
        state = {key: torch.empty(shape, device="meta") for key, shape in {
            "x_embedder.proj.weight": (width, 4, 2, 2), "pos_embed": (1, 256, width), "final_layer.linear.weight": (32, width),
            "y_embedder.embedding_table.weight": (1001, width), "blocks.0.mlp.fc1.weight": (4 * width, width),
            f"blocks.{depth - 1}.attn.qkv.weight": (3 * width, width),
        }.items()}  # fmt: skip
        config = config_from(state)
        assert config["num_attention_heads"] == heads and config["sample_size"] == 32 and config["out_channels"] == 8


def test_positions_are_of_column_and_row():
    table = positions(16, 3, 3).view(3, 3, 16)
    assert torch.equal(table[0, 1, :8], table[2, 1, :8]) and torch.equal(table[1, 0, 8:], table[1, 2, 8:])
    assert not torch.equal(table[0, 1], table[1, 0])
    assert table[0, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4


def test_first_half_keeps_every_patch():
    rows = torch.arange(4 * 6)  # 2 x 2 pixels of 6 channels
    assert first_half(rows, 2).tolist() == [6 * p + c for p in range(4) for c in range(3)]


def test_without_a_null_class(tmp_path):
    _, pipe = converted(tmp_path, random_state(), "DiT-x.pt", class_dropout_prob=0)
    assert pipe.null_class is None and pipe.num_classes == 11
    assert pipe(class_labels=10, num_inference_steps=2, output_type="latent").images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="no null class"):
        pipe(class_labels=10, num_inference_steps=2, guidance_scale=2.0, output_type="latent")


def test_with_its_autoencoder(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), norm_num_groups=8, sample_size=8)
    vae.save_pretrained(tmp_path / "vae")
    plan, pipe = converted(tmp_path, random_state(), "DiT-x.pt", vae=str(tmp_path / "vae"))
    assert "vae" in plan.sources and pipe(class_labels=1, num_inference_steps=1).images[0].size == (8, 8)
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(pipe.vae.decode(z).sample, vae.decode(z).sample)
    AutoencoderKL(latent_channels=3, block_out_channels=(32,), norm_num_groups=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="3 channels of latents, and the network draws 4"):
        converted(tmp_path, random_state(), "DiT-x.pt", vae=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("w.pt", {}, "codebase=dit or codebase=sit"),
        ("DiT-x.pt", {"vae": None}, "vae=FOLDER"),
        ("DiT-x.pt", {"vae": "nowhere"}, "no config.json"),
        ("DiT-x.pt", {"num_heads": None}, "num_heads=N"),
        ("DiT-x.pt", {"num_heads": "many"}, "num_heads = 'many' is not a number"),
        ("DiT-x.pt", {"num_heads": 5}, "multiple of num_attention_heads"),
        ("DiT-x.pt", {"weights": "best"}, "none of ema, model"),
        ("SiT-x.pt", {}, "does not say its path_type"),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, options, message):
    torch.save(random_state(), tmp_path / name)
    options = {key: value for key, value in {"num_heads": 4, "vae": "none", **options}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / name, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_the_network_starts_as_zero_and_says_what_does_not_fit():
    network = DiTModel(sample_size=8, width=32, depth=1, num_attention_heads=2, num_embeds_ada_norm=3)
    assert float(network(X, 0.5, class_labels=torch.tensor([0, 1, 3])).sample.detach().abs().max()) == 0.0
    with pytest.raises(ValueError, match="positions are for 8 x 8"):
        network(torch.zeros(1, 4, 16, 16), 0.5, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="patches of 3"):
        DiTModel(sample_size=8, patch_size=3, width=32, depth=1, num_attention_heads=2)
    network.enable_gradient_checkpointing()
    network(X, 0.5, class_labels=torch.tensor([0, 1, 3])).sample.sum().backward()
    assert network.linear_out.bias.grad is not None
