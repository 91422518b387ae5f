"""Consistency objectives against the closed form for Gaussian data, and transport couplings against brute force."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.processes import PATHS, Parameterization
from gen_pipelines.training.objectives.consistency import (
    ConsistencyDistillation,
    ConsistencyTraining,
    discretization,
    karras_levels,
    predict_at,
    pseudo_huber,
    same_dropout,
)
from gen_pipelines.training.objectives.coupling import MinibatchOTCoupling
from gen_pipelines.training.objectives.denoising import DenoisingObjective
from gen_pipelines.training.objectives.latent_consistency import LatentConsistencyDistillation
from gen_pipelines.training.objectives.reflow import ReflowObjective

MEAN, STD = 0.4, 0.3
STUDENT = Parameterization(PATHS["edm"](), "consistency", sigma_data=0.5)
TEACHERS = {
    "edm": Parameterization(PATHS["edm"](), "edm", sigma_data=0.5),
    "epsilon": Parameterization(PATHS["discrete_vp"](), "epsilon"),
    "flow": Parameterization(PATHS["linear"](), "flow_prediction", lambda_range=(-math.log(80), math.log(500))),
}
JUMPING = replace(TEACHERS["flow"], jumps=True)


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def expand(value, like):
    return value.reshape(len(value), *[1] * (like.ndim - 1))


def true_jump(y, sigma, low):
    """Where the flow of N(MEAN, STD^2) leads from sigma to the lowest level: quantiles are kept."""
    spread = (STD**2 + low**2) ** 0.5 / (STD**2 + sigma**2).sqrt()
    return MEAN + (y - MEAN) * expand(spread, y)


def student(factor=1.0):
    """A network whose consistency function is the true one, or one that is `factor` times as far from the mean."""
    low = STUDENT.boundary_sigma

    def network(scaled, time, condition):
        t = STUDENT.path_time(time.double())
        sigma = STUDENT.path.sigma(t)
        y = scaled.double() / expand((sigma**2 + 0.25).rsqrt(), scaled)
        aim = MEAN + (true_jump(y, sigma, low) - MEAN) * factor
        return STUDENT.target(aim, (y - aim) / expand(sigma, y), t).nan_to_num(0, 0, 0)  # at the boundary any output will do

    return network


def teacher(p):
    """The ideal denoiser of the data, in the convention `p`."""

    def network(scaled, time, condition):
        t = p.path_time(time.double())
        alpha, sigma = (expand(v, scaled) for v in (p.path.alpha(t), p.path.sigma(t)))
        c_in = 1.0 if p.sigma_data is None else ((sigma / alpha) ** 2 + p.sigma_data**2).rsqrt() / alpha
        x = scaled.double() / c_in
        x_0 = MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * MEAN)
        return p.target(x_0, (x - alpha * x_0) / sigma, t)

    return network


def test_the_student_of_the_test_is_the_flow():
    sigma = torch.tensor([0.01, 1.0, 60.0], dtype=torch.float64)
    y = torch.randn(3, 4, dtype=torch.float64) * 2
    assert_close(predict_at(student(), STUDENT, y, sigma, None)[0], true_jump(y, sigma, STUDENT.boundary_sigma), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_true_jump_is_what_distillation_asks_for(name):
    """Of any teacher in any convention: the loss of the truth vanishes as the levels grow dense, that of another function does not."""
    p = TEACHERS[name]
    mine, its = STUDENT.trained_lambda_range, p.trained_lambda_range
    learner = STUDENT.with_(lambda_range=(max(mine[0], its[0]), min(mine[1], its[1])))
    distances = []
    for intervals in (20, 80):
        objective = ConsistencyDistillation(learner, start=intervals, end=intervals, teacher_parameterization=p, huber=0.0)
        x_0 = MEAN + STD * torch.randn(512, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        out = objective(jump(learner), x_0, teacher=teacher(p), generator=generators(512))
        distances.append(out.metrics["distance"].mean().item())
    wrong = objective(jump(learner, 1.5), x_0, teacher=teacher(p), generator=generators(512)).metrics["distance"].mean().item()
    assert distances[1] < 0.1 * distances[0] and distances[1] < 0.05 * wrong, (distances, wrong)


def jump(learner, factor=1.0):
    low = learner.boundary_sigma

    def network(scaled, time, condition):
        t = learner.path_time(time.double())
        sigma = learner.path.sigma(t)
        y = scaled.double() / expand((sigma**2 + 0.25).rsqrt(), scaled)
        aim = MEAN + (true_jump(y, sigma, low) - MEAN) * (1 + (factor - 1) * expand((sigma - low) / sigma, y))
        return learner.target(aim, (y - aim) / expand(sigma, y), t).nan_to_num(0, 0, 0)

    return network


def test_training_without_a_teacher_has_the_truth_as_its_optimum():
    """Its gradient along a change of f vanishes at the truth, in the mean, when the levels are dense."""
    objective = ConsistencyTraining(STUDENT, start=400, end=400, huber=1e3)  # a wide Huber is a square, whose optimum is a mean
    x_0 = MEAN + STD * torch.randn(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def slope(factor):
        h = 1e-3
        sides = []
        for shift in (-h, h):
            target = student(factor)

            def model(x, t, c, shift=shift):
                return student(factor + shift)(x, t, c)

            generator = torch.Generator().manual_seed(1)
            lower, upper = objective.pairs(len(x_0), 1.0, generator, "cpu")
            noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
            points = [(x_0 + expand(s, x_0) * noise, s) for s in (upper, lower)]
            sides.append(objective.compare(model, target, *points, None).metrics["distance"].mean())
        return ((sides[1] - sides[0]) / (2 * h)).item()

    assert abs(slope(1.0)) < 0.1 * abs(slope(1.3))


def test_losses_belong_to_the_sample_and_no_gradient_flows_through_the_target():
    weight = torch.tensor(0.3, requires_grad=True)
    objective = ConsistencyTraining(STUDENT)
    x_0 = torch.randn(6, 3)
    calls = []

    def model(x, t, condition):
        calls.append(torch.is_grad_enabled())
        return weight * x

    many = objective(model, x_0, progress=0.3, generator=generators(6)).per_sample
    one = objective(model, x_0[2:3], progress=0.3, generator=generators(1, seed=2)).per_sample
    assert_close(many[2:3], one)
    assert calls == [True, False, True, False] and torch.isfinite(many).all()
    many.sum().backward()
    assert weight.grad.abs() > 0


def test_both_points_of_a_pair_have_the_same_dropout():
    """Song et al. 2023, appendix C: the random state of the student's pass is the target's; the stream goes on after the student's."""
    torch.manual_seed(0)
    replay = same_dropout(torch.device("cpu"))
    first, after = torch.rand(3), torch.get_rng_state()
    with replay():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), after)
    masks = []

    def model(x, t, condition):
        masks.append(torch.nn.functional.dropout(torch.ones(4), 0.5))
        return 0.3 * x

    ConsistencyTraining(STUDENT)(model, torch.randn(4, 3), progress=0.0, generator=generators(4))
    assert torch.equal(*masks)


