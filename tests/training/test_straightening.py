"""What reflow and consistency distillation are for, on points in the plane: straighter paths, better single steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gen_pipelines import ConsistencyScheduler, RectifiedFlowScheduler
from gen_pipelines.processes import PATHS, Parameterization
from gen_pipelines.training.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from gen_pipelines.training.objectives.denoising import DenoisingObjective
from gen_pipelines.training.objectives.reflow import ReflowObjective

FLOW = Parameterization(PATHS["linear"](), "flow_prediction", time_input="t")
JUMP = Parameterization(PATHS["edm"](0.01, 10.0), "consistency", sigma_data=0.7)


class Field(nn.Module):
    """(x, time) -> 2 numbers."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(nn.Linear(6, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        t = t.reshape(-1, 1).expand(len(x), 1) * self.scale
        return self.layers(torch.cat([x, t, t.cos(), (3 * t).sin(), (3 * t).cos()], dim=1))


def ring(count: int, generator: torch.Generator) -> Tensor:
    """Six blobs on a circle of radius 1."""
    angle = torch.randint(0, 6, (count,), generator=generator) * (math.pi / 3)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=generator)


def fit(network: nn.Module, loss, steps: int, rate: float = 3e-3) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step / steps).mean().backward()
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def draw(network: nn.Module, noise: Tensor, scheduler, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def away(x: Tensor) -> float:
    """How far points are from the nearest blob's middle, root mean square; 0.07 of the data."""
    angle = torch.arange(6) * (math.pi / 3)
    return torch.cdist(x, torch.stack([angle.cos(), angle.sin()], 1)).min(1).values.square().mean().sqrt().item()


@pytest.mark.slow
def test_reflow_straightens_and_makes_one_step_better():
    """2-rectified against 1-rectified (Liu et al. 2022, section 3): half the straightness or less, and a far better single step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    matching = DenoisingObjective(FLOW)
    network_0 = Field()
    first = fit(network_0, lambda _: matching(network_0, ring(128, generator), generator=generator).per_sample, 800)
    scheduler = RectifiedFlowScheduler().bind(FLOW)
    noise = torch.randn(4096, 2, generator=generator)
    data = draw(first, noise, scheduler, 40)
    bent = scheduler.straightness.mean().item()
    again, network_1 = ReflowObjective(FLOW), Field()
    network_1.load_state_dict(first.state_dict())

    def loss(_: float) -> Tensor:
        rows = torch.randint(0, 4096, (128,), generator=generator)
        return again(network_1, data[rows], noise[rows], generator=generator).per_sample

    second = fit(network_1, loss, 800)
    fresh = torch.randn(2000, 2, generator=generator)
    draw(second, fresh, scheduler, 40)
    straight = scheduler.straightness.mean().item()
    one = [away(draw(network, fresh, scheduler, 1)) for network in (first, second)]
    assert straight < 0.5 * bent, (straight, bent)
    assert one[1] < 0.6 * one[0], one
    assert away(draw(second, fresh, scheduler, 2)) < away(draw(first, fresh, scheduler, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distillation", "training"])
def test_a_consistency_model_draws_in_one_step_what_its_teacher_cannot(kind):
    """Against one step of a flow that was trained as long; and two steps are not worse than one."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    teacher = Field()
    matching = DenoisingObjective(FLOW)
    fit(teacher, lambda _: matching(teacher, ring(128, generator), generator=generator).per_sample, 800)
    student = Field(scale=1 / 250)  # it is told 250 log(sigma)
    if kind == "distillation":
        objective = ConsistencyDistillation(JUMP, 18, 18, density="uniform", weighting="uniform", teacher_parameterization=FLOW)
        run = lambda progress: objective(
            student, ring(128, generator), teacher=teacher, progress=progress, generator=generator
        ).per_sample
    else:
        objective = ConsistencyTraining(JUMP, 10, 80)
        run = lambda progress: objective(student, ring(128, generator), progress=progress, generator=generator).per_sample
    fit(student, run, 900)
    noise = torch.randn(2000, 2, generator=generator)
    flow = away(draw(teacher, noise, RectifiedFlowScheduler().bind(FLOW), 1))
    jumps = ConsistencyScheduler().bind(JUMP)
    one, two = (away(draw(student, noise, jumps, steps)) for steps in (1, 2))
    assert one < 0.7 * flow, (one, flow)
    assert two < 1.1 * one, (one, two)
