"""What every pipeline shares: schedulers bound to the network, folders written whole or not at all, and clear errors for bad ones."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import gen_pipelines
from gen_pipelines import AutoPipeline, LatentTextToImagePipeline
from gen_pipelines.hub.loading import check_safetensors, read_index
from gen_pipelines.hub.saving import written_at_once
from gen_pipelines.pipelines.base import as_dtype
from gen_pipelines.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerScheduler,
    FlowMatchEulerScheduler,
)


def make_pipeline(scheduler=None, **denoiser):
    denoiser = denoiser or {"transformer": conftest.make_transformer()}
    pipe = LatentTextToImagePipeline(
        conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), scheduler or FlowMatchEulerScheduler(), **denoiser
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a red apple", steps=3, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np", **options).images


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "pipe"
    pipe.save_pretrained(path, license="apache-2.0")
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------------------------- save and reload


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
def test_a_reloaded_pipeline_draws_the_same_picture(denoiser, tmp_path):
    scheduler = DDIMScheduler() if denoiser == "unet" else FlowMatchEulerScheduler(shift=2.0)
    pipe = make_pipeline(scheduler, **{denoiser: getattr(conftest, f"make_{denoiser}")()})
    pipe.save_pretrained(tmp_path / "p")
    for load in (LatentTextToImagePipeline, AutoPipeline):
        again = load.from_pretrained(tmp_path / "p")
        assert type(again) is LatentTextToImagePipeline and type(again.scheduler) is type(scheduler)
        assert again.parameterization == pipe.parameterization
        assert np.array_equal(draw(again), draw(pipe))
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            assert_close(getattr(again, name).state_dict(), component.state_dict(), rtol=0, atol=0)


def test_saving_what_was_loaded_gives_the_same_bytes(folder, tmp_path):
    AutoPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again", repo_id="pipe", license="apache-2.0")
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_a_saved_folder_says_nothing_of_this_machine_and_names_the_package(folder, tmp_path):
    AutoPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    text = "".join(p.read_text() for p in (tmp_path / "again").rglob("*.json"))
    assert str(folder) not in text and "_name_or_path" not in text
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["gen_pipelines", "FlowMatchEulerScheduler"]


def test_diffusers_loads_our_scheduler_in_a_process_that_only_imported_us(sd_folder, tmp_path):
    pipe = AutoPipeline.from_pretrained(sd_folder)
    pipe.scheduler = DDIMScheduler()
    pipe.save_pretrained(tmp_path / "p")
    code = (
        "import sys, gen_pipelines; assert 'torch' not in sys.modules\n"
        "from diffusers import DiffusionPipeline, StableDiffusionPipeline\n"
        "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, feature_extractor=None, image_encoder=None)\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "image = pipe('a', num_inference_steps=2, output_type='np').images\n"
        "print(type(pipe.scheduler).__module__, type(pipe.scheduler).__name__, image.shape)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(gen_pipelines.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0].startswith("gen_pipelines") and "DDIMScheduler (1, 16, 16, 3)" in done.stdout


def test_dtype_is_float32_unless_told_otherwise(pipe, tmp_path):
    half = make_pipeline()
    half.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert {c.dtype for c in AutoPipeline.from_pretrained(tmp_path / "half").components.values() if isinstance(c, torch.nn.Module)} == {
        torch.float32
    }
    again = AutoPipeline.from_pretrained(tmp_path / "half", dtype="bfloat16")
    assert {c.dtype for c in again.components.values() if isinstance(c, torch.nn.Module)} == {torch.bfloat16}
    assert np.isfinite(draw(again)).all()
    mixed = AutoPipeline.from_pretrained(tmp_path / "half", dtype={"vae": torch.bfloat16, "default": torch.float32})
    assert (mixed.vae.dtype, mixed.transformer.dtype) == (torch.bfloat16, torch.float32)
    assert np.isfinite(draw(mixed)).all()
    with pytest.raises(ValueError, match="'half'.*bfloat16"):
        as_dtype("half")


def test_variants_stay_beside_the_plain_weights(copy):
    pipe = AutoPipeline.from_pretrained(copy, dtype=torch.float16)
    pipe.save_pretrained(copy, variant="fp16")
    names = {p.name for p in (copy / "vae").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    assert AutoPipeline.from_pretrained(copy, variant="fp16").vae.dtype == torch.float32
    assert np.array_equal(draw(AutoPipeline.from_pretrained(copy)), draw(make_pipeline()))


def test_sharded_weights_load_and_are_replaced_without_leftovers(copy):
    pipe = AutoPipeline.from_pretrained(copy)
    pipe.save_pretrained(copy, max_shard_size="40KB")
    assert len(list((copy / "transformer").glob("*.safetensors"))) > 1
    assert np.array_equal(draw(AutoPipeline.from_pretrained(copy)), draw(pipe))
    pipe.save_pretrained(copy)
    assert sorted(p.name for p in (copy / "transformer").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert np.array_equal(draw(AutoPipeline.from_pretrained(copy)), draw(pipe))


def test_a_card_is_written_once_and_an_edited_one_is_kept(folder, copy):
    card = (folder / "README.md").read_text()
    for wanted in (
        "library_name: gen-pipelines",
        "license: apache-2.0",
        "pipeline_tag: text-to-image",
        "AutoPipeline.from_pretrained",
        "`diffusers.AutoencoderKL`",
    ):
        assert wanted in card
    (copy / "README.md").write_text("mine")
    (copy / "notes.txt").write_text("mine too")
    AutoPipeline.from_pretrained(copy).save_pretrained(copy)
    assert (copy / "README.md").read_text() == "mine" and (copy / "notes.txt").read_text() == "mine too"


# ------------------------------------------------------------------------------------------------------------------- nothing half-written


def test_an_interrupted_save_leaves_what_was_there(copy, monkeypatch):
    before = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    pipe = AutoPipeline.from_pretrained(copy)
    monkeypatch.setattr(type(pipe.vae), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(copy)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(copy.parent / "new")
    assert {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("by_file", [False, True])
def test_a_failure_while_moving_brings_the_old_entries_back(tmp_path, monkeypatch, by_file):
    target = tmp_path / "t"
    for name in ("a/old", "b/old"):
        (target / name).parent.mkdir(parents=True)
        (target / name).write_text("old")
    replace, calls = os.replace, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) == 3:
            raise OSError("moved away")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="moved away"), written_at_once(target, by_file) as side:
        for name in ("a/old", "b/old"):
            (side / name).parent.mkdir()
            (side / name).write_text("new")
    assert {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()} == {"a/old": "old", "b/old": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_what_is_saved_has_the_permissions_of_any_new_file(pipe, tmp_path):
    before = os.umask(0o027)
    try:
        pipe.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert modes[".safetensors"] == 0o640 and set(modes.values()) == {0o640}


def test_saving_onto_a_file_is_refused(pipe, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="it is a file"):
        pipe.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_saving_where_nothing_can_be_written_names_the_folder(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot save into ''"):  # not into the folder that we are in
        pipe.save_pretrained("")
    with pytest.raises(OSError, match="cannot save into /proc/mine"):
        pipe.save_pretrained("/proc/mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("load", [AutoPipeline.from_pretrained, LatentTextToImagePipeline.from_pretrained])
def test_what_is_no_name_is_refused_before_anything_is_asked(load):
    with pytest.raises(TypeError, match="got a NoneType"):  # the Hub has no 'None'
        load(None)
    for name in ("", " ", "user/name "):
        with pytest.raises(ValueError, match="is no name"):
            load(name)


def test_the_two_names_of_the_dtype(folder):
    for options in ({"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": "float16", "torch_dtype": "float16"}):
        assert AutoPipeline.from_pretrained(folder, **options).dtype == torch.float16
    with pytest.raises(ValueError, match="two names of one thing"):
        AutoPipeline.from_pretrained(folder, dtype="float16", torch_dtype="float32")


def test_a_folder_of_another_pipeline_is_named_before_it_is_loaded(folder, caplog):
    from gen_pipelines import GlowPipeline

    with pytest.raises(ValueError, match="is a LatentTextToImagePipeline and has no flow, which a GlowPipeline is made of"):
        GlowPipeline.from_pretrained(folder)
    assert not caplog.records


def test_a_scheduler_s_class_is_told_from_an_object(pipe):
    with pytest.raises(TypeError, match=r"DDIMScheduler is a class; assign an object, DDIMScheduler\(\)"):
        pipe.scheduler = DDIMScheduler


def test_a_scheduler_is_not_taken_away(pipe):
    before = pipe.scheduler
    with pytest.raises(TypeError, match="None draws nothing; assign one of gen_pipelines.schedulers"):
        pipe.scheduler = None
    assert pipe.scheduler is before


def test_numbers_of_numpy_are_numbers(pipe):
    plain = draw(pipe, guidance_scale=2.0, eta=0.0)
    assert np.array_equal(plain, draw(pipe, steps=np.int64(3), guidance_scale=np.float32(2.0), eta=np.float32(0.0)))


def test_pickles_are_neither_written_nor_read(pipe, folder, copy):
    with pytest.raises(ValueError, match="safetensors only"):
        pipe.save_pretrained(copy, safe_serialization=False)
    with pytest.raises(ValueError, match="safetensors"):
        AutoPipeline.from_pretrained(folder, use_safetensors=False)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"vae.*pickled.*diffusion_pytorch_model\.bin"):
        AutoPipeline.from_pretrained(copy)


# ------------------------------------------------------------------------------------------------------------------------- bad folders


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _change(path, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
}
DAMAGE = {
    "missing": (lambda p: p.unlink(), "is missing"),
    "cut short": (_cut, "cut short"),
    "empty": (lambda p: p.write_bytes(b""), "cut short"),
    "not safetensors": (lambda p: p.write_bytes(b"\x08" + b"\0" * 7 + b"{broken}"), "not a safetensors file"),
    "random bytes": (lambda p: p.write_bytes(b"\xff" * 64), "not a safetensors file"),
    "git lfs pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
    "without a key": (lambda p: _change(p, lambda t: t.pop(sorted(t)[0])), "no weights for"),
    "wrong shape": (lambda p: _change(p, lambda t: t.__setitem__(sorted(t)[0], torch.zeros(3, 3))), r"shape.*3, 3"),
}


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_named(copy, component, damage, capfd):
    from safetensors import safe_open

    file = copy / component / WEIGHTS[component]
    with safe_open(file, "pt") as tensors:
        key = sorted(tensors.keys())[0]
    spoil, message = DAMAGE[damage]
    spoil(file)
    with pytest.raises(ValueError, match=message) as error:
        AutoPipeline.from_pretrained(copy)
    assert str(copy / component) in str(error.value)
    if damage in ("without a key", "wrong shape"):
        assert key in str(error.value)


def test_folders_that_are_no_pipeline_are_named(tmp_path, copy):
    with pytest.raises(ValueError, match="not a folder"):
        AutoPipeline.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pipeline: it has no model_index\.json"):
        AutoPipeline.from_pretrained(tmp_path / "empty")
    (tmp_path / "a file").write_text("x")
    with pytest.raises(ValueError, match="not a folder"):
        AutoPipeline.from_pretrained(tmp_path / "a file")
    shutil.rmtree(copy / "vae")
    with pytest.raises(ValueError, match="lacks the folder 'vae'"):
        AutoPipeline.from_pretrained(copy)
    for text in ("{broken", "[1]", "{}"):
        (copy / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=r"model_index\.json"):
            read_index(copy)


def test_code_in_a_repository_is_refused(copy, folder):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Evil"]}))
    with pytest.raises(ValueError, match="never run"):
        AutoPipeline.from_pretrained(copy)
    for option in ({"trust_remote_code": True}, {"custom_pipeline": "x"}):
        with pytest.raises(ValueError, match="never run"):
            AutoPipeline.from_pretrained(folder, **option)


def test_unknown_classes_names_and_arguments_are_named(copy, folder):
    with pytest.raises(TypeError, match="guidance_scael.*allowed are"):
        AutoPipeline.from_pretrained(folder, guidance_scael=3)
    with pytest.raises(ValueError, match="no bundled pipeline 'nothing'"):
        AutoPipeline.from_pretrained("bundled:nothing")
    with pytest.raises(OSError, match="not a folder here"):
        AutoPipeline.from_pretrained("nobody/nothing", local_files_only=True)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(ValueError, match="'NoSuchPipeline' is known neither"):
        AutoPipeline.from_pretrained(copy)
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoPipeline()


def test_a_scheduler_config_with_an_unknown_key_is_refused(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shfit": 3.0}))
    with pytest.raises(ValueError, match="shfit"):
        AutoPipeline.from_pretrained(copy)


def test_a_whole_file_passes(folder):
    for component, name in WEIGHTS.items():
        check_safetensors(folder / component / name)


# -------------------------------------------------------------------------------------------------------------------------- schedulers


def test_both_idioms_of_swapping_know_the_network():
    pipe = make_pipeline(FlowMatchEulerScheduler(shift=2.0))
    network = pipe.parameterization
    assert network.prediction == "flow_prediction"
    for new in (DDIMScheduler.from_config(pipe.scheduler.config), DDIMScheduler(), EulerScheduler(), DDPMScheduler()):
        pipe.scheduler = new
        assert pipe.scheduler.parameterization == network and pipe.parameterization == network
        assert pipe.config["scheduler"] == ("gen_pipelines", type(new).__name__)
        assert np.isfinite(draw(pipe)).all()


def test_first_order_schedulers_agree_on_one_grid():
    pipe = make_pipeline(FlowMatchEulerScheduler())
    grid = [999.0, 700.0, 400.0, 100.0]
    pictures = []
    for new in (FlowMatchEulerScheduler(), EulerScheduler(), DDIMScheduler()):
        pipe.scheduler = new
        pictures.append(pipe("a", timesteps=grid, generator=torch.Generator().manual_seed(0), output_type="latent").images)
    scale = pictures[0].abs().max()
    assert (pictures[1] - pictures[0]).abs().max() < 1e-5 * scale and (pictures[2] - pictures[0]).abs().max() < 1e-5 * scale


def test_binding_does_not_change_the_scheduler_that_was_assigned():
    shared = DDIMScheduler()
    before = shared.parameterization
    one, other = make_pipeline(FlowMatchEulerScheduler()), make_pipeline(DDIMScheduler(), unet=conftest.make_unet())
    one.scheduler = other.scheduler = shared
    assert one.parameterization != other.parameterization
    assert shared.parameterization == before and one.scheduler is not shared


def test_schedulers_of_diffusers_are_hosted():
    import diffusers

    pipe = make_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    network = pipe.parameterization
    assert pipe.scheduler.hosted_class is diffusers.FlowMatchEulerDiscreteScheduler and pipe.scheduler.config["shift"] == 3.0
    assert pipe.config["scheduler"] == ("diffusers", "FlowMatchEulerDiscreteScheduler")
    for new in (diffusers.DDIMScheduler(), diffusers.UniPCMultistepScheduler()):  # their defaults say nothing of this network
        pipe.scheduler = new
        assert pipe.scheduler.hosted_class is type(new) and pipe.parameterization == pipe.scheduler.parameterization == network
        assert pipe.config["scheduler"] == ("diffusers", type(new).__name__)
        assert np.isfinite(draw(pipe, steps=4)).all()
    with pytest.raises(ValueError, match="beta_start"):
        pipe.scheduler = diffusers.DDIMScheduler(beta_start=0.01)
    with pytest.raises(ValueError, match="prediction_type='v_prediction'.*flow_prediction"):
        pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="RePaintScheduler.*cannot be used"):
        pipe.scheduler = diffusers.RePaintScheduler()
    with pytest.raises(TypeError, match="not a scheduler"):
        pipe.scheduler = "ddim"
    assert pipe.scheduler.hosted_class is diffusers.UniPCMultistepScheduler
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe.parameterization == network and pipe.config["scheduler"] == ("gen_pipelines", "DDIMScheduler")
    assert pipe.scheduler.config["shift"] == 3.0


def test_a_scheduler_leaves_nothing_behind_for_the_next_one():
    """A comparison does not depend on its order: a new scheduler has its own grid and the model's, not that of the one before."""
    import diffusers

    chain = (
        lambda: DDIMScheduler(timestep_spacing="leading"),
        diffusers.DDIMScheduler,
        lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min"),
        diffusers.UniPCMultistepScheduler,
        EulerScheduler,
        FlowMatchEulerScheduler,
        DDIMScheduler,
    )
    swapped = make_pipeline(FlowMatchEulerScheduler(shift=3.0))
    for make in (*chain, *reversed(chain)):
        fresh = make_pipeline(FlowMatchEulerScheduler(shift=3.0))
        swapped.scheduler, fresh.scheduler = make(), make()
        for pipe in (swapped, fresh):
            pipe.scheduler.set_timesteps(4)
        assert torch.equal(swapped.scheduler.timesteps, fresh.scheduler.timesteps), type(fresh.scheduler).__name__
        assert swapped.scheduler.config == fresh.scheduler.config
    taken = FlowMatchEulerScheduler.from_config(DDIMScheduler(timestep_spacing="leading").bind(swapped.parameterization).config)
    swapped.scheduler = taken
    assert swapped.scheduler.config["timestep_spacing"] == "leading"  # from_config takes over all of a config


