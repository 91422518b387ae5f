"""taming's VQGAN as diffusers' VQModel: the same latents, codes and pictures as the network from its description."""

import copy

import pytest
import torch
import yaml
from conversion.checkpoints import taming_vqgan as theirs
from diffusers import VQModel
from torch.testing import assert_close

from gen_pipelines import convert


@torch.no_grad()
def test_latents_codes_and_pictures_are_theirs(tmp_path):
    source = theirs.write(tmp_path)
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(theirs.YAML))
    plan = convert(source, tmp_path / "vqgan", options={"config": str(tmp_path / "project.yaml")})
    assert plan.notes == [] and "optimizer_states.*" in plan.dropped and "state_dict.loss.*" in plan.dropped
    model = VQModel.from_pretrained(tmp_path / "vqgan").eval()
    assert model.config.sample_size == 16
    x = 2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    z, codes, picture = theirs.reconstruct(theirs.state(), x)
    latents = model.encode(x).latents
    assert_close(latents, z, atol=1e-5, rtol=1e-4)
    found = model.quantize(latents)[2][2].view(codes.shape)
    assert torch.equal(found, codes) and len(codes.unique()) > 2
    assert_close(model.decode(latents).sample, picture, atol=1e-5, rtol=1e-4)


def test_an_autoencoder_with_moments_becomes_diffusers_kl_autoencoder(tmp_path):
    """As latent diffusion trains them by themselves: twice the channels before the moments, and no codebook."""
    kept = {k: v for k, v in theirs.state().items() if not k.startswith("quantize.")}
    wide = {"encoder.conv_out": (12, 64, 3, 3), "quant_conv": (12, 12, 1, 1), "post_quant_conv": (6, 6, 1, 1)}
    changed = {f"{name}.weight": torch.randn(shape) for name, shape in wide.items()}
    changed |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in wide.items()}
    torch.save({"state_dict": kept | changed}, tmp_path / "kl.ckpt")
    plan = convert(tmp_path / "kl.ckpt", dry_run=True)
    assert plan.components["vqvae"].cls.__name__ == "AutoencoderKL" and plan.notes


def test_a_yaml_of_another_model_and_other_quantisers_are_refused(tmp_path):
    source = theirs.write(tmp_path)
    other = copy.deepcopy(theirs.YAML)
    other["model"]["params"]["n_embed"] = 1024
    with pytest.raises(ValueError, match="num_vq_embeddings 1024 where the weights have 9"):
        convert(source, dry_run=True, options={"config": other})
    with pytest.raises(ValueError, match="no yaml of a VQGAN"):
        convert(source, dry_run=True, options={"config": {"model": {}}})
    gumbel = {k.replace("embedding", "embed"): v for k, v in theirs.state().items()} | {"quantize.proj.weight": torch.zeros(9, 4, 1, 1)}
    torch.save({"state_dict": gumbel}, tmp_path / "gumbel.ckpt")
    with pytest.raises(ValueError, match="Gumbel-softmax"):
        convert(tmp_path / "gumbel.ckpt", dry_run=True)
