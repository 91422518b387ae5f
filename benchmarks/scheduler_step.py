"""What a scheduler's step costs, beside the tensor operations that it must do and beside diffusers' scheduler of the same name.

    python benchmarks/scheduler_step.py [--only ddim,unipc] [--repeats 40] [--core 1] [--markdown]

Every scheduler walks the middle of a 50-step grid with a network output that is there already, so that histories are full and no step is
the special first or last one. Two forms are measured: "output" is a call as it stands by default, of which the loop reads `prev_sample`;
"tuple" is `return_dict=False`, which gives x_0 as well. The bare operations are those of the same step written out by hand, with its
coefficients as numbers, the noise and what is kept for the next step included, and x_0 where it is returned or needed.

One thread on one core, that thread's own time, the four contestants interleaved in blocks of one loop, and the fastest block of each:
what else runs on the machine can only add. us = microseconds per step, "over" = ours - 1.3 x bare, to be at most 10.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from gen_pipelines.schedulers import SCHEDULERS, DDIMInverseScheduler
from gen_pipelines.schedulers.ddpm import DDPMScheduler
from gen_pipelines.schedulers.updates import posterior_std

SHAPES = [(1, 4, 64, 64), (8, 3, 32, 32), (1, 2)]
STEPS, SKIPPED = 50, 5  # of the grid, and at both of its ends
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

# ours -> the twin in diffusers, whose config names the network of both
TWINS: dict[str, Callable[[], Any]] = {
    "ddpm": lambda: diffusers.DDPMScheduler(**SD),
    "ddim": lambda: diffusers.DDIMScheduler(**DDIM),
    "ddim_inverse": lambda: diffusers.DDIMInverseScheduler(**DDIM),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SD),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**SD),
    "dpm_solver_multistep": lambda: diffusers.DPMSolverMultistepScheduler(**SD),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**SD),
    "flow_match_euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow_match_heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "consistency": lambda: diffusers.CMStochasticIterativeScheduler(num_train_timesteps=60),
}
FLOW = ("flow_match_euler", "flow_match_heun", "rectified_flow")


class Numbers(NamedTuple):
    """x_0 = a x + b out; x' = c x + d out (first order); alpha, sigma here and there; the times between."""

    a: float
    b: float
    c: float
    d: float
    alpha: float
    sigma: float
    alpha_there: float
    sigma_there: float


def numbers(scheduler: Any) -> list[Numbers]:
    """What the hand-written steps need, from the tables of `set_timesteps`."""
    rows = zip(scheduler._affine, scheduler._moves, scheduler._stages, strict=True)
    return [Numbers(a.x_0_from_x, a.x_0_from_output, *move, *stage.here, *stage.there) for a, move, stage in rows]


# ------------------------------------------------------------------------------------------------ the bare operations, one function each


