"""What the sampling loop costs without its network, per step and with guidance, beside diffusers' own loop.

    python benchmarks/pipeline_overhead.py [--scheduler ddim|ddpm|euler] [--repeats 15]

Each with its own library's scheduler of the name. The network is a U-Net of diffusers' class whose forward returns a ready tensor; text
embeddings and latents are given, the decoder is left out.
The cost of a step is the difference of a call of 150 steps and one of 50, over 100, so what a call costs once does not count. One thread,
the process's CPU time, interleaved A/B, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel

import gen_pipelines

CLASSES = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler": "EulerDiscreteScheduler"}
OURS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "euler": "EulerScheduler"}


class ReadyUNet(diffusers.UNet2DConditionModel):
    """Answers every call with a tensor that is there already."""

    answer: dict[int, torch.Tensor] = {}

    def forward(self, sample: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
        if len(sample) not in self.answer:
            self.answer[len(sample)] = torch.randn(sample.shape)
        return (self.answer[len(sample)],)


def build(scheduler: str) -> tuple:
    unet = ReadyUNet(
        sample_size=32,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4).eval()
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, bos_token_id=0, eos_token_id=7
        )
    )
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    config |= {"clip_sample": False} if scheduler != "euler" else {"timestep_spacing": "leading"}
    theirs = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=getattr(diffusers, CLASSES[scheduler])(**config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    ours = gen_pipelines.LatentTextToImagePipeline(
        vae, text, None, getattr(gen_pipelines, OURS[scheduler]).from_config(theirs.scheduler.config), unet=unet
    )
    embeds = torch.randn(2, 1, 77, 8)
    options = {"prompt_embeds": embeds[:1, 0], "negative_prompt_embeds": embeds[1:, 0], "latents": torch.randn(1, 4, 32, 32)}
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    return tuple(lambda n, p=p: p(num_inference_steps=n, guidance_scale=5.0, output_type="latent", **options) for p in (theirs, ours))


def per_step(call) -> float:
    """Microseconds."""
    times = []
    for steps in (50, 150):
        start = time.process_time()
        call(steps)
        times.append(time.process_time() - start)
    return 1e6 * (times[1] - times[0]) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheduler", choices=[*CLASSES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for scheduler in CLASSES if args.scheduler == "all" else [args.scheduler]:
        theirs, ours = build(scheduler)
        theirs(5), ours(5)
        pairs = [(per_step(theirs), per_step(ours)) for _ in range(args.repeats)]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(y / x for x, y in pairs)
        print(
            f"{scheduler}: diffusers {a:.0f} us per step, ours {b:.0f} us, ratio {ratio:.2f}; latents 1 x 4 x 32 x 32, guidance", flush=True
        )


if __name__ == "__main__":
    main()
