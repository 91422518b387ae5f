"""GlowPipeline on tiny flows: sampling, encode and decode, interpolation, attributes, levels, likelihood, saving, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, GlowPipeline
from gen_pipelines.models.flows.glow import GlowModel
from gen_pipelines.models.flows.realnvp import RealNVPModel

PICTURES = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def make(cls=GlowModel, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = cls(**{"in_channels": 1, "sample_size": 8, "num_levels": 2, "hidden_channels": 6} | settings)
        labels = None if flow.config.num_class_labels is None else torch.arange(6) % flow.config.num_class_labels
        flow.initialize_from_batch((PICTURES.float() + 0.5) / 128 - 1, labels)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return GlowPipeline(flow)


PIPELINES = {
    "glow": lambda: make(num_steps=2, pre_transform="marginal"),
    "glow_labels": lambda: make(num_steps=2, num_class_labels=3, pre_transform="logit"),
    "realnvp": lambda: make(RealNVPModel, num_couplings=1, num_blocks=1),
}


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request):
    return PIPELINES[request.param]()


def labels_for(pipe, count):
    return None if pipe.num_classes is None else [number % pipe.num_classes for number in range(count)]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_call_draws_pictures_in_every_form(pipe):
    images = pipe(batch_size=2, generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 2 and images[0].size == (8, 8) and images[0].mode == "L"
    array = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert array.shape == (2, 8, 8, 1) and array.min() >= 0 and array.max() <= 1
    assert np.array_equal((array[..., 0] * 255).round().astype(np.uint8), np.stack([np.asarray(image) for image in images]))
    tensor = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)[0]
    assert tensor.shape == (2, 1, 8, 8)
    latents = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="latent").images
    again = pipe(latents=latents / pipe.config.default_temperature, class_labels=labels_for(pipe, 2), output_type="pt").images
    assert latents.shape == (2, 64) and again.shape == (2, 1, 8, 8)


def test_a_picture_belongs_to_its_generator_and_the_global_state_stays(pipe):
    state = torch.get_rng_state()
    together = pipe(batch_size=3, generator=seeds(1, 2, 3), output_type="pt").images
    alone = pipe(batch_size=1, generator=seeds(2), output_type="pt").images
    assert_close(together[1:2], alone, atol=1.01 / 255, rtol=0)  # a value at the border of two levels may round to either
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_zero_is_the_mean_and_one_for_each_level(pipe):
    mean = pipe(batch_size=2, class_labels=None if pipe.num_classes is None else 1, temperature=0.0, output_type="pt").images
    assert_close(mean[0], mean[1])
    count = len(pipe.flow.latent_shapes)
    latents = pipe(batch_size=1, temperature=[0.0] * (count - 1) + [1.0], output_type="latent").images
    fine = sum(shape[0] * shape[1] * shape[2] for shape in pipe.flow.latent_shapes[:-1])
    assert (latents[:, :fine] == 0).all() and (latents[:, fine:] != 0).all()


def test_encode_and_decode_give_the_picture_back(pipe):
    labels = labels_for(pipe, 6)
    latents = pipe.encode(PICTURES, labels)
    assert latents.shape == (6, 64)
    pictures = pipe.decode(latents, labels)
    for picture, expected in zip(pictures, PICTURES, strict=True):
        assert np.array_equal(np.asarray(picture), expected[0].numpy())
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(pipe.reconstruct(pictures, labels), pictures, strict=True))
    assert_close(pipe.encode(PICTURES.float() / 255, labels), latents)
    assert_close(pipe.join(pipe.split(latents)), latents)


@pytest.mark.parametrize("mode", ["linear", "spherical"])
def test_interpolation_begins_and_ends_at_the_pictures(pipe, mode):
    way = pipe.interpolate(PICTURES[0], PICTURES[1], 5, None if pipe.num_classes is None else [0, 1], mode)
    assert len(way) == 5
    for picture, expected in ((way[0], PICTURES[0]), (way[-1], PICTURES[1])):
        assert np.array_equal(np.asarray(picture), expected[0].numpy())
    assert not np.array_equal(np.asarray(way[2]), np.asarray(way[0]))


def test_an_attribute_is_the_difference_of_means_and_its_strength_goes_both_ways(pipe):
    labels = labels_for(pipe, 6)
    has = [True, True, False, False, False, True]
    direction = pipe.attribute_direction(PICTURES, has, labels)
    latents, mask = pipe.encode(PICTURES, labels), torch.tensor(has)
    assert_close(direction, latents[mask].mean(0) - latents[~mask].mean(0))
    moved = pipe.manipulate(PICTURES[:2], direction, [-1.0, 0.0, 1.0], None if labels is None else labels[:2], output_type="pil")
    assert len(moved) == 6
    for place, expected in ((1, PICTURES[0]), (4, PICTURES[1])):  # strength 0 is the picture
        assert np.array_equal(np.asarray(moved[place]), expected[0].numpy())
    assert not np.array_equal(np.asarray(moved[0]), np.asarray(moved[2]))
    with pytest.raises(ValueError, match="some of each kind"):
        pipe.attribute_direction(PICTURES, [True] * 6, labels)
    with pytest.raises(ValueError, match=r"shape \(64,\)"):
        pipe.manipulate(PICTURES, direction[:10], 1.0, labels)


def test_levels_are_drawn_anew_one_by_one(pipe):
    labels = labels_for(pipe, 6)
    for level in (0, -1):
        drawn = pipe.resample_levels(PICTURES, [level], labels, temperature=1.0, generator=seeds(*range(6)), output_type="pt")
        assert drawn.shape == (6, 1, 8, 8) and not torch.equal(drawn, PICTURES.float() / 255)
    with pytest.raises(ValueError, match="levels names some of the levels"):
        pipe.resample_levels(PICTURES, [5], labels)


def test_likelihood_and_saving(pipe, tmp_path):
    labels = labels_for(pipe, 6)
    result = pipe.log_likelihood(PICTURES, labels, num_samples=3, generator=seeds(*range(6)))
    assert result.kind == "exact" and result.dequantization == "uniform" and result.nats.shape == result.stderr.shape == (6,)
    assert_close(result.bits_per_dim, -result.nats / (64 * np.log(2)))
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = AutoPipeline.from_pretrained(tmp_path / "pipe")
    assert type(loaded) is GlowPipeline and type(loaded.flow) is type(pipe.flow)
    same = loaded.log_likelihood(PICTURES, labels, num_samples=3, generator=seeds(*range(6)))
    assert torch.equal(same.nats, result.nats)
    assert "GlowPipeline" in (tmp_path / "pipe" / "README.md").read_text()
    one, two = (p(batch_size=2, generator=seeds(1, 2), output_type="pt").images for p in (pipe, loaded))
    assert torch.equal(one, two)


def test_labels_are_given_drawn_or_refused():
    pipe = PIPELINES["glow_labels"]()
    assert len(pipe(class_labels=[0, 2], num_images_per_label=3).images) == 6
    assert len(pipe(batch_size=4, class_labels=1).images) == 4
    for wrong in ([0, 7, 1, 1, 1, 1], [-1] * 6, [0.2] * 6):
        with pytest.raises(ValueError, match="log_likelihood: labels are whole numbers from 0 to 2"):
            pipe.log_likelihood(PICTURES, wrong)
    drawn, again = (pipe(batch_size=4, generator=seeds(1, 2, 3, 4), output_type="pt").images for _ in range(2))
    assert torch.equal(drawn, again)
    with pytest.raises(ValueError, match="from 0 to 2"):
        pipe(class_labels=3)
    with pytest.raises(ValueError, match="give class_labels"):
        pipe.encode(PICTURES)
    with pytest.raises(ValueError, match="has no classes"):
        PIPELINES["glow"]()(class_labels=1)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"batch_size": 2.0}, TypeError, "whole number"),
        ({"temperature": -1.0}, ValueError, "at least 0"),
        ({"temperature": [1.0, 1.0, 1.0]}, ValueError, "or 2"),
        ({"output_type": "jpeg"}, ValueError, "pil, np, pt, latent"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, ValueError, "one per picture: 2 here"),
        ({"generator": 3}, TypeError, "torch.Generator"),
        ({"latents": torch.zeros(1, 3)}, ValueError, r"\(B, 64\)"),
        ({"latents": torch.zeros(2, 64), "batch_size": 3}, ValueError, "leave out batch_size"),
        ({"num_images_per_label": 2}, ValueError, "needs class_labels"),
    ],
)
def test_calls_that_make_no_sense_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        PIPELINES["glow"]()(**options)


def test_pictures_that_do_not_fit_are_refused():
    pipe = PIPELINES["glow"]()
    with pytest.raises(ValueError, match="8 x 8 pixels are needed"):
        pipe.encode(Image.new("L", (4, 8)))
    with pytest.raises(ValueError, match="one picture"):
        pipe.interpolate(PICTURES[:2], PICTURES[0])
    with pytest.raises(TypeError, match="NormalizingFlowModel"):
        GlowPipeline(torch.nn.Linear(2, 2))