def test_limits_of_x_0_are_the_network_s_and_a_fixed_variance_is_the_sampler_s():
    import diffusers

    pipe = make_pipeline(DDIMScheduler(clip_sample=True), unet=conftest.make_unet())
    for wrong, named in (
        (diffusers.DDIMScheduler(clip_sample=False), "clip_sample=False was given.*True.*with_.clip_sample=False"),
        (diffusers.DDIMScheduler(clip_sample_range=2.0), "clip_sample_range=2.0"),
        (diffusers.DDIMScheduler(thresholding=True), "thresholding=True"),
        (DDIMScheduler(clip_sample=False), "clip_sample=False"),
        (DDPMScheduler(variance_type="learned_range"), "variance_type='learned_range'"),
    ):
        with pytest.raises(ValueError, match=named):
            pipe.scheduler = wrong
    pipe.scheduler = diffusers.DDIMScheduler(dynamic_thresholding_ratio=0.5)  # of no effect, as in diffusers
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pictures = []
    for kind in ("fixed_small", "fixed_large"):
        pipe.scheduler = DDPMScheduler(variance_type=kind)
        assert pipe.scheduler.config["variance_type"] == kind and pipe.parameterization.variance is None
        pictures.append(draw(pipe, steps=4))
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3


def test_a_wrong_config_is_corrected_by_keyword_in_diffusers_idiom():
    pipe = make_pipeline(DDIMScheduler(), unet=conftest.make_unet())
    other = make_pipeline(DDIMScheduler(), unet=conftest.make_unet())
    pipe.scheduler = EulerScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert pipe.parameterization.prediction == pipe.scheduler.parameterization.prediction == "v_prediction"
    pipe.scheduler = DDIMScheduler()
    assert pipe.scheduler.parameterization.prediction == "v_prediction"
    other.scheduler = pipe.scheduler  # a scheduler on loan says nothing of the borrower's network
    assert other.scheduler.parameterization.prediction == "epsilon"


