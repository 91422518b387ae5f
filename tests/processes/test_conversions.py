"""Each conversion against the definition x = alpha x_0 + sigma eps, in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.processes import conversions as C

LEVELS = [(0.9, 0.4), (0.3, 0.95), (1.0, 7.0), (0.6, 0.4)]  # variance preserving, exploding, and straight


def problem(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(3, 5, generator=g, dtype=dtype) for _ in range(2))
    return x_0, eps


@pytest.mark.parametrize("level", LEVELS)
class TestConversion:
    def test_eps(self, level):
        x_0, eps = problem()
        x = C.noise_data(x_0, eps, *level)
        assert_close(C.eps_to_x_0(eps, x, *level), x_0)
        assert_close(C.x_0_to_eps(x_0, x, *level), eps)

    def test_v(self, level):
        x_0, eps = problem()
        x, v = C.noise_data(x_0, eps, *level), C.x_0_eps_to_v(x_0, eps, *level)
        assert_close(C.v_to_x_0(v, x, *level), x_0)
        assert_close(C.v_to_eps(v, x, *level), eps)

    def test_v_is_a_rotation(self, level):
        x_0, eps = problem()
        r = math.hypot(*level)
        x, v = C.noise_data(x_0, eps, *level) / r, C.x_0_eps_to_v(x_0, eps, *level)
        assert_close(x**2 + v**2, x_0**2 + eps**2)

    def test_score(self, level):
        x_0, eps = problem()
        x, score = C.noise_data(x_0, eps, *level), C.eps_to_score(eps, level[1])
        assert_close(C.score_to_eps(score, level[1]), eps)
        assert_close(C.score_to_x_0(score, x, *level), x_0)

    def test_flow(self, level):
        x_0, eps = problem()
        dots = (-0.7, 1.3)
        x, u = C.noise_data(x_0, eps, *level), C.x_0_eps_to_flow(x_0, eps, *dots)
        assert_close(C.flow_to_x_0(u, x, *level, *dots), x_0)
        assert_close(C.flow_to_eps(u, x, *level, *dots), eps)

    @pytest.mark.parametrize("sigma_data", [0.5, 1.0])
    def test_edm(self, level, sigma_data):
        x_0, eps = problem()
        x = C.noise_data(x_0, eps, *level)
        raw = C.x_0_to_edm(x_0, x, *level, sigma_data)
        assert_close(C.edm_to_x_0(raw, x, *level, sigma_data), x_0)

    def test_consistency(self, level):
        x_0, eps = problem()
        x = C.noise_data(x_0, eps, *level)
        raw = C.x_0_to_consistency(x_0, x, *level, 0.5, 0.002)
        assert_close(C.consistency_to_x_0(raw, x, *level, 0.5, 0.002), x_0)


def test_edm_is_table_1_at_alpha_1():
    sigma, sd = 3.0, 0.5
    raw, x = problem()
    c_skip, c_out, c_in = sd**2 / (sigma**2 + sd**2), sigma * sd / math.sqrt(sigma**2 + sd**2), 1 / math.sqrt(sigma**2 + sd**2)
    assert_close(C.edm_to_x_0(raw, x, 1.0, sigma, sd), c_skip * x + c_out * raw)
    assert C.edm_input_scale(1.0, sigma, sd) == pytest.approx(c_in)


def test_edm_with_unit_data_is_minus_v():
    raw, x = problem()
    assert_close(C.edm_to_x_0(raw, x, 0.6, 0.8, 1.0), C.v_to_x_0(-raw, x, 0.6, 0.8))


def test_edm_input_and_target_have_unit_variance_on_every_path():
    g = torch.Generator().manual_seed(0)
    x_0, eps = 0.5 * torch.randn(200_000, generator=g, dtype=torch.float64), torch.randn(200_000, generator=g, dtype=torch.float64)
    for level in LEVELS:  # false alarm below 1e-9: five standard errors of a variance over 2e5 draws are 0.016
        x = C.noise_data(x_0, eps, *level)
        assert float((x * C.edm_input_scale(*level, 0.5)).var()) == pytest.approx(1.0, abs=0.02)
        assert float(C.x_0_to_edm(x_0, x, *level, 0.5).var()) == pytest.approx(1.0, abs=0.02)


def test_straight_path_forms():
    x_0, eps = problem()
    t = 0.3
    x, u = C.noise_data(x_0, eps, 1 - t, t), C.x_0_eps_to_flow(x_0, eps, -1.0, 1.0)
    assert_close(u, eps - x_0)
    assert_close(C.flow_to_x_0(u, x, 1 - t, t, -1.0, 1.0), x - t * u)


def test_consistency_boundary_is_the_identity():
    raw, x = problem()
    assert C.consistency_coefficients(0.002, 0.5, 0.002) == (1.0, 0.0)
    assert_close(C.consistency_to_x_0(raw, x, 1.0, 0.002, 0.5, 0.002), x)


def test_half_precision_is_widened():
    x_0, eps = problem(torch.float32)
    half = C.eps_to_x_0(eps.half(), x_0.bfloat16(), 0.5, 0.5)
    assert half.dtype == torch.float32
    assert C.v_to_eps(eps.half(), x_0.double(), 0.5, 0.5).dtype == torch.float64
