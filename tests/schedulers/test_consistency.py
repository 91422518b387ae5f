"""Consistency sampling, judged on consistency networks: the exact jump along the probability-flow ODE of Gaussian data."""

import warnings

import pytest
import torch
from analytic import GAUSSIAN, NETWORKS, sample
from diffusers import schedulers as D
from torch.testing import assert_close

from gen_pipelines.processes import DATA, PATHS, DiscreteVPPath, EDMPath, LinearPath, Parameterization
from gen_pipelines.schedulers import ConsistencyScheduler
from gen_pipelines.schedulers.consistency import lcm_scalings, renoise
from gen_pipelines.schedulers.updates import first_order_update, raise_level

CM = Parameterization(EDMPath(), "consistency", sigma_data=0.5)
JUMPS = {
    "edm": (CM, {}),
    "lcm": (Parameterization(DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")), {"rule": "lcm"}),
    "lcm_v": (Parameterization(DiscreteVPPath(rescale_betas_zero_snr=True), "v_prediction"), {"rule": "lcm"}),
    "flow": (Parameterization(LinearPath(), "flow_prediction"), {"rule": "consistency"}),
    "tcd": (Parameterization(DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")), {"rule": "tcd"}),
}


def jump(p):
    """The ideal consistency network: x_0 is where the ODE's curve through x ends (at the boundary level of a consistency prediction)."""

    def predict(scaled, network_time):
        t = min(max(float(p.path_time(float(network_time))), p.path.t_min), p.path.t_max)
        here = p.path.level(t)
        x = scaled / p.input_scale(here)
        x_0 = GAUSSIAN.ode(x, here, p.path.level(p.path.t_min) if p.prediction == "consistency" else DATA)
        return p.target(x_0, (x - here.alpha * x_0) / here.sigma, t)

    return predict


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", JUMPS)
def test_consistency_networks_sample_the_data(name, steps):
    """20,000 draws. TCD is judged at gamma = 1, which is multistep consistency sampling: with less, eps is the jump's and not the noise."""
    p, options = JUMPS[name]
    kwargs = {"eta": 1.0} if name == "tcd" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = sample(ConsistencyScheduler(**options).bind(p), jump(p), (20_000,), steps=steps, **kwargs)
    assert float(x.mean()) == pytest.approx(GAUSSIAN.mean, abs=0.03)  # starting from N(0, 1) at a terminal SNR above 0 costs 0.02
    assert float(x.std()) == pytest.approx(GAUSSIAN.std, abs=0.035)


@pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: p.name)
@pytest.mark.parametrize("boundary", [0.0, 0.002])
def test_renoising_keeps_the_marginal(path, boundary):
    """A clean sample with the boundary's noise in it, eps_b: alpha x_0 + (alpha boundary) eps_b + std z has variance sigma^2."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    there = path.level(path.t_min + 0.4 * (path.t_max - path.t_min))
    assert float(renoise(one, there, zero, boundary)) == pytest.approx(there.alpha)
    std = float(renoise(zero, there, one, boundary))
    assert std**2 + (there.alpha * boundary) ** 2 == pytest.approx(there.sigma**2)
    cleaner = path.level(path.t_min + 0.2 * (path.t_max - path.t_min))
    moved = [float(raise_level(first_order_update(a, b, cleaner), cleaner, there, c)) for a, b, c in
             ((one, zero, zero), (zero, one, zero), (zero, zero, one))]  # fmt: skip
    assert moved[0] == pytest.approx(there.alpha)
    assert moved[1] ** 2 + moved[2] ** 2 == pytest.approx(there.sigma**2)


def test_a_diffusion_network_warns_once():
    p, grid = NETWORKS["ddpm_eps"]
    scheduler = ConsistencyScheduler().bind(p, grid)
    with pytest.warns(UserWarning, match="another distribution"):
        scheduler.set_timesteps(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(4)
        ConsistencyScheduler().bind(CM).set_timesteps(4)


def test_grids():
    scheduler = ConsistencyScheduler().bind(CM)
    scheduler.set_timesteps(1)
    assert_close(scheduler.sigmas, torch.tensor([80.0, 0.0]))
    scheduler.set_timesteps(2)
    assert float(scheduler.sigmas[1]) == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, rel=1e-5)
    lcm = ConsistencyScheduler(rule="lcm")
    lcm.set_timesteps(4)
    assert lcm.timesteps.tolist() == [999, 759, 499, 259]
    with pytest.raises(ValueError, match="original_inference_steps"):
        lcm.set_timesteps(60)


def test_lcm_scalings_are_the_identity_at_index_0():
    assert lcm_scalings(0.0) == (1.0, 0.0)
    c_skip, c_out = lcm_scalings(999.0)
    assert c_skip < 1e-8
    assert c_out == pytest.approx(1.0)


def test_which_rule_a_config_means():
    for cls, rule in ((D.LCMScheduler, "lcm"), (D.TCDScheduler, "tcd")):
        config = {**cls().config, "_class_name": cls.__name__}
        ours = ConsistencyScheduler.from_config(config)
        assert ours.config["rule"] == rule
        assert ConsistencyScheduler.from_config(ours.config).config["rule"] == rule
        config.pop("_class_name")
        with pytest.raises(ValueError, match="rule='lcm'"):
            ConsistencyScheduler.from_config(config)
    ours = ConsistencyScheduler.from_config({**D.CMStochasticIterativeScheduler().config, "_class_name": "CMStochasticIterativeScheduler"})
    assert ours.parameterization.prediction == "consistency"
    for bad, match in (({"rule": "magic"}, "not known"), ({"rule": "lcm", "parameterization": CM}, "VE network")):
        with pytest.raises(ValueError, match=match):
            ConsistencyScheduler(**bad).set_timesteps(2)
    with pytest.raises(ValueError, match="gamma"):
        scheduler = ConsistencyScheduler(rule="tcd")
        scheduler.set_timesteps(2)
        scheduler.step(torch.zeros(1, 1), scheduler.timesteps[0], torch.zeros(1, 1), eta=1.5)
