"""pythae's VAE and VQ-VAE with default networks: one hidden layer of 512 on each side, grey values in [0, 1] from a sigmoid."""

import json
import math
import pickle

import pytest
import torch
from conversion.checkpoints import pythae as theirs
from torch.nn import functional as F
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, convert

X = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def decode(state, z):
    return torch.sigmoid(linear(state, "decoder.layers.1.0", linear(state, "decoder.layers.0.0", z).relu()))


@pytest.mark.parametrize("loss", ["mse", "bce"])
@torch.no_grad()
def test_a_vae_has_their_moments_pictures_and_loss(loss, tmp_path):
    config = theirs.VAE | {"reconstruction_loss": loss}
    convert(theirs.write(tmp_path, config), tmp_path / "vae")
    vae, s = AutoPipeline.from_pretrained(str(tmp_path / "vae")).vae, theirs.state(config)
    x = X.round() if loss == "bce" else X
    h = linear(s, "encoder.layers.0.0", x).relu()
    mean, log_variance = linear(s, "encoder.embedding", h), linear(s, "encoder.log_var", h)
    pictures = 2 * x.view(-1, 1, 4, 6) - 1
    latents = vae.encode(pictures).latent_dist
    assert_close(latents.mean, mean)
    assert_close(latents.log_variance, log_variance)
    grey = decode(s, mean)
    described = vae.decode(mean)
    assert_close((described.sample.flatten(1) + 1) / 2, grey)
    if loss == "bce":
        theirs_, constant = F.binary_cross_entropy(grey, x, reduction="none").sum(1), 0.0
    else:  # of a Gaussian of deviation 1 over [0, 1], as a density over [-1, 1]
        theirs_, constant = 0.5 * (grey - x).square().sum(1), 24 * (0.5 * math.log(2 * math.pi) + math.log(2))
    assert_close(-described.distribution.log_prob(pictures) - constant, theirs_, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ema", [False, True])
@torch.no_grad()
def test_a_vqvae_has_their_codes_and_pictures(ema, tmp_path):
    config = theirs.VQVAE | {"use_ema": ema}
    plan = convert(theirs.write(tmp_path, config), tmp_path / "vqvae")
    model, s = AutoPipeline.from_pretrained(str(tmp_path / "vqvae")).vqvae, theirs.state(config)
    assert model.config.beta == 0.5 and model.config.codebook_update == ("ema" if ema else "loss") and plan.notes
    x = torch.rand(5, 48, generator=torch.Generator().manual_seed(0))
    z = linear(s, "encoder.embedding", linear(s, "encoder.layers.0.0", x).relu())
    book = s["quantizer.embeddings" if ema else "quantizer.embeddings.weight"][:, 0]
    codes = (z[:, :, None] - book).abs().argmin(2)  # each latent number by itself
    output = model(2 * x.view(-1, 3, 4, 4) - 1)
    assert torch.equal(output.codes[0], codes[:, None]) and len(codes.unique()) > 1
    assert_close((output.distribution.mean.flatten(1) + 1) / 2, decode(s, book[codes]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "VAMPConfig"}, "a VAMP of pythae: converted are VAE, BetaVAE, IWAE, VQVAE"),
        ({"uses_default_encoder": False}, "encoder.pkl holds code, which is not run"),
        ({"input_dim": [784]}, r"input_dim \[784\]: pictures"),
    ],
)
def test_other_models_networks_and_shapes_are_refused(changes, message, tmp_path):
    config = theirs.VAE | changes
    source = theirs.write(tmp_path, {**theirs.VAE})
    (source / "model_config.json").write_text(json.dumps(config))
    (source / "encoder.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=message):
        convert(source, dry_run=True)


def test_the_weights_alone_need_the_configuration(tmp_path):
    source = theirs.write(tmp_path)
    with pytest.raises(ValueError, match=r"--config model_config.json"):
        convert(source / "model.pt", dry_run=True)
    plan = convert(source / "model.pt", dry_run=True, options={"config": str(source / "model_config.json")})
    assert plan.components["vae"].config["latent_dim"] == 3