def test_uniform_pairs_and_weights_are_the_first_papers():
    """Song et al. 2023, algorithms 2 and 3: n uniform, lambda(t) = 1."""
    first = ConsistencyTraining(STUDENT, start=18, end=18, density="uniform", weighting="uniform")
    levels = first.levels(0.5)
    assert_close(first.weights(levels), torch.full((18,), 1 / 18, dtype=torch.float64))
    lower, _ = first.pairs(18000, 0.5, torch.Generator().manual_seed(0), "cpu")
    counts = torch.bincount(torch.searchsorted(levels, lower), minlength=18)
    assert (counts - 1000).abs().max() < 5 * 31  # 18 binomials within 5 deviations: one seed in a hundred thousand
    out = first(lambda x, t, c: 0.3 * x, torch.randn(4, 3), progress=0.0, generator=generators(4))
    assert_close(out.per_sample, out.metrics["distance"])


def test_a_clipped_student_still_learns_where_it_is_clipped():
    weight = torch.tensor(50.0, requires_grad=True)
    clipped = STUDENT.with_(clip_sample=True)
    out = ConsistencyTraining(clipped)(lambda x, t, c: weight * x, torch.ones(8, 3), progress=0.0, generator=generators(8))
    out.per_sample.mean().backward()
    assert weight.grad.abs() > 0


LATENT = {
    "epsilon": Parameterization(PATHS["discrete_vp"](), "epsilon"),
    "v": Parameterization(PATHS["discrete_vp"](rescale_betas_zero_snr=True), "v_prediction"),
    "flow": Parameterization(PATHS["linear"](), "flow_prediction"),
}


