"""rosinality's Glow: the same densities and normal numbers as the network written down from its description."""

import math

import pytest
import torch
from conversion.checkpoints import rosinality_glow as theirs
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, GlowModel, convert
from gen_pipelines.conversion.rosinality_glow import config_from, rename


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("lu", [True, False])
def test_densities_and_latents_are_theirs(affine, lu):
    found = theirs.state(affine, lu)
    config = config_from(found, theirs.OPTIONS)
    flow = GlowModel(**config).double().eval()
    flow.load_state_dict(rename(found, config))
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    with torch.no_grad():
        output = flow(2 * x)
        nats, normals = theirs.log_prob(found, x)
        assert_close(output.latents, normals)
        assert_close(output.log_prob + 64 * math.log(2), nats)  # a density of 2 x
        assert_close(flow.decode(normals)[0], 2 * x)


def test_a_converted_pipeline_says_the_likelihood_of_pictures(tmp_path):
    convert(theirs.write(tmp_path), tmp_path / "glow", options=theirs.OPTIONS)
    pipe = AutoPipeline.from_pretrained(str(tmp_path / "glow"))
    levels = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    result = pipe.log_likelihood(levels, generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(result.nats).all() and result.bits_per_dim.shape == (2,)
    assert pipe.flow.config.num_bits == 5 and pipe.config.default_temperature == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--set sample_size=64"),
        ({"sample_size": 10}, "a multiple of 4, got 10"),
        ({"sample_size": 8, "num_bits": 9}, "num_bits must be from 1 to 8"),
    ],
)
def test_what_the_file_does_not_say_is_asked_for(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(theirs.write(tmp_path), dry_run=True, options=options)


def test_a_layer_that_cannot_be_inverted_is_refused():
    found = theirs.state()
    found["blocks.0.flows.1.actnorm.scale"][0, 0] = 0
    with pytest.raises(ValueError, match="has zeros, so the flow cannot be inverted"):
        rename(found, config_from(found, theirs.OPTIONS))
