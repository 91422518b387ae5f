"""The loop on tiny recipes: exact resume after a real kill, two ranks against one, non-finite losses, what bad input gets."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from gen_pipelines.training.config import Recipe, build
from gen_pipelines.training.data import LatentData
from gen_pipelines.training.objectives.base import ObjectiveOutput, Phase
from gen_pipelines.training.run import train
from gen_pipelines.training.state import checkpoints, load_checkpoint
from gen_pipelines.training.trainer import Trainer
from tests.training.tiny import autoencoder_recipe, flow_recipe, realnvp_recipe, text_to_image_recipe

RECIPES = {
    "autoencoder": autoencoder_recipe,
    "flow": flow_recipe,
    "realnvp": realnvp_recipe,
    "latent_text_to_image": text_to_image_recipe,
}


def recipe_file(kind: str, folder: Path, shapes: Path, vae: Path, **loop) -> Path:
    settings = RECIPES[kind](shapes, vae, **loop) if kind == "latent_text_to_image" else RECIPES[kind](shapes, **loop)
    path = folder / f"{kind}-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def content(path: Path) -> dict:
    """Everything that a checkpoint holds, as one digest per part."""
    networks, averages, optimizers, ranks, about = load_checkpoint(path)

    def digest(value) -> str:
        if isinstance(value, torch.Tensor):
            value = (tuple(value.shape), value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        if isinstance(value, dict):
            value = sorted((str(key), digest(one)) for key, one in value.items())
        if isinstance(value, (list, tuple)) and any(isinstance(one, (torch.Tensor, dict, list, tuple)) for one in value):
            value = [digest(one) for one in value]
        return hashlib.sha256(repr(value).encode()).hexdigest()

    parts = {"networks": networks, "averages": averages, "optimizers": optimizers, "ranks": ranks}
    return {name: digest(part) for name, part in parts.items()} | {"step": about["step"], "micro_steps": about["micro_steps"]}


@pytest.mark.parametrize("kind", RECIPES)
def test_stop_and_resume_is_an_unbroken_run_bit_for_bit(kind, tmp_path, shapes, tiny_vae):
    """N steps = k steps, resume, N - k steps: weights, averages, optimiser, random state; and the saved pipeline."""
    whole = recipe_file(kind, tmp_path, shapes, tiny_vae, steps=6, gradient_accumulation_steps=2)
    train(whole, output_dir=tmp_path / "whole")
    train(whole, ["loop.steps=6"], tmp_path / "parts")
    newest = checkpoints(tmp_path / "parts" / "checkpoints")
    assert [path.name for path in newest] == ["step-00000004", "step-00000006"]  # keep_checkpoints
    for path in newest[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()  # as if the run had been killed after step 4
    train(whole, output_dir=tmp_path / "parts", resume=True)
    assert content(checkpoints(tmp_path / "whole" / "checkpoints")[-1]) == content(checkpoints(tmp_path / "parts" / "checkpoints")[-1])
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.safetensors") if "checkpoints" not in p.parts)
    assert files
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    log = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 3, 4, 5, 6]


RUN = "import sys; from gen_pipelines.training.run import train; train(sys.argv[1], sys.argv[3:], sys.argv[2], resume=True)"


def start(recipe: Path, output: Path, *overrides: str, ranks: int = 1, code: str = RUN) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    script = output.parent / f"{output.name}.py"
    script.write_text(code)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launcher, str(script), str(recipe), str(output), *overrides]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()  # waits, and closes the pipe


SLOW_SAVE = RUN.replace(
    "train(",
    """
import os, time, gen_pipelines.training.state as state
original = state.save_file
def save_file(tensors, path):
    original(tensors, path)
    if "step-00000006" in str(path) and "networks" in str(path):
        open(sys.argv[2] + ".saving", "w").close()
        time.sleep(60)
