"""A guided text-to-image step beside diffusers' own, as ratios in one run.

    python benchmarks/text_to_image_step.py [--model unet|dit|both] [--steps 8] [--repeats 5] [--threads 1] [--dtype bfloat16]
                                            [--fast-matmul] [--tokens 77]

Both pipelines run whole calls of `--steps` steps on the same weights, latents and text embeddings, interleaved A/B. Two ratios are printed:
of steps (the time from one step's end to the next one's, medians over all calls), and of whole calls, in which what is computed once (text
keys and values) is spread over few steps. With one thread the process's CPU time is taken, so other work on the machine matters less.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import time

import torch


def build_unet() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(  # Stable Diffusion's shape at 0.3 of its width
        sample_size=32, block_out_channels=(96, 192, 384, 384), cross_attention_dim=768, attention_head_dim=8, layers_per_block=2
    ).eval()


def build_dit() -> torch.nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=32, num_layers=12, num_attention_heads=6, attention_head_dim=64, cross_attention_dim=384, caption_channels=768,
        in_channels=4, out_channels=4, patch_size=2, use_additional_conditions=False,
    ).eval()  # fmt: skip


def shared_parts() -> dict:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    return {"vae": vae.eval()}


def pair(model: str, dtype: torch.dtype, tokens: int):
    """diffusers' pipeline and ours, each with a function from a number of steps to latents; and the millions of parameters."""
    import copy

    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    import gen_pipelines

    network = build_unet() if model == "unet" else build_dit()
    # one object in float32: where weights happen to lie in memory moves a step by several per cent
    ours_network = network if dtype == torch.float32 else copy.deepcopy(network).to(dtype)
    generator = torch.Generator().manual_seed(0)
    embeds, negative = torch.randn(2, 1, 77, 768, generator=generator)
    latents = torch.randn(1, 4, 32, 32, generator=generator)
    mask = torch.zeros(1, 77, dtype=torch.bool)
    mask[:, :tokens] = True
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, bos_token_id=0, eos_token_id=7
        )
    )
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "steps_offset": 1}
    scheduler = diffusers.DDIMScheduler(**config)
    parts = shared_parts()
    if model == "unet":
        theirs = diffusers.StableDiffusionPipeline(
            vae=parts["vae"], text_encoder=text, tokenizer=None, unet=network, scheduler=scheduler, safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        their_options = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
        our_options = dict(their_options)
    else:
        theirs = diffusers.PixArtAlphaPipeline(
            tokenizer=None, text_encoder=text, vae=parts["vae"], transformer=network, scheduler=scheduler
        )
        their_options = {
            "prompt_embeds": embeds, "negative_prompt_embeds": negative, "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "negative_prompt": None, "use_resolution_binning": False, "height": 256, "width": 256,
        }  # fmt: skip
        our_options = {k: v for k, v in their_options.items() if k not in ("negative_prompt", "use_resolution_binning")}
    ours = gen_pipelines.LatentTextToImagePipeline(
        parts["vae"], text, None, diffusers.DDIMScheduler(**config), **{"unet" if model == "unet" else "transformer": ours_network}
    )
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)

    def run(pipe, options):
        return lambda steps: pipe(num_inference_steps=steps, guidance_scale=5.0, latents=latents, output_type="latent", **options).images

    return theirs, run(theirs, their_options), ours, run(ours, our_options), sum(p.numel() for p in network.parameters()) / 1e6


def record_steps(pipe, clock) -> list[float]:
    """A list to which every end of a step of the pipeline is appended."""
    ends: list[float] = []
    step = pipe.scheduler.step

    @functools.wraps(step)
    def timed(*args, **kwargs):
        result = step(*args, **kwargs)
        ends.append(clock())
        return result

    pipe.scheduler.step = timed
    return ends


def measure(call, ends: list[float], steps: int, clock) -> tuple[float, list[float]]:
    """Seconds of a whole call, and of each of its steps but the first."""
    ends.clear()
    start = clock()
    call(steps)
    return clock() - start, [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["unet", "dit", "both"], default="both")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=77, help="text tokens that are not padding (the DiT takes a mask)")
    parser.add_argument("--dtype", default="float32", help="of our network; diffusers' stays float32")
    parser.add_argument("--fast-matmul", action="store_true", help="our calls inside fast_cpu_matmul()")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter

    from gen_pipelines import fast_cpu_matmul

    for model in ["unet", "dit"] if args.model == "both" else [args.model]:
        torch.manual_seed(0)
        their_pipe, theirs, our_pipe, ours, millions = pair(model, getattr(torch, args.dtype), args.tokens)
        their_ends, our_ends = record_steps(their_pipe, clock), record_steps(our_pipe, clock)
        around = fast_cpu_matmul if args.fast_matmul else contextlib.nullcontext
        difference = (theirs(2) - ours(2)).abs().max().item()
        calls, their_steps, our_steps = [], [], []
        for _ in range(args.repeats):
            a, steps = measure(theirs, their_ends, args.steps, clock)
            their_steps += steps
            with around():
                b, steps = measure(ours, our_ends, args.steps, clock)
            our_steps += steps
            calls.append(b / a)
        name = f"{model} {millions:.0f}M, {args.dtype}{' + fast_cpu_matmul' if args.fast_matmul else ''}, {args.tokens} tokens"
        a, b = statistics.median(their_steps), statistics.median(our_steps)
        print(
            f"{name}: ours / diffusers fp32 = {b / a:.3f} per step ({1e3 * b:.0f} / {1e3 * a:.0f} ms; "
            f"best {min(our_steps) / min(their_steps):.3f}), "
            f"{statistics.median(calls):.3f} per call of {args.steps}; latents differ by {difference:.1e} after 2 steps",
            flush=True,
        )


if __name__ == "__main__":
    main()
