"""VAEPipeline and VQVAEPipeline: one generator per picture, codes and latents in and out, interpolation, saving, what bad input gets."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, PixelCNNPrior, PixelSNAILPrior, TransformerPrior, VAEModel, VAEPipeline, VQVAEModel, VQVAEPipeline
from gen_pipelines.pipelines.autoencoding import between, picture_grid


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def vae_pipeline() -> VAEPipeline:
    return VAEPipeline(seeded(lambda: VAEModel(sample_size=8, block_out_channels=(8,), latent_dim=4)))


def vq_pipeline(classes: int | None = 3, priors: bool = True) -> VQVAEPipeline:
    model = seeded(
        lambda: VQVAEModel(
            sample_size=8, downsample_factors=(2, 2), hidden_channels=8, layers_per_block=1, residual_channels=4, num_embeddings=16,
            embedding_dim=4,
        )
    )  # fmt: skip
    if not priors:
        return VQVAEPipeline(model)
    top = seeded(lambda: TransformerPrior(16, (2, 2), classes, width=16, num_layers=1, num_heads=2))
    bottom = seeded(lambda: PixelCNNPrior(16, (4, 4), classes, [[2, 2]], width=8, num_layers=2, attention_every=0))
    pipe = VQVAEPipeline(model, top, bottom)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {"vae": vae_pipeline, "vq_vae": vq_pipeline, "vq_vae_without_classes": lambda: vq_pipeline(None)}
LEVELS = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_picture_depends_on_its_own_generator_and_on_nothing_else(kind):
    pipe = PIPELINES[kind]()
    before = torch.get_rng_state()
    for options in ({}, {"sample_pixels": True}):
        whole = pipe(batch_size=3, generator=generators(5, 6, 7), output_type="pt", **options).images
        alone = pipe(batch_size=1, generator=generators(6), output_type="pt", **options).images
        assert_close(alone[0], whole[1], atol=1e-5, rtol=0)
        assert (whole[0] - whole[1]).abs().max() > 0
    assert torch.equal(torch.get_rng_state(), before)
    once, again = (pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt").images for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("kind", PIPELINES)
def test_output_types(kind):
    pipe = PIPELINES[kind]()
    draw = lambda **options: pipe(batch_size=2, generator=torch.Generator().manual_seed(0), **options)
    pt, array, pil = (draw(output_type=name).images for name in ("pt", "np", "pil"))
    assert pt.shape == (2, 1, 8, 8)
    assert 0 <= pt.min() <= pt.max() <= 1
    assert array.shape == (2, 8, 8, 1)
    assert [picture.mode for picture in pil] == ["L", "L"]
    assert abs(np.asarray(pil[0]) / 255 - array[0, :, :, 0]).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(draw(output_type="pt", return_dict=False)[0], pt)
    latents = draw(output_type="latent").images
    assert torch.equal(pipe.decode(latents, "pt"), pt)


def test_pictures_that_are_not_finite_are_reported(caplog):
    vae, vq = vae_pipeline(), vq_pipeline()
    latents, codes = vae(2, output_type="latent").images, vq(2, output_type="latent").images
    for network in (vae.vae, vq.vqvae):
        for parameter in network.decoder.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    for draw in (lambda: vae(2).images, lambda: vae.decode(latents), lambda: vq(2).images, lambda: vq.decode(codes)):
        caplog.clear()
        assert len(draw()) == 2
        assert [record.getMessage().count("2 of 2 pictures have values that are not finite") for record in caplog.records] == [1]
    assert vae(1, output_type="pt").images.isnan().any()


@pytest.mark.parametrize("kind", PIPELINES)
def test_encode_decode_reconstruct_and_interpolate(kind):
    pipe = PIPELINES[kind]()
    pictures = [Image.fromarray(level[0].numpy()) for level in LEVELS]
    back = pipe.reconstruct(pictures, output_type="pt")
    assert torch.equal(pipe.decode(pipe.encode(LEVELS), "pt"), back)
    assert torch.equal(pipe.reconstruct(LEVELS.float() / 255, output_type="pt"), back)
    low = PIPELINES[kind]().to(torch.bfloat16)
    low.set_progress_bar_config(disable=True)
    assert low(batch_size=2, generator=generators(0, 1), output_type="pt").images.isfinite().all()
    assert torch.isfinite(low.log_likelihood(LEVELS, generator=generators(0, 1, 2)).nats).all()
    for mode in ("slerp", "lerp"):
        path = pipe.interpolate(pictures[:2], pictures[1:], num_images=5, mode=mode, output_type="pt")
        assert path.shape == (10, 1, 8, 8)
        assert_close(path[[0, 4, 5, 9]], back[[0, 1, 1, 2]], atol=1e-5, rtol=0)
    assert len(pipe.interpolate(pictures[0], pictures[1])) == 8


@pytest.mark.parametrize("kind", [*PIPELINES, "vq_vae_alone"])
def test_it_loads_as_what_was_saved(kind, tmp_path):
    pipe = vq_pipeline(priors=False) if kind == "vq_vae_alone" else PIPELINES[kind]()
    pipe.save_pretrained(tmp_path)
    again = AutoPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipe)
    assert_close(again.reconstruct(LEVELS, output_type="pt"), pipe.reconstruct(LEVELS, output_type="pt"))
    if kind != "vq_vae_alone":
        draw = lambda p: p(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        again.set_progress_bar_config(disable=True)
        assert_close(draw(again), draw(pipe))
        nats = [p.log_likelihood(LEVELS, generator=generators(0, 1, 2)).nats for p in (again, pipe)]
        assert_close(nats[0], nats[1])


def test_latents_of_temperature_zero_are_the_mean_and_traversals_walk_through_it():
    pipe = vae_pipeline()
    cold = pipe(batch_size=2, temperature=0.0, output_type="latent").images
    assert torch.equal(cold, torch.zeros(2, 4))
    noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe(latents=noise, temperature=0.5, output_type="latent").images, 0.5 * noise)
    picture = pipe.traverse(LEVELS[0], dimensions=[0, 2], num=5)
    assert picture.size == (40, 16)
    start = pipe.encode(LEVELS[:1])
    start[0, 2] = -3.0
    assert abs(np.asarray(picture, dtype=float)[8:16, :8] - np.asarray(pipe.decode(start)[0], dtype=float)).max() <= 1
    middle = np.asarray(pipe.traverse(num=3), dtype=float)[:8, 8:16]
    assert abs(middle - np.asarray(pipe.decode(torch.zeros(1, 4))[0], dtype=float)).max() <= 1
    drawn = pipe.encode(LEVELS, sample=True, generator=generators(1, 2, 3))
    assert (drawn - pipe.encode(LEVELS)).abs().min() > 0


def test_classes_are_those_asked_for_and_drawn_from_the_generator_otherwise():
    pipe = vq_pipeline()
    seen = []
    sample = type(pipe.prior).sample


    def spy(count, labels, *rest, **named):
        seen.append(labels.tolist())
        return sample(pipe.prior, count, labels, *rest, **named)

    pipe.prior.sample = spy
    assert len(pipe(class_labels=[2, 0], num_images_per_label=2, generator=torch.Generator().manual_seed(0)).images) == 4
    assert len(pipe(class_labels=1).images) == 1
    pipe(batch_size=60, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert seen[:2] == [[2, 2, 0, 0], [1]]
    assert set(seen[2]) == {0, 1, 2}
    pipe(batch_size=2, class_labels=[1], output_type="latent")
    assert seen[3] == [1, 1]


def test_without_labels_the_bound_is_the_mean_over_classes():
    pipe = vq_pipeline()
    each = torch.stack([pipe.log_likelihood(LEVELS, labels=[label] * 3).nats for label in range(3)])
    assert_close(pipe.log_likelihood(LEVELS).nats, each.logsumexp(0) - torch.tensor(3.0).log())
    assert pipe.log_likelihood(LEVELS).kind == "elbo"
    codes = pipe.encode(LEVELS)
    with torch.no_grad():
        prior = pipe.prior.log_prob(codes[0], torch.tensor([1] * 3)) + pipe.prior_2.log_prob(codes[1], torch.tensor([1] * 3), codes[:1])
        decoder = pipe.vqvae.decode_codes(codes).distribution.log_prob(LEVELS / 127.5 - 1)
    assert_close(each[1], prior + decoder, rtol=1e-5, atol=1e-3)


def test_only_priors_that_know_classes_are_told_them():
    with_classes, without = vq_pipeline(), vq_pipeline(None)
    for top, bottom in ((with_classes.prior, without.prior_2), (without.prior, with_classes.prior_2)):
        pipe = VQVAEPipeline(with_classes.vqvae, top, bottom)
        pipe.set_progress_bar_config(disable=True)
        for parameter in (*top.parameters(), *bottom.parameters()):  # what begins at zero hears nothing
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        assert pipe.num_classes == 3
        assert len(pipe(class_labels=[0, 2]).images) == len(pipe(2).images) == 2
        each = torch.stack([pipe.log_likelihood(LEVELS, labels=[label] * 3).nats for label in range(3)])
        assert (each[0] - each[1]).abs().max() > 1e-3
        assert_close(pipe.log_likelihood(LEVELS).nats, each.logsumexp(0) - torch.tensor(3.0).log())


def test_networks_that_were_being_trained_draw_and_measure_without_dropout():
    model = vq_pipeline(priors=False).vqvae.train()
    top, bottom = (
        seeded(
            lambda shape=shape, above=above: PixelSNAILPrior(
                16, shape, condition_shapes=above, width=8, residual_channels=8, num_blocks=1, layers_per_block=1, num_heads=2, dropout=0.5
            )
        ).train()
        for shape, above in (((2, 2), []), ((4, 4), [[2, 2]]))
    )
    for parameter in (*top.parameters(), *bottom.parameters()):
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    pipe = VQVAEPipeline(model, top, bottom)
    assert torch.equal(pipe.log_likelihood(LEVELS).nats, pipe.log_likelihood(LEVELS).nats)


def test_the_probabilities_that_codes_and_decoder_give_are_of_levels():
    """On 1 x 2 pixels of 2 levels the decoder's probabilities of one code map sum to one, so the bounds sum to at most one."""
    model = seeded(
        lambda: VQVAEModel(
            sample_size=(1, 2), downsample_factors=(2,), hidden_channels=8, layers_per_block=1, residual_channels=4, num_embeddings=4,
            embedding_dim=2, num_bits=2,
        )
    )  # fmt: skip
    pipe = VQVAEPipeline(model, seeded(lambda: TransformerPrior(4, (1, 1), width=8, num_layers=1, num_heads=2)))
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4)).view(16, 1, 1, 2).to(torch.uint8)
    bounds = pipe.log_likelihood(every << 6).nats
    assert 0 < bounds.exp().sum() <= 1
    x = every.float() * 2 / 3 - 1
    one = torch.zeros(1, 1, 1, dtype=torch.long)
    with torch.no_grad():
        total = model.decode_codes([one.expand(16, -1, -1)]).distribution.log_prob(x).exp().sum()
    assert_close(total, torch.tensor(1.0))


