"""The pure updates keep the marginal of the path: exact, read off a linear map."""

import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.processes import DATA, PATHS, DiscreteVPPath
from gen_pipelines.schedulers import updates as U
from gen_pipelines.schedulers.ddpm import posterior_update, upper_std

PATH_OBJECTS = [cls() for cls in PATHS.values()] + [DiscreteVPPath(rescale_betas_zero_snr=True)]
ONE, ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def ends(path, high=0.9, low=0.5):
    return tuple(path.level(path.t_min + (path.t_max - path.t_min) * u) for u in (high, low))


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("path", PATH_OBJECTS, ids=lambda p: p.name)
class TestMarginal:
    @pytest.mark.parametrize("start", [0.9, 1.0])
    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    def test_ancestral(self, path, eta, start):
        here, there = ends(path, start)

        def step(x_0, e, n):
            return U.ancestral_update(x_0, e, here, there, eta, n)

        assert_close(step(ONE, ZERO, ZERO), tensor(there.alpha))
        assert_close(step(ZERO, ONE, ZERO) ** 2 + step(ZERO, ZERO, ONE) ** 2, tensor(there.sigma**2))

    def test_posterior_is_ancestral_at_eta_1(self, path):
        here, there = ends(path)
        g = torch.Generator().manual_seed(0)
        x_0, eps, noise = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(3))
        x = here.alpha * x_0 + here.sigma * eps
        found = posterior_update(x_0, x, here, there, U.posterior_std(here, there), noise)
        assert_close(found, U.ancestral_update(x_0, eps, here, there, 1.0, noise))

    def test_upper_variance_is_the_reverse_variance_of_unit_data(self, path):
        here, there = ends(path)
        c = here.alpha / there.alpha  # q(x_here | x_there): joint Gaussian for x_0 ~ N(0, 1)
        var_there = there.alpha**2 + there.sigma**2
        var_here = c**2 * var_there + U.transition_variance(here, there)
        assert var_here == pytest.approx(here.alpha**2 + here.sigma**2)
        assert upper_std(here, there) ** 2 == pytest.approx(var_there - (c * var_there) ** 2 / var_here)
        assert U.posterior_std(here, there) <= upper_std(here, there) + 1e-12

    def test_raising_a_level_keeps_the_marginal(self, path):
        here, there = ends(path)
        x_0, eps = there.alpha, there.sigma  # coefficients of x at the lower level
        raised = U.raise_level(tensor(x_0), there, here, ZERO)
        assert_close(raised, tensor(here.alpha))
        noise = U.raise_level(ZERO, there, here, ONE)
        assert_close(U.raise_level(tensor(eps), there, here, ZERO) ** 2 + noise**2, tensor(here.sigma**2))

    def test_the_last_step_gives_x_0(self, path):
        here, _ = ends(path)
        for eta in (0.0, 1.0):
            assert_close(U.ancestral_update(ONE, 7 * ONE, here, DATA, eta, 9 * ONE), ONE)


def test_ddpm_variances_are_the_papers():
    path = DiscreteVPPath()
    here, there = path.level(500.0), path.level(499.0)
    beta = float(path.betas[500])
    abar, abar_prev = (float(path.alphas_cumprod[i]) for i in (500, 499))
    assert upper_std(here, there) ** 2 == pytest.approx(beta, rel=1e-5)
    assert U.posterior_std(here, there) ** 2 == pytest.approx((1 - abar_prev) / (1 - abar) * beta, rel=1e-5)
    c_0, c_x = U.posterior_coefficients(here, there)
    assert c_0 == pytest.approx(math.sqrt(abar_prev) * beta / (1 - abar), rel=1e-5)
    assert c_x == pytest.approx(math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar), rel=1e-5)
