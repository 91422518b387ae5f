"""rosinality's VQ-VAE-2 and its PixelSNAIL priors: the same codes, pictures and probabilities as the networks from their description."""

import pytest
import torch
from conversion.checkpoints import rosinality_vqvae as theirs
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, PixelSNAILPrior, VQVAEModel, convert
from gen_pipelines.conversion.rosinality_vqvae import prior_config, rename_prior, rename_vqvae, vqvae_config


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_codes_and_pictures_are_theirs(inplace):
    found = theirs.vqvae_state()
    config = vqvae_config(found, {"sample_size": 32, "inplace_relu": inplace})
    model = VQVAEModel(**config).double().eval()
    model.load_state_dict(rename_vqvae(found, config))
    x = 2 * torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    top, bottom, picture = theirs.reconstruct(found, x, inplace)
    output = model(x)
    assert torch.equal(output.codes[0], top) and torch.equal(output.codes[1], bottom)
    assert len(top.unique()) > 1 and len(bottom.unique()) > 1
    assert_close(output.distribution.mean, picture)


@pytest.mark.parametrize("settings", [theirs.TOP, theirs.BOTTOM], ids=["top", "bottom"])
@torch.no_grad()
def test_probabilities_of_codes_are_theirs(settings):
    found = theirs.prior_state(**settings)
    config = prior_config(found)
    prior = PixelSNAILPrior(**config).double().eval()
    prior.load_state_dict({k: v.make() if hasattr(v, "make") else v for k, v in rename_prior(found, config)[0].items()})
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(theirs.CODES, (2, *settings["shape"]), generator=generator)
    small = [side // 2 for side in settings["shape"]]
    above = torch.randint(theirs.CODES, (2, *small), generator=generator) if settings["condition"] else None
    assert_close(prior(codes, None, [] if above is None else [above]), theirs.logits(found, codes, above, **settings))


def test_one_folder_or_three_files_make_the_same_pipeline(tmp_path):
    source = theirs.write(tmp_path)
    convert(source, tmp_path / "one")
    priors = {name: str(source / f"pixelsnail_{name}_420.pt") for name in ("top", "bottom")}
    convert(source / "vqvae_560.pt", tmp_path / "three", options=priors)
    for part in ("vqvae", "prior", "prior_2"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes()
    pipe = AutoPipeline.from_pretrained(str(tmp_path / "one"))
    pictures = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert pictures.shape == (2, 3, 32, 32) and pipe.prior.config.dropout == 0.2
    plan = convert(source / "pixelsnail_bottom_420.pt", dry_run=True)
    assert plan.pipeline is None and list(plan.components) == ["prior"]


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("vqvae_560.pt", {}, "--set sample_size=256"),
        ("vqvae_560.pt", {"sample_size": 20}, "a multiple of 8 is needed, got 20"),
        ("vqvae_560.pt", {"top": "pixelsnail_top_420.pt"}, "give both priors"),
        ("vqvae_560.pt", {"top": "pixelsnail_bottom_420.pt"}, "top: the file holds the bottom network"),
        ("vqvae_560.pt", {"top": "no.pt"}, "no.pt is no file"),
        ("vqvae_560.pt", {"top": "pixelsnail_top_420.pt", "bottom": "pixelsnail_bottom_420.pt", "sample_size": 64}, "pictures of 32 x 32"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_said(file, options, message, tmp_path, monkeypatch):
    source = theirs.write(tmp_path)
    monkeypatch.chdir(source)
    with pytest.raises(ValueError, match=message):
        convert(source / file, dry_run=True, options=options)
