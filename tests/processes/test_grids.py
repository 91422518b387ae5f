"""Time grids: monotone, ending in data, in the trained range, and diffusers' own where it is right."""

import math

import numpy as np
import pytest
from analytic import NETWORKS

from gen_pipelines.processes import DATA, DiscreteVPPath, EDMPath, LinearPath, Parameterization, VEPath
from gen_pipelines.processes.grids import SPACINGS, GridOptions, make_grid, sigma_of_level, time_of_sigma

VP = Parameterization(DiscreteVPPath())
FLOW = Parameterization(LinearPath(), "flow_prediction")
RESPACINGS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"]


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
@pytest.mark.parametrize("network", NETWORKS)
def test_falls_from_noise_to_data(network, spacing, steps):
    p = NETWORKS[network][0]
    grid = make_grid(p, steps, GridOptions(timestep_spacing=spacing))
    assert len(grid) == steps
    lambdas = [level.lambda_ for level in grid.levels]
    assert all(a < b for a, b in zip(lambdas, lambdas[1:], strict=False))
    assert grid.levels[-1] == DATA
    low, high = p.trained_lambda_range
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in lambdas[:-1])
    assert all(p.path_time(n) == pytest.approx(t, rel=1e-9, abs=1e-12) for n, t in zip(grid.network_times, grid.times, strict=True))


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_respaced_grids_fall_too(network, respacing):
    if respacing == "use_beta_sigmas":
        pytest.importorskip("scipy", reason="use_beta_sigmas needs scipy's Beta quantiles")
    p = NETWORKS[network][0]
    grid = make_grid(p, 20, GridOptions(**{respacing: True}))
    lambdas = [level.lambda_ for level in grid.levels]
    assert all(a < b for a, b in zip(lambdas, lambdas[1:], strict=False))
    assert all(math.isfinite(v) for v in lambdas[1:-1])
    assert grid.levels[-1] == DATA


@pytest.mark.parametrize("options", [*({"timestep_spacing": name} for name in SPACINGS), *({name: True} for name in RESPACINGS)])
@pytest.mark.parametrize("network", NETWORKS)
def test_one_step_begins_in_noise(network, options):
    if "use_beta_sigmas" in options:
        pytest.importorskip("scipy", reason="use_beta_sigmas needs scipy's Beta quantiles")
    p = NETWORKS[network][0]
    usual = make_grid(p, 1, GridOptions()).levels[0] if p.path.name != "discrete_vp" else p.path.level(p.path.t_max)
    (here, there) = make_grid(p, 1, GridOptions(**options)).levels
    assert there == DATA and here.sigma == pytest.approx(usual.sigma, rel=1e-3)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": -7.0}, {"shift": 0.0}, {"shift": -1.0}, {"flow_shift": math.nan}])
def test_numbers_that_lay_no_grid_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} = .*give a number above 0"):
        GridOptions(**options)


def test_leading_trailing_linspace_are_diffusers_on_indices():
    from diffusers import DDPMScheduler

    for spacing in ("leading", "trailing", "linspace"):
        for steps in (7, 50, 600, 1000):  # of one step theirs is the data's end in two of three
            theirs = DDPMScheduler(timestep_spacing=spacing)
            theirs.set_timesteps(steps)
            ours = make_grid(VP, steps, GridOptions(timestep_spacing=spacing, round_timesteps=True))
            assert list(ours.network_times) == theirs.timesteps.tolist(), (spacing, steps)


def test_steps_offset_and_final_sigma():
    grid = make_grid(VP, 10, GridOptions(timestep_spacing="leading", steps_offset=1, final_sigmas_type="sigma_min"))
    assert grid.times[-1] == 1.0
    assert grid.levels[-1] == VP.path.level(0.0)


def test_shift_is_applied_once():
    plain, shifted = make_grid(FLOW, 20), make_grid(FLOW, 20, GridOptions(shift=3.0))
    for a, b in zip(plain.levels[:-1], shifted.levels[:-1], strict=True):
        assert b.lambda_ == pytest.approx(a.lambda_ - math.log(3.0)) if a.lambda_ > -math.inf else b.lambda_ == -math.inf
    assert shifted.times[-1] == pytest.approx(3 * 0.001 / (1 + 2 * 0.001))  # diffusers shifts its smallest sigma twice (issue #13243)
    assert make_grid(FLOW, 20, GridOptions(flow_shift=3.0)) == shifted


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_a_shift_by_mu(kind):
    mu = 1.7
    dynamic = make_grid(FLOW, 9, GridOptions(use_dynamic_shifting=True, time_shift_type=kind), mu=mu)
    static = make_grid(FLOW, 9, GridOptions(shift=math.exp(mu) if kind == "exponential" else mu))
    assert dynamic.times == pytest.approx(static.times)