def test_a_folder_whose_scheduler_cannot_be_hosted_names_the_remedy_and_it_works(sd_folder, tmp_path):
    copy = Path(shutil.copytree(sd_folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "RePaintScheduler"]}))
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    kept = {k: v for k, v in config.items() if k.startswith("beta") or k == "num_train_timesteps"}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({**kept, "_class_name": "RePaintScheduler"}))
    with pytest.raises(ValueError, match=r"RePaintScheduler of diffusers cannot be used here: .*Take one of gen_pipelines"):
        AutoPipeline.from_pretrained(copy)
    pipe = AutoPipeline.from_pretrained(copy, scheduler=DDIMScheduler.from_pretrained(sd_folder, subfolder="scheduler"))
    assert pipe.parameterization == AutoPipeline.from_pretrained(sd_folder).parameterization
    assert np.abs(draw(pipe, steps=4) - draw(AutoPipeline.from_pretrained(sd_folder), steps=4)).max() < 1e-5  # 4 divides 1000


def test_a_new_parameterization_rebinds_the_scheduler():
    pipe = make_pipeline(DDIMScheduler(), unet=conftest.make_unet())
    pipe.parameterization = pipe.parameterization.with_(prediction="v_prediction")
    assert pipe.scheduler.parameterization.prediction == "v_prediction"