@pytest.mark.parametrize("name", LATENT)
def test_latent_consistency_vanishes_for_the_end_of_a_straight_trajectory(name):
    """Data at one point: the teacher's step keeps eps, so the trajectory's end is known, and the student that says it has no loss."""
    p, data = LATENT[name], torch.full((1, 2), 0.7)
    objective = LatentConsistencyDistillation(p, num_nodes=20, huber=0.0)
    end = p.path.t_min

    def split(x, t):
        alpha, sigma = (expand(value, x) for value in (p.path.alpha(t), p.path.sigma(t)))
        return data, (x - alpha * data) / sigma.clamp_min(1e-12)

    def teacher(x, time, condition):
        t = p.path_time(time.double())
        return p.target(*split(x, t), t)

    def student(x, time, condition):
        t = p.path_time(time.double())
        _, eps = split(x.double(), t)
        aim = float(p.path.alpha(end)) * data + float(p.path.sigma(end)) * eps
        c_skip, c_out = (expand(c, x) for c in objective.boundary(t))
        x_0 = (aim - c_skip * x) / c_out.clamp_min(1e-12)
        alpha, sigma = (expand(value, x) for value in (p.path.alpha(t), p.path.sigma(t)))
        return p.target(x_0, (x - alpha * x_0) / sigma.clamp_min(1e-12), t)

    x_0 = data.expand(64, 2).double()
    out = objective(student, x_0, teacher=teacher, generator=generators(64))
    assert out.metrics["distance"].max() < 1e-6
    other = objective(lambda x, t, c: student(x, t, c) + 1.0, x_0, teacher=teacher, generator=generators(64))
    assert other.metrics["distance"].mean() > 1e-3


def test_latent_consistency_has_the_samplers_nodes_and_coefficients():
    from gen_pipelines.schedulers.consistency import ConsistencyScheduler, lcm_scalings

    objective = LatentConsistencyDistillation(LATENT["epsilon"], num_nodes=50)
    upper, lower = objective.times()
    scheduler = ConsistencyScheduler(rule="lcm", original_inference_steps=50).bind(LATENT["epsilon"])
    scheduler.set_timesteps(50)
    assert_close(upper.flip(0), scheduler.timesteps.double())
    assert_close(lower[1:], upper[:-1])
    for t in (0.0, 19.0, 999.0):
        at = torch.tensor([t], dtype=torch.float64)
        assert_close(torch.cat(objective.boundary(at)), torch.tensor(lcm_scalings(t), dtype=torch.float64))
    x = torch.randn(2, 3, dtype=torch.float64)  # at time 0 the jump is the identity, whatever the network says
    assert_close(objective.jump(lambda x, t, c: 5 * x, x, torch.zeros(2, dtype=torch.float64), None), x)
    with pytest.raises(ValueError, match="ConsistencyDistillation takes the others"):
        LatentConsistencyDistillation(TEACHERS["edm"])


def test_reflow_is_the_papers_formula_and_the_network_that_knows_its_pairs_has_no_loss():
    """Pairs x_0 = 0.5 eps + 0.3: straight paths that do not cross, so a velocity of (x, t) has no loss (Liu et al. 2022, section 3)."""
    p = LATENT["flow"]
    eps = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    x_0, times = 0.5 * eps + 0.3, []

    def knows(x, time, condition):
        t = (time / 1000)[:, None]
        times.append(time / 1000)
        noise = (x - (1 - t) * 0.3) / (0.5 * (1 - t) + t)
        return 0.5 * noise - 0.3

    assert ReflowObjective(p)(knows, x_0, eps, generator=generators(64)).per_sample.max() < 1e-9
    assert ReflowObjective(p, one_step=True)(knows, x_0, eps, generator=generators(64)).per_sample.max() < 1e-9
    assert times[0].std() > 0.2 and times[1].unique().tolist() == [1.0]
    zero = lambda x, t, c: torch.zeros_like(x)
    assert_close(ReflowObjective(p)(zero, x_0, eps, generator=generators(64)).per_sample, (eps - x_0).square().mean(1))
    assert_close(ReflowObjective(p, huber=0.1)(zero, x_0, eps, generator=generators(64)).per_sample, pseudo_huber(eps - x_0, 0.1))
    with pytest.raises(ValueError, match="velocities on the linear path"):
        ReflowObjective(LATENT["epsilon"])


def test_the_discretization_doubles_and_pairs_follow_their_density():
    counts = [discretization(p / 100) for p in range(101)]
    assert counts[0] == 10 and counts[-1] == 1280 and counts == sorted(counts) and len(set(counts)) == 8
    objective = ConsistencyTraining(STUDENT)
    levels = objective.levels(1.0)
    assert len(levels) == 1281
    assert_close(levels[[0, -1]], torch.tensor([0.002, 80.0], dtype=torch.float64))
    assert_close(objective.weights(levels).sum(), torch.tensor(1.0, dtype=torch.float64))
    lower, upper = objective.pairs(20000, 1.0, torch.Generator().manual_seed(0), "cpu")
    assert (lower < upper).all()
    logs = upper.log()
    assert abs(logs.mean() + 1.1) < 0.15 and abs(logs.std() - 2.0) < 0.25                               # cut at the ends of the range
    assert_close(karras_levels(3, 1.0, 4.0, rho=1.0), torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64))