def test_the_way_between_two_latents():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    turned, straight = between(a, b, 3, "slerp"), between(a, b, 3, "lerp")
    assert_close(turned[0], torch.tensor([[3.0, 0.0], [4.5**0.5, 0.5**0.5], [0.0, 1.0]]))
    assert_close(straight[0, 1], torch.tensor([1.5, 0.5]))
    assert_close(between(a, 2 * a, 3, "slerp")[0, 1], torch.tensor([4.5, 0.0]))
    assert torch.isfinite(between(a, torch.zeros(1, 2), 3, "slerp")).all()


def test_a_grid_puts_pictures_row_by_row():
    picture = picture_grid(torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 1.0, 0.0)]), columns=2)
    assert np.asarray(picture)[::2, ::2].tolist() == [[0, 255], [128, 255]]


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("vae", lambda p: p(batch_size=0), "batch_size must be at least 1, got 0"),
        ("vae", lambda p: p(batch_size=2, generator=generators(1)), "one per picture: 2 here, got 1"),
        ("vae", lambda p: p(temperature=-1.0), "temperature -1.0"),
        ("vae", lambda p: p(output_type="jpeg"), "must be one of pil, np, pt, latent, got 'jpeg'"),
        ("vae", lambda p: p(latents=torch.zeros(2, 5)), r"\(batch_size, 4\), got \(2, 5\)"),
        ("vae", lambda p: p.interpolate(LEVELS, LEVELS[:2]), "3 pictures at the start and 2 at the end"),
        ("vae", lambda p: p.interpolate(LEVELS, LEVELS, mode="cubic"), "'cubic' is none of slerp, lerp"),
        ("vae", lambda p: p.interpolate(LEVELS, LEVELS, num_images=1), "num_images must be at least 2, got 1"),
        ("vae", lambda p: p(temperature="1"), "temperature '1' is not allowed"),
        ("vae", lambda p: p.encode(LEVELS.float() / 127.5 - 1), r"images must be in \[0, 1\].*\(x \+ 1\) / 2 makes it"),
        ("vae", lambda p: p.log_likelihood(p(output_type="pt").images), r"\(255 \* x\)\.round\(\)"),
        ("vae", lambda p: p.traverse(dimensions=[4]), r"from 0 to 3, got \[4\]"),
        ("vae", lambda p: p.log_likelihood(LEVELS, labels=[1]), "has no classes"),
        ("vae", lambda p: p.log_likelihood(LEVELS, kind="exact"), "'exact' is none of elbo, iwae"),
        ("vae", lambda p: p.log_likelihood(torch.rand(1, 1, 8, 8)), "must have been 8-bit"),
        ("vae", lambda p: p.log_likelihood(LEVELS, num_samples=0), "num_samples must be at least 1, got 0"),
        ("vae", lambda p: p.decode(torch.zeros(3, 5)), r"shape \(B, 4\), got \(3, 5\)"),
        ("vae", lambda p: p.encode(LEVELS[:, :, :4]), "8 x 8 pixels are needed"),
        ("vq_vae", lambda p: p(batch_size=3, class_labels=[1, 2]), "batch_size 3, but class_labels ask for 2"),
        ("vq_vae", lambda p: p(class_labels=3), "from 0 to 2, got 3"),
        ("vq_vae", lambda p: p(class_labels="cat"), "from 0 to 2, got 'cat'"),
        ("vq_vae", lambda p: p(class_labels=["cat"]), r"from 0 to 2, got \['cat'\]"),
        ("vq_vae", lambda p: p(temperature="1"), "temperature '1' is not allowed"),
        ("vq_vae", lambda p: p(class_labels=[1], num_images_per_label=0), "num_images_per_label 0"),
        ("vq_vae", lambda p: p(temperature=[1.0]), "1 temperatures for 2 levels"),
        ("vq_vae", lambda p: p.log_likelihood(LEVELS, labels=[1]), "1 labels for 3 pictures"),
        ("vq_vae", lambda p: p.log_likelihood(LEVELS, num_samples=5), "the encoder draws nothing"),
        ("vq_vae", lambda p: p.decode([torch.zeros(1, 4, 4).long()]), r"are needed, got"),
        ("vq_vae", lambda p: p.decode([torch.zeros(1, 2, 2), torch.zeros(1, 4, 4)]), "codes are whole numbers from 0 to 15"),
        ("vq_vae", lambda p: p.decode([torch.full((1, 2, 2), 16), torch.zeros(1, 4, 4).long()]), "codes are whole numbers from 0 to 15"),
        ("vq_vae", lambda p: p.log_likelihood(LEVELS, generator=generators(1)), "one per picture: 3 here, got 1"),
        ("vq_vae", lambda p: VQVAEPipeline(p.vqvae, p.prior, vq_pipeline(2).prior_2), "the priors know 2 and 3 classes"),
        ("vq_vae", lambda p: VQVAEPipeline(p.vqvae, p.prior), "1 priors for 2 levels"),
        ("vq_vae", lambda p: VQVAEPipeline(p.vqvae, p.prior_2, p.prior), "was it trained on another model"),
        ("vq_vae_without_classes", lambda p: p(class_labels=1), "know no classes"),
    ],
)
def test_bad_input_is_an_error_that_says_what_is_allowed(kind, call, message):
    with pytest.raises(ValueError, match=message):
        call(PIPELINES[kind]())