state.save_file = save_file
train(""",
    1,
)


@pytest.mark.slow
def test_sigkill_at_a_random_step_and_during_a_save(tmp_path, shapes, tiny_vae):
    """Killed twice without warning, the second time in the middle of writing a checkpoint, the run ends where the unbroken one ends."""
    recipe = recipe_file("latent_text_to_image", tmp_path, shapes, tiny_vae, steps=10, checkpoint_every=2)
    unbroken = tmp_path / "unbroken"
    finish(start(recipe, unbroken))

    killed = tmp_path / "killed"
    first = start(recipe, killed)
    while not checkpoints(killed / "checkpoints"):
        assert first.poll() is None
        time.sleep(0.01)
    time.sleep(int.from_bytes(os.urandom(1), "big") / 255 * 0.2)  # a random moment within the next steps
    kill(first)
    after_first = [path.name for path in checkpoints(killed / "checkpoints")]

    if "step-00000006" not in after_first and not any(name > "step-00000006" for name in after_first):
        second = start(recipe, killed, code=SLOW_SAVE)
        while not Path(f"{killed}.saving").exists():
            assert second.poll() is None
            time.sleep(0.01)
        kill(second)
        assert [path for path in (killed / "checkpoints").iterdir() if path.name.startswith(".writing-")]  # it was in the middle
        assert "step-00000006" not in [path.name for path in checkpoints(killed / "checkpoints")]

    finish(start(recipe, killed))
    assert content(checkpoints(unbroken / "checkpoints")[-1]) == content(checkpoints(killed / "checkpoints")[-1])


GRADIENTS = """
import sys, torch
import gen_pipelines.training.trainer as trainer
from safetensors.torch import save_file
original = trainer.Trainer._update
def update(self, phase, batches):
    optimizer = self.optimizers[phase.name]
    step = optimizer.step
    def keep(*arguments, **options):
        if self.accelerator.is_main_process and self.step == 0:
            every = {f"{n}.{k}": p.grad for n, net in self.networks.items() for k, p in net.named_parameters()}
            save_file({name: gradient.clone() for name, gradient in every.items() if gradient is not None}, sys.argv[2] + ".gradients")
        return step(*arguments, **options)
    optimizer.step = keep
    try:
        return original(self, phase, batches)
    finally:
        optimizer.step = step
trainer.Trainer._update = update
from gen_pipelines.training.run import train
train(sys.argv[1], sys.argv[3:], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_two_ranks_have_the_gradients_of_one(kind, tmp_path, shapes, tiny_vae):
    """Two gloo processes and one process with the whole batch: gradients of the first step, and where they are after three."""
    recipe = recipe_file(kind, tmp_path, shapes, tiny_vae, steps=3, checkpoint_every=3, max_grad_norm=None)
    settings = ["model.text_encoder.attention_dropout=0.0"] if kind == "latent_text_to_image" else []
    settings += ["optimizer.eps=1e-3"]  # Adam divides by the gradient's size: without it, rounding of tiny gradients becomes the update
    finish(start(recipe, tmp_path / "one", *settings, code=GRADIENTS))
    finish(start(recipe, tmp_path / "two", *settings, ranks=2, code=GRADIENTS))
    one, two = (load_file(f"{tmp_path / name}.gradients") for name in ("one", "two"))
    assert one.keys() == two.keys() and one
    scale = max(gradient.abs().max().item() for gradient in one.values())
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}")
    weights = [load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1])[0] for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_a_non_finite_loss_stops_the_run_and_says_where(tmp_path, shapes, tiny_vae, monkeypatch):
    from gen_pipelines.training.tasks.autoencoder import AutoencoderTask
    from gen_pipelines.training.trainer import NonFiniteLoss

    original, calls = AutoencoderTask.losses, []

    def losses(self, networks, batch, phase, generator):
        calls.append(1)
        output = original(self, networks, batch, phase, generator)
        if len(calls) == 4:
            output.per_sample = output.per_sample * torch.tensor([float("nan")] + [1.0] * 7)
        return output

    monkeypatch.setattr(AutoencoderTask, "losses", losses)
    recipe = recipe_file("autoencoder", tmp_path, shapes, tiny_vae)
    with pytest.raises(NonFiniteLoss, match=r"step 4, phase 'vae': 1 of 8 losses are not finite .*resume from .*step-00000002"):
        train(recipe, output_dir=tmp_path / "run")
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"


