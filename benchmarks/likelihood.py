"""How many evaluations a likelihood by the probability flow takes, and what one of them costs.

    python benchmarks/likelihood.py [--model runs/mnist-flow --data path/to/mnist] [--pictures 4] [--repeats 5] [--threads 1]

Without --model a small U-Net is fitted to scikit-learn's digits first (--fit steps), as a flow and as a VP-SDE: a network that has learned
little, so measure trained ones too. Every row has the same pictures, dequantisation and probes, drawn from one generator per picture; the
differences are then the solvers' alone. The reference is dopri5 at 1e-5. "dopri5 in t" integrates in the path's own time, as others do; the
rest in the half log-SNR. The last lines hold one evaluation (the flow, its divergence and the step's arithmetic) against one
forward pass with a vector-Jacobian product of the bare network. Processor time, interleaved, medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch import Tensor

from gen_pipelines import AutoPipeline, DiffusionImagePipeline, FlowMatchEulerScheduler, ScoreSDEScheduler
from gen_pipelines.likelihood.denoiser import Denoiser
from gen_pipelines.likelihood.ode import ode_log_density
from gen_pipelines.models.calling import ClassCondition, predict
from gen_pipelines.processes.random import uniform
from gen_pipelines.training.objectives.denoising import DenoisingObjective

ROWS = [
    ("dopri5, 1e-5", {"solver": "dopri5", "tolerance": 1e-5}),
    ("dopri5, 1e-3", {"solver": "dopri5", "tolerance": 1e-3}),
    ("the default", {}),
    *((f"Adams, {steps} steps", {"solver": "adams", "steps": steps}) for steps in (16, 24, 32, 64)),
    *((f"RK4, {steps} steps", {"solver": "rk4", "steps": steps}) for steps in (8, 12, 24)),
    ("Heun, 48 steps", {"solver": "heun", "steps": 48}),
]


def digits() -> Tensor:
    """scikit-learn's 8 x 8 digits at 16 x 16, uint8 (N, 1, 16, 16)."""
    from sklearn.datasets import load_digits

    pictures = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] * 255 / 16
    return torch.nn.functional.interpolate(pictures, scale_factor=2, mode="bilinear").round().to(torch.uint8)


def fitted(name: str, pictures: Tensor, steps: int) -> DiffusionImagePipeline:
    """A small U-Net that has seen `steps` batches."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    size = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "layers_per_block": 1}
    unet = UNet2DModel(**size, **blocks, norm_num_groups=8, attention_head_dim=8)
    vp = {"path": {"type": "vp_sde"}, "prediction": "epsilon"}
    scheduler = FlowMatchEulerScheduler() if name == "flow" else ScoreSDEScheduler(parameterization=vp)
    pipe = DiffusionImagePipeline(scheduler, unet=unet)
    objective, optimizer = DenoisingObjective(pipe.parameterization), torch.optim.AdamW(unet.parameters(), 2e-3)
    for _ in range(steps):
        x_0 = pictures[torch.randint(len(pictures), (64,))].float() / 127.5 - 1
        loss = objective(lambda x, t, condition: predict(unet, x, t, condition), x_0).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return pipe


def bits(nats: Tensor, values: int, dims: int) -> Tensor:
    """Bits per dimension of pictures of `dims` values, from the density in [-1, 1] of all `values`, its frame's too."""
    return (values * math.log(127.5) - nats) / (dims * math.log(2))


def in_native_time(pipe: DiffusionImagePipeline, network, x: Tensor, probe: Tensor, low: float, high: float, tolerance: float):
    """(log p, evaluations) by dopri5 over the path's own time and coordinates: dx / dt = alpha' x_0 + sigma' eps."""
    from torchdiffeq import odeint

    p, evaluations = pipe.parameterization, 0
    start, end = (float(p.path.t_from_lambda(torch.tensor(value, dtype=torch.float64))) for value in (high, low))

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            x = state[0].detach().requires_grad_(True)
            at = min(max(float(t), start), end)
            out = network(p.scale_model_input(x, at), torch.tensor(float(p.network_time(at))))
            x_0, eps = p.denoise(out, x, at)
            velocity = float(p.path.alpha_dot(at)) * x_0 + float(p.path.sigma_dot(at)) * eps
            (product,) = torch.autograd.grad(velocity, x, probe)
        return velocity.detach(), (product * probe).flatten(1).sum(1)

    times = torch.tensor([start, end], dtype=torch.float64)
    alpha, _ = p.path.level(start)
    exact = {"rtol": tolerance, "atol": tolerance, "method": "dopri5", "options": {"step_t": times[1:]}}  # no step beyond the end
    with torch.no_grad():
        states = odeint(field, (alpha * x, torch.zeros(len(x))), times, **exact)
    z, change = states[0][-1], states[1][-1]
    last = p.path.level(end)
    scale = math.hypot(last.alpha, last.sigma)
    log_noise = -0.5 * ((z / scale).square() + math.log(2 * math.pi)).flatten(1).sum(1) - x[0].numel() * math.log(scale)
    return log_noise + change + x[0].numel() * math.log(alpha), evaluations