def bare_first_order(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """DDIM, its inverse, Euler: x' = c x + d out."""

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        k = n[i]
        prev = (x * k.c).add_(out, alpha=k.d)
        return (prev, (x * k.a).add_(out, alpha=k.b)) if want_x_0 else (prev,)

    return step


def bare_flow(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """x' = x + (t' - t) u, x_0 = x - t u."""

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        k = n[i]
        prev = x.add(out, alpha=k.d)
        return (prev, x.add(out, alpha=k.b)) if want_x_0 else (prev,)

    return step


def bare_rectified(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """The flow's step, and the running mean and spread of its velocity."""
    mean = spread = done = None

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        nonlocal mean, spread, done
        k = n[i]
        length = 1 / STEPS
        if mean is None:
            mean, spread, done = out.clone(), out.new_zeros(len(out)), length
        else:
            done += length
            away = out - mean
            mean.add_(away, alpha=length / done)
            spread.add_((away * (out - mean)).flatten(1).sum(1), alpha=length)
        prev = x.add(out, alpha=k.d)
        return (prev, x.add(out, alpha=k.b)) if want_x_0 else (prev,)

    return step


def bare_ddpm(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """x_0 clipped, the posterior's mean, noise."""
    std = [posterior_std(s.here, s.there) for s in scheduler._stages]

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        k, s = n[i], std[i]
        x_0 = (x * k.a).add_(out, alpha=k.b).clamp_(-1, 1)
        prev = (x * (k.sigma_there / k.sigma)).add_(x_0, alpha=k.alpha_there).add_(torch.randn(x.shape), alpha=s)
        return (prev, x_0) if want_x_0 else (prev,)

    return step


def bare_noisy(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """Euler ancestral, Euler-Maruyama: x' = c x + d out + s z."""
    std = [posterior_std(s.here, s.there) for s in scheduler._stages]

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        k = n[i]
        prev = (x * k.c).add_(out, alpha=k.d).add_(torch.randn(x.shape), alpha=std[i])
        return (prev, (x * k.a).add_(out, alpha=k.b)) if want_x_0 else (prev,)

    return step


def bare_heun(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """Euler's step, then half the difference of the slopes; the first slope is kept (a copy: the network may write over its output)."""
    slope = None

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        nonlocal slope
        k = n[i]
        if i % 2 == 0:
            prev, slope = (x * k.c).add_(out, alpha=k.d), out.clone()
        else:
            prev = x.add(out, alpha=0.5 * k.d).add_(slope, alpha=-0.5 * k.d)
        return (prev, (x * k.a).add_(out, alpha=k.b)) if want_x_0 else (prev,)

    return step


def bare_flow_heun(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """The same in a flow's time, where x_0 and the first move are one operation each."""
    slope = None

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        nonlocal slope
        k = n[i]
        if i % 2 == 0:
            prev, slope = x.add(out, alpha=k.d), out.clone()
        else:
            prev = x.add(out, alpha=0.5 * k.d).add_(slope, alpha=-0.5 * k.d)
        return (prev, x.add(out, alpha=k.b)) if want_x_0 else (prev,)

    return step


def bare_dpm(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """x_0, which is kept, and x' = p x + q x_0 + r (the last x_0)."""
    last = None

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        nonlocal last
        k = n[i]
        x_0 = (x * k.a).add_(out, alpha=k.b)
        prev = (x * (k.sigma_there / k.sigma)).add_(x_0, alpha=k.d)
        if last is not None:
            prev.add_(last, alpha=-0.1)
        last = x_0
        return (prev, x_0) if want_x_0 else (prev,)

    return step


def bare_unipc(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """x_0, which is kept; the correction of the last step, of order 3 (four terms); the next step, of order 2 (three terms)."""
    history: list[Tensor] = []
    before = None

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        nonlocal before, history
        k = n[i]
        x_0 = (x * k.a).add_(out, alpha=k.b)
        if before is not None:
            x = (before * (k.sigma_there / k.sigma)).add_(x_0, alpha=0.1)
            for old in history:
                x.add_(old, alpha=0.01)
        prev = (x * (k.sigma_there / k.sigma)).add_(x_0, alpha=k.d)
        if history:
            prev.add_(history[0], alpha=-0.1)
        before, history = x, [x_0, *history[:1]]
        return (prev, x_0) if want_x_0 else (prev,)

    return step


def bare_consistency(n: list[Numbers], want_x_0: bool, scheduler: Any) -> Callable:
    """x_0 clipped, then noise."""

    def step(i: int, x: Tensor, out: Tensor) -> Any:
        k = n[i]
        x_0 = (x * k.a).add_(out, alpha=k.b).clamp_(-1, 1)
        prev = x_0.add(torch.randn(x.shape), alpha=k.sigma_there)
        return (prev, x_0) if want_x_0 else (prev,)

    return step


BARE: dict[str, Callable[..., Callable]] = {
    "ddpm": bare_ddpm,
    "ddim": bare_first_order,
    "ddim_inverse": bare_first_order,
    "euler": bare_first_order,
    "euler_ancestral": bare_noisy,
    "heun": bare_heun,
    "dpm_solver_multistep": bare_dpm,
    "unipc": bare_unipc,
    "flow_match_euler": bare_flow,
    "flow_match_heun": bare_flow_heun,
    "rectified_flow": bare_rectified,
    "score_sde": bare_noisy,
    "consistency": bare_consistency,
}

# ------------------------------------------------------------------------------------------------------------------------- the contestants


def make(name: str) -> tuple[Any, Any]:
    """(ours, theirs or None) for the same network."""
    cls = {**SCHEDULERS, "ddim_inverse": DDIMInverseScheduler}[name]
    theirs = TWINS[name]() if name in TWINS else None
    config = (theirs or TWINS["flow_match_euler" if name in FLOW else "ddim"]()).config
    return cls.from_config(config), theirs


def middle(count: int) -> range:
    return range(SKIPPED * 2, count - SKIPPED * 2)


def loop_of(scheduler: Any, output: Tensor, as_output: bool) -> Callable[[Tensor], int]:
    """One walk of the grid's middle; returns the number of steps."""
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    kwargs = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}
    times = [scheduler.timesteps[i] for i in middle(len(scheduler.timesteps))]
    step = scheduler.step

    def run(x: Tensor) -> int:
        if hasattr(scheduler, "set_begin_index"):  # diffusers' DDPM and DDIM find their place by the timestep
            scheduler.set_begin_index(SKIPPED * 2)
            scheduler._step_index = None
        if as_output:
            for t in times:
                x = step(output, t, x, **kwargs).prev_sample
        else:
            for t in times:
                x = step(output, t, x, return_dict=False, **kwargs)[0]
        return len(times)

    return run


def bare_loop(name: str, scheduler: Any, output: Tensor, want_x_0: bool) -> Callable[[Tensor], int]:
    table = numbers(scheduler)

    def run(x: Tensor) -> int:
        step = BARE[name](table, want_x_0, scheduler)
        for i in middle(len(table)):
            x = step(i, x, output)[0]
        return len(middle(len(table)))

    return run


def fastest(loops: list[Callable[[Tensor], int]], start: Tensor, repeats: int) -> list[float]:
    """Microseconds per step of each, interleaved."""
    best = [math.inf] * len(loops)
    for loop in loops:
        loop(start)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for k, loop in enumerate(loops):
                begin = time.thread_time()
                steps = loop(start)
                best[k] = min(best[k], (time.thread_time() - begin) / steps)
    finally:
        gc.enable()
    return [1e6 * b for b in best]


def measure(name: str, shape: tuple[int, ...], as_output: bool, repeats: int) -> tuple[float, float, float | None]:
    """(bare, ours, diffusers'), microseconds per step."""
    ours, theirs = make(name)
    generator = torch.Generator().manual_seed(0)
    start, output = torch.randn(shape, generator=generator), 0.1 * torch.randn(shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the consistency rule on this network
        ours.set_timesteps(STEPS)
    # what the solver keeps anyway is x_0; the others owe it only where it is returned
    loops = [bare_loop(name, ours, output, not as_output), loop_of(ours, output, as_output)]
    if theirs is not None:
        theirs.set_timesteps(STEPS)
        if hasattr(theirs, "is_scale_input_called"):
            theirs.is_scale_input_called = True
        loops.append(loop_of(theirs, output, as_output))
    times = fastest(loops, start, repeats)
    return times[0], times[1], times[2] if theirs is not None else None


def measure_noising(name: str, shape: tuple[int, ...], repeats: int) -> tuple[float, float, float]:
    """(bare, ours, diffusers') of noising a batch at a time of its own each, microseconds."""
    theirs = diffusers.DDPMScheduler(**SD) if name == "ddpm" else diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = (DDPMScheduler if name == "ddpm" else SCHEDULERS[name]).from_config(theirs.config)
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    index = torch.randint(0, 1000, shape[:1], generator=generator)
    view = (-1,) + (1,) * (len(shape) - 1)
    if name == "ddpm":
        times = index
        alphas, sigmas = theirs.alphas_cumprod.sqrt(), (1 - theirs.alphas_cumprod).sqrt()
        bare = lambda: torch.addcmul(alphas[times].view(view) * x, sigmas[times].view(view), noise)
        noised = lambda: theirs.add_noise(x, noise, times)
    else:
        times = theirs.timesteps[index]

        def bare() -> Tensor:
            t = (times * 0.001).view(view)
            return torch.addcmul((1 - t) * x, t, noise)

        noised = lambda: theirs.scale_noise(x, times, noise)

    def repeated(call: Callable[[], Tensor]) -> Callable[[Tensor], int]:
        def run(_: Tensor) -> int:
            for _ in range(10):
                call()
            return 10

        return run

    return tuple(fastest([repeated(f) for f in (bare, lambda: ours.add_noise(x, noise, times), noised)], x, repeats))


# ------------------------------------------------------------------------------------------------------------------------------- the table


def row(cells: list[str], markdown: bool) -> str:
    return "| " + " | ".join(cells) + " |" if markdown else f"{cells[0]:<22}" + "".join(f"{c:>15}" for c in cells[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--core", type=int, default=1, help="pinned to this core where the system can; -1 for none")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.core >= 0 and hasattr(os, "sched_setaffinity") and args.core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {args.core})
    names = args.only.split(",") if args.only else list(BARE)
    if unknown := sorted(set(names) - set(BARE)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BARE)}")
    with torch.no_grad():
        for shape in SHAPES:
            for form in ("output", "tuple"):
                print(f"\n{shape}, {form}, us per step")
                head = ["scheduler", "bare", "ours", "ours / bare", "over", "diffusers", "theirs / ours"]
                print(row(head, args.markdown))
                if args.markdown:
                    print("|" + "---|" * len(head))
                for name in names:
                    bare, ours, theirs = measure(name, shape, form == "output", args.repeats)
                    cells = [f"{bare:.1f}", f"{ours:.1f}", f"{ours / bare:.2f}", f"{ours - 1.3 * bare:+.1f}"]
                    cells += ["-", "-"] if theirs is None else [f"{theirs:.1f}", f"{theirs / ours:.1f}"]
                    print(row([name, *cells], args.markdown), flush=True)
        if not args.only:
            for name in ("ddpm", "flow_match_euler"):
                for shape in ((64, 3, 32, 32), *SHAPES[:2]):
                    bare, ours, theirs = measure_noising(name, shape, args.repeats)
                    print(
                        f"noising {shape} at a time each, {name}: bare {bare:.1f} us, ours {ours:.1f} ({ours / bare:.2f} of bare), "
                        f"diffusers {theirs:.1f} ({theirs / bare:.1f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
