"""Rectified flow's grid, its one step, and the measure of straightness."""

import pytest
import torch
from analytic import GAUSSIAN, NETWORKS, sample
from torch.testing import assert_close

from gen_pipelines.processes import LinearPath, Parameterization
from gen_pipelines.schedulers import RectifiedFlowScheduler

FLOW = Parameterization(LinearPath(), "flow_prediction", time_input="t")


def test_steps_are_equal():
    scheduler = RectifiedFlowScheduler().bind(FLOW)
    for n in (1, 3, 8):
        scheduler.set_timesteps(n)
        assert_close(scheduler.timesteps, 1 - torch.arange(n) / n)
        assert float(scheduler.sigmas[-1]) == 0.0


def test_one_step_is_exact_where_the_flow_is_straight():
    start, end = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (1, 4):
        scheduler = RectifiedFlowScheduler().bind(FLOW)
        found = sample(scheduler, lambda x, t: start - end, steps=n, x=start)
        assert_close(found, end)
        assert_close(scheduler.straightness, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("network", ["plain_flow", "sd3_flow", "ddpm_eps", "edm"])
def test_straightness_is_the_papers_mean(network):
    """From the velocities themselves: the mean, weighted by the steps' lengths, of |v - (end - start)|^2."""
    p, grid = NETWORKS[network]
    scheduler, ideal = RectifiedFlowScheduler().bind(p, grid), GAUSSIAN.network(p)
    scheduler.set_timesteps(6)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scheduler.init_noise_sigma
    assert scheduler.straightness is None
    states, velocities, times = [], [], []
    for t, stage in zip(scheduler.timesteps, scheduler._stages, strict=True):
        out = ideal(scheduler.scale_model_input(x, t), t)
        states.append(x / sum(stage.here))
        times.append(stage.here.sigma / sum(stage.here))
        x_0, eps = p.denoise(out, x, stage.t)
        velocities.append(eps - x_0)
        x = scheduler.step(out, t, x).prev_sample
    chord = (states[0] - x) / times[0]
    lengths = torch.tensor([a - b for a, b in zip(times, [*times[1:], 0.0], strict=True)], dtype=torch.float64)
    squares = torch.stack([(v - chord).square().sum(1) for v in velocities])
    assert_close(scheduler.straightness, (lengths[:, None] * squares).sum(0) / times[0], rtol=1e-6, atol=1e-9)
    assert float(scheduler.straightness.min()) > 0


def test_part_of_a_loop_has_no_straightness():
    scheduler, ideal = RectifiedFlowScheduler().bind(FLOW), GAUSSIAN.network(FLOW)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    x = torch.zeros(4, 3)
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(ideal(x, t), t, x).prev_sample
    assert scheduler.straightness is None
