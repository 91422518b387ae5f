"""Every objective of the diffusion family as a recipe: exact resume, what is saved and drawn, two ranks against one, pairs for reflow."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gen_pipelines import AutoPipeline, DDIMScheduler, DDPMScheduler, DiffusionImagePipeline, FlowMatchEulerScheduler, HeunScheduler
from gen_pipelines.training.config import Recipe, build, load_recipe
from gen_pipelines.training.pairs import PairData, draw_pairs
from gen_pipelines.training.run import train
from gen_pipelines.training.state import checkpoints, load_checkpoint
from gen_pipelines.training.tasks import make_task
from tests.training.test_diffusion_image import UNET, digits, recipe, written  # noqa: F401
from tests.training.test_trainer import content
from tests.training.tiny import text_to_image_recipe

PLAIN = {**UNET, "sample_size": 8, "dropout": 0.0, "block_out_channels": [8, 16], "norm_num_groups": 4}
VE = {"type": "ve", "sigma_min": 0.01, "sigma_max": 20.0}
EDM = {"path": {"type": "edm"}, "prediction": "edm", "sigma_data": 0.5, "time_input": "250 log(sigma)"}
LIKELIHOOD = {"time_density": "uniform_lambda", "weighting": "likelihood"}

# name -> (scheduler, objective, denoiser): what differs from the recipe of a DDPM
DENOISING = {
    "score_sde_vp": (
        {"class": "ScoreSDEScheduler", "parameterization": {"path": {"type": "vp_sde"}, "prediction": "epsilon"}},
        LIKELIHOOD,
        {},
    ),
    "score_sde_subvp": (
        {"class": "ScoreSDEScheduler", "parameterization": {"path": {"type": "sub_vp"}, "prediction": "score", "lambda_range": [-5, 7]}},
        LIKELIHOOD,
        {},
    ),
    "score_sde_ve": (
        {"class": "ScoreSDEScheduler", "correct_steps": 1, "parameterization": {"path": VE, "prediction": "score"}},
        {"weighting": "likelihood"},
        {"time_embedding_type": "fourier"},
    ),
    "edm": ({"class": "HeunScheduler", "parameterization": EDM}, {"time_density": "log_normal_sigma"}, {}),
    "v": ({"class": "DDPMScheduler", "prediction_type": "v_prediction"}, {"weighting": "min_snr"}, {}),
    "learned_variance": ({"class": "DDPMScheduler", "variance_type": "learned_range"}, {"bound": 0.001}, {"out_channels": 2}),
    "variational": ({"class": "DDPMScheduler", "variance_type": "fixed_large"}, {"simple": 0.0, "bound": 1.0}, {}),
    "flow_on_cosine": (
        {"class": "HeunScheduler", "parameterization": {"path": {"type": "cosine"}, "prediction": "flow_prediction"}},
        {"time_density": "logit_normal"},
        {},
    ),
    "flow_sinkhorn": ({"class": "FlowMatchEulerScheduler"}, {"coupling": "sinkhorn", "time_density": "mode"}, {}),
}
# name -> (teacher or start, model, objective)
DISTILLING = {
    "consistency_training": (None, {"denoiser": PLAIN}, {"start": 4, "end": 16}),
    "distillation_of_epsilon": ("ddpm", {}, {"target_decay": 0.9, "teacher_guidance": 2.0}),
    "distillation_of_a_flow": ("flow", {}, {"solver": "euler", "density": "log_normal"}),
    # a wide Huber: a narrow one divides by distances that are mostly rounding in an untrained network
    "distillation_by_lcm": ("flow", {}, {"rule": "lcm", "num_nodes": 10, "teacher_guidance": 2.0, "huber": 1.0}),
    "distillation_of_edm": ("edm", {"denoiser": {**PLAIN, "dropout": 0.1}}, {"weighting": "inverse_step"}),
    "reflow": ("flow", {}, {"huber": 0.1}),
    "one_step": ("ddpm", {}, {"one_step": True}),
}
SMALL_UNET = {
    "class": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16,
}  # fmt: skip
SMALL_SD3 = {
    "class": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
    "pooled_projection_dim": 16, "pos_embed_max_size": 8,
}  # fmt: skip
TEXT = {"unet_on_clip": SMALL_UNET, "sd3": SMALL_SD3}
KINDS = [*DENOISING, *DISTILLING, *TEXT, "latent_consistency", "latent_consistency_told"]


def network(settings: dict, classes: int | None = 11):
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = UNet2DModel(**{k: v for k, v in settings.items() if k != "class"}, num_class_embeds=classes)
        for parameter in made.parameters():  # an untrained U-Net says 0
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def stock(tmp_path_factory, shapes, tiny_vae) -> dict[str, Path]:
    """Folders to learn from: denoisers of three kinds, pairs of two of them, text-to-image pipelines with two networks."""
    root = tmp_path_factory.mktemp("stock")
    schedulers = {
        "ddpm": DDPMScheduler(),
        "flow": FlowMatchEulerScheduler(),
        "edm": HeunScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
    }
    folders = {}
    for name, scheduler in schedulers.items():
        folders[name] = root / name
        pipe = DiffusionImagePipeline(scheduler, unet=network(PLAIN), null_class=10)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folders[name])
        if name != "edm":
            pipe.scheduler = DDIMScheduler()  # any sampler
            folders[f"{name} pairs"] = root / f"{name}-pairs"
            draw_pairs(pipe, folders[f"{name} pairs"], 24, num_inference_steps=2, shard_size=16, batch_size=5)
    for name, denoiser in {"unet": SMALL_UNET, "pixart": None}.items():
        settings = text_to_image_recipe(shapes, tiny_vae, steps=1, checkpoint_every=0)
        settings["model"] |= {} if denoiser is None else {"denoiser": denoiser}
        folders[name] = root / name
        train(written(settings, root), output_dir=folders[name])
    return folders


def settings_of(kind: str, stock: dict[str, Path], digits: Path, shapes: Path, vae: Path) -> dict:  # noqa: F811
    if kind in DENOISING:
        scheduler, objective, denoiser = copy.deepcopy(DENOISING[kind])
        settings = recipe(digits, {**PLAIN, **denoiser})
        settings["model"]["scheduler"] = scheduler
        settings["objective"] |= objective
        return settings
    if kind in DISTILLING:
        source, model, objective = copy.deepcopy(DISTILLING[kind])
        settings = recipe(digits)
        straight = kind in ("reflow", "one_step")
        settings["task"] = "reflow" if straight else "consistency"
        settings["model"] = model | ({} if source is None else {"start" if straight else "teacher": str(stock[source])})
        settings["objective"] |= objective
        settings["sample"] = {"pictures": 10}
        if straight:
            settings["data"] = {"name": str(stock[f"{source} pairs"])}
        return settings
    settings = text_to_image_recipe(shapes, vae, steps=4)
    settings["sample"] = {"pictures": 4, "steps": 2}
    settings["model"]["text_encoder"]["attention_dropout"] = 0.0
    if kind in TEXT:
        settings["model"]["denoiser"] = copy.deepcopy(TEXT[kind])  # the network's block alone
        return settings
    told = kind.endswith("told")
    settings["task"] = "latent_consistency"
    settings["model"] = {"teacher": str(stock["unet" if told else "pixart"]), "guidance_embedding": 8 if told else 0}
    settings["objective"] = {"num_nodes": 10, "guidance": 2.0} | ({"guidance_max": 6.0} if told else {})
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stop_and_resume_is_an_unbroken_run_bit_for_bit_and_the_result_draws(kind, stock, digits, shapes, tiny_vae, tmp_path):  # noqa: F811
    settings = settings_of(kind, stock, digits, shapes, tiny_vae)
    settings["ema"] = {"decay": 0.9, "also": [0.5]}
    path = written(settings, tmp_path)
    overrides = ["loop.steps=3", "loop.checkpoint_every=2", "loop.sample_every=3"]
    train(path, overrides, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(checkpoints(tmp_path / "parts" / "checkpoints")[-1])  # as if the run had been killed after step 2
    train(path, overrides, tmp_path / "parts", resume=True)
    ends = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts")]
    assert ends[0].name == "step-00000003" and content(ends[0]) == content(ends[1])
    assert list((tmp_path / "whole" / "samples").iterdir())
    pipe, other = AutoPipeline.from_pretrained(tmp_path / "whole"), AutoPipeline.from_pretrained(tmp_path / "whole" / "averages" / "0.5")
    task = make_task(build(Recipe, settings, "recipe"))
    if kind.startswith("latent_consistency"):  # predicts what its teacher does, and jumps
        wanted = task.teacher.parameterization.with_(jumps=True)
    else:
        wanted = task.scheduler.parameterization
    assert pipe.parameterization == wanted
    kept, changed = (next(iter(one.denoiser.parameters())) for one in (pipe, other))
    assert not torch.equal(kept, changed)
    for one in (pipe, other):
        one.set_progress_bar_config(disable=True)
        asks = "prompt" in inspect.signature(type(one).__call__).parameters
        drawn = one("a red circle", num_inference_steps=2) if asks else one(class_labels=3)
        assert drawn.images[0].size in ((8, 8), (16, 16))
    if kind == "v":  # an average kept beside is the one that a run of its own would have had
        train(path, [*overrides, "ema={decay: 0.5}"], tmp_path / "alone")
        files = [tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors" for name in ("alone", "whole/averages/0.5")]
        assert files[0].read_bytes() == files[1].read_bytes()


GRADIENTS = """
import sys, json
import gen_pipelines.training.trainer as trainer
from safetensors.torch import save_file
from gen_pipelines.training.run import train
original = trainer.Trainer._update
def update(self, phase, batches):
    optimizer = self.optimizers[phase.name]
    step = optimizer.step
    def keep(*arguments, **options):
        if self.accelerator.is_main_process and self.step == 0:
            every = {f"{n}.{k}": p.grad for n, net in self.networks.items() for k, p in net.named_parameters()}
            save_file({name: g.clone() for name, g in every.items() if g is not None}, str(self.output_dir) + ".gradients")
        return step(*arguments, **options)
    optimizer.step = keep
    try:
        return original(self, phase, batches)
    finally:
        optimizer.step = step