def test_a_gradient_that_is_not_finite_spoils_neither_weights_nor_checkpoints(tmp_path, shapes, tiny_vae, monkeypatch):
    """The square root of zero is zero and its gradient is infinite: the loss does not show it."""
    from gen_pipelines.training.tasks.autoencoder import AutoencoderTask
    from gen_pipelines.training.trainer import NonFiniteLoss

    original, calls = AutoencoderTask.losses, []

    def losses(self, networks, batch, phase, generator):
        calls.append(1)
        output = original(self, networks, batch, phase, generator)
        if len(calls) == 4:
            output.per_sample = output.per_sample + (output.per_sample * 0).sqrt()
        return output

    monkeypatch.setattr(AutoencoderTask, "losses", losses)
    recipe = recipe_file("autoencoder", tmp_path, shapes, tiny_vae)
    with pytest.raises(NonFiniteLoss, match=r"step 4, phase 'vae': the losses are finite .* not updated; resume from .*step-00000002"):
        train(recipe, output_dir=tmp_path / "clipped")
    log = [json.loads(line)["step"] for line in (tmp_path / "clipped" / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 3]
    calls.clear()  # without clipping nobody looks at the gradient: the weights are looked at before they are kept
    with pytest.raises(NonFiniteLoss, match=r"step 4: weights of vae are not finite .*no checkpoint was written; resume from .*-00000002"):
        train(recipe, ["loop.max_grad_norm=null"], tmp_path / "free")
    for name in ("clipped", "free"):
        assert [path.name for path in checkpoints(tmp_path / name / "checkpoints")] == ["step-00000002"]


def test_several_phases_train_their_own_networks_and_frozen_parameters_stay(tmp_path):
    """Two optimisers in turns, as for a GAN; the second runs in every other step, twice."""
    recipe = build(
        Recipe, {"task": "t", "data": {"name": "x"}, "loop": {"steps": 2, "batch_size": 2}, "optimizer": {"learning_rate": 0.1}}, "test"
    )
    networks = {name: torch.nn.Linear(2, 2) for name in ("one", "two")}
    networks["one"].bias.requires_grad_(False)
    before = {name: {key: value.clone() for key, value in network.state_dict().items()} for name, network in networks.items()}
    seen = []

    def losses(networks, batch, phase, generator):
        seen.append((phase, {name: network.weight.requires_grad for name, network in networks.items()}))
        return ObjectiveOutput(networks["two"](networks["one"](batch["latents"])).square().mean(1))

    phases = (Phase("first", ("one",)), Phase("second", ("two",), interval=2, repeats=2))
    trainer = Trainer(recipe, networks, losses, phases, LatentData(torch.randn(4, 2), None, range(4)), tmp_path)
    trainer.train()
    only = {"first": {"one": True, "two": False}, "second": {"one": False, "two": True}}
    assert seen == [(phase, only[phase]) for phase in ("first", "second", "second", "first")]
    for name in networks:
        assert not torch.equal(networks[name].weight, before[name]["weight"])
    assert torch.equal(networks["one"].bias, before["one"]["bias"]) and not networks["one"].bias.requires_grad
    assert trainer.averages["two"].updates == 2


def test_a_lazy_phase_shares_an_optimiser_and_settings_are_its_owners(tmp_path):
    """A regulariser that runs in every second step continues the moments of the phase whose network it regularises."""
    loop = {"steps": 3, "batch_size": 2, "max_grad_norm": None}
    recipe = build(Recipe, {"task": "t", "data": {"name": "x"}, "loop": loop, "optimizer": {"learning_rate": 0.1}}, "test")
    networks, clipped = {name: torch.nn.Linear(2, 2) for name in ("one", "two")}, []

    def losses(networks, batch, phase, generator):
        return ObjectiveOutput(networks["one"](batch["latents"]).square().mean(1) + networks["two"](batch["latents"]).square().mean(1))

    phases = (
        Phase("one", ("one",), settings={"learning_rate": 0.01, "betas": (0.0, 0.99)}),
        Phase("two", ("two",)),
        Phase("penalty", ("one",), interval=2, optimizer="one"),
    )
    data = LatentData(torch.randn(4, 2), None, range(4))
    trainer = Trainer(recipe, networks, losses, phases, data, tmp_path, after_update=lambda networks, phase: clipped.append(phase))
    trainer.train()
    assert clipped == ["one", "two", "penalty", "one", "two", "one", "two", "penalty"]
    steps = {name: {int(state["step"]) for state in trainer.optimizers[name].state_dict()["state"].values()} for name in ("one", "two")}
    assert steps == {"one": {5}, "two": {3}} and set(trainer.optimizers) == {"one", "two"}
    group = trainer.optimizers["one"].param_groups[0]
    assert group["lr"] == 0.01 and tuple(group["betas"]) == (0.0, 0.99) and trainer.optimizers["two"].param_groups[0]["lr"] == 0.1
    assert trainer.averages["one"].updates == 3


def test_a_number_that_some_samples_lack_is_averaged_over_the_others(tmp_path):
    """NaN says that a sample has no such number: in a micro-batch without any, it must not count as zero."""
    loop = {"steps": 1, "batch_size": 4, "gradient_accumulation_steps": 2, "log_every": 1}
    recipe = build(Recipe, {"task": "t", "data": {"name": "x"}, "loop": loop}, "test")

    def losses(networks, batch, phase, generator):
        value = batch["latents"][:, 0]
        metrics = {"large": value.masked_fill(value < 2, torch.nan), "none": torch.full_like(value, torch.nan)}
        return ObjectiveOutput(networks["one"](batch["latents"]).square().mean(1), metrics)

    data = LatentData(torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0]]), None, range(4))
    Trainer(recipe, {"one": torch.nn.Linear(2, 2)}, losses, (Phase("only", ("one",)),), data, tmp_path).train()
    entry = json.loads((tmp_path / "log.jsonl").read_text())
    assert entry["large"] == 2.5 and "none" not in entry and entry["loss"] > 0


