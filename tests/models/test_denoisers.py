"""The networks of score-based models, EDM2 and k-diffusion: sizes, saving, what they start from, magnitudes, how they are called."""

import math

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines import (
    DiffusionImagePipeline,
    EDM2UNetModel,
    HDiTModel,
    HeunScheduler,
    KDiffusionUNetModel,
    Parameterization,
    ScoreUNetModel,
)
from gen_pipelines.models.calling import ClassCondition, predict
from gen_pipelines.models.denoisers import edm2_unet, score_unet

TINY = {"sample_size": 8, "base_channels": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_resolutions": (4,)}
MODELS = {
    "DDPM++": (ScoreUNetModel, TINY),
    "NCSN++": (ScoreUNetModel, {**TINY, "resample_taps": (1, 3, 3, 1), "input_pyramid": "residual", "time_embedding": "fourier",
                                "time_transform": "log", "num_class_embeds": 3}),
    "pyramids": (ScoreUNetModel, {**TINY, "input_pyramid": "input_skip", "combine": "cat", "output_pyramid": "output_skip"}),
    "DDPM": (ScoreUNetModel, {**TINY, "block_type": "ddpm", "input_pyramid": "residual", "output_pyramid": "residual"}),
    "EDM2": (EDM2UNetModel, {"sample_size": 8, "base_channels": 8, "channel_mults": (1, 2), "layers_per_block": 1,
                             "attention_resolutions": (4,), "channels_per_head": 8, "num_class_embeds": 3}),
    "k-diffusion": (KDiffusionUNetModel, {"sample_size": 8, "patch_size": 2, "embedding_channels": 16, "block_out_channels": (8, 16),
                                          "layers_per_block": (1, 2), "attention_levels": (False, True), "num_class_embeds": 3}),
    "HDiT": (HDiTModel, {"sample_size": 8, "patch_size": 1, "block_out_channels": (8, 16, 16), "layers_per_block": (1, 2, 1),
                         "attention_types": ("neighborhood", "shifted-window", "global"), "attention_sizes": (3, 2, None),
                         "attention_head_dims": (8, 8, 16), "mapping_channels": 16, "num_class_embeds": 3}),
}  # fmt: skip


def make(kind, **changes):
    cls, config = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(**{**config, **changes})


def stirred(model):
    """With weights in place of the zeros that it starts from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def inputs(model, count=2):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, model.config.in_channels, 8, 8, generator=generator)
    labels = None if model.config.num_class_embeds is None else torch.arange(count)
    return x, torch.tensor([0.3, 7.0])[:count], labels


@pytest.mark.parametrize("kind", MODELS)
def test_it_starts_from_zero_learns_everywhere_and_is_saved(kind, tmp_path):
    model = make(kind)
    x, t, labels = inputs(model)
    assert not model(x, t, labels).sample.any()
    stirred(model)
    output = model(x, t, labels).sample
    assert output.shape == x.shape
    output.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()]
    assert all(name.startswith("logvar") for name in without), without
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(x, t, labels).sample
        assert_close(again(x, t, labels, return_dict=False)[0], expected, rtol=0, atol=0)
        condition = None if labels is None else ClassCondition(labels)
        assert_close(predict(again, x, t, condition), expected, rtol=0, atol=0)
        assert_close(again(x, 0.3, labels).sample[:1], expected[:1])


@pytest.mark.parametrize("kind", MODELS)
def test_a_picture_does_not_depend_on_its_batch(kind):
    model = stirred(make(kind)).double().eval()
    x, t, labels = inputs(model)
    x, t = x.double(), t.double()
    with torch.no_grad():
        whole = model(x, t, labels).sample
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], None if labels is None else labels[i : i + 1]).sample for i in range(2)])
    assert_close(whole, alone)


@pytest.mark.parametrize("kind", MODELS)
def test_labels_that_do_not_fit_are_refused(kind):
    model = make(kind)
    x, t, labels = inputs(model)
    with pytest.raises(ValueError, match=r"(has|has no) classes"):
        model(x, t, torch.arange(2) if labels is None else None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["NCSN++", "EDM2"])
def test_it_compiles_without_graph_breaks(kind):
    model = stirred(make(kind)).eval()
    x, t, labels = inputs(model)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(x, t, labels).sample, model(x, t, labels).sample)


@pytest.mark.parametrize(("changes", "message"), [
    ({"block_type": "resnet"}, "block_type='resnet'"),
    ({"time_embedding": "learned"}, "positional, fourier"),
    ({"block_type": "ddpm", "resample_taps": (1, 3, 3, 1)}, "without a filter"),
    ({"time_transform": "geometric"}, "num_scales"),
    ({"sample_size": 9}, "cannot be halved"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ScoreUNetModel(**{**TINY, **changes})


@pytest.mark.parametrize(("changes", "message"), [
    ({"attention_levels": (True,)}, "one entry for each level"),
    ({"sample_size": 4}, "down to 2 or more"),
    ({"sample_size": 10}, "cannot be halved 1 times"),
    ({"block_out_channels": (8, 160)}, "dealt out to 2 heads|cannot"),
])  # fmt: skip
def test_options_of_k_diffusions_network_that_do_not_fit_are_refused(changes, message):
    if changes.get("block_out_channels") == (8, 160):
        assert make("k-diffusion", **changes).down[1].attentions[0].num_heads == 2  # 160 // 64
        changes = {"block_out_channels": (8, 193)}
    with pytest.raises(ValueError, match=message):
        make("k-diffusion", **changes)


def test_a_condition_of_k_diffusions_network_moves_its_output():
    model = stirred(make("k-diffusion", condition_channels=4)).eval()
    x, t, labels = inputs(model)
    with torch.no_grad():
        plain, told = model(x, t, labels).sample, model(x, t, labels, torch.ones(2, 4)).sample
        assert_close(model(x, t, labels, torch.zeros(2, 4)).sample, plain)
    assert not torch.allclose(told, plain, atol=1e-3)
    with pytest.raises(ValueError, match="condition_channels=0"):
        make("k-diffusion")(x, t, labels, torch.ones(2, 4))


def test_a_geometric_time_is_the_number_of_the_level():
    model = make("DDPM++", time_transform="geometric", sigma_range=(0.01, 50.0), num_scales=1000, time_scale=0.5)
    plain = make("DDPM++")
    number = torch.tensor([0.0, 1.0, 417.0, 999.0], dtype=torch.float64)
    sigma = 2 * 50.0 * (0.01 / 50.0) ** (number / 999)
    assert_close(model.embed_time(sigma), plain.embed_time(number), rtol=0, atol=1e-5)
    assert_close(model.embed_time(sigma.float()), plain.embed_time(number), rtol=0, atol=1e-4)


def test_a_time_below_the_smallest_counts_as_it():
    model = make("DDPM++", smallest_time=0.999, time_scale=2.0)
    assert_close(model.embed_time(torch.tensor([0.0, 0.3])), make("DDPM++").embed_time(torch.tensor([0.999, 0.999])))
    assert_close(model.embed_time(torch.tensor([5.0])), make("DDPM++").embed_time(torch.tensor([10.0])))


def test_a_score_is_divided_by_the_time():
    model, plain = stirred(make("NCSN++", divide_by_time=True)).eval(), stirred(make("NCSN++")).eval()
    x, t, labels = inputs(model)
    with torch.no_grad():
        assert_close(model(x, t, labels).sample * t.view(-1, 1, 1, 1), plain(x, t, labels).sample)


@pytest.mark.parametrize(("build", "millions"), [
    (score_unet.ddpmpp, 61.8), (score_unet.ncsnpp, 62.8), (lambda: edm2_unet.edm2("xs"), 124.7), (lambda: edm2_unet.edm2("s"), 280.2),
])  # fmt: skip
def test_published_sizes(build, millions):
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)


def test_unknown_sizes_are_refused():
    with pytest.raises(ValueError, match="256 and 1024"):
        score_unet.ncsnpp_large(128)
    with pytest.raises(ValueError, match="xxs, xs"):
        edm2_unet.edm2("xxxl")


# ----------------------------------------------------------------------------------------------------------------------------- EDM2


def magnitude(x):
    return x.double().square().mean().sqrt().item()


def test_the_operations_keep_magnitudes():
    """Independent inputs of magnitude one give outputs of magnitude one, to the counting error of two million numbers."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 64, 128, 128, generator=generator) for _ in range(2))
    assert magnitude(edm2_unet._silu(a)) == pytest.approx(1, abs=5e-3)
    for weight in (0.3, 0.5, 0.9):
        assert magnitude(edm2_unet._blend(a, b, weight)) == pytest.approx(1, abs=5e-3)
        assert magnitude(edm2_unet._join(a, b[:, :16], weight)) == pytest.approx(1, abs=5e-3)
    joined = edm2_unet._join(a, b[:, :16], 0.5)
    assert joined[:, :64].square().sum().item() == pytest.approx(joined[:, 64:].square().sum().item(), rel=2e-2)
    layer = edm2_unet._Weighted(64, 32, 3)
    assert magnitude(layer(a)[:, :, 1:-1, 1:-1]) == pytest.approx(1, abs=5e-2)  # one draw of 32 x 576 weights
    assert magnitude(edm2_unet.unit_magnitude(7 * a, (1,))) == pytest.approx(1, abs=1e-3)
    time = edm2_unet._Fourier(4096)(torch.linspace(-1.5, 1.1, 16))
    assert magnitude(time) == pytest.approx(1, abs=5e-2)


def test_training_keeps_the_weights_on_their_sphere():
    model = stirred(make("EDM2"))
    x, t, labels = inputs(model)
    before = model.conv_out.weight.detach().clone()
    with torch.no_grad():
        model.train()(x, t, labels)
    assert_close(model.conv_out.weight.detach(), before)  # nothing is touched without gradients
    model(x, t, labels)
    rms = model.conv_out.weight.detach().square().mean((1, 2, 3)).sqrt()
    assert_close(rms, torch.ones_like(rms), rtol=0, atol=1e-3)
    model.eval()
    scaled = model(x, t, labels).sample.detach()
    with torch.no_grad():
        model.conv_out.weight.mul_(5.0)
        assert_close(model(x, t, labels).sample, scaled, rtol=1e-3, atol=1e-4)


def test_the_error_estimate_follows_the_time():
    model = stirred(make("EDM2"))
    assert model.log_variance(torch.tensor([-1.0, 0.5])).shape == (2,)
    with pytest.raises(ValueError, match="logvar_channels=0"):
        make("EDM2", logvar_channels=0).log_variance(torch.zeros(1))


@pytest.mark.parametrize("kind", ["NCSN++", "EDM2"])
def test_it_draws_in_a_pipeline(kind):
    convention = "edm2" if kind == "EDM2" else "score_sde_ve"
    p = Parameterization.named(convention) if kind == "EDM2" else Parameterization.named(convention, prediction="epsilon", sign=-1)
    pipe = DiffusionImagePipeline(HeunScheduler().bind(p), unet=stirred(make(kind)).eval())
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(class_labels=[1, 2], num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    assert drawn.shape[0] == 2 and torch.isfinite(drawn).all() and math.isfinite(magnitude(drawn))