def solvers(name: str, pipe: DiffusionImagePipeline, pictures: Tensor) -> None:
    """Prints bits per dimension, evaluations and time for every solver."""
    network, x = as_network(pipe, len(pictures)), dequantised(pipe, pictures)
    denoiser = Denoiser(network, pipe.parameterization)
    low, high = denoiser.lambda_range()
    own = lambda: [torch.Generator().manual_seed(i) for i in range(len(x))]
    dims, reference = pictures[0].numel(), None
    print(f"\n{name}: {pipe.parameterization.prediction} on {pipe.parameterization.path.name}, lambda {low:.2f} to {high:.2f}", flush=True)
    print("| solver | evaluations | bits/dim | difference | s per picture |\n|---|---|---|---|---|")
    for row, options in ROWS:
        begun = time.process_time()
        with torch.no_grad():
            nats, evaluations = ode_log_density(denoiser, x, low, high, own(), **options)
        spent, value = (time.process_time() - begun) / len(x), bits(nats, x[0].numel(), dims)
        reference = (value, evaluations) if reference is None else reference
        difference = (value - reference[0]).abs().mean().item()
        note = "" if options else f", Adams: 1/{reference[1] / evaluations:.1f} of the reference's evaluations"
        print(f"| {row}{note} | {evaluations} | {value.mean():.4f} | {difference:.4f} | {spent:.2f} |", flush=True)
    probe = uniform(x.shape, own()).sub(0.5).sign()
    begun = time.process_time()
    nats, evaluations = in_native_time(pipe, network, x, probe, low, high, 1e-5)
    difference = (bits(nats, x[0].numel(), dims) - reference[0]).abs().mean().item()
    spent = (time.process_time() - begun) / len(x)
    value = bits(nats, x[0].numel(), dims).mean()
    print(f"| dopri5 in t, 1e-5 | {evaluations} | {value:.4f} | {difference:.4f} | {spent:.2f} |", flush=True)


def as_network(pipe: DiffusionImagePipeline, count: int):
    """(input, time) -> output, of the null class where there is one."""
    labels = pipe.null_labels(count, "the benchmark")
    condition = None if labels is None else ClassCondition(torch.tensor(labels))
    return lambda x, t: predict(pipe.denoiser, x, t, condition).float()


def dequantised(pipe: DiffusionImagePipeline, pictures: Tensor) -> Tensor:
    """Pictures of the network's size, with uniform noise of one level, the same for every solver."""
    from gen_pipelines.pipelines.pictures import pad

    levels = pad(pictures, pipe.latents_shape(1)[2:], value=0).float()  # a frame has levels too; without noise its density has no bound
    return (levels + torch.rand(levels.shape, generator=torch.Generator().manual_seed(0)) - 0.5) / 127.5 - 1


def cost(pipe: DiffusionImagePipeline, pictures: Tensor, repeats: int) -> None:
    """Prints one evaluation of the likelihood over one forward pass with its vector-Jacobian product."""
    network, x = as_network(pipe, len(pictures)), dequantised(pipe, pictures)
    denoiser = Denoiser(network, pipe.parameterization)
    low, high = denoiser.lambda_range()
    probe, steps, ratios = torch.randn_like(x).sign(), 31, []

    def bare() -> float:
        begun = time.process_time()
        for _ in range(steps + 1):
            y = x.detach().requires_grad_(True)
            torch.autograd.grad(network(y, torch.tensor(0.5)), y, probe)
        return time.process_time() - begun

    def ours() -> float:
        begun = time.process_time()
        with torch.no_grad():
            ode_log_density(denoiser, x, low, high, torch.Generator().manual_seed(0), steps=steps)
        return time.process_time() - begun

    bare(), ours()
    for _ in range(repeats):
        ratios.append(ours() / bare())
    print(f"one evaluation over a forward pass with its vector-Jacobian product: {statistics.median(ratios):.3f} of {repeats}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a DiffusionImagePipeline: a folder, bundled:NAME or an id on the Hub")
    parser.add_argument("--data", help="its pictures: a data set of the Hub or a folder, with the column image")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--fit", type=int, default=200, help="steps that the small network is fitted for")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None:
        pictures = digits()
        for name in ("flow", "vp_sde"):
            pipe = fitted(name, pictures, args.fit)
            solvers(f"U-Net on digits, {args.fit} steps", pipe, pictures[: args.pictures])
            cost(pipe, pictures[: args.pictures], args.repeats)
        return
    if args.data is None:
        parser.error("--model needs --data, the pictures to measure on")
    import datasets

    from gen_pipelines.likelihood.dequantization import to_levels

    pipe = AutoPipeline.from_pretrained(args.model)
    rows = datasets.load_dataset(args.data, split="test").select(range(args.pictures))
    pictures = to_levels(list(rows["image"]), pipe.denoiser.config.in_channels, pipe.picture_size)
    solvers(args.model, pipe, pictures)
    cost(pipe, pictures, args.repeats)


if __name__ == "__main__":
    main()