def test_split_weights_are_refused(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    from gen_pipelines.training.trainer import _check_launch

    with pytest.raises(ValueError, match="Trainer: FSDP splits the weights"):
        _check_launch(SimpleNamespace(distributed_type=DistributedType.FSDP, log_with=[]), None)
    _check_launch(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, log_with=[]), None)


@pytest.mark.parametrize("kind", ["autoencoder", "latent_text_to_image"])
def test_gradient_checkpointing_changes_no_weight(kind, tmp_path, shapes, tiny_vae):
    """The forward pass that runs again in the backward one takes the same attention kernel."""
    recipe = recipe_file(kind, tmp_path, shapes, tiny_vae, steps=2, attention="math")
    settings = ["model.text_encoder.attention_dropout=0.0"] if kind == "latent_text_to_image" else []
    train(recipe, settings, tmp_path / "kept")
    train(recipe, [*settings, "loop.gradient_checkpointing=true"], tmp_path / "again")
    weights = [load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1])[0] for name in ("kept", "again")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_a_network_without_gradient_checkpointing_says_so(tmp_path, shapes, tiny_vae):
    with pytest.raises(ValueError, match="GlowModel does not support gradient checkpointing"):
        train(recipe_file("flow", tmp_path, shapes, tiny_vae, steps=2), ["loop.gradient_checkpointing=true"], tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*no supported trackers are currently installed")  # accelerate warns, and goes on
@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("autoencoder", ["task=sculpture"], "task: 'sculpture' is none of autoencoder"),
        ("autoencoder", ["model.vae.class=NoSuchClass"], "model.vae.class: 'NoSuchClass' is a class of neither"),
        ("autoencoder", ["model.vae.chanels=3"], "unknown arguments chanels"),
        ("autoencoder", ["objective.l3=1"], "objective.l3: unknown setting"),
        ("autoencoder", ["loop.batch_size=9", "loop.gradient_accumulation_steps=2"], "make it a multiple of 2"),
        ("autoencoder", ["loop.batch_size=64"], "a batch of 64 samples from a data set of 24"),
        ("autoencoder", ["optimizer.schedule=step"], "optimizer.schedule: 'step' is none of"),
        ("latent_text_to_image", ["objective.time_density=normal"], "objective.time_density: 'normal' is none of"),
        ("latent_text_to_image", ["objective.time_density={name: mode, sclae: 2}"], "mode takes no sclae"),
        ("autoencoder", ["objective.kl=small"], "objective.kl: expected float, got 'small'"),
        ("autoencoder", ["loop.log_with=comet_ml"], "loop.log_with: the tracker 'comet_ml' is not installed"),
        ("latent_text_to_image", ["objective.drop_caption=often"], "objective.drop_caption: expected float, got 'often'"),
        ("latent_text_to_image", ["objective.weighting={name: min_snr, gama: 2}"], "min_snr takes no gama; it takes gamma"),
        ("latent_text_to_image", ["objective.weighting={name: target, gamma: 2}"], "target takes no gamma; it takes no arguments"),
        ("latent_text_to_image", ["objective.time_density={name: mode, scale: big}"], "scale: expected float, got 'big'"),
        ("latent_text_to_image", ["loop.batch_size=9", "loop.gradient_accumulation_steps=2"], "make it a multiple of 2"),
        ("latent_text_to_image", ["data.resolution=32"], "model.denoiser.sample_size: 8, but pictures of 32 .* set it to 16"),
        ("latent_text_to_image", ["data.resolution=17"], "data.resolution: 17 is not a multiple of 2"),
        ("autoencoder", ["data.resolution=17"], "data.resolution: 17 is not a multiple of 2"),
        ("latent_text_to_image", ["model.denoiser.in_channels=8"], "in_channels: 8, but the latents of model.vae have 4 channels"),
        ("latent_text_to_image", ["sample.pictures=0"], "sample: at least 1 picture"),
        ("latent_text_to_image", ["sample.guidance=.nan"], "guidance_scale must be a finite number"),
        ("latent_text_to_image", ["model.save_dtype=nn"], "model.save_dtype: 'nn' is none of float32"),
        ("latent_text_to_image", ["model.vae={from: no/such/folder/at/all}"], "no/such/folder"),
        ("latent_text_to_image", ["data.horizontal_flip=0.5"], "cached latents cannot be augmented"),
        ("latent_text_to_image", ["data.text_column=null"], "data.text_column is missing"),
        ("latent_text_to_image", ["model.scheduler.class=Euler"], "model.scheduler.class: 'Euler' is none of"),
    ],
)
def test_bad_recipes_fail_before_anything_is_computed(kind, overrides, message, tmp_path, shapes, tiny_vae, monkeypatch):
    computed = lambda *arguments, **options: pytest.fail("the pictures were encoded before the recipe was checked")
    monkeypatch.setattr("gen_pipelines.training.tasks.latent_text_to_image.encode_all", computed)
    with pytest.raises((ValueError, OSError), match=message):
        train(recipe_file(kind, tmp_path, shapes, tiny_vae), overrides, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_output_folders_are_not_overwritten_and_must_be_writable(tmp_path, shapes, tiny_vae):
    recipe = recipe_file("autoencoder", tmp_path, shapes, tiny_vae, steps=2)
    train(recipe, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run: pass --resume"):
        train(recipe, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="these settings differ: optimizer.learning_rate"):
        train(recipe, ["optimizer.learning_rate=0.5"], tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        train(recipe, output_dir=tmp_path / "file")


@pytest.mark.parametrize("kind", ["flow", "latent_text_to_image"])  # pictures, and latents that are kept of them
def test_other_data_are_not_gone_on_with(kind, tmp_path, shapes, tiny_vae):
    import datasets

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train-00000-of-00001.parquet").write_bytes(next(shapes.glob("*.parquet")).read_bytes())
    recipe = recipe_file(kind, tmp_path, folder, tiny_vae, steps=1)
    train(recipe, output_dir=tmp_path / "run")
    rows = datasets.load_dataset(str(folder), split="train")
    fewer, other = rows.select(range(20)), rows.map(lambda row: {"image": row["image"].rotate(90)})
    for changed, says in ((fewer, r"step-00000001 was made with other data: .* had \d+ rows, now"), (other, "rows, others than now")):
        changed.to_parquet(folder / "train-00000-of-00001.parquet")
        with pytest.raises(ValueError, match=says):
            train(recipe, ["loop.steps=2"], tmp_path / "run", resume=True)
    rows.to_parquet(folder / "train-00000-of-00001.parquet")  # the same rows, in a file of another date
    train(recipe, ["loop.steps=2"], tmp_path / "run", resume=True)
    about = checkpoints(tmp_path / "run" / "checkpoints")[-1] / "checkpoint.json"
    kept = json.loads(about.read_text())
    del kept["data"]  # of an older version
    about.write_text(json.dumps(kept))
    fewer.to_parquet(folder / "train-00000-of-00001.parquet")
    train(recipe, ["loop.steps=3"], tmp_path / "run", resume=True)


def test_a_folder_with_another_model_is_refused_before_anything_is_written(tmp_path, shapes, tiny_vae):
    recipe = recipe_file("autoencoder", tmp_path, shapes, tiny_vae, steps=1)
    for name in ("model_index.json", "config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        for resume in (False, True):
            with pytest.raises(ValueError, match=rf"{folder}: it holds a finished model \({name}\) .* another --output-dir"):
                train(recipe, output_dir=folder, resume=resume)
        assert [file.name for file in folder.iterdir()] == [name]


def test_fewer_steps_than_are_done_and_a_cut_log(tmp_path, shapes, tiny_vae):
    recipe = recipe_file("autoencoder", tmp_path, shapes, tiny_vae, steps=3)
    train(recipe, output_dir=tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"step-00000003 has done 3 steps, more than loop.steps=2"):
        train(recipe, ["loop.steps=2"], tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before
    train(recipe, output_dir=tmp_path / "run", resume=True)  # as many: nothing is left to do
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1][:9], "", "[]", lines[2][:-3]]))
    with pytest.warns(UserWarning, match=r"log\.jsonl: line \d is cut off") as told:
        train(recipe, ["loop.steps=4"], tmp_path / "run", resume=True)
    assert sum("cut off" in str(one.message) for one in told) == 4
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 4]