def test_the_pseudo_huber_distance_is_square_near_and_linear_far():
    d = torch.tensor([[3e-4, 4e-4], [3.0, 4.0]], dtype=torch.float64)
    assert_close(pseudo_huber(d, 1.0), torch.tensor([0.5 * 25e-8, math.sqrt(26) - 1], dtype=torch.float64), rtol=1e-4, atol=0)
    assert_close(pseudo_huber(d, 0.0), torch.tensor([5e-4, 5.0], dtype=torch.float64))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ConsistencyTraining(TEACHERS["edm"]), "prediction 'consistency'"),
    (lambda: ConsistencyTraining(STUDENT, start=1), "1 < start"),
    (lambda: ConsistencyDistillation(STUDENT), "give teacher_parameterization"),
    (lambda: ConsistencyDistillation(STUDENT, teacher_parameterization=STUDENT), "give teacher_parameterization"),
    (lambda: ConsistencyDistillation(STUDENT, teacher_parameterization=JUMPING), "of a network that denoises"),
    (lambda: DenoisingObjective(JUMPING), "a network that jumps"),
    (lambda: ConsistencyDistillation(STUDENT, teacher_parameterization=TEACHERS["edm"], solver="rk4"), "none of heun, euler"),
    (lambda: MinibatchOTCoupling("greedy"), "none of exact, sinkhorn"),
    (lambda: MinibatchOTCoupling(regularization=0.0), "above 0"),
])  # fmt: skip
def test_what_makes_no_sense_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------------------ couplings


def cost(a, b):
    return (a - b).square().sum().item()


def test_the_exact_coupling_is_the_best_of_all():
    pytest.importorskip("scipy")
    x_0, eps = torch.randn(5, 2, 2), torch.randn(5, 2, 2)
    best = min(cost(x_0, eps[list(order)]) for order in itertools.permutations(range(5)))
    assert math.isclose(cost(x_0, MinibatchOTCoupling()(x_0, eps)), best, rel_tol=1e-6)


def test_classes_keep_their_own_noises():
    pytest.importorskip("scipy")
    x_0, eps, labels = torch.randn(8, 3), torch.randn(8, 3), torch.tensor([0, 1, 0, 1, 2, 2, 0, 1])
    paired = MinibatchOTCoupling()(x_0, eps, labels)
    for label in range(3):
        mine = {tuple(row.tolist()) for row in eps[labels == label]}
        assert {tuple(row.tolist()) for row in paired[labels == label]} == mine
    assert cost(x_0, paired) <= cost(x_0, eps)
    across = MinibatchOTCoupling(within_labels=False)(x_0, eps, labels)
    assert cost(x_0, across) <= cost(x_0, paired)


def test_flow_matching_learns_from_coupled_noise():
    pytest.importorskip("scipy")
    p, x_0, seen = Parameterization(PATHS["linear"](), "flow_prediction"), torch.randn(8, 2), {}

    def model(x, t, condition):
        seen.update(x=x, t=t / 1000)
        return torch.zeros_like(x)

    coupled = DenoisingObjective(p, coupling=MinibatchOTCoupling())(model, x_0, generator=generators(8)).per_sample
    eps = (seen["x"] - (1 - seen["t"][:, None]) * x_0) / seen["t"][:, None]
    assert_close(coupled, (eps - x_0).square().mean(1), rtol=1e-4, atol=1e-5)
    assert coupled.mean() < DenoisingObjective(p)(model, x_0, generator=generators(8)).per_sample.mean()
    with pytest.raises(ValueError, match="a coupling needs flow_prediction"):
        DenoisingObjective(TEACHERS["epsilon"], coupling=MinibatchOTCoupling())


def test_sinkhorn_nears_the_exact_coupling_as_its_entropy_falls():
    pytest.importorskip("scipy")
    x_0, eps = (torch.randn(16, 2, generator=generator) for generator in generators(2))
    exact = cost(x_0, MinibatchOTCoupling()(x_0, eps))
    near = cost(x_0, MinibatchOTCoupling("sinkhorn", regularization=0.005, iterations=1000)(x_0, eps))
    assert near < 1.1 * exact < cost(x_0, eps)