@pytest.mark.parametrize("kind", ["vae", "vq_vae"])
def test_a_network_of_another_kind_is_refused_when_the_pipeline_is_made(kind):
    pipe = PIPELINES[kind]()
    with pytest.raises(TypeError, match="must be a (VQ)?VAEModel, got Linear"):
        type(pipe)(torch.nn.Linear(1, 1))
    name = "vae" if kind == "vae" else "vqvae"
    compiled = torch.compile(getattr(pipe, name))  # not run: what is inside counts
    assert type(pipe)(compiled).picture_size == (8, 8)


def test_a_scheduler_that_would_have_no_effect_is_refused():
    from gen_pipelines import DDIMScheduler

    with pytest.raises(AttributeError, match="VAEPipeline draws without a scheduler"):
        PIPELINES["vae"]().scheduler = DDIMScheduler()


@pytest.mark.parametrize("kind", ["vae", "vq_vae"])
def test_numbers_of_numpy_are_numbers(kind):
    pipe = PIPELINES[kind]()
    draw = lambda count, temperature: pipe(count, temperature=temperature, generator=generators(0, 1), output_type="pt").images
    assert_close(draw(2, 0.5), draw(np.int64(2), np.float32(0.5)), rtol=0, atol=0)


def test_a_pipeline_without_priors_says_what_it_can_do():
    with pytest.raises(ValueError, match="has no prior over its codes.*use encode, decode and reconstruct"):
        vq_pipeline(priors=False)()


