"""How many evaluations of the network a sampler needs: the distance of its pictures from those in which the probability flow ends.

    python benchmarks/samplers.py [--models bundled:emoji bundled:mnist-ddpm] [--num 32] [--evaluations 4,8,16,32] [--out samplers.png]

All samplers without noise follow one equation, from the same noise to the same picture, and differ in their error alone. So no data set is
needed, and few pictures say much. The error is the root mean square over pixels in [0, 1], of the median picture: where two paths part, a
small error becomes another picture, and a mean would be about these few. The reference is Heun's method with ten times the evaluations.
Samplers are compared at equal evaluations: Heun's method takes two in a step. Samplers with noise do not end in that picture;
`gen-pipelines evaluate --scheduler a,b --steps 10,20` compares what they draw with data.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from gen_pipelines import AutoPipeline
from gen_pipelines.evaluation.sampling import CountRows, denoiser_of
from gen_pipelines.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerScheduler,
    FlowMatchEulerScheduler,
    FlowMatchHeunScheduler,
    HeunScheduler,
    UniPCScheduler,
)

# label: (scheduler, evaluations in a step)
SAMPLERS: dict[str, tuple[Any, int]] = {
    "DDIM": (DDIMScheduler, 1),
    "Euler": (EulerScheduler, 1),
    "flow-matching Euler": (FlowMatchEulerScheduler, 1),
    "Heun": (HeunScheduler, 2),
    "flow-matching Heun": (FlowMatchHeunScheduler, 2),
    "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, 1),
    "DPM-Solver++ 3M": (lambda: DPMSolverMultistepScheduler(solver_order=3), 1),
    "UniPC": (UniPCScheduler, 1),
}
CAPTIONS = ["a red apple", "a rocket", "a blue heart", "a house", "a banana", "a smiling face", "a castle", "an owl"]


def draw(pipe: Any, num: int, steps: int, guidance: float | None) -> tuple[Tensor, float]:
    """Pictures of noises 0 to num - 1, (num, C, H, W) in [0, 1], and the network's evaluations for each."""
    conditions: dict[str, Any] = {"batch_size": num}
    if type(pipe).__name__ == "LatentTextToImagePipeline":
        conditions = {"prompt": [CAPTIONS[i % len(CAPTIONS)] for i in range(num)]}
    elif pipe.config.null_class is not None:
        conditions = {"class_labels": [i % pipe.config.null_class for i in range(num)]}
    if guidance is not None:
        conditions["guidance_scale"] = guidance
    generators = [torch.Generator().manual_seed(i) for i in range(num)]
    with CountRows(denoiser_of(pipe)) as counted:
        pictures = pipe(**conditions, num_inference_steps=steps, generator=generators, output_type="pt").images
    return pictures.double(), counted.rows / num


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bundled:emoji", "bundled:mnist-ddpm", "bundled:mnist-flow"])
    parser.add_argument("--num", type=int, default=32, help="noises")
    parser.add_argument("--evaluations", default="4,8,16,32", help="steps of a sampler with one evaluation in each; even numbers")
    parser.add_argument("--guidance", type=float, default=None, help="default: the model's; more than 1 doubles the evaluations")
    parser.add_argument("--out", default="samplers.png")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [int(number) for number in arguments.evaluations.split(",")]
    figure, axes = plt.subplots(1, len(arguments.models), figsize=(5 * len(arguments.models), 4.2), squeeze=False)
    for axis, model in zip(axes[0], arguments.models, strict=True):
        pipe = AutoPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(desc=model, leave=False)
        pipe.scheduler = HeunScheduler()
        reference, _ = draw(pipe, arguments.num, 5 * max(steps), arguments.guidance)
        print(f"\n{model}: error after evaluations of the network\n\n| sampler |" + " | ".join(f" {n}" for n in steps) + " |")
        print("|---|" + "---:|" * len(steps))
        for label, (scheduler, each) in SAMPLERS.items():
            pipe.scheduler = scheduler()
            cells, curve = [], []
            for n in steps:
                pictures, evaluations = draw(pipe, arguments.num, n // each, arguments.guidance)
                error = (pictures - reference).square().flatten(1).mean(1).sqrt().median().item()
                cells.append(f"{error:.4f}")
                curve.append((evaluations, error))
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
            axis.loglog(*zip(*curve, strict=True), marker="o", markersize=4, label=label)
        axis.set(title=model, xlabel="evaluations of the network per picture", ylabel="error of the median picture")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=80)
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
