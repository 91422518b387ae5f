"""The whole evaluation on small models: what it says of pictures whose quality is known, exact resuming, NaN, costs, cards."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from gen_pipelines import AutoPipeline, DiffusionImagePipeline, VAEModel, VAEPipeline, evaluate
from gen_pipelines.cli.main import main
from gen_pipelines.cli.repository import Repository
from gen_pipelines.evaluation import evaluate as module
from gen_pipelines.evaluation.compare import compare
from gen_pipelines.evaluation.distances import frechet_distance
from gen_pipelines.evaluation.extractors import find_extractor
from gen_pipelines.evaluation.flows import is_flow, straightness
from gen_pipelines.evaluation.reference import Reference
from gen_pipelines.evaluation.report import write_card
from gen_pipelines.evaluation.sampling import Sampler
from gen_pipelines.evaluation.statistics import FeatureStatistics
from gen_pipelines.hub.card import read_evaluation
from tests.evaluation.conftest import enlarged

NUM = 60


class Replay(VAEPipeline):
    """Draws pictures of a list, spoiled as the test says."""

    pictures = torch.zeros(1, 1, 28, 28)
    broken = False

    def __call__(self, batch_size=1, generator=None, output_type="pil"):
        chosen = torch.stack([self.pictures[torch.randint(len(self.pictures), (), generator=g)] for g in generator])
        if self.broken:
            bad = torch.tensor([g.initial_seed() % 4 == 0 for g in generator])
            chosen = torch.where(bad[:, None, None, None], math.nan, chosen)
        return type("Output", (), {"images": chosen})


def tiny_vae(**changes) -> VAEModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAEModel(sample_size=28, latent_dim=4, block_out_channels=(8, 8), layers_per_block=1, **changes).eval()


def replay(pictures: torch.Tensor, **changes) -> Replay:
    pipe = Replay(tiny_vae())
    pipe.pictures = pictures.float() / 255
    for name, value in changes.items():
        setattr(pipe, name, value)
    return pipe


def without_cost(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("cost", "pictures")}


@pytest.fixture(scope="module")
def reference(digits):
    return Reference.open(str(digits), resolution=28, channels=1)


def test_what_is_known_of_pictures_is_found(reference):
    """Real pictures, copies of training pictures, one class alone, noise: each is told from the others, in the direction it should be."""
    of = lambda pictures: evaluate(replay(pictures), reference, num=NUM, likelihood=0, progress=False)["metrics"]
    real, labels = enlarged(300, 500)
    fresh, copies = of(real), of(enlarged(300)[0])
    zeros = of(real[torch.tensor(labels) == 0])
    noise = of(torch.randint(256, (300, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8))
    assert fresh["frechet_distance_over_real"] < 2 < zeros["frechet_distance_over_real"] < noise["frechet_distance_over_real"]
    assert fresh["coverage"] > 2 * zeros["coverage"] and fresh["precision"] > 0.7 and noise["precision"] < 0.05
    assert fresh["class_entropy_over_data"] > 0.9 > 0.3 > zeros["class_entropy_over_data"]
    assert copies["near_copies"] == 1.0 and copies["nearest_over_real"] == 0.0 and fresh["near_copies"] < 0.2
    assert fresh["nearest_over_real"] == pytest.approx(1, abs=0.3) and noise["nearest_over_real"] > 1.5


def test_the_distance_of_real_pictures_is_over_all_of_them_and_of_no_seed(reference):
    real, held_out, _ = reference.measure(find_extractor("mnist-classifier", 1, (28, 28)))
    whole = FeatureStatistics.of(real.features)
    scaled = lambda features: FeatureStatistics.of(features.double() / whole.std)
    sets = [frechet_distance(whole.scaled(whole.std), scaled(part)) for part in held_out.features.split(25)]
    found = module.real_distance(held_out.features, 25, whole.scaled(whole.std), whole.std)
    assert found == pytest.approx(sum(sets) / 4, rel=1e-9) and max(sets) > found > min(sets)
    seeds = [evaluate(replay(enlarged(99, 500)[0]), reference, num=25, seed=seed, likelihood=0, progress=False) for seed in (0, 1)]
    assert seeds[0]["real"] == seeds[1]["real"] and seeds[0]["metrics"]["frechet_distance"] != seeds[1]["metrics"]["frechet_distance"]
    assert seeds[0]["protocol"]["held_out_sets"] == 4


def test_the_result_says_under_which_protocol_it_was_found(digits, tmp_path):
    out = tmp_path / "a" / "evaluation.json"
    result = evaluate("bundled:mnist-vae", str(digits), num=NUM, likelihood=20, seed=3, out=out, progress=False)
    assert json.loads(out.read_text()) == result
    protocol = result["protocol"]
    assert (protocol["extractor"], protocol["resizer"]) == ("mnist-classifier", "none") and protocol["extractor_hash"].startswith("sha256:")
    assert (protocol["split"], protocol["held_out"], protocol["reference_pictures"], protocol["num"], protocol["seed"]) == (
        "train", "test", 300, NUM, 3,
    )  # fmt: skip
    assert result["model"] == "bundled:mnist-vae" and result["dataset"] == digits.name and str(digits) not in json.dumps(result)
    assert result["counts"] == {"drawn": NUM, "not_finite": 0}
    assert result["likelihood"]["kind"] == "elbo" and result["likelihood"]["pictures"] == 20
    assert result["metrics"]["bits_per_dim"] == result["likelihood"]["bits_per_dim"] > 0
    assert result["cost"]["parameters"] == sum(p.numel() for p in AutoPipeline.from_pretrained("bundled:mnist-vae").vae.parameters())
    assert result["cost"]["seconds_per_picture"] > 0 and result["cost"]["peak_memory_mib"] > 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["evaluation-data.png", "evaluation.json", "evaluation.png"]


def test_a_killed_evaluation_goes_on_to_the_same_numbers(reference, tmp_path, monkeypatch):
    options = {"num": NUM, "batch_size": 16, "likelihood": 24, "progress": False}
    straight = evaluate("bundled:mnist-vae", reference, out=tmp_path / "straight.json", **options)
    drawn, draw_part = [], module.draw_part

    def killed(parts, part, *rest):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(part)
        draw_part(parts, part, *rest)

    monkeypatch.setattr(module, "draw_part", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate("bundled:mnist-vae", reference, out=tmp_path / "killed.json", **options)
    assert not (tmp_path / "killed.json").exists()
    monkeypatch.setattr(module, "draw_part", lambda parts, part, *rest: (drawn.append(part), draw_part(parts, part, *rest)))
    again = evaluate("bundled:mnist-vae", reference, out=tmp_path / "killed.json", **options)
    assert len(drawn) == len(set(drawn)) == 4  # the first two were not drawn again
    assert without_cost(again) == without_cost(straight)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", *[".png"] * 4]  # nothing half-done is left
    other = evaluate("bundled:mnist-vae", reference, out=tmp_path / "killed.json", seed=1, **options)
    assert other["metrics"]["frechet_distance"] != straight["metrics"]["frechet_distance"] and len(drawn) == 8


def test_pictures_that_are_not_finite_are_counted(reference, caplog):
    real = enlarged(300, 500)[0]
    whole = evaluate(replay(real), reference, num=NUM, likelihood=0, progress=False)
    with caplog.at_level("WARNING", logger="gen_pipelines"):
        broken = evaluate(replay(real, broken=True), reference, num=NUM, likelihood=0, progress=False)
    count = broken["counts"]["not_finite"]
    assert 5 < count < 30 and whole["counts"]["not_finite"] == 0  # a quarter of 60
    assert f"{count} of {NUM} pictures are not finite" in caplog.text
    assert math.isfinite(broken["metrics"]["frechet_distance"]) and sum(broken["metrics"]["class_shares"]) == pytest.approx(1)
    nothing = evaluate(replay(torch.full((1, 1, 28, 28), math.nan)), reference, num=NUM, likelihood=0, progress=False)
    assert nothing["metrics"] == {} and nothing["counts"]["not_finite"] == NUM


def test_a_likelihood_that_is_not_finite_is_no_likelihood(reference):
    pipe = replay(enlarged(100)[0])
    pipe.log_likelihood = lambda levels, labels=None, generator=None: VAEPipeline.log_likelihood(pipe, levels, generator=generator)
    fine = evaluate(pipe, reference, num=NUM, likelihood=20, progress=False)["likelihood"]
    assert fine["not_finite"] == 0 and fine["bits_per_dim"] > 0

    def sometimes(levels, labels=None, generator=None):
        if (levels.float().mean((1, 2, 3)) > 40).any():
            raise ValueError("LikelihoodResult: 1 of 16 log-likelihoods are not finite")
        return VAEPipeline.log_likelihood(pipe, levels, generator=generator)

    pipe.log_likelihood = sometimes
    found = evaluate(pipe, reference, num=NUM, likelihood=20, progress=False)
    assert 0 < found["likelihood"]["not_finite"] < 20 and found["likelihood"]["bits_per_dim"] is None
    assert "are not finite" in found["likelihood"]["reason"] and "bits_per_dim" not in found["metrics"]


def tiny_diffusion(scheduler: str, classes: int | None = None) -> DiffusionImagePipeline:
    from diffusers import UNet2DModel

    import gen_pipelines

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=32, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
            num_class_embeds=None if classes is None else classes + 1,
        )  # fmt: skip
    return DiffusionImagePipeline(getattr(gen_pipelines, scheduler)(), unet=unet.eval(), image_size=28, null_class=classes)


def test_a_flow_of_classes_its_evaluations_and_its_bends(reference, monkeypatch):
    monkeypatch.setattr(module, "FLOW_PICTURES", 4)
    monkeypatch.setattr(module, "FLOW_STEPS", 3)
    pipe = tiny_diffusion("FlowMatchEulerScheduler", classes=10)
    own = dict(pipe.scheduler.config)
    result = evaluate(pipe, reference, num=20, steps=3, likelihood=0, progress=False)
    assert result["cost"]["evaluations_per_picture"] == 3 and result["sampling"]["classes_asked_for"]
    assert 0 <= result["metrics"]["class_accuracy"] <= 1
    guided = evaluate(pipe, reference, num=20, steps=3, guidance=2.0, scheduler="heun", likelihood=0, progress=False)
    assert guided["cost"]["evaluations_per_picture"] >= 6  # both branches of guidance count
    assert guided["sampling"]["scheduler"] == "heun" and guided["sampling"]["guidance"] == 2.0
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerScheduler" and dict(pipe.scheduler.config) == own  # given back as it came
    assert guided["metrics"]["straightness"] > 0 and guided["metrics"]["transport_cost"] > 0


def test_straightness_is_its_definition():
    pipe, steps = tiny_diffusion("FlowMatchEulerScheduler"), 4
    assert is_flow(pipe) and not is_flow(tiny_diffusion("DDPMScheduler"))
    sampler = Sampler(pipe, seed=0)
    bent, far = straightness(sampler, [0, 1, 2], None, steps)
    from gen_pipelines.training.random import normal, sample_generators

    eps = normal((3, 1, 32, 32), sample_generators(0, "sampling", [0, 1, 2], [0] * 3))
    x, velocities = eps, []
    with torch.no_grad():
        for step in range(steps):
            v = pipe.unet(x, torch.tensor(1000.0 * (1 - step / steps))).sample
            velocities.append(v)
            x = x - v / steps
    displacement = eps - x  # v points to noise
    expected = torch.stack([(v - displacement).square().mean((1, 2, 3)) for v in velocities]).mean(0)
    assert_close(bent.float(), expected, rtol=1e-3, atol=1e-6)
    assert_close(far.float(), displacement.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def vq_vae():
    from gen_pipelines import TransformerPrior, VQVAEModel, VQVAEPipeline

    sizes = {"downsample_factors": (2, 2), "hidden_channels": 8, "layers_per_block": 1, "residual_channels": 4, "num_embeddings": 16}
    return VQVAEPipeline(
        VQVAEModel(sample_size=16, embedding_dim=4, **sizes), TransformerPrior(16, (4, 4), 10, width=16, num_layers=1, num_heads=2),
        TransformerPrior(16, (8, 8), 10, [[4, 4]], width=16, num_layers=1, num_heads=2),
    )  # fmt: skip


def one_of_each():
    """(family, a pipeline of grey pictures of 16 x 16, its kind of likelihood, evaluations per picture), with weights at random."""
    import gen_pipelines as gp

    small = {"in_channels": 1, "sample_size": 16, "num_levels": 2, "hidden_channels": 8}
    yield "vae", VAEPipeline(VAEModel(sample_size=16, latent_dim=4, block_out_channels=(8,), layers_per_block=1)), "elbo", 1
    yield "vq_vae", vq_vae(), "elbo", 80
    yield "gan", gp.GANPipeline(gp.DCGANGenerator(16, 1, latent_dim=8, base_channels=4, num_classes=10)), None, 1
    style = gp.StyleGAN2Generator(16, 1, 8, 8, channel_base=128, channel_max=16, num_mapping_layers=2)
    yield "stylegan", gp.StyleGANPipeline(style), None, 1
    yield "glow", gp.GlowPipeline(gp.GlowModel(num_steps=1, **small)), "exact", 1
    yield "realnvp", gp.GlowPipeline(gp.RealNVPModel(num_couplings=1, num_blocks=0, **small)), "exact", 1


def test_every_family(digits, tmp_path):
    """Draws, measures and takes the likelihood; or says that there is none. Diffusion is above."""
    from gen_pipelines import ConvClassifier

    ConvClassifier(sample_size=16, base_channels=2, feature_dim=6).save_pretrained(tmp_path / "extractor")
    data = Reference.open(str(digits), resolution=16, channels=1)
    for family, pipe, kind, evaluations in one_of_each():
        options = {"num": 12, "likelihood": 4, "batch_size": 6, "extractor": str(tmp_path / "extractor"), "progress": False}
        result = evaluate(pipe, data, name=family, **options)
        assert math.isfinite(result["metrics"]["frechet_distance"]), family
        found = result["likelihood"]
        assert found.get("kind") == kind and (kind is None) == ("reason" in found), (family, found)
        assert result["cost"]["evaluations_per_picture"] == evaluations, family
        again = evaluate(pipe, data, name=family, **options)
        assert without_cost(again) == without_cost(result), family


def test_labels_that_are_words_are_left_alone(digits, tmp_path):
    import datasets

    rows = datasets.load_dataset(str(digits), split="train").map(lambda row: {"label": str(row["label"])}, features=None)
    rows.cast_column("label", datasets.Value("string")).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    data = Reference.open(str(tmp_path), resolution=28, channels=1)
    assert data.reference.labels is None and data.labels(3, 0) is None


def test_single_classes(digits):
    some = Reference.open(str(digits), resolution=28, channels=1, classes=[3, 5])
    assert set(some.reference.labels) == set(some.held_out.labels) == {3, 5} == set(some.labels(50, 0))
    result = evaluate(tiny_diffusion("DDIMScheduler", 10), some, num=10, steps=2, likelihood=0, progress=False)
    assert result["protocol"]["classes"] == "3,5"
    with pytest.raises(ValueError, match="not asked for classes"):
        evaluate(tiny_diffusion("DDIMScheduler"), some, num=10, likelihood=0)
    with pytest.raises(ValueError, match="no picture has the label 12; there are 0, 1"):
        Reference.open(str(digits), resolution=28, channels=1, classes=[12])


def test_held_out_pictures_are_not_in_the_reference(digits, tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes((digits / "train-00000-of-00001.parquet").read_bytes())
    alone = Reference.open(str(tmp_path), resolution=28, channels=1)  # one split: a sixth of it stands beside
    assert not set(alone.reference.indices) & set(alone.held_out.indices) and len(alone.held_out) == 50
    assert alone.held_out_name == "50 rows of train"
    nowhere = ("./nothing", "--dataset: the folder ./nothing does not exist")
    for wrong, says in (nowhere, (str(tmp_path), "--dataset: cannot read the split 'x'")):
        with pytest.raises(ValueError, match=says):
            Reference.open(wrong, "x", resolution=28, channels=1)
    with pytest.raises(ValueError, match="^--image-column: .* has no column 'photo'; its columns: [^.]*\\.$"):
        Reference.open(str(tmp_path), resolution=28, channels=1, image_column="photo")
    with pytest.raises(ValueError, match="^--text-column: .* has no column 'caption'; its columns: [^.]*\\.$"):
        Reference.open(str(tmp_path), resolution=28, channels=1, text_column="caption")
    with pytest.raises(ValueError, match="it is the split 'train' itself"):
        Reference.open(str(tmp_path), held_out_split="train", resolution=28, channels=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 3}, "num: 3 is not allowed"),
        ({"steps": 5}, "a VAEPipeline has no steps"),
        ({"scheduler": "ddim"}, "draws without steps"),
        ({"extractor": "nothing"}, "'nothing' is not known"),
        ({"dataset": "./no-such-folder"}, "does not exist"),
        ({"out": "."}, "is a folder; name a file"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_drawn(reference, options, message, monkeypatch):
    monkeypatch.setattr(module, "draw_part", lambda *args: pytest.fail("it began to draw"))
    with pytest.raises(ValueError, match=message):
        evaluate(VAEPipeline(tiny_vae()), options.pop("dataset", reference), **options)
    if "scheduler" in options:
        with pytest.raises(ValueError, match="there is no such scheduler; there are ddpm"):
            evaluate(tiny_diffusion("DDIMScheduler"), reference, scheduler="nothing")


def test_the_command_and_the_card(digits, tmp_path, capsys):
    VAEPipeline(tiny_vae()).save_pretrained(tmp_path / "vae", license="apache-2.0")
    words = ["evaluate", str(tmp_path / "vae"), "--dataset", str(digits), "--num", "20", "--likelihood", "0"]
    out, fingerprint = tmp_path / "vae" / "evaluation.json", Repository.open(str(tmp_path / "vae")).fingerprint()
    assert main([*words, "--out", str(out), "--card"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(out)] and "Fréchet distance" in said.err
    result, card = read_evaluation(tmp_path / "vae"), (tmp_path / "vae" / "README.md").read_text()
    assert f"| Fréchet distance (mnist-classifier features) | {result['metrics']['frechet_distance']:.4g}" in card
    assert "type: frechet-distance-mnist-classifier-features" in card and "coverage" in card and result["model"] == "vae"
    write_card(tmp_path / "vae", result)
    assert (tmp_path / "vae" / "README.md").read_text() == card  # once is as good as twice
    assert Repository.open(str(tmp_path / "vae")).fingerprint() == fingerprint  # numbers make no other model of it
    assert main(["info", str(tmp_path / "vae")]) == 0 and "Fréchet distance" in capsys.readouterr().out


def test_too_few_real_pictures(digits, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(module, "draw_part", lambda *args: pytest.fail("it began to draw"))
    rows = datasets.load_dataset(str(digits), split="train").select(range(24))
    rows.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="4 pictures in '4 rows of train'; more than 5 are needed"):
        evaluate(VAEPipeline(tiny_vae()), str(tmp_path))


def test_several_samplers_in_one_command(digits, tmp_path, capsys):
    tiny_diffusion("DDIMScheduler").save_pretrained(tmp_path / "ddim")
    words = ["evaluate", str(tmp_path / "ddim"), "--dataset", str(digits), "--num", "12", "--likelihood", "0"]
    assert main([*words, "--scheduler", "ddim,euler", "--steps", "2,3", "--out", str(tmp_path / "several")]) == 0
    names = [path.name for path in sorted((tmp_path / "several").glob("*.json"))]
    assert names == [f"evaluation-{scheduler}-{steps}.json" for scheduler in ("ddim", "euler") for steps in (2, 3)]
    results = [json.loads((tmp_path / "several" / name).read_text()) for name in names]
    assert [(r["sampling"]["scheduler"], r["cost"]["evaluations_per_picture"]) for r in results] == [
        ("ddim", 2), ("ddim", 3), ("euler:timestep_spacing=leading", 2), ("euler:timestep_spacing=leading", 3),  # the model's own grid
    ]  # fmt: skip
    own = {"ddim:use_karras_sigmas=true": "ddim-use_karras_sigmas-true", "ddim": "ddim"}  # the first leaves nothing to the second
    assert main([*words, "--scheduler", ",".join(own), "--steps", "2", "--out", str(tmp_path / "settings")]) == 0
    results = {name: json.loads((tmp_path / "settings" / f"evaluation-{file}-2.json").read_text()) for name, file in own.items()}
    assert {name: result["sampling"]["scheduler"] for name, result in results.items()} == {name: name for name in own}
    (group,) = compare(list(results.values()))
    assert {row.sampling for row in group.rows} == {f"{name}, 2 steps" for name in own}  # not two seeds of one
    capsys.readouterr()
    assert main([*words, "--steps", "2,3", "--out", "one.json"]) == 2 and "need a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_find_what_one_finds(digits, tmp_path):
    words = ["-m", "gen_pipelines", "evaluate", "bundled:mnist-vae", "--dataset", str(digits), "--num-images", "50", "--batch-size", "8"]
    words += ["--likelihood", "20"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    subprocess.run([sys.executable, *words, "--out", str(one)], check=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    subprocess.run([*launch, *words, "--out", str(two)], check=True)
    found = [json.loads(path.read_text()) for path in (one, two)]
    assert without_cost(found[0]) == without_cost(found[1]) and found[1]["cost"]["processes"] == 2


@pytest.mark.slow
def test_a_model_of_captions_draws_those_of_the_held_out_pictures(tmp_path):
    import datasets
    from PIL import Image

    from gen_pipelines import ConvClassifier

    ConvClassifier(sample_size=64, in_channels=3, base_channels=2, feature_dim=6).save_pretrained(tmp_path / "extractor")
    rows = {"image": [Image.new("RGB", (64, 64), (4 * i, 90, 200 - 4 * i)) for i in range(48)], "text": [f"a red {i}" for i in range(48)]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}))
    data.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    options = {"num": 10, "steps": 2, "likelihood": 0, "extractor": str(tmp_path / "extractor"), "progress": False}
    with pytest.raises(ValueError, match="draws from prompts; name the data set's column of captions"):
        evaluate("bundled:emoji", str(tmp_path), **options)
    result = evaluate("bundled:emoji", str(tmp_path), text_column="text", **options)
    assert result["counts"] == {"drawn": 10, "not_finite": 0} and result["cost"]["evaluations_per_picture"] >= 2
    assert result["protocol"]["held_out"] == "8 rows of train" and result["likelihood"] is None