@pytest.mark.parametrize("kind", ["vae", "vq_vae"])
def test_the_command_line_draws_them_without_prompts(kind, tmp_path, monkeypatch, capsys):
    from gen_pipelines.cli.main import main
    from gen_pipelines.cli.pictures import read_settings

    monkeypatch.chdir(tmp_path)
    PIPELINES[kind]().save_pretrained("model")
    classes = ["--classes", "0-1"] if kind == "vq_vae" else []
    words = ["generate", "--model", "model", "--num", "3", "--temperature", "0.7", "--grid", "--device", "cpu"]
    assert main([*words, *classes, "--out", "whole"]) == 0
    paths = capsys.readouterr().out.split()
    assert len(paths) == (7 if classes else 4)
    with Image.open(paths[-1]) as grid:
        assert min(grid.size) >= 8
    assert read_settings(paths[0])["temperature"] == 0.7
    assert main(["generate", "--like", paths[1], "--device", "cpu", "--out", "again"]) == 0
    with Image.open(capsys.readouterr().out.split()[-1]) as again, Image.open(paths[1]) as before:
        assert again.tobytes() == before.tobytes()
    assert main(["generate", "--model", "model", "--scheduler", "ddim", "--device", "cpu"]) != 0
    assert "draws without steps" in capsys.readouterr().err
    assert main(["generate", "--model", "model", "--steps", "3", "--device", "cpu"]) != 0
    assert "--steps: a" in capsys.readouterr().err
