"""Adversarial losses and penalties against closed forms, augmentation against its definition, and the game on tiny networks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gen_pipelines import AdversarialObjective, AutoPipeline
from gen_pipelines.training.augmentation import AdaptiveAugmentation
from gen_pipelines.training.collapse import CollapseAlarm, CollapseWatch, recall_and_coverage
from gen_pipelines.training.config import load_recipe
from gen_pipelines.training.objectives.adversarial import LOSSES, gradient_penalty, path_lengths, r1_penalty
from gen_pipelines.training.run import train
from gen_pipelines.training.seen import add_row
from gen_pipelines.training.state import checkpoints, load_checkpoint
from tests.training.test_trainer import finish, start


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


# ------------------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("name", ["minimax", "non_saturating"])
def test_the_discriminator_of_the_entropy_games_is_cross_entropy(name):
    real, fake = torch.randn(5), torch.randn(5)
    expected = -torch.log(torch.sigmoid(real)) - torch.log(1 - torch.sigmoid(fake))
    assert_close(LOSSES[name].discriminator(real, fake), expected)
    ascent = torch.log(1 - torch.sigmoid(fake)) if name == "minimax" else -torch.log(torch.sigmoid(fake))
    assert_close(LOSSES[name].generator(fake), ascent)


@pytest.mark.parametrize("name", LOSSES)
def test_every_game_pulls_the_right_way_and_is_finite_far_out(name):
    """The generator wants a higher logit of what it drew; the discriminator a higher one of real and a lower one of drawn pictures."""
    real, fake = torch.tensor([0.3], requires_grad=True), torch.tensor([0.2], requires_grad=True)
    LOSSES[name].discriminator(real, fake).sum().backward()
    assert real.grad < 0 < fake.grad
    fake = torch.tensor([0.2], requires_grad=True)
    LOSSES[name].generator(fake).sum().backward()
    assert fake.grad < 0
    far = torch.tensor([-1e4, 1e4])
    assert torch.isfinite(LOSSES[name].discriminator(far, -far)).all() and torch.isfinite(LOSSES[name].generator(far)).all()


def test_penalties_have_their_closed_forms():
    """Of a linear critic a x the gradient is a everywhere; of x' Q x / 2 it is Q x."""
    a = torch.tensor([0.6, -0.8, 2.0])
    real, fake, mix = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    assert_close(gradient_penalty(lambda x: x @ a, real, fake, mix), (a.norm() - 1).square().expand(4))
    assert_close(r1_penalty(lambda x: x @ a, real), a.square().sum().expand(4))
    q = torch.randn(3, 3)
    q = q + q.T
    at = mix[:, None] * real + (1 - mix[:, None]) * fake
    quadratic = lambda x: ((x @ q) * x).sum(1) / 2
    assert_close(gradient_penalty(quadratic, real, fake, mix), ((at @ q).norm(dim=1) - 1).square(), rtol=1e-4, atol=1e-5)
    assert_close(r1_penalty(quadratic, real), (real @ q).square().sum(1), rtol=1e-4, atol=1e-5)


def test_path_length_is_the_norm_of_the_jacobian_product():
    jacobian = torch.randn(3 * 2 * 2, 2 * 5)
    styles = torch.randn(4, 2, 5, requires_grad=True)
    pictures = (styles.flatten(1) @ jacobian.T).view(4, 3, 2, 2)
    noise = torch.randn(4, 3, 2, 2)
    product = (noise.flatten(1) / 2) @ jacobian                                                        # sqrt(H W) = 2
    assert_close(path_lengths(pictures, styles, noise), product.view(4, 2, 5).square().sum(2).mean(1).sqrt())


