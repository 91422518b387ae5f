"""Ours inside diffusers' own pipelines, by `from_config(pipe.scheduler.config)`: the right samples, and the same after saving and loading.

Stable Diffusion's pipeline is in `test_bridge.py`, where its pictures are compared with those of our own pipeline.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import diffusers
import numpy as np
import pytest
import torch
from analytic import sample
from torch.testing import assert_close

import gen_pipelines
from gen_pipelines import BridgedScheduler
from gen_pipelines.processes import Parameterization
from gen_pipelines.schedulers import SCHEDULERS, DDIMScheduler
from gen_pipelines.testing import GaussianOracle

pytestmark = pytest.mark.filterwarnings("ignore:ConsistencyScheduler on a network that predicts:UserWarning")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DATA = GaussianOracle(mean=0.1, std=0.25)  # its pictures lie in [-1, 1], which these pipelines clamp to
EVERY = pytest.mark.parametrize("name", SCHEDULERS)


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def make_sd():
    return diffusers.StableDiffusionPipeline(
        vae=conftest.make_vae(), text_encoder=conftest.make_text_encoder(), tokenizer=conftest.make_tokenizer(), unet=conftest.make_unet(),
        scheduler=diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def make_sd3():
    transformer = seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=16,
        )
    )  # fmt: skip
    vae = conftest.make_vae()
    vae.register_to_config(shift_factor=0.05)  # this pipeline's autoencoders have one
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def make_dit():
    """As published: a learned variance, which the pipeline cuts off before the scheduler sees it."""
    transformer = seeded(
        lambda: diffusers.DiTTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        )
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    return diffusers.DiTPipeline(transformer=transformer, vae=conftest.make_vae(), scheduler=scheduler)


def make_unet():
    return seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )
    )  # fmt: skip


def make_ddpm():
    return diffusers.DDPMPipeline(unet=make_unet(), scheduler=diffusers.DDPMScheduler())


PIPELINES = {"sd": make_sd, "sd3": make_sd3, "dit": make_dit, "ddpm": make_ddpm}


# ------------------------------------------------------------------------------------------------------------------- the right samples


class Knows:
    """Puts the ideal network for Gaussian data in place of a pipeline's forward pass, and the identity in place of its decoder."""

    def __init__(self, pipe, scheduler):
        self.ideal = DATA.network(scheduler.parameterization)
        self.double = getattr(pipe, "transformer", None) is not None and pipe.transformer.config.out_channels == 8
        network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
        network.forward = self.forward
        if hasattr(pipe, "vae"):
            scaling = pipe.vae.config.scaling_factor
            pipe.vae.decode = lambda z, *args, **kwargs: SimpleNamespace(sample=z * scaling)
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)

    def __call__(self, x, t):
        return self.ideal(x, t)

    def forward(self, sample=None, timestep=None, *args, hidden_states=None, **kwargs):
        x = hidden_states if sample is None else sample
        out = self.ideal(x, torch.as_tensor(timestep).reshape(-1)[0])
        out = torch.cat([out, torch.zeros_like(out)], 1) if self.double else out
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=out)


COUNT, STEPS = 12, 100


def samples(kind, pipe, generator):
    """(COUNT, C, h, w) in the data's own range, from standard normal noise that the generator draws first."""
    g = {"generator": generator, "num_inference_steps": STEPS}
    if kind in ("sd", "sd3"):
        latents = torch.randn(COUNT, 4, 8, 8, generator=generator)
        text = torch.zeros(COUNT, 5, 32)
        texts = {"prompt_embeds": text, "negative_prompt_embeds": text}
        if kind == "sd3":
            texts |= {"pooled_prompt_embeds": text[:, 0, :16], "negative_pooled_prompt_embeds": text[:, 0, :16]}
        return pipe(**texts, latents=latents, output_type="latent", height=16, width=16, **g).images
    if kind == "dit":
        images = pipe(class_labels=[0] * COUNT, guidance_scale=1.0, output_type="pt", **g).images
    else:
        images = torch.from_numpy(pipe(batch_size=COUNT, output_type="np", **g).images).permute(0, 3, 1, 2)
    return 2 * images - 1


