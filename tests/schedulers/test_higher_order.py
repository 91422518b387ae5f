"""Heun, DPM-Solver++ and UniPC: the pure updates against exact integrals, and the order in which the class converges."""

import math

import pytest
import torch
from analytic import GAUSSIAN, NETWORKS
from torch.testing import assert_close

from gen_pipelines.processes import DATA, PATHS, LinearPath, Parameterization
from gen_pipelines.processes.level import Level
from gen_pipelines.schedulers import SCHEDULERS, DPMSolverMultistepScheduler, UniPCScheduler
from gen_pipelines.schedulers.dpm_solver_multistep import ALGORITHMS, dpm_solver_weights
from gen_pipelines.schedulers.heun import slope_width
from gen_pipelines.schedulers.multistep import kernel_moments
from gen_pipelines.schedulers.unipc import unipc_weights

FLOW = Parameterization(LinearPath(), "flow_prediction")


def levels(path, *fractions):
    return [path.level(path.t_min + (path.t_max - path.t_min) * u) for u in fractions]


def integral(function, low, high, n=4001):
    x = torch.linspace(low, high, n, dtype=torch.float64)
    y = function(x)
    return float((y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * (high - low) / (n - 1) / 3)


@pytest.mark.parametrize("rate", [1.0, 2.0, -1.0])
@pytest.mark.parametrize("h", [1e-4, 0.2, 0.499, 0.501, 3.0])
def test_kernel_moments(h, rate):
    for k, found in enumerate(kernel_moments(h, rate, 4)):
        exact = integral(lambda s, k=k: torch.exp(-rate * (h - s)) * (s / h) ** k, 0.0, h)
        assert found == pytest.approx(exact, rel=1e-9)


def exact_move(here, there, algorithm, power):
    """(from x, integral of the kernel against (lambda - lambda_here)^power) of the linear equation that the solver integrates."""
    h, s = there.lambda_ - here.lambda_, 2.0 if algorithm.startswith("sde") else 1.0
    if algorithm.endswith("++"):
        return integral(lambda u: s * there.alpha * torch.exp(-s * (h - u)) * u**power, 0.0, h)
    return integral(lambda u: -s * there.sigma * torch.exp(h - u) * u**power, 0.0, h)


@pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: p.name)
class TestWeights:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_dpm_solver_is_exact_for_polynomials_in_lambda(self, path, algorithm):
        """Order k integrates estimates that are polynomials of degree k - 1: this is what makes 3M third order."""
        two, one, here, there = levels(path, 0.95, 0.8, 0.6, 0.45)
        for earlier in ([], [one], [one, two]):
            w = dpm_solver_weights(here, there, earlier, algorithm, midpoint=False)
            nodes = [level.lambda_ - here.lambda_ for level in (here, *earlier)]
            for power in range(len(nodes)):
                found = sum(weight * node**power for weight, node in zip(w.outputs, nodes, strict=True))
                assert found == pytest.approx(exact_move(here, there, algorithm, power), rel=1e-7, abs=1e-10)

    @pytest.mark.parametrize("data_form", [True, False])
    @pytest.mark.parametrize("corrector", [True, False])
    def test_unipc_is_exact_for_polynomials_in_lambda(self, path, data_form, corrector):
        two, one, here, there = levels(path, 0.95, 0.8, 0.6, 0.45)
        w = unipc_weights(here, there, [one, two], corrector, "bh2", data_form)
        nodes = [level.lambda_ - here.lambda_ for level in ([there] if corrector else []) + [here, one, two]]
        for power in range(len(nodes)):
            found = sum(weight * node**power for weight, node in zip(w.outputs, nodes, strict=True))
            exact = exact_move(here, there, "dpmsolver++" if data_form else "dpmsolver", power)
            assert found == pytest.approx(exact, rel=1e-7, abs=1e-10)

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_update_keeps_the_marginal(self, path, algorithm):
        """With the true x_0 and eps held: coefficient of x_0, and the variance of the rest; exact for all but the SDE in eps."""
        here, there = levels(path, 0.6, 0.59)
        w = dpm_solver_weights(here, there, (), algorithm)
        of_x_0 = w.from_x * here.alpha + (w.outputs[0] if algorithm.endswith("++") else 0.0)
        of_eps = w.from_x * here.sigma + (0.0 if algorithm.endswith("++") else w.outputs[0])
        assert of_x_0 == pytest.approx(there.alpha)
        slack = 0.0 if algorithm != "sde-dpmsolver" else 8 * (there.lambda_ - here.lambda_) ** 2
        assert of_eps**2 + w.noise**2 == pytest.approx(there.sigma**2, rel=1e-12 + slack)

    def test_first_order_is_ddim(self, path):
        here, there = levels(path, 0.8, 0.5)
        for w, newest in ((dpm_solver_weights(here, there), 0), (dpm_solver_weights(here, there, (), "dpmsolver"), 1),
                          (unipc_weights(here, there), 0), (unipc_weights(here, there, data_form=False), 1)):  # fmt: skip
            ends = [w.from_x * here.alpha, w.from_x * here.sigma]
            ends[newest] += w.outputs[0]
            assert_close(torch.tensor(ends), torch.tensor([there.alpha, there.sigma]))

    def test_slope_widths(self, path):
        """Both coordinates give DDIM's step: x alpha'/alpha + width eps, and x (alpha' + sigma') / (alpha + sigma) + width (eps - x_0)."""
        here, there = levels(path, 0.8, 0.5)
        assert there.alpha / here.alpha * here.sigma + slope_width(here, there) == pytest.approx(there.sigma)
        scale, width = (there.alpha + there.sigma) / (here.alpha + here.sigma), slope_width(here, there, True)
        assert scale * here.sigma + width == pytest.approx(there.sigma)
        assert scale * here.alpha - width == pytest.approx(there.alpha)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_steps_from_noise_and_to_data(algorithm):
    noise, middle = Level(0.0, 1.0), Level(0.6, 0.4)
    last = dpm_solver_weights(middle, DATA, (noise,), algorithm)
    assert (last.from_x, last.outputs, last.noise) == (0.0, (1.0,), 0.0)
    first = dpm_solver_weights(noise, middle, (), algorithm)
    assert first.outputs == (0.6,)
    assert first.from_x**2 + first.noise**2 == pytest.approx(0.4**2)