# ------------------------------------------------------------------------------------------------------------------------------ the rest


def test_what_a_pipeline_lacks_is_said(pipe):
    with pytest.raises(NotImplementedError, match="FID"):
        pipe.log_likelihood(torch.zeros(1, 3, 16, 16))
    assert pipe.denoiser is pipe.transformer


def test_values_that_are_not_finite_are_counted(pipe, caplog):
    x = torch.zeros(4, 3, 2, 2)
    x[1, 0, 0, 0], x[3, 2, 1, 1] = float("nan"), float("inf")
    with caplog.at_level(logging.WARNING):
        assert pipe.report_non_finite(torch.zeros(4, 2), x) == 2
    assert "2 of 4 pictures" in caplog.text and "1, 3" in caplog.text and len(caplog.records) == 1
    assert pipe.report_non_finite(torch.zeros(4, 2)) == 0 and len(caplog.records) == 1


def test_a_cast_is_not_warned_of_when_there_is_nothing_to_warn_of(monkeypatch, caplog):
    network = make_pipeline().denoiser
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    network.to(torch.float16)
    assert not caplog.records
    monkeypatch.setattr(type(network), "_keep_in_fp32_modules", ["norm"])
    network.to(torch.float16)
    assert "kept in float32: ['norm']" in caplog.text


def test_components_that_are_not_used_are_named(sd_folder, tmp_path, caplog):
    copy = Path(shutil.copytree(sd_folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}))
    with caplog.at_level(logging.WARNING):
        assert type(AutoPipeline.from_pretrained(copy)) is LatentTextToImagePipeline
    assert "does not use these components" in caplog.text and "safety_checker" in caplog.text
    caplog.clear()
    AutoPipeline.from_pretrained(copy, safety_checker=None)
    assert "safety_checker" not in caplog.text


def test_a_component_may_be_passed(folder):
    vae = conftest.make_vae(seed=5)
    assert AutoPipeline.from_pretrained(folder, vae=vae).vae is vae
    loaded = AutoPipeline.from_pretrained(folder, scheduler=DDIMScheduler.from_config(read_scheduler(folder)))
    assert type(loaded.scheduler) is DDIMScheduler


def read_scheduler(folder):
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