@pytest.mark.slow
def test_a_penalised_critic_estimates_the_distance_of_gaussians():
    """Two Gaussians of one covariance are |difference of means| apart (Olkin & Pukelsheim 1982).

    The penalty is two-sided: the slope L that maximises L d - weight (L - 1)^2 is 1 + d / (2 weight), so a weight of 10 reads 9 % too much.
    """
    torch.manual_seed(0)
    shift = torch.tensor([1.5, -1.0])
    layers = [torch.nn.Linear(2, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1)]
    critic = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.9))
    judge = lambda x: critic(x).squeeze(1)
    estimates = []
    for _ in range(800):
        real, fake = torch.randn(512, 2) + shift, torch.randn(512, 2)
        distance = (judge(real) - judge(fake)).mean()
        loss = -distance + 100 * gradient_penalty(judge, real, fake, torch.rand(512)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        estimates.append(distance.item())
    assert abs(sum(estimates[-200:]) / 200 / shift.norm().item() - 1) < 0.05


def test_an_objective_names_what_it_does_not_take():
    with pytest.raises(ValueError, match="'vanilla' is none of minimax"):
        AdversarialObjective("vanilla")
    with pytest.raises(ValueError, match="r1 = -1"):
        AdversarialObjective(r1=-1.0)
    with pytest.raises(ValueError, match="style_mixing = 2"):
        AdversarialObjective(style_mixing=2.0)


def test_drawing_mixes_styles_and_belongs_to_the_sample():
    import gen_pipelines

    torch.manual_seed(0)
    generator = gen_pipelines.StyleGAN2Generator(16, 1, 8, 8, channel_base=128, channel_max=8, num_mapping_layers=2)
    objective = AdversarialObjective(style_mixing=1.0)
    _, styles = objective.draw(generator, 6, None, generators(6), "cpu")
    first = [int((one != one[0]).any(1).float().argmax()) for one in styles]                           # where the second style begins
    assert all(1 <= f < generator.num_ws for f in first)
    for one, f in zip(styles, first, strict=True):
        assert torch.equal(one[:f], one[:1].expand(f, -1)) and torch.equal(one[f:], one[-1:].expand(len(one) - f, -1))
    pictures, _ = objective.draw(generator, 6, None, generators(6), "cpu")
    alone, _ = objective.draw(generator, 1, None, generators(1, seed=4), "cpu")
    assert_close(pictures[4:5], alone, rtol=1e-4, atol=1e-5)


def test_stylegan3_follows_the_power_of_its_layers_inputs_in_the_players_game_and_nowhere_else():
    import gen_pipelines

    torch.manual_seed(0)
    shape = {"channel_base": 128, "channel_max": 8}
    generator = gen_pipelines.StyleGAN3Generator(16, 1, 8, 8, num_mapping_layers=2, num_layers=4, num_critical=1, **shape)
    judge = gen_pipelines.StyleGAN2Discriminator(16, 1, **shape)
    objective, real = AdversarialObjective(), torch.randn(4, 1, 16, 16)
    first = getattr(generator.synthesis, generator.synthesis.layer_names[0])
    objective.generator(generator, lambda x, labels: judge(x, labels).logits, 4, random=generators(4))
    assert first.magnitude_ema == 1
    powers = []
    first.register_forward_pre_hook(lambda layer, given: powers.append(given[0].square().mean()))
    objective.discriminator(generator, lambda x, labels: judge(x, labels).logits, real, random=generators(4))
    kept = 0.5 ** (4 / 20_000)  # Karras et al. 2021: half forgotten after 20,000 pictures
    assert_close(first.magnitude_ema, kept + (1 - kept) * powers[0], rtol=1e-6, atol=0)
    averages = [buffer for name, buffer in generator.named_buffers() if "magnitude" in name]
    assert len(averages) == 5 and all(average != 1 for average in averages)


# ------------------------------------------------------------------------------------------------------------------ augmentation


def test_every_number_of_the_augmentation_is_drawn_for_itself():
    """Of dark pictures with a light middle: how bright they become says nothing of where they are moved."""
    pictures = torch.full((2000, 1, 16, 16), -0.5)
    pictures[:, :, 6:10, 6:10] = 0.5
    torch.manual_seed(0)
    changed = AdaptiveAugmentation(strength=1.0)(pictures)
    weight = (changed - changed.amin((2, 3), keepdim=True)).clamp_min(1e-6)
    place = (weight * torch.linspace(-1, 1, 16)).sum((2, 3)) / weight.sum((2, 3))
    assert abs(float(torch.corrcoef(torch.stack([place[:, 0], changed.amin((1, 2, 3))]))[0, 1])) < 0.1


def test_augmentation_of_strength_zero_is_the_identity_and_of_one_is_not():
    x = torch.rand(6, 3, 16, 16) * 2 - 1
    assert torch.equal(AdaptiveAugmentation(strength=0.0)(x, generators(6)), x)
    changed = AdaptiveAugmentation(strength=1.0)(x, generators(6))
    assert changed.shape == x.shape and not any(torch.allclose(a, b) for a, b in zip(changed, x, strict=True))
    many = AdaptiveAugmentation(strength=0.5)(x, generators(6))
    one = AdaptiveAugmentation(strength=0.5)(x[3:4], generators(1, seed=3))
    assert_close(many[3:4], one, rtol=1e-4, atol=1e-5)
    x.requires_grad_(True)
    AdaptiveAugmentation(strength=1.0)(x, generators(6)).square().sum().backward()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()


def test_mirrors_quarter_turns_and_whole_pixels_move_pixels_as_they_are(monkeypatch):
    """The blitting transformations are exact up to the filter: a smooth picture is flipped, turned or shifted."""
    from gen_pipelines.training import augmentation as module

    axis = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    picture = torch.exp(-((x - 0.2) ** 2 + (y + 0.1) ** 2) * 8)[None, None]
    chance = torch.ones(1, 12)
    augment = AdaptiveAugmentation(strength=0.5, colour=False)
    monkeypatch.setattr(module, "uniform", lambda *a, **k: chance)

    def run(which, size):
        chance.fill_(1.0)
        chance[0, which] = 0.0
        monkeypatch.setattr(module, "normal", lambda *a, **k: torch.full((1, 14), size))
        return augment(picture)

    assert_close(run(0, -1.0), picture.flip(3), rtol=0, atol=0.02)
    turned = run(1, -0.5)                                                                              # fraction 0.31: one quarter
    assert min((turned - picture.rot90(k, (2, 3))).abs().max() for k in (1, 3)) < 0.02
    shifted = run(2, 1.0)                                                                              # fraction 0.84: 2.7 pixels, rounded
    assert min((shifted - picture.roll((s, s), (2, 3)))[..., 4:-4, 4:-4].abs().max() for s in (3, -3)) < 0.02


def test_the_strength_follows_the_discriminator():
    augmentation = AdaptiveAugmentation(target=0.6, images=1000)
    augmentation.watch(torch.tensor([2.0, 1.0, 3.0, -1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]))             # mean sign 0.8
    augmentation.adjust()
    assert_close(augmentation.strength, torch.tensor(0.01))
    augmentation.watch(torch.tensor([1.0, -1.0]))
    augmentation.adjust()
    assert_close(augmentation.strength, torch.tensor(0.008))
    assert augmentation.signs.tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------- the game

CONDITIONAL = {"sample_size": 16, "base_channels": 4, "num_classes": 3}
STYLE = {"sample_size": 16, "channel_base": 64, "channel_max": 8}
RECIPES = {
    "gan": {
        "model": {
            "generator": {"class": "DCGANGenerator", "out_channels": 1, "latent_dim": 8, **CONDITIONAL},
            "discriminator": {"class": "DCGANDiscriminator", "in_channels": 1, **CONDITIONAL},
        },
        "objective": {"loss": "non_saturating"},
    },
    "wgan": {
        "model": {
            "generator": {"class": "DCGANGenerator", "sample_size": 16, "out_channels": 1, "latent_dim": 8, "base_channels": 4},
            "discriminator": {"class": "DCGANDiscriminator", "sample_size": 16, "in_channels": 1, "base_channels": 4},
        },
        "objective": {"loss": "wasserstein", "n_critic": 2, "weight_clip": 0.01},
    },
    "wgan-gp": {
        "model": {
            "generator": {"class": "ResNetGenerator", "sample_size": 16, "out_channels": 1, "latent_dim": 8, "base_channels": 4},
            "discriminator": {"class": "ResNetDiscriminator", "sample_size": 16, "in_channels": 1, "base_channels": 4},
        },
        "objective": {"loss": "wasserstein", "n_critic": 2, "gradient_penalty": 10.0},
    },
    "stylegan2": {
        "model": {
            "generator": {"class": "StyleGAN2Generator", "out_channels": 1, "z_dim": 8, "w_dim": 8, "num_mapping_layers": 2, **STYLE},
            "discriminator": {"class": "StyleGAN2Discriminator", "in_channels": 1, "mbstd_group_size": 2, **STYLE},
            "augmentation": {"strength": 0.2, "images": 100},
        },
        "objective": {"r1": 1.0, "r1_interval": 2, "path_length": 2.0, "path_interval": 2, "style_mixing": 0.5},
    },
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Twelve drawn pictures of 14 x 14 in three classes, as a folder."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        picture = Image.new("L", (14, 14))
        for x in range(4 + i % 3 * 3):
            picture.putpixel((x, (x * (i + 1)) % 14), 255)
        (folder / "train" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        picture.save(folder / "train" / str(i % 3) / f"{i}.png")
    return folder


def recipe(kind, folder, data, **loop):
    import yaml

    settings = {
        "task": "gan",
        "data": {"name": str(data), "label_column": "label", "resolution": 14, "channels": 1},
        "optimizer": {"learning_rate": 1e-3, "betas": [0.0, 0.99]},
        "sample": {"pictures": 6, "columns": 3},
        "loop": {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "sample_every": 2, "log_every": 1, "max_grad_norm": None} | loop,
        **RECIPES[kind],
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def networks_of(run):
    networks, averages, *_ = load_checkpoint(checkpoints(run / "checkpoints")[-1])
    return networks | {f"average.{key}": value for key, value in averages.items()}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_stopped_and_resumed_game_is_an_unbroken_one(kind, digits, tmp_path):
    """Penalties' moments, path length, augmentation strength, average style and batch statistics included, bit for bit."""
    path = recipe(kind, tmp_path, digits)
    train(path, output_dir=tmp_path / "whole")
    train(path, ["loop.steps=2"], tmp_path / "parts")
    train(path, output_dir=tmp_path / "parts", resume=True)
    whole, parts = networks_of(tmp_path / "whole"), networks_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    if kind == "stylegan2":
        assert whole["statistics.path_length"] > 0 and whole["statistics.augmentation.strength"] != 0.2
        assert whole["generator.mapping.w_avg"].abs().sum() > 0 and "path_length/path_length" in log[-1]
    if kind == "wgan":
        assert all(v.abs().max() <= 0.01 for k, v in whole.items() if k.startswith("discriminator.") and v.ndim > 1)
    pipe = AutoPipeline.from_pretrained(tmp_path / "whole")
    pictures = pipe(batch_size=2, generator=generators(2)).images
    assert [p.size for p in pictures] == [(14, 14)] * 2 and pictures[0].mode == "L"
    with Image.open(tmp_path / "whole" / "samples" / "step-00000004.png") as picture:
        assert picture.size == (42, 28)
        last = picture.crop((0, 0, 42, 14)).tobytes()
    with Image.open(tmp_path / "parts" / "samples" / "strip.png") as strip:  # a row of the same samples for each of two times
        assert strip.size == (42, 28) and strip.crop((0, 14, 42, 28)).tobytes() == last
        assert strip.tobytes() == Image.open(tmp_path / "whole" / "samples" / "strip.png").tobytes()
    seen = [entry for entry in log if "samples/coverage" in entry]
    assert [entry["step"] for entry in seen] == [2, 4] and len(log) == 4
    assert {"samples/recall", "samples/variety", "samples/classes", "samples/class_entropy", "samples/collapse"} <= seen[0].keys()
    assert ("samples/class_accuracy" in seen[0]) == (kind == "gan")


def test_the_learning_rates_of_both_players_fall_by_the_step(digits, tmp_path):
    """Not by the update: a critic with several in a step would have stopped learning long before the generator."""
    path = recipe("wgan-gp", tmp_path, digits)
    train(path, ["optimizer.schedule=linear"], tmp_path / "run")
    for folder, left in zip(checkpoints(tmp_path / "run" / "checkpoints"), (0.5, 0.0), strict=True):  # after 2 and 4 of 4 steps
        states = load_checkpoint(folder)[2]
        rates = {name: states[name]["param_groups"][0]["lr"] for name in ("discriminator", "generator")}
        assert rates == pytest.approx({"discriminator": left * 1e-3, "generator": left * 1e-3}), folder


SHIPPED = [path for path in sorted((Path(__file__).parents[2] / "configs").glob("*/*.yaml")) if "task: gan" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_recipes_play(path, tmp_path):
    """With narrow networks, on a few pictures of noise; every other setting of the game as it is."""
    shipped = load_recipe(path)
    size, classes = shipped.data.resolution, shipped.model["generator"].get("num_classes")
    kind = shipped.data.image_column
    rows = {kind: [Image.fromarray(np.random.default_rng(i).integers(0, 255, (size, size, 3), np.uint8)) for i in range(16)]}
    rows |= {"label": [i % (classes or 10) for i in range(16)]}
    import datasets

    datasets.Dataset.from_dict(rows).cast_column(kind, datasets.Image()).to_parquet(tmp_path / "data" / "train.parquet")
    styled = "Style" in shipped.model["generator"]["class"]
    narrow = {"channel_base": 128, "channel_max": 8} if styled else {"base_channels": 4, "max_channels": 8}
    settings = [f"model.{part}.{key}={value}" for part in ("generator", "discriminator") for key, value in narrow.items()]
    settings += ["model.generator.z_dim=16", "model.generator.w_dim=16"] if styled else []
    settings += [f"data.name={tmp_path / 'data'}", "data.workers=0", "loop.steps=2", "loop.batch_size=4", "loop.sample_every=2"]
    settings += ["loop.checkpoint_every=2", "loop.log_every=1"]
    train(path, settings, tmp_path / "run")
    pipe = AutoPipeline.from_pretrained(tmp_path / "run")
    assert pipe(batch_size=2, generator=generators(2)).images[0].size == (size, size)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for entry in log for value in entry.values()) and "samples/coverage" in log[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gan", "wgan-gp", "stylegan2"])
def test_two_ranks_play_the_game_of_one(kind, digits, tmp_path):
    """Batch statistics, penalties, path length, average style and augmentation strength are those of the whole batch.

    (Groups of the minibatch deviation are within a rank by definition, so it is off here.)
    """
    path = recipe(kind, tmp_path, digits, steps=3, checkpoint_every=3, sample_every=0)
    settings = ["optimizer.eps=1"]  # Adam divides by the gradient's size: rounding of gradients that are zero would become the update
    if kind == "stylegan2":
        settings += ["model.discriminator.mbstd_group_size=1", "objective.path_batch=1.0"]
    finish(start(path, tmp_path / "one", *settings))
    finish(start(path, tmp_path / "two", *settings, ranks=2))
    one, two = networks_of(tmp_path / "one"), networks_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert_close(two[key], value, rtol=1e-4, atol=2e-5, msg=lambda text, k=key: f"{k}: {text}")


def pictures_of(classes, seed=0):
    """A bar for each class, at a place of its own with noise: uint8 (N, 1, 12, 12)."""
    noise = torch.randint(0, 60, (len(classes), 1, 12, 12), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    for picture, label in zip(noise, classes.tolist(), strict=True):
        picture[:, 3 * label : 3 * label + 2] = 250
    return noise


class Oracle:
    """Knows the class of `pictures_of`."""

    def __call__(self, pictures):
        features = pictures.float().mean((1, 3))                                                       # (B, 12)
        return features, features.unflatten(1, (4, 3)).mean(2)


@pytest.mark.parametrize("extractor", [None, Oracle()])
def test_lost_modes_are_seen_and_said_once_they_are_lost(extractor, caplog):
    classes = torch.arange(120) % 4
    watch = CollapseWatch(pictures_of(classes), classes, extractor)
    good = watch.look(pictures_of(classes, seed=1), classes)
    assert good["classes"] == 4 and good["class_entropy"] == pytest.approx(1) and good["class_accuracy"] == 1
    assert min(good["coverage"], good["recall"]) > 0.7 and good["variety"] == pytest.approx(1, abs=0.05)
    lost = watch.look(pictures_of(classes % 2, seed=2), classes)
    assert lost["classes"] == 2 and lost["class_entropy"] == pytest.approx(0.5) and lost["class_accuracy"] == 0.5
    assert max(lost["coverage"], lost["recall"]) < 0.6
    one = watch.look(pictures_of(classes[:1]).expand(120, -1, -1, -1), classes)
    assert one["variety"] == 0 and one["classes"] == 1 and one["recall"] < 0.05

    alarm = CollapseAlarm()
    assert alarm.hear(lost) == []  # nothing was better before
    assert alarm.hear(good) == []
    again = CollapseAlarm()
    again.load_state_dict(alarm.state_dict())
    with caplog.at_level("WARNING"):
        assert "2 classes are drawn, there were 4" in again.hear(lost)
        reasons = again.hear(one)
    assert reasons[0].startswith("samples of different noise differ 0.00") and any("recall is" in reason for reason in reasons)
    assert "mode collapse: 2 classes are drawn" in caplog.text


def test_recall_and_coverage_are_those_of_an_evaluation():
    from gen_pipelines.evaluation.neighbours import manifolds

    real, drawn = torch.randn(60, 3), torch.randn(50, 3) * 0.5 + 0.5
    whole = manifolds(real, drawn, k_precision=5, k_density=5)
    assert recall_and_coverage(real, drawn) == pytest.approx((whole.recall, whole.coverage))


def test_pictures_without_classes_are_watched_too():
    watch = CollapseWatch(pictures_of(torch.arange(40) % 4))
    assert watch.look(pictures_of(torch.arange(40) % 4, seed=1)).keys() == {"variety", "recall", "coverage"}
    assert CollapseWatch(pictures_of(torch.arange(4))).look(pictures_of(torch.arange(4))).keys() == {"variety"}


def test_the_strip_takes_the_place_of_rows_that_a_stopped_run_left(tmp_path):
    rows = [Image.new("L", (6, 2), shade) for shade in (10, 20, 30, 40)]
    for place in (0, 1, 2):
        add_row(tmp_path / "strip.png", rows[place], place)
    add_row(tmp_path / "strip.png", rows[3], 1)
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (6, 4) and [strip.getpixel((0, y)) for y in (0, 2)] == [10, 40]


@pytest.mark.parametrize(("changes", "message"), [
    (["sample.classifier=mnist-classifier"], "takes pictures of 1 x 28 x 28, these are 1 x 14 x 14"),
    (["data.resolution=15"], "larger by an even number"),
    (["model.discriminator.in_channels=3"], "must agree"),
    (["data.label_column=null"], "need data.label_column"),
    (["model.generator.num_classes=2"], "but the data has a class 2"),
    (["objective.gradient_penalty=10"], "batch norm is not"),
    (["objective.path_length=2"], "has no styles"),
    (["objective.loss=vanilla"], "none of minimax"),
    (["objective.n_critic=0"], "give 1 or more"),
    (["model.generator=null"], "model.generator is missing"),
])  # fmt: skip
def test_bad_recipes_fail_before_anything_is_computed(changes, message, digits, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(recipe("gan", tmp_path, digits), changes, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