def test_a_damaged_checkpoint_is_named(tmp_path, shapes, tiny_vae):
    recipe = recipe_file("autoencoder", tmp_path, shapes, tiny_vae, steps=2)
    train(recipe, output_dir=tmp_path / "run")
    weights = checkpoints(tmp_path / "run" / "checkpoints")[-1] / "networks.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="step-00000002: damaged checkpoint"):
        train(recipe, ["loop.steps=4"], tmp_path / "run", resume=True)


def test_a_stream_trains_and_refuses_an_exact_resume(tmp_path, shapes, tiny_vae):
    recipe = recipe_file("autoencoder", tmp_path, shapes, tiny_vae, steps=2)
    train(recipe, ["data.streaming=true", "loop.sample_every=2", "sample.pictures=3"], tmp_path / "run")
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as picture:
        assert picture.size == (3 * 16, 2 * 16)
    assert "from diffusers import AutoencoderKL" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(ValueError, match="--inexact-resume"):
        train(recipe, ["data.streaming=true", "loop.steps=4"], tmp_path / "run", resume=True)
    train(recipe, ["data.streaming=true", "loop.steps=4"], tmp_path / "run", inexact_resume=True)


def test_the_trained_text_to_image_folder_is_a_pipeline(tmp_path, shapes, tiny_vae):
    """What the trainer saves loads in two lines, draws, and does not depend on what an unknown word is."""
    from gen_pipelines import AutoPipeline

    recipe = recipe_file("latent_text_to_image", tmp_path, shapes, tiny_vae, steps=2, sample_every=2)
    train(recipe, ["sample.pictures=4", "sample.steps=2", "data.holdout=4", "model.save_dtype=float16"], tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2 steps of 8 samples" in card and "```yaml" in card
    for file in (tmp_path / "run").glob("*/*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {torch.float16}
    pipe = AutoPipeline.from_pretrained(tmp_path / "run")
    pictures = pipe(["a red circle", "a 日本 quetzalcoatl 🍎"], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2


def test_training_the_decoder_alone_keeps_the_latents(tmp_path, shapes, tiny_vae):
    from diffusers import AutoencoderKL

    recipe = recipe_file("autoencoder", tmp_path, shapes, tiny_vae, steps=3)
    settings = yaml.safe_load(recipe.read_text())
    settings["model"] = {"vae": {"from": str(tiny_vae)}, "train": "decoder"}
    recipe.write_text(yaml.safe_dump(settings))
    train(recipe, output_dir=tmp_path / "run")
    before, after = (AutoencoderKL.from_pretrained(path) for path in (tiny_vae, tmp_path / "run"))
    assert before.config.scaling_factor == after.config.scaling_factor
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight) == (not name.startswith("decoder.")), name


@pytest.mark.slow
def test_a_tiny_model_learns_its_captions(tmp_path, shapes):
    """Autoencoder, then text to image, for a minute: colours follow the caption. What the whole library is for, small."""
    from gen_pipelines import AutoPipeline

    recipe = recipe_file("autoencoder", tmp_path, shapes, tmp_path, steps=400, batch_size=12, checkpoint_every=0, log_every=0)
    train(recipe, ["optimizer.learning_rate=3e-3", "data.horizontal_flip=0", "data.shift=0", "ema.decay=0.98"], tmp_path / "vae")
    quiet = {"checkpoint_every": 0, "log_every": 0}
    recipe = recipe_file("latent_text_to_image", tmp_path, shapes, tmp_path / "vae", steps=800, batch_size=24, **quiet)
    bigger = ["model.denoiser.attention_head_dim=32", "model.denoiser.cross_attention_dim=64", "model.text_encoder.hidden_size=32"]
    bigger += ["model.denoiser.caption_channels=32", "optimizer.learning_rate=2e-3", "ema.decay=0.98", "objective.pseudo_word=0"]
    train(recipe, bigger, tmp_path / "run")
    pipe = AutoPipeline.from_pretrained(tmp_path / "run")
    captions = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]
    generator = torch.Generator().manual_seed(0)
    pictures = pipe(captions, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="pt").images
    centre = pictures[:, :, 6:10, 6:10].mean((2, 3))  # (6, 3)
    # the middle of the picture is dark in the two channels that the colour lacks ("green" is (0, 128, 0)), white elsewhere
    right = [centre[i].argmax().item() == i // 2 and centre[i].min().item() < 0.4 for i in range(6)]
    assert sum(right) >= 5, centre
