"""The way back: a network, exported and converted again, is the same network."""

import pickle

import pytest
import torch
from conversion import fakes
from conversion.checkpoints import rosinality_stylegan2, stylegan2_ada, stylegan3
from safetensors.torch import load_file, save_file

from gen_pipelines import AutoPipeline, StyleGAN2Generator, StyleGAN3Generator, convert
from gen_pipelines.conversion import export_state_dict, read, tensors
from gen_pipelines.conversion.nvidia import records


@pytest.mark.parametrize(("format", "networks"), [("stylegan2_ada", stylegan2_ada), ("stylegan3", stylegan3)])
def test_nvidias_keys_and_back(format, networks, tmp_path):
    """The keys are those that its pickles have; what is exported and pickled as they do it converts to the network that it was."""
    made = networks.networks()
    theirs = tensors(records(read(networks.write(tmp_path)))["G_ema"])
    state, arguments = export_state_dict(made["generator"], format, tmp_path / "g.safetensors")
    assert set(state) == set(theirs) and all(torch.equal(state[key], theirs[key]) for key in state)
    assert {**load_file(tmp_path / "g.safetensors")}.keys() == state.keys()
    save_file(state, tmp_path / "again.safetensors", {"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "g.safetensors").read_bytes()
    clamp = {"conv_clamp": made["generator"].config.conv_clamp}
    attributes = {"mapping": {"w_avg_beta": made["generator"].config.w_avg_beta}, "synthesis.b4.conv1": clamp}
    with fakes.modules(**fakes.NVIDIA):
        record = fakes.module_record(state, "Generator", arguments, attributes)
        (tmp_path / "back.pkl").write_bytes(pickle.dumps({"G_ema": record}))
    convert(tmp_path / "back.pkl", tmp_path / "back")
    back = AutoPipeline.from_pretrained(str(tmp_path / "back")).generator
    settings = [{k: list(v) if isinstance(v, tuple) else v for k, v in net.config.items() if k[0] != "_"}
                for net in (made["generator"], back)]  # fmt: skip
    assert settings[0] == settings[1]
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in made["generator"].state_dict().items())
    if "discriminator" in made:
        state, arguments = export_state_dict(made["discriminator"], format)
        theirs = tensors(records(read(tmp_path / "network.pkl"))["D"])
        assert set(theirs) <= set(state) and all(torch.equal(state[key], theirs[key]) for key in theirs)


def test_rosinalitys_keys_and_back(tmp_path):
    model = rosinality_stylegan2.networks()["generator"]
    state, arguments = export_state_dict(model, "rosinality_stylegan2")
    theirs = tensors(read(rosinality_stylegan2.write(tmp_path)).tree["g_ema"])
    assert set(state) == set(theirs) and all(torch.equal(state[key], theirs[key]) for key in state)
    assert arguments == {"size": 16, "style_dim": 12, "n_mlp": 2}


def test_what_cannot_be_exported():
    with pytest.raises(ValueError, match="is none of stylegan2_ada"):
        export_state_dict(torch.nn.Linear(1, 1), "nothing")
    with pytest.raises(ValueError, match="has no StyleGAN3Generator"):
        export_state_dict(StyleGAN3Generator(16, z_dim=4, w_dim=4, channel_base=32, num_layers=4), "stylegan2_ada")
    grey = StyleGAN2Generator(8, out_channels=1, z_dim=4, w_dim=4, channel_base=32)
    with pytest.raises(ValueError, match="three colours"):
        export_state_dict(grey, "rosinality_stylegan2")
