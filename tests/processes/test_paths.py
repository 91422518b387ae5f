"""Every path of the registry, in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.processes import DATA, PATHS, DiscreteVPPath, Level, LinearPath
from gen_pipelines.processes.discrete_vp import BETA_SCHEDULES
from gen_pipelines.processes.paths import path_from_config

DISCRETE = [DiscreteVPPath(beta_schedule=s, rescale_betas_zero_snr=z) for s in BETA_SCHEDULES for z in (False, True)]
ALL = [cls() for name, cls in PATHS.items() if name != "discrete_vp"] + DISCRETE + [DiscreteVPPath(trained_betas=(0.1, 0.2, 0.4))]


def _id(path):
    return f"{path.name}-{getattr(path, 'beta_schedule', '')}-{getattr(path, 'rescale_betas_zero_snr', '')}"


def inner_times(path, n=37):
    return path.t_min + (path.t_max - path.t_min) * torch.linspace(0.003, 0.997, n, dtype=torch.float64)


@pytest.mark.parametrize("path", ALL, ids=_id)
class TestPath:
    def test_time_and_lambda_invert_each_other(self, path):
        t = inner_times(path)
        assert_close(path.t_from_lambda(path.lambda_(t)), t, rtol=1e-9, atol=1e-9 * path.t_max)

    def test_lambda_falls(self, path):
        assert (path.lambda_(inner_times(path)).diff() < 0).all()

    def test_lambda_is_the_log_ratio(self, path):
        t = inner_times(path)
        assert_close(path.lambda_(t), torch.log(path.alpha(t) / path.sigma(t)))

    @pytest.mark.parametrize("name", ["alpha", "sigma"])
    def test_derivatives_are_autograds(self, path, name):
        t = inner_times(path).requires_grad_()
        value = getattr(path, name)(t)
        grad = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        assert_close(getattr(path, f"{name}_dot")(t.detach()), grad, rtol=1e-9, atol=1e-12)

    def test_level_is_the_path_at_one_time(self, path):
        for t in inner_times(path, 5).tolist() + [path.t_min, path.t_max]:
            level = path.level(t)
            assert_close(torch.tensor(level), torch.stack([path.alpha(t), path.sigma(t)]).float())
            assert level.lambda_ == pytest.approx(float(path.lambda_(t)), abs=1e-6)

    def test_dtype_and_shape_are_kept(self, path):
        t = inner_times(path, 6).reshape(2, 3)
        for name in ("alpha", "sigma", "alpha_dot", "sigma_dot", "lambda_"):
            method = getattr(path, name)
            assert method(t).dtype == torch.float64
            assert method(t.float()).dtype == torch.float32
            assert method(t.half()).dtype == torch.float32  # float32 or better
            assert method(t).shape == (2, 3)

    def test_config_round_trip(self, path):
        again = path_from_config(path.to_config())
        assert again == path
        assert hash(again) == hash(path)

    def test_variance_preserving_paths_preserve_it(self, path):
        if path.name in ("discrete_vp", "vp_sde", "cosine"):
            t = inner_times(path)
            assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_discrete_table_is_that_of_diffusers(schedule, zero_snr):
    from diffusers import DDPMScheduler

    ours = DiscreteVPPath(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    theirs = DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    assert torch.equal(ours.alphas_cumprod.float(), theirs.alphas_cumprod)


def test_zero_snr_ends_in_pure_noise_and_is_continuous_before():
    path = DiscreteVPPath(rescale_betas_zero_snr=True)
    assert path.level(999.0) == Level(0.0, 1.0)
    assert float(path.lambda_(999.0)) == -math.inf
    assert float(path.t_from_lambda(-math.inf)) == 999.0
    t = torch.tensor([998 - 1e-7, 998 + 1e-7], dtype=torch.float64)
    for name in ("alpha", "sigma", "lambda_"):
        a, b = getattr(path, name)(t).tolist()
        assert a == pytest.approx(b, abs=1e-6)
    assert torch.isfinite(path.lambda_(torch.tensor([998.5, 998.999], dtype=torch.float64))).all()


def test_between_indices_log_sigma_over_alpha_is_linear():
    path = DiscreteVPPath()
    low, middle, high = (path.level(t).lambda_ for t in (500.0, 500.25, 501.0))
    assert middle == pytest.approx(0.75 * low + 0.25 * high, abs=1e-12)


def test_ends_of_the_straight_path_are_pure():
    assert LinearPath().level(1.0) == Level(0.0, 1.0)
    assert LinearPath().level(0.0) == DATA
    assert Level(0.0, 1.0).ratio == math.inf
    assert Level(0.0, 1.0).lambda_ == -math.inf
    assert DATA.lambda_ == math.inf


def test_errors_name_what_is_allowed():
    with pytest.raises(ValueError, match="linear, scaled_linear"):
        DiscreteVPPath(beta_schedule="cubic")
    with pytest.raises(ValueError, match="outside the trained indices 0 to 999"):
        DiscreteVPPath().level(1000.0)
    with pytest.raises(ValueError, match="use one of discrete_vp"):
        path_from_config({"type": "spiral"})
    with pytest.raises(ValueError, match="does not take beta"):
        path_from_config({"type": "vp_sde", "beta": 1})
    with pytest.raises(ValueError, match="sigma_min"):
        PATHS["ve"](sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="beta_min"):
        PATHS["vp_sde"](beta_min=3.0, beta_max=1.0)
