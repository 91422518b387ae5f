"""OpenAI's U-Net: every branch against the forward pass said again, every container, every error."""

import argparse
import itertools

import pytest
import torch
from openai_layout import Forward, random_state

from gen_pipelines import AutoPipeline
from gen_pipelines.conversion import FORMATS, convert
from gen_pipelines.conversion.openai_unet import PRESETS, flags_of, parameterization_of, settings_of
from gen_pipelines.conversion.unet_layout import layout_of, rows_by_kind

GUIDED = {"codebase": "guided_diffusion", "image_size": 8, "use_new_attention_order": False, "diffusion_steps": 1000,
          "noise_schedule": "linear"}  # fmt: skip


def difference(folder, state, options, x, t, labels=None, resample="conv", layers=1, levels=3, by_head=True, heads=None, up_heads=None):
    """Largest difference between the converted network and the original's forward pass, over the output's scale, and the pipeline."""
    torch.save(state, folder / "weights.pt")
    convert(folder / "weights.pt", folder / "out", options=options)
    pipe = AutoPipeline.from_pretrained(folder / "out")
    with torch.no_grad():
        wanted = Forward(state, heads, by_head, resample, layers, levels, up_heads)(x, t, labels)
        got = pipe.unet(x, t, class_labels=labels).sample
    return float((got - wanted).abs().max() / wanted.abs().max()), pipe


BRANCHES = list(itertools.product(("conv", "residual", "pool"), (False, True), (False, True)))


@pytest.mark.parametrize(("resample", "scale_shift", "new_order"), BRANCHES)
def test_every_branch_computes_the_same(tmp_path, resample, scale_shift, new_order):
    """The heads differ with the order, so that both ways of giving them, and both target classes, are used."""
    heads = {"num_heads": 4} if new_order else {"num_head_channels": 16}
    count = (lambda width: 4) if new_order else (lambda width: width // 16)
    state = random_state(widths=(32, 64, 64), resample=resample, scale_shift=scale_shift, attention=(new_order, True, False))
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 997.0])
    options = {**GUIDED, "use_new_attention_order": new_order, **heads}
    error, pipe = difference(tmp_path, state, options, x, t, resample=resample, by_head=not new_order, heads=count)
    assert error < 1e-5
    assert type(pipe.unet).__name__ == ("ADMUNet2DModel" if resample == "pool" or new_order else "UNet2DModel")
    with torch.no_grad():  # the other order is another function: the comparison can fail
        wrong = Forward(state, count, new_order, resample, 1, 3)(x, t)
        assert float((wrong - pipe.unet(x, t).sample).abs().max() / wrong.abs().max()) > 1e-3


def test_classes_learned_variance_and_heads_of_the_way_up(tmp_path):
    state = random_state(classes=5, out_channels=6, layers=2)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 500.0]), torch.tensor([4, 1])
    options = {**GUIDED, "num_heads": 4, "num_heads_upsample": 2, "class_cond": True, "learn_sigma": True}
    error, pipe = difference(tmp_path, state, options, x, t, labels, layers=2, heads=lambda width: 4, up_heads=lambda width: 2)
    assert error < 1e-5
    assert pipe.num_classes == 5 and pipe.parameterization.variance == "learned_range"
    assert pipe(class_labels=[0, 4], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)