def test_karras_is_its_equation():
    p = Parameterization(EDMPath(), "edm", sigma_data=0.5)
    grid = make_grid(p, 18)
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert np.allclose(grid.times, expected, rtol=1e-12)


def test_exponential_is_uniform_in_lambda():
    grid = make_grid(Parameterization(VEPath(), "score"), 12)
    assert np.allclose(np.diff([level.lambda_ for level in grid.levels[:-1]], 2), 0, atol=1e-9)


def test_explicit_timesteps_are_what_the_network_sees_and_never_shifted():
    grid = make_grid(FLOW, timesteps=[900.0, 500.0, 20.0], options=GridOptions(shift=3.0))
    assert grid.network_times == (900.0, 500.0, 20.0)
    assert [level.sigma for level in grid.levels] == pytest.approx([0.9, 0.5, 0.02, 0.0])
    assert make_grid(VP, timesteps=[999, 500.5, 0]).times == (999.0, 500.5, 0.0)


def test_explicit_sigmas():
    grid = make_grid(FLOW, sigmas=[1.0, 0.5], options=GridOptions(shift=3.0))  # shifted, as in diffusers
    assert grid.times == pytest.approx((1.0, 0.75))
    assert make_grid(FLOW, sigmas=[1.0, 0.5, 0.0], options=GridOptions(shift=3.0)) == grid
    vp = make_grid(VP, sigmas=[14.0, 3.0, 0.2, 0.0])
    assert [level.ratio for level in vp.levels] == pytest.approx([14.0, 3.0, 0.2, 0.0])
    both = make_grid(FLOW, sigmas=[0.9, 0.4], timesteps=[1000.0, 333.0])
    assert both.network_times == (1000.0, 333.0)
    assert both.times == pytest.approx((0.9, 0.4))


def test_nodes_outside_the_trained_range_merge_at_its_end_with_one_warning():
    with pytest.warns(UserWarning, match="2 of 4 grid nodes are outside") as caught:
        grid = make_grid(VP, sigmas=[1e4, 500.0, 3.0, 0.2, 0.0])
    assert len(caught) == 1
    assert grid.times[0] == 999.0
    assert len(grid) == 3
    narrow = Parameterization(LinearPath(), "flow_prediction", lambda_range=(-3.0, 3.0))
    with pytest.warns(UserWarning, match="outside"):
        assert len(make_grid(narrow, timesteps=[1000.0, 990.0, 500.0, 1.0])) == 3
    assert make_grid(narrow, 10).levels[0].lambda_ == pytest.approx(-3.0)  # its own grid starts there, silently


def test_time_of_sigma_inverts_sigma_of_level():
    for p, _ in NETWORKS.values():
        for t in make_grid(p, 9).times[1:]:
            assert time_of_sigma(p, sigma_of_level(p, p.path.level(t))) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "give num_inference_steps, timesteps or sigmas"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"num_inference_steps": 10**8}, "num_inference_steps = 100000000; give at most 100,000"),
        ({"num_inference_steps": 3, "timesteps": [1, 0]}, "disagree"),
        ({"timesteps": [0, 1]}, "fall strictly"),
        ({"timesteps": [5, 5]}, "fall strictly"),
        ({"sigmas": [3.0, 1.0]}, "the last must be 0"),
        ({"num_inference_steps": 5, "options": GridOptions(timestep_spacing="evenly")}, "use one of leading"),
        ({"num_inference_steps": 5, "options": GridOptions(final_sigmas_type="one")}, "'zero' or 'sigma_min'"),
        ({"num_inference_steps": 5, "options": GridOptions(use_karras_sigmas=True, use_beta_sigmas=True)}, "choose one"),
        ({"num_inference_steps": 5, "options": GridOptions(use_karras_sigmas=True, sigma_min=3.0, sigma_max=1.0)}, "sigma_min"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_grid(VP, **kwargs)


def test_flow_errors():
    with pytest.raises(ValueError, match="needs mu"):
        make_grid(FLOW, 5, GridOptions(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="at most 1"):
        make_grid(FLOW, sigmas=[14.0, 1.0])
    with pytest.raises(ValueError, match="above 0"):
        make_grid(FLOW, sigmas=[0.5, 0.0, 0.0])
