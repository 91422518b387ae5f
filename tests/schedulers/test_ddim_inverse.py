"""DDIM inversion: round trips on every network."""

import copy

import pytest
import torch
from analytic import GAUSSIAN, NETWORKS, sample
from torch.testing import assert_close

import gen_pipelines
from gen_pipelines.processes import LinearPath, Parameterization
from gen_pipelines.schedulers import DDIMInverseScheduler, DDIMScheduler


def there_and_back(network, n):
    p, grid = NETWORKS[network]
    grid = {**grid, "timestep_spacing": "trailing"} if p.path.name == "discrete_vp" else grid
    inverse, ddim, ideal = DDIMInverseScheduler().bind(p, grid), DDIMScheduler().bind(p, grid), GAUSSIAN.network(p)
    x_0 = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = sample(inverse, ideal, steps=n, x=x_0)
    back = sample(ddim, ideal, steps=n, x=noise)
    return x_0, noise, back, inverse


@pytest.mark.parametrize("network", NETWORKS)
def test_round_trip(network):
    """The error of the way there and back is of first order: it halves with the step, and is small at 200."""
    errors = []
    for n in (100, 200):
        x_0, noise, back, inverse = there_and_back(network, n)
        errors.append(float((back - x_0).abs().max()))
    slack = 0.06 if network != "edm" else 0.2  # there a step is 8 % of sigma
    assert errors[1] < slack
    assert errors[1] < 0.65 * errors[0]
    level = inverse._stages[-1].there
    exact = GAUSSIAN.ode(x_0, gen_pipelines.processes.DATA, level)
    assert float((noise - exact).abs().max()) < slack * float(exact.abs().max())


def test_timesteps_rise_and_the_first_state_is_data():
    inverse = DDIMInverseScheduler()
    inverse.set_timesteps(10)
    assert inverse.timesteps.tolist() == list(range(0, 1000, 100))
    assert float(inverse.sigmas[0]) == 0.0
    assert (inverse.sigmas.diff() > 0).all()
    assert inverse.init_noise_sigma == 1.0
    assert inverse.bind(NETWORKS["edm"][0]).init_noise_sigma == 1.0


def test_interface(tmp_path):
    assert gen_pipelines.DDIMInverseScheduler is DDIMInverseScheduler
    flow = Parameterization(LinearPath(), "flow_prediction")
    inverse = DDIMInverseScheduler().bind(flow, {"shift": 3.0})
    inverse.save_pretrained(tmp_path)
    loaded = DDIMInverseScheduler.from_pretrained(tmp_path)
    assert loaded.parameterization == flow
    for scheduler in (inverse, loaded):
        scheduler.set_timesteps(5)
    assert torch.equal(inverse.timesteps, loaded.timesteps)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).half()
    out = loaded.step(x, loaded.timesteps[0], x)
    assert out.prev_sample.dtype == torch.float16
    twin = copy.deepcopy(inverse)
    assert_close(inverse.step(x, inverse.timesteps[0], x).prev_sample, out.prev_sample)
    assert torch.equal(twin.step(x, twin.timesteps[0], x, return_dict=False)[0], out.prev_sample)
    with pytest.raises(ValueError, match="DDIMInverseScheduler.step: timestep 3 is not in the current schedule"):
        inverse.step(x, 3, x)