trainer.Trainer._update = update
for recipe, output in json.loads(sys.argv[1]):
    train(recipe, ["loop.steps=2", "loop.checkpoint_every=2", "loop.max_grad_norm=null", "optimizer.eps=1e-3"], output)
"""
# a coupling is of one process's share of the batch: its groups are others, and so are its gradients
ON_TWO = [kind for kind in KINDS if kind != "flow_sinkhorn"]


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(stock, digits, shapes, tiny_vae, tmp_path):  # noqa: F811
    """Two gloo processes and one with the whole batch: times, noise, pairs and scales of guidance belong to the samples."""
    script = tmp_path / "run.py"
    script.write_text(GRADIENTS)
    paths = {}
    for kind in ON_TWO:
        settings = settings_of(kind, stock, digits, shapes, tiny_vae)
        if "denoiser" in settings["model"]:
            settings["model"]["denoiser"] |= {"dropout": 0.0} if "dropout" in settings["model"]["denoiser"] else {}
        paths[kind] = written(settings, tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    launchers = {"one": [sys.executable], "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
    for name, launcher in launchers.items():
        todo = json.dumps([[str(path), str(tmp_path / name / kind)] for kind, path in paths.items()])
        done = subprocess.run([*launcher, str(script), todo], env=environment, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ON_TWO:
        one, two = (load_file(tmp_path / name / f"{kind}.gradients") for name in launchers)
        assert one.keys() == two.keys() and one
        scale = max(gradient.abs().max().item() for gradient in one.values())
        assert scale > 0
        for name in one:
            where = lambda text, n=name, k=kind: f"{k}, {n}: {text}"
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5 * scale, msg=where)
        weights = [load_checkpoint(checkpoints(tmp_path / name / kind / "checkpoints")[-1])[0] for name in launchers]
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, n=name, k=kind: f"{k}, {n}: {text}")


@pytest.mark.parametrize("name", ["score_sde_vp", "score_sde_subvp", "score_sde_ve", "edm", "ddpm_learned_variance", "consistency"])
def test_the_recipes_for_mnist_fit_their_budget(name, digits):  # noqa: F811
    path = Path(__file__).parents[2] / "configs" / "mnist" / f"{name}.yaml"
    task = make_task(load_recipe(path, [f"data.name={digits}"]))
    assert sum(p.numel() for p in task.networks["denoiser"].parameters()) <= 1_000_000
    pipe = task.pipeline(task.networks)
    assert (pipe.picture_size, pipe.latents_shape(1), pipe.null_class) == ((28, 28), (1, 1, 32, 32), 10)


@pytest.mark.parametrize("name", ["consistency_distillation", "reflow"])
def test_the_recipes_that_need_a_model_take_one(name, stock, digits):  # noqa: F811
    path = Path(__file__).parents[2] / "configs" / "mnist" / f"{name}.yaml"
    where = {
        "reflow": [f"model.start={stock['flow']}", f"data.name={stock['flow pairs']}"],
        "consistency_distillation": [f"model.teacher={stock['flow']}", f"data.name={digits}", "data.resolution=8"],
    }
    task = make_task(load_recipe(path, where[name]))
    assert (task.scheduler.parameterization.path.name, task.scheduler.parameterization.prediction) == ("linear", "flow_prediction")


WRONG = {
    "no teacher": ("latent_consistency", {"model": {"teacher": None}}, "model.teacher is missing"),
    "another kind": ("latent_consistency", {"model": {"teacher": "flow"}}, "is a DiffusionImagePipeline; this task learns from a Latent"),
    "range": ("latent_consistency", {"objective": {"guidance_max": 9.0}}, "set model.guidance_embedding"),
    "not told": ("latent_consistency", {"model": {"guidance_embedding": 8}}, "has no input for the guidance scale"),
    "no start": ("reflow", {"model": {"start": None}}, "model.start is missing"),
    "no pairs": ("reflow", {"data": {"name": "."}}, "holds no pairs .* gen-pipelines pairs"),
    "bound": ("variational", {"objective": {"weighting": "min_snr"}}, "objective.weighting: the variational bound"),
    "simple": ("v", {"objective": {"simple": 0.5}}, "set objective.bound too"),
    "outputs": ("learned_variance", {"model": {"denoiser": PLAIN}}, "out_channels: 1, but the output has 2"),
    "denoises": ("consistency_training", {"model": {"scheduler": {"class": "DDIMScheduler"}}}, "prediction 'consistency'"),
    "no one to guide": ("consistency_training", {"objective": {"teacher_guidance": 2.0}}, "give model.teacher"),
    "rule": ("consistency_training", {"objective": {"rule": "lcm"}}, "give model.teacher"),
    "pairs of lcm": ("distillation_by_lcm", {"objective": {"start": 5}}, "objective.start: with rule lcm"),
    "target": ("distillation_of_a_flow", {"objective": {"target_decay": 1.0}}, "from 0 .no average. to below 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_one_error_before_any_training(name, stock, digits, shapes, tiny_vae):  # noqa: F811
    kind, changes, message = WRONG[name]
    settings = settings_of(kind, stock, digits, shapes, tiny_vae)
    for group, values in copy.deepcopy(changes).items():
        settings[group] |= {key: str(stock[value]) if key == "teacher" and value else value for key, value in values.items()}
    with pytest.raises(ValueError, match=message):
        make_task(build(Recipe, settings, "recipe"))


# ----------------------------------------------------------------------------------------------------------------------------- pairs


def flow_pipe():
    pipe = DiffusionImagePipeline(FlowMatchEulerScheduler(), unet=network(PLAIN), null_class=10)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pairs_are_the_same_however_they_were_drawn_and_a_stopped_run_goes_on(tmp_path):
    pipe, options = flow_pipe(), {"seed": 5, "num_inference_steps": 2, "shard_size": 4}
    assert draw_pairs(pipe, tmp_path / "a", 10, batch_size=10, **options) == 10
    assert draw_pairs(pipe, tmp_path / "b", 6, batch_size=3, rank=0, ranks=2, **options) == 4     # two processes, then more pairs
    assert draw_pairs(pipe, tmp_path / "b", 6, batch_size=3, rank=1, ranks=2, **options) == 2
    before = (tmp_path / "b" / "pairs-00000.safetensors").stat().st_mtime_ns
    assert draw_pairs(pipe, tmp_path / "b", 10, batch_size=2, **options) == 6
    assert (tmp_path / "b" / "pairs-00000.safetensors").stat().st_mtime_ns == before
    a, b = PairData(tmp_path / "a"), PairData(tmp_path / "b")
    assert len(a) == len(b) == 10 and a.settings == b.settings
    for item in range(10):
        one, two = a[(item, 0)], b[(item, 0)]
        assert torch.equal(one["noise"], two["noise"]) and one["label"] == two["label"] == item
        torch.testing.assert_close(one["sample"], two["sample"])
        assert torch.equal(one["noise"][None], torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5 + item)))
    guided = DiffusionImagePipeline(FlowMatchEulerScheduler(), unet=pipe.unet, null_class=10, default_guidance_scale=3.0)
    guided.set_progress_bar_config(disable=True)
    for name, scale, same in (("plain", 1.0, True), ("usual", None, False)):
        draw_pairs(guided, tmp_path / name, 2, guidance_scale=scale, **options)
        assert torch.allclose(PairData(tmp_path / name)[(1, 0)]["sample"], a[(1, 0)]["sample"], atol=1e-5) == same
    again = pipe(class_labels=7, latents=a[(7, 0)]["noise"][None], num_inference_steps=2, output_type="latent").images[0]
    torch.testing.assert_close(a[(7, 0)]["sample"], again)


@pytest.mark.parametrize("draws", [False, True])
def test_a_sampler_that_draws_noise_is_warned_of(draws, tmp_path, caplog):
    pipe = flow_pipe()
    pipe.scheduler = FlowMatchEulerScheduler(stochastic_sampling=draws)
    draw_pairs(pipe, tmp_path, 2, num_inference_steps=3)
    assert ("adds noise on its way" in caplog.text) == draws


def test_pairs_of_other_settings_and_half_finished_ones_are_refused(tmp_path):
    pipe = flow_pipe()
    draw_pairs(pipe, tmp_path, 4, num_inference_steps=1, shard_size=4)
    with pytest.raises(ValueError, match="pairs of other settings .num_inference_steps: 1 there, 2 now."):
        draw_pairs(pipe, tmp_path, 4, num_inference_steps=2, shard_size=4)
    other = flow_pipe()
    other.scheduler = FlowMatchEulerScheduler(timestep_spacing="trailing")
    with pytest.raises(ValueError, match="scheduler_settings: None there, {'timestep_spacing': 'trailing'} now"):
        draw_pairs(other, tmp_path, 4, num_inference_steps=1, shard_size=4)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # safetensors would leave its files to their owner alone
    draw_pairs(pipe, tmp_path, 8, num_inference_steps=1, shard_size=4)
    (tmp_path / "pairs-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="00001.safetensors has 0 of 4 pairs"):
        PairData(tmp_path)
    (tmp_path / "pairs-00001.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(ValueError, match="damaged shard"):
        PairData(tmp_path)
    with pytest.raises(ValueError, match="DiffusionImagePipeline"):
        draw_pairs(object(), tmp_path / "other", 4)


def test_the_command_draws_pairs_and_says_where(stock, tmp_path, capsys):
    from gen_pipelines.cli.main import main

    words = ["pairs", str(stock["ddpm"]), "--out", str(tmp_path / "p"), "--num", "3", "--steps", "2", "--scheduler", "ddim"]
    assert main([*words, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "p")
    settings = PairData(tmp_path / "p").settings
    assert (settings["scheduler"], settings["model"], settings["prediction"]) == ("DDIMScheduler", "ddpm", "epsilon")
    assert settings["model_revision"] and settings["seed"] == 0
    assert main([*words, "--steps", "0"]) == 2
