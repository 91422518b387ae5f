"""Pipelines of generators: drawing, truncation, walks, style mixing, projection, edits, and what bad input gets."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import gen_pipelines
from gen_pipelines import AutoPipeline, GANPipeline, StyleGANPipeline
from gen_pipelines.pipelines.sequences import save_animation, strip


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def gan():
    torch.manual_seed(0)
    return GANPipeline(gen_pipelines.DCGANGenerator(16, 1, latent_dim=8, base_channels=4, num_classes=3), image_size=14)


@pytest.fixture
def style():
    torch.manual_seed(0)
    network = gen_pipelines.StyleGAN2Generator(16, 3, 8, 8, channel_base=128, channel_max=16, num_mapping_layers=2)
    for module in network.modules():
        if hasattr(module, "noise_strength"):
            torch.nn.init.constant_(module.noise_strength, 0.1)
    network.mapping.w_avg.copy_(network.mapping(torch.randn(1000, 8)).mean(0).detach())
    return StyleGANPipeline(network)


def test_pictures_are_their_generators_and_labels(gan):
    pictures = gan(class_labels=[0, 1, 2, 0], generator=generators(1, 2, 3, 4), output_type="pt").images
    assert pictures.shape == (4, 1, 14, 14) and 0 <= pictures.min() and pictures.max() <= 1
    alone = gan(class_labels=2, generator=generators(3), output_type="pt").images
    assert_close(alone, pictures[2:3], rtol=1e-4, atol=1e-5)
    assert len(gan(class_labels=[0, 2], num_images_per_label=3).images) == 6
    assert len(gan(4, class_labels=1).images) == 4
    drawn = gan(batch_size=4, generator=generators(1, 2, 3, 4), output_type="pt").images  # labels are drawn from each generator
    again = gan(batch_size=1, generator=generators(3), output_type="pt").images
    assert_close(again, drawn[2:3], rtol=1e-4, atol=1e-5)
    picture = gan(1, return_dict=False)[0][0]
    assert picture.mode == "L" and picture.size == (14, 14)


def test_truncated_noise_is_the_truncated_normal(gan):
    z = gan.prepare_latents(4000, torch.Generator().manual_seed(0), None, 0.5)
    assert z.abs().max() <= 0.5
    expected = torch.distributions.Normal(0, 1)
    tail = expected.cdf(torch.tensor(0.25)) - expected.cdf(torch.tensor(-0.25))
    whole = expected.cdf(torch.tensor(0.5)) - expected.cdf(torch.tensor(-0.5))
    assert_close((z.abs() < 0.25).float().mean(), tail / whole, rtol=0.02, atol=0)
    wide = gan.prepare_latents(10, torch.Generator().manual_seed(0), None, 8.0)
    assert_close(wide, gan.prepare_latents(10, torch.Generator().manual_seed(0), None, None), rtol=1e-4, atol=1e-5)


def test_walks_close_and_interpolation_meets_its_ends(gan):
    a, b = torch.randn(8), torch.randn(8)
    frames = gan.interpolate(a, b, num_images=5, class_labels=1, output_type="pt")
    ends = gan(class_labels=[1, 1], latents=torch.stack([a, b]), output_type="pt").images
    assert_close(frames[[0, 4]], ends, rtol=1e-4, atol=1e-5)
    assert len(gan.walk(frames=10, stops=3, generator=generators(0)[0], class_labels=0)) == 10


def test_save_load_and_what_is_stored(gan, style, tmp_path):
    for name, pipe in (("gan", gan), ("style", style)):
        pipe.save_pretrained(tmp_path / name)
        again = AutoPipeline.from_pretrained(tmp_path / name)
        assert type(again) is type(pipe) and again.discriminator is None
        a, b = (p(2, generator=generators(5, 6), output_type="pt").images for p in (pipe, again))
        assert torch.equal(a, b)
    with pytest.raises(NotImplementedError, match="no log_likelihood"):
        gan.log_likelihood(None)


def test_truncation_to_zero_is_the_average_picture(style):
    average = style(styles=style.average_style()[None], output_type="pt").images
    assert_close(style(2, generator=generators(1, 2), truncation=0.0, output_type="pt").images, average.expand(2, -1, -1, -1))
    half = style(1, generator=generators(1), truncation=0.5, truncation_cutoff=2, output_type="latent").images
    full = style(1, generator=generators(1), output_type="latent").images
    assert_close(half[:, :2], (full[:, :2] + style.average_style()[:2]) / 2)
    assert torch.equal(half[:, 2:], full[:, 2:])


def test_style_mixing_is_a_picture_of_rows_and_columns(style):
    rows, columns = (style(2 + i, generator=generators(*range(2 + i)), output_type="latent").images for i in (0, 1))
    picture = style.mix(rows, columns, "fine")
    assert picture.size == (16 * 4, 16 * 3)
    mixed = rows[1].clone()
    mixed[style.layers("fine")] = columns[2][style.layers("fine")]
    cell = picture.crop((48, 32, 64, 48))
    assert cell.tobytes() == style(styles=mixed[None]).images[0].tobytes()
    assert style.layers("coarse") + style.layers("middle") + style.layers("fine") == list(range(style.generator.num_ws))


def test_mixing_all_shows_the_three_tables_below_each_other(style):
    rows, columns = (style(2, generator=generators(i, i + 2), output_type="latent").images for i in (0, 1))
    whole = style.mix(rows, columns)
    assert whole.size == (16 * 3, 16 * 7)
    for i, which in enumerate(("coarse", "middle", "fine")):
        table = style.mix(rows, columns, which)
        assert whole.crop((0, 16 + 32 * i, 48, 48 + 32 * i)).tobytes() == table.crop((0, 16, 48, 48)).tobytes()


def test_walks_with_truncation_pass_the_truncated_pictures(gan, style):
    for pipe in (gan, style):
        options = {"class_labels": 1} if pipe is gan else {}
        frames = pipe.walk(4, 2, generators(1, 2), truncation=0.5, **options)
        stop = pipe(1, generator=generators(2), truncation=0.5, **({"class_labels": [1]} if pipe is gan else {})).images[0]
        assert np.abs(np.asarray(frames[2]).astype(int) - np.asarray(stop)).max() <= 1
    with pytest.raises(ValueError, match="1 generators for 2 stops"):
        style.walk(4, 2, generators(1))
    with pytest.raises(ValueError, match="finite"):
        style.walk(4, 2, truncation=float("nan"))


def test_a_sequence_as_a_strip_and_as_an_animation(gan, tmp_path):
    frames = gan.walk(6, 3, generators(1, 2, 3), class_labels=0)
    whole = strip(frames, columns=4, gap=2)
    assert whole.size == (4 * 16 - 2, 2 * 16 - 2)
    assert whole.crop((16, 16, 30, 30)).tobytes() == frames[5].tobytes()
    for name in ("walk.png", "walk.gif"):
        save_animation(frames, tmp_path / name, frames_per_second=10)
        with Image.open(tmp_path / name) as picture:
            assert picture.n_frames == 6 and picture.size == (14, 14)
    with Image.open(tmp_path / "walk.png") as picture:
        picture.seek(3)
        assert picture.convert("L").tobytes() == frames[3].tobytes() and picture.info["duration"] == 100
    with pytest.raises(ValueError, match=r"walk.mp4 ends in none of .png"):
        save_animation(frames, tmp_path / "walk.mp4")
    with pytest.raises(ValueError, match="different sizes"):
        strip([frames[0], frames[1].resize((4, 4))])


@pytest.mark.slow
@pytest.mark.parametrize("space", ["w", "w+"])
def test_projection_recovers_a_drawn_picture(style, space):
    target = style.crop(style.render(style(1, generator=generators(3), output_type="latent").images))
    start = (style.crop(style.render(style.average_style()[None])) - target).square().mean()
    found = style.project(target[0], steps=150, space=space, generator=generators(0)[0], progress=False)
    assert (style.crop(style.render(found)) - target).square().mean() < 0.05 * start
    assert space == "w+" or torch.equal(found[:, :1].expand_as(found), found)
    assert all(p.requires_grad for p in style.generator.parameters())


def test_directions_are_the_principal_ones(style):
    found = style.directions(3, samples=2000, generator=generators(0)[0])
    assert_close(found.vectors @ found.vectors.T, torch.eye(3), rtol=0, atol=1e-5)
    assert (found.deviations[:-1] >= found.deviations[1:]).all()
    with torch.no_grad():
        w = style.generator.mapping(torch.randn(4000, 8))
    assert_close((w @ found.vectors.T).std(0), found.deviations, rtol=0.1, atol=0)
    styles = style(1, generator=generators(1), output_type="latent").images
    still, moved = style.edit(styles, found.vectors[0], [0.0, 3 * float(found.deviations[0])], layers="fine")
    assert still.tobytes() == style(styles=styles).images[0].tobytes() != moved.tobytes()


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"batch_size": 0}, ValueError, "at least 1"),
    ({"batch_size": 2.0}, TypeError, "whole number"),
    ({"class_labels": [3]}, ValueError, "3 is none of 0 to 2"),
    ({"class_labels": []}, ValueError, "empty"),
    ({"latents": torch.zeros(2, 7)}, ValueError, r"give \(2, 8\)"),
    ({"batch_size": 3, "generator": generators(1)}, ValueError, "1 generators for 3 pictures"),
    ({"truncation": -1.0}, ValueError, "positive"),
    ({"truncation": "0.5"}, ValueError, "positive number of standard deviations, got '0.5'"),
    ({"batch_size": 3, "class_labels": [0, 1]}, ValueError, "batch_size 3, but class_labels ask for 2"),
    ({"class_labels": "cat"}, ValueError, "'c' is none of 0 to 2"),
    ({"class_labels": 1.0}, ValueError, "1.0 is none of 0 to 2"),
    ({"output_type": "jpeg"}, ValueError, "none of pil, np, pt, latent"),
])  # fmt: skip
def test_bad_input_is_named_before_anything_is_drawn(gan, arguments, error, message, monkeypatch):
    monkeypatch.setattr(gan.generator, "forward", lambda *a, **k: pytest.fail("drawn"))
    with pytest.raises(error, match=message):
        gan(**arguments)


def test_styles_are_truncated_as_those_of_noise_are(style):
    styles = style(2, generator=generators(1, 2), output_type="latent").images
    for psi, cutoff in ((0.0, None), (0.5, None), (0.5, 2), (1.0, 0)):
        options = {"truncation": psi, "truncation_cutoff": cutoff}
        drawn = style(2, generator=generators(1, 2), output_type="latent", **options).images
        assert_close(style(styles=styles, output_type="latent", **options).images, drawn)


@pytest.mark.parametrize(("call", "message"), [
    (lambda p: p.interpolate(torch.zeros(8), torch.zeros(7)), r"shape \(8,\), got \(8,\) and \(7,\)"),
    (lambda p: p.interpolate(torch.ones(8), torch.ones(8), class_labels=9), "9 is none of 0 to 2"),
    (lambda p: p.walk(4, 2, class_labels=-1), "-1 is none of 0 to 2"),
])  # fmt: skip
def test_bad_ways_are_named(gan, call, message):
    with pytest.raises(ValueError, match=message):
        call(gan)


def test_bad_styles_are_named(style):
    one, styles = torch.zeros(1, 6, 8), torch.zeros(2, 6, 8)
    for arguments, message in (
        ({"styles": styles, "class_labels": [1]}, "class_labels and styles"),
        ({"styles": styles, "latents": torch.zeros(2, 8)}, "latents and styles"),
        ({"truncation_cutoff": 7}, "truncation_cutoff must be at most 6"),
        ({"truncation_cutoff": -1}, "truncation_cutoff must be at least 0"),
        ({"truncation": "0.5"}, "finite number"),
        ({"noise": "loud", "output_type": "latent"}, "'loud' is none of random, const, none"),
    ):
        with pytest.raises(ValueError, match=message):
            style(**arguments)
    with pytest.raises(ValueError, match="edit takes styles"):
        style.edit(styles, torch.zeros(8), [1.0])
    with pytest.raises(ValueError, match="start and end must be tensors"):
        style.interpolate(one[0], torch.zeros(8))
    with pytest.raises(ValueError, match="styles have shape"):
        style(styles=torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="none of w, w\\+"):
        style.project(torch.zeros(3, 16, 16), space="z")
    with pytest.raises(ValueError, match="give \\(1, 3, 16, 16\\)"):
        style.project(torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match="none of coarse, middle, fine"):
        style.mix(torch.zeros(1, 6, 8), torch.zeros(1, 6, 8), "rough")
    with pytest.raises(ValueError, match="columns: styles have shape"):
        style.mix(torch.zeros(1, 6, 8), torch.zeros(1, 5, 8))
    with pytest.raises(ValueError, match="cropped evenly"):
        GANPipeline(style.generator, image_size=13)