# ---------------------------------------------------------------------- order of convergence


def slope(make, p, order, counts=(64, 128), high=0.6, low=0.2):
    """Slope of log error over log steps between two interior levels of the ODE, on a grid that is smooth and uneven; a multistep solver
    starts from exact states, so that its low-order first steps do not count."""
    network, x = GAUSSIAN.network(p), torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top, errors = p.trained_t_range[1], []
    x = x * p.path.level(high * top).sigma
    for n in counts:
        times = [top * (low + (high - low) * (1 - i / n) ** 1.3) for i in range(n + 1)]
        scheduler = make().bind(p)
        scheduler.set_timesteps(timesteps=[p.network_time(t) for t in times])
        begin = scheduler._stages[0].here
        state, nodes = x, 0
        for t, stage in zip(scheduler.timesteps, scheduler._stages, strict=True):
            if stage.node == n:
                break
            if stage.first and stage.node < order:
                state = GAUSSIAN.ode(x, begin, stage.here)
            out = network(scheduler.scale_model_input(state, t), stage.network_time)  # t itself has been rounded to float32
            state = scheduler.step(out, t, state).prev_sample
            nodes = stage.node + 1
        assert nodes == n
        errors.append(float((state - GAUSSIAN.ode(x, begin, scheduler._stages[-1].here)).abs().max()))
    return math.log2(errors[0] / errors[1])


OFF = {"lower_order_final": False}
ORDERS = {
    "heun": (SCHEDULERS["heun"], 2),
    "flow_match_heun": (SCHEDULERS["flow_match_heun"], 2),
    **{f"{a}-{k}{s[0]}": (lambda a=a, k=k, s=s: DPMSolverMultistepScheduler(solver_order=k, algorithm_type=a, solver_type=s, **OFF), k)
       for a in ("dpmsolver++", "dpmsolver") for k, s in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))},
    **{f"unip-{k}-{bh}-{'x_0' if d else 'eps'}":
       (lambda k=k, bh=bh, d=d: UniPCScheduler(solver_order=k, solver_type=bh, predict_x0=d, disable_corrector=list(range(999)), **OFF), k)
       for k in (1, 2, 3) for bh in ("bh1", "bh2") for d in (True, False)},
    **{f"unipc-{k}": (lambda k=k: UniPCScheduler(solver_order=k, disable_corrector=list(range(k - 1)), **OFF), k + 1) for k in (1, 2, 3)},
}  # fmt: skip


@pytest.mark.parametrize("network", ["plain_flow", "vp_cosine_v"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, network):
    make, order = ORDERS[name]
    counts = (256, 512) if name.startswith("unipc") else (64, 128)  # its error has two terms of nearly the same size
    assert slope(make, NETWORKS[network][0], order, counts) == pytest.approx(order, abs=0.15)
