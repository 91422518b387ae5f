"""VAE, VQ-VAE and their priors through the whole trainer: exact resume, two ranks against one, what is saved, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gen_pipelines import AutoPipeline
from gen_pipelines.training.run import train
from gen_pipelines.training.state import checkpoints, load_checkpoint
from tests.training.test_trainer import GRADIENTS, content, finish, start
from tests.training.tiny import COLOURS, SHAPES, draw

VAE = {"class": "VAEModel", "sample_size": 8, "block_out_channels": [8], "latent_dim": 4}
VQVAE = {
    "class": "VQVAEModel", "sample_size": 8, "downsample_factors": [2, 2], "hidden_channels": 8, "layers_per_block": 1,
    "residual_channels": 4, "num_embeddings": 16, "embedding_dim": 4, "decay": 0.8, "revive_below": 0.3,
}  # fmt: skip
PRIORS = {
    "prior": {"class": "TransformerPrior", "width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    "prior_2": {"class": "PixelCNNPrior", "width": 8, "num_layers": 2, "attention_every": 2, "num_heads": 2},
}
KINDS = {
    "vae": ("vae", {"vae": VAE}, {"warmup_steps": 4, "free_bits": 0.05}),
    "iwae": ("vae", {"vae": {**VAE, "likelihood": "bernoulli"}}, {"name": "iwae", "num_samples": 3, "estimator": "dreg"}),
    "vq_vae": ("vq_vae", {"vqvae": VQVAE}, {}),
    "vq_vae_loss": ("vq_vae", {"vqvae": {**VQVAE, "codebook_update": "loss"}}, {"reconstruction": "squared_error", "variance": 0.5}),
    "prior": ("prior", {**PRIORS, "class_conditional": True}, {"drop_label": 0.2}),
}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """48 grey pictures with one of three labels, in parquet."""
    import datasets

    folder = tmp_path_factory.mktemp("labelled")
    rows = [(draw(c, s), SHAPES.index(s)) for c in COLOURS for s in SHAPES] * 4
    columns = {"image": [picture for picture, _ in rows], "label": [label for _, label in rows]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def first_stage(labelled, tmp_path_factory) -> Path:
    """A folder with a VQ-VAE that was trained for two steps."""
    folder = tmp_path_factory.mktemp("first")
    return train(recipe_file("vq_vae", folder, labelled, Path(), steps=2), output_dir=folder / "run")


def recipe_file(kind: str, folder: Path, labelled: Path, first: Path, **loop) -> Path:
    task, model, objective = KINDS[kind]
    data = {"name": str(labelled), "label_column": "label", "resolution": 8, "channels": 1, "holdout": 8}
    settings = {
        "task": task,
        "data": data,
        "model": {**model, "vqvae": {"from": str(first)}} if kind == "prior" else model,
        "objective": objective,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "loop": {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "max_grad_norm": 100.0, **loop},
    }
    path = folder / f"{kind}-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_stop_and_resume_is_an_unbroken_run_bit_for_bit(kind, tmp_path, labelled, first_stage):
    """Weights, averages, codebooks with their counts, the epoch's use, random state; over the end of an epoch; and it loads and draws."""
    whole = recipe_file(kind, tmp_path, labelled, first_stage, steps=7, gradient_accumulation_steps=2, sample_every=7)
    train(whole, output_dir=tmp_path / "whole")
    train(whole, ["loop.steps=7", "loop.sample_every=0"], tmp_path / "parts")
    newest = checkpoints(tmp_path / "parts" / "checkpoints")[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()  # as if the run had been killed after step 6, in the second epoch
    train(whole, output_dir=tmp_path / "parts", resume=True)
    ends = [checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts")]
    assert content(ends[0]) == content(ends[1])
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [*range(1, 8)]
    state = load_checkpoint(ends[0])[0]
    if kind.startswith("vq_vae"):
        assert bool(state["vqvae.quantizers.0.initialized"])
        assert state["vqvae.quantizers.0.updates"] == 7
        assert state["vqvae.quantizers.0.epoch"] == 1  # 40 pictures, 8 a step
        assert state["vqvae.quantizers.0.usage"].sum() == 2 * 8 * 16  # two steps since it began
        assert 0 < log[-1]["used_0"] <= 1
    assert (tmp_path / "whole" / "samples" / "step-00000007.png").is_file()
    pipe = AutoPipeline.from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "7 steps of 8 samples" in card
    assert "## Measured" in card
    if not kind.startswith("vq_vae"):
        pictures = pipe(batch_size=2, generator=torch.Generator().manual_seed(0)).images
        assert [picture.size for picture in pictures] == [(8, 8)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "iwae", "vq_vae", "vq_vae_loss"])
def test_two_ranks_have_the_gradients_and_buffers_of_one(kind, tmp_path, labelled, first_stage):
    """Free bits on the batch of all ranks, codes counted over all ranks, dead ones revived with the same vectors."""
    recipe = recipe_file(kind, tmp_path, labelled, first_stage, steps=3, checkpoint_every=3, max_grad_norm=None)
    settings = ["optimizer.eps=1e-3", "ema=null"]  # without eps the rounding of tiny gradients becomes Adam's update
    finish(start(recipe, tmp_path / "one", *settings, code=GRADIENTS))
    finish(start(recipe, tmp_path / "two", *settings, ranks=2, code=GRADIENTS))
    one, two = (load_file(f"{tmp_path / name}.gradients") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert one
    scale = max(gradient.abs().max().item() for gradient in one.values())
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}")
    states = [load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1])[0] for name in ("one", "two")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("vae", "model.vae=null", "model.vae is missing"),
        ("vae", "objective.name=vimco", "'vimco' is none of elbo, iwae"),
        ("vae", "objective.estimator=stl", "objective.estimator: the objective 'elbo' does not take it"),
        ("vae", "data.resolution=16", "made for pictures of 1 x 8 x 8, but"),
        ("vq_vae", "model.vqvae.decay=1.0", "decay 1.0"),
        ("vq_vae", "objective.reconstruction=l1", "none of likelihood, squared_error"),
        ("prior", "model.prior_2=null", r"2 levels of codes; give prior, prior_2, got \['prior'\]"),
        ("prior", "data.label_column=null", "data.label_column is missing"),
        ("prior", "data.shift=1", "takes no streaming"),
        ("prior", "model.class_conditional=false", "no label to drop"),
    ],
)
def test_recipes_that_cannot_be_run_are_errors(kind, override, message, tmp_path, labelled, first_stage):
    with pytest.raises(ValueError, match=message):
        train(recipe_file(kind, tmp_path, labelled, first_stage), [override], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tiny_models_learn(tmp_path, labelled):
    """The bound rises, the codebook is in use, and a class-conditional prior draws the class it is asked for."""
    quiet = {"checkpoint_every": 0, "log_every": 10, "batch_size": 16}
    train(recipe_file("vae", tmp_path, labelled, Path(), steps=150, **quiet), ["optimizer.learning_rate=3e-3"], tmp_path / "vae")
    log = [json.loads(line)["elbo"] for line in (tmp_path / "vae" / "log.jsonl").read_text().splitlines()]
    assert log[-1] > log[0] + 100
    fast = ["optimizer.learning_rate=3e-3", "ema.decay=0.9"]
    bigger = ["model.vqvae.hidden_channels=16", "model.vqvae.num_embeddings=32"]
    train(recipe_file("vq_vae", tmp_path, labelled, Path(), steps=300, **quiet), [*fast, *bigger], tmp_path / "vq_vae")
    recipe = recipe_file("prior", tmp_path, labelled, tmp_path / "vq_vae", steps=400, **quiet)
    bigger = ["model.prior.width=32", "model.prior_2.width=32", "model.prior.dropout=0"]
    train(recipe, [*fast, *bigger, "objective.drop_label=0"], tmp_path / "prior")
    log = [json.loads(line) for line in (tmp_path / "vq_vae" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["used_1"] > 0.9
    pipe = AutoPipeline.from_pretrained(tmp_path / "prior")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(class_labels=[0, 1, 2], num_images_per_label=8, generator=torch.Generator().manual_seed(0), output_type="pt").images
    bound = torch.stack([pipe.log_likelihood(drawn.mul(255).round().to(torch.uint8), labels=[label] * 24).nats for label in range(3)])
    assert (bound.argmax(0) == torch.arange(3).repeat_interleave(8)).float().mean() > 0.8


RECIPES = [path for path in sorted((Path(__file__).parents[2] / "configs").glob("*/*.yaml")) if "vae" in path.stem or path.stem == "iwae"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_recipes_build_what_they_name(path):
    """Networks that fit the data's size; priors that fit the codes of their first stage's recipe."""
    from gen_pipelines.training.config import load_recipe
    from gen_pipelines.training.tasks.base import build_network, check_size
    from gen_pipelines.training.tasks.vae import OBJECTIVE, make_objective

    recipe = load_recipe(path)
    first = load_recipe(path.with_stem(path.stem.removesuffix("_prior")))
    with torch.random.fork_rng(devices=[]):
        name = "vae" if recipe.task == "vae" else "vqvae"
        model = build_network(first.model[name], f"model.{name}")
        check_size(model, first, f"model.{name}")
        if recipe.task == "vae":
            make_objective({**OBJECTIVE, **recipe.objective}, set(recipe.objective))
        if recipe.task == "prior":
            for number, one in enumerate(key for key in ("prior", "prior_2") if key in recipe.model):
                shapes = [list(shape) for shape in model.code_shapes]
                filled = {"num_codes": model.config.num_embeddings, "shape": shapes[number], "condition_shapes": shapes[:number]}
                prior = build_network({**filled, "num_classes": 10, **recipe.model[one]}, f"model.{one}")
                assert prior.config.num_classes == 10
            assert number + 1 == len(model.code_shapes)