@EVERY
@pytest.mark.parametrize("kind", PIPELINES)
def test_samples_are_right(kind, name):
    """Those of a loop written out by hand with the same network, and of the data's distribution.

    9,000 numbers or 2,304 (ddpm): standard errors of up to 0.005 in the mean and 0.004 in the spread; the rest of the tolerance is
    discretisation. The consistency rule on these networks has another distribution, by its nature.
    """
    pipe = PIPELINES[kind]()
    scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    network = Knows(pipe, scheduler)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # DiTPipeline and StableDiffusion3Pipeline give their scheduler no generator
        found = samples(kind, pipe, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(found.shape, generator=generator)
    twin = SCHEDULERS[name].from_config(scheduler.config)
    twin.set_timesteps(STEPS)
    x = start
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for t in twin.timesteps:
            x = twin.step(network(x, t), t, x, generator=None if kind in ("dit", "sd3") else generator).prev_sample
    x = x if kind in ("sd", "sd3") else x.clamp(-1, 1)
    assert_close(found, x, rtol=0, atol=2e-5)
    if name != "consistency":
        assert float(found.mean()) == pytest.approx(DATA.mean, abs=0.025)
        assert float(found.std()) == pytest.approx(DATA.std, abs=0.035)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_pipeline_by_assignment(eta):
    """Its constructor turns every scheduler into diffusers' DDIM; what is assigned afterwards stays. Only DDIM takes its eta."""
    pipe = diffusers.DDIMPipeline(unet=make_unet(), scheduler=DDIMScheduler.from_config(diffusers.DDPMScheduler().config))
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    network = Knows(pipe, pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    images = torch.from_numpy(pipe(batch_size=COUNT, num_inference_steps=STEPS, eta=eta, generator=generator, output_type="np").images)
    x = sample(DDIMScheduler.from_config(pipe.scheduler.config), network, (COUNT, 3, 8, 8), STEPS, dtype=torch.float32, eta=eta)
    assert_close(2 * images.permute(0, 3, 1, 2) - 1, x.clamp(-1, 1), rtol=0, atol=2e-5)
    assert float(x.mean()) == pytest.approx(DATA.mean, abs=0.025) and float(x.std()) == pytest.approx(DATA.std, abs=0.035)


# -------------------------------------------------------------------------------------------------------------------- saved and loaded

DRAW = '''
import torch

def draw(pipe):
    """Four steps of the real network; not every pipeline gives its scheduler the generator."""
    seeded = lambda s: torch.Generator().manual_seed(s)
    pipe.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 4, "generator": seeded(0), "output_type": "np"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if type(pipe).__name__ == "StableDiffusion3Pipeline":
            text, pooled = torch.randn(1, 5, 32, generator=seeded(1)), torch.randn(1, 16, generator=seeded(2))
            texts = {"prompt_embeds": text, "negative_prompt_embeds": -text}
            texts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
            return pipe(**texts, height=16, width=16, **common).images
        return pipe(class_labels=[3], **common).images if type(pipe).__name__ == "DiTPipeline" else pipe(**common).images
'''
LOAD = DRAW + '''
import sys, pathlib
assert "gen_pipelines" in sys.modules
import numpy as np, diffusers

for folder in sorted(p for p in pathlib.Path(sys.argv[1]).iterdir() if p.is_dir()):
    cls = getattr(diffusers, folder.name.split("-")[0])
    nothing = {k: None for k in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")}
    pipe = cls.from_pretrained(folder, **(nothing if cls is diffusers.StableDiffusion3Pipeline else {}))
    if cls is diffusers.DDIMPipeline:
        pipe.scheduler = gen_pipelines.DDIMScheduler.from_config(pipe.scheduler.config)
    assert isinstance(pipe.scheduler, (gen_pipelines.BridgedScheduler, *gen_pipelines.SCHEDULERS.values())), folder
    assert np.abs(draw(pipe) - np.load(str(folder) + ".npy")).max() < 1e-5, folder
    print("same", folder.name)
'''


@pytest.mark.slow  # starts a process, and loads forty pipelines
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' UniPC hands tensors to numpy
def test_whole_pipelines_survive_saving_in_a_fresh_process(tmp_path):
    """diffusers finds a third-party component only in an imported library: `import gen_pipelines` alone must do."""
    space = {}
    exec(DRAW, space)
    count = 0
    for make in (make_sd3, make_dit, make_ddpm):
        pipe = make()
        native = pipe.scheduler.config
        new = {name: cls.from_config(native) for name, cls in SCHEDULERS.items()}
        new["bridged"] = BridgedScheduler(diffusers.UniPCMultistepScheduler(), Parameterization.from_config(native))
        for name, scheduler in new.items():
            pipe.scheduler = scheduler
            folder = tmp_path / f"{type(pipe).__name__}-{name}"
            np.save(f"{folder}.npy", space["draw"](pipe))
            pipe.save_pretrained(folder)
            count += 1
    ddim = diffusers.DDIMPipeline(unet=make_unet(), scheduler=diffusers.DDPMScheduler())
    ddim.scheduler = DDIMScheduler.from_config(ddim.scheduler.config)
    np.save(tmp_path / "DDIMPipeline-ddim.npy", space["draw"](ddim))
    ddim.save_pretrained(tmp_path / "DDIMPipeline-ddim")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(gen_pipelines.__file__).parent.parent)}
    code = "import sys, gen_pipelines; assert 'torch' not in sys.modules\n" + LOAD
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == count + 1