def test_a_time_embedding_of_another_width(tmp_path):
    """The largest published network has half of its `num_channels` at the first level."""
    state = random_state(widths=(32, 64, 64), time_channels=64)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 997.0])
    options = {**GUIDED, "num_head_channels": 32, "num_channels": 64}
    error, pipe = difference(tmp_path, state, options, x, t, heads=lambda width: width // 32)
    assert error < 1e-5 and type(pipe.unet).__name__ == "ADMUNet2DModel"


def test_halves_stay_halves_and_a_second_run_writes_the_same(tmp_path):
    state = random_state(dtype=torch.float16)
    torch.save(state, tmp_path / "weights.pt")
    for name in "ab":
        convert(tmp_path / "weights.pt", tmp_path / name, options={**GUIDED, "num_head_channels": 32})
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 5
    for file in files:
        if file.suffix != ".md":  # the card has the folder's name
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "a/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_torchcfm_container(tmp_path, weights, parallel):
    prefix = "module." if parallel else ""
    ema, last = random_state(seed=1), random_state(seed=2)
    tree = {
        "net_model": {prefix + key: value for key, value in last.items()},
        "ema_model": {prefix + key: value for key, value in ema.items()},
        "sched": {"base_lrs": [2e-4]}, "optim": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}, "step": 7,
    }  # fmt: skip
    file = tmp_path / "otcfm_weights.pt"
    torch.save(tree, file)
    plan = convert(file, tmp_path / "out", options={"image_size": 8, "num_heads": 4, "use_new_attention_order": False, "weights": weights})
    pipe = AutoPipeline.from_pretrained(tmp_path / "out")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 0.7])
    with torch.no_grad():
        wanted = Forward(ema if weights == "ema" else last, lambda width: 4, True, "conv", 1, 3)(x, t)
        assert (pipe.unet(x, t).sample - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert any(pattern.startswith("optim") for pattern in plan.dropped)


def test_a_flow_is_sampled_towards_data_at_one(tmp_path):
    """torchcfm's own sampling, x += dt v(t, x) from t = 0 (noise) to 1 (data), step by step."""
    state = random_state(widths=(32, 32), attention=(False, True))
    torch.save({"net_model": state, "ema_model": state, "optim": {}, "sched": {}, "step": 1}, tmp_path / "icfm_x.pt")
    options = {"image_size": 8, "num_heads": 2, "use_new_attention_order": False}
    convert(tmp_path / "icfm_x.pt", tmp_path / "out", options=options)
    pipe = AutoPipeline.from_pretrained(tmp_path / "out")
    forward = Forward(state, lambda width: 2, True, "conv", 1, 2)
    noise = torch.randn(2, 3, 8, 8)
    x = noise.clone()
    for i in range(5):
        x = x + 0.2 * forward(x, torch.full((2,), 0.2 * i))
    got = pipe(latents=noise, batch_size=2, num_inference_steps=5, output_type="latent").images
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_flow_matching_container_with_its_average_in_a_list(tmp_path, weights):
    last, ema = random_state(resample="pool", seed=1), random_state(resample="pool", seed=2)
    model = {"num_updates": torch.tensor(9)} | {f"model.{key}": value for key, value in last.items()}
    model |= {f"shadow_params.{i}": value for i, value in enumerate(ema.values())}
    tree = {"model": model, "optimizer": {"state": {}}, "lr_schedule": {}, "epoch": 3, "scaler": {}}
    tree["args"] = argparse.Namespace(dataset="mine")
    torch.save(tree, tmp_path / "checkpoint-3.pth")
    options = {"image_size": 8, "num_heads": 1, "use_new_attention_order": True, "weights": weights}
    convert(tmp_path / "checkpoint-3.pth", tmp_path / "out", options=options)
    pipe = AutoPipeline.from_pretrained(tmp_path / "out")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 0.7])
    with torch.no_grad():
        wanted = Forward(ema if weights == "ema" else last, lambda width: 1, False, "pool", 1, 3)(x, t)
        assert (pipe.unet(x, t).sample - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert pipe.parameterization.sign == -1 and pipe.parameterization.time_input == "1 - t"


def test_consistency_models_say_so_by_their_attention(tmp_path):
    state = random_state(attention_dims=2, resample="residual", classes=4)
    torch.save(state, tmp_path / "target_model.pt")
    for mode, prediction in (("consistency_distillation", "consistency"), ("edm", "edm")):
        options = {"image_size": 8, "num_head_channels": 32, "training_mode": mode}
        plan = convert(tmp_path / "target_model.pt", options=options, dry_run=True)
        assert plan.objects["scheduler"].parameterization.prediction == prediction
        assert plan.objects["scheduler"].parameterization.time_input == "250 log(sigma)"
    convert(tmp_path / "target_model.pt", tmp_path / "out", options=options)
    pipe = AutoPipeline.from_pretrained(tmp_path / "out")
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([-3.0, 900.0]), torch.tensor([3, 0])
    with torch.no_grad():
        wanted = Forward(state, lambda width: width // 32, False, "residual", 1, 3)(x, t, labels)
        assert (pipe.unet(x, t, class_labels=labels).sample - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_an_upsampler_becomes_a_network_alone(tmp_path):
    state = random_state(in_channels=6, out_channels=6, classes=3)
    torch.save(state, tmp_path / "up.pt")
    options = {**GUIDED, "num_heads": 4, "class_cond": True, "learn_sigma": True}
    options.pop("image_size")
    plan = convert(tmp_path / "up.pt", tmp_path / "out", options={**options, "large_size": 16, "small_size": 8})
    assert plan.pipeline is None and (tmp_path / "out/config.json").is_file()


def test_layouts_without_sizes_or_attention():
    for kwargs in ({"widths": (32,), "attention": (True,)}, {"attention": (False,) * 3}, {"layers": 3, "resample": "residual"}):
        layout = layout_of(random_state(**kwargs))
        assert layout.layers_per_block == kwargs.get("layers", 1)
        assert layout.widths == kwargs.get("widths", (32, 64, 96))
        assert layout.attention_levels == kwargs.get("attention", (False, True, True))


def test_rows_by_kind_is_a_permutation():
    rows = torch.arange(24)
    by_kind = rows_by_kind(rows, 4)
    assert sorted(by_kind.tolist()) == rows.tolist() and by_kind[:2].tolist() == [0, 1] and by_kind[2:4].tolist() == [6, 7]


# ------------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name):
    codebase, command = PRESETS[name]
    settings = settings_of(codebase, {"model": "otcfm"} if codebase == "torchcfm" else {}, name)
    assert settings["image_size"] >= 32
    assert flags_of(command).items() <= settings.items()
    parameterization_of(codebase, settings, settings.get("learn_sigma", False))


def test_the_betas_of_a_longer_chain_end_at_the_same_noise():
    settings = settings_of("improved_diffusion", {}, "lsun_uncond_100M_1200K_bs128") | {"diffusion_steps": 4000}
    longer = parameterization_of("improved_diffusion", settings, True).path
    assert longer.beta_start == 0.0001 / 4 and longer.num_train_timesteps == 4000
    cosine = parameterization_of("improved_diffusion", settings_of("improved_diffusion", {}, "cifar10_uncond_50M_500K"), True)
    assert cosine.time_input == "index_scaled" and cosine.path.beta_schedule == "squaredcos_cap_v2"


def test_a_whole_command_is_compared_with_the_shapes(tmp_path):
    torch.save(random_state(layers=2, resample="residual", classes=1000), tmp_path / "w.pt")
    command = "--image_size 8 --num_channels 32 --num_res_blocks 2 --resblock_updown True --class_cond True --attention_resolutions 4,2 "
    command += "--dropout 0.1 --num_head_channels 32 --use_fp16 True"
    plan = convert(tmp_path / "w.pt", options={"codebase": "guided_diffusion", "flags": command}, dry_run=True)
    assert plan.components["unet"].config["sample_size"] == 8
    for flag, value, message in (("num_res_blocks", "3", "num_res_blocks = 3"), ("attention_resolutions", "8", "attention_resolutions 8"),
                                 ("class_cond", "False", "class_cond = False"), ("learn_sigma", "True", "learn_sigma = True")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "w.pt", options={"codebase": "guided_diffusion", "flags": command, flag: value}, dry_run=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "codebase=NAME"),
        ({"codebase": "guided_diffusion"}, "image_size, use_new_attention_order, diffusion_steps, noise_schedule, num_heads"),
        ({"codebase": "other"}, "none of guided_diffusion"),
        ({**GUIDED, "num_heads": 3}, "num_heads = 3 does not fit"),
        ({**GUIDED, "num_heads": 4, "noise_schedule": "sigmoid"}, "linear, cosine"),
        ({**GUIDED, "num_heads": 4, "image_size": "big"}, "image_size = 'big'"),
        ({**GUIDED, "num_heads": 4, "class_cond": "True"}, "class_cond = True, but the checkpoint has False"),
        ({**GUIDED, "num_heads": 4, "weights": "best"}, "none of ema, model"),
        ({"codebase": "guided_diffusion", "preset": "cifar10_uncond_50M_500K"}, "but w.pt is of improved_diffusion"),
        ({"preset": "nothing"}, "codebase=NAME|preset 'nothing'"),
        ({"codebase": "guided_diffusion", "flags": "--image_size 8 --colour red"}, "--colour"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path, options, message):
    torch.save(random_state(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "w.pt", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_keys_too_many_or_too_few_are_refused(tmp_path):
    state = random_state()
    options = {**GUIDED, "num_heads": 4}
    torch.save({**state, "extra.weight": torch.zeros(2)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="extra.weight"):
        convert(tmp_path / "more.pt", tmp_path / "out", options=options)
    torch.save({k: v for k, v in state.items() if k != "output_blocks.2.1.qkv.weight"}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match="qkv"):
        convert(tmp_path / "less.pt", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_other_state_dicts_are_not_taken():
    assert "openai_unet" in FORMATS
    with pytest.raises(ValueError, match="input_blocks"):
        layout_of({"time_embed.0.weight": torch.zeros(4, 1)})
