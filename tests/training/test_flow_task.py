"""The task of flows: initialisation before the first step, classes, streams, what the card says, what is refused; and that it learns."""


import pytest
import torch
import yaml

from gen_pipelines import GlowModel, GlowPipeline, LikelihoodObjective, RealNVPModel
from gen_pipelines.training.config import Recipe, build
from gen_pipelines.training.run import train
from gen_pipelines.training.tasks import make_task
from tests.training.tiny import COLOURS, SHAPES, draw, flow_recipe


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder of parquet with 24 pictures and the number of their colour."""
    import datasets

    folder = tmp_path_factory.mktemp("labelled")
    rows = [(draw(colour, shape), number) for _ in range(2) for number, colour in enumerate(COLOURS) for shape in SHAPES]
    data = datasets.Dataset.from_dict(
        {"image": [picture for picture, _ in rows], "label": [label for _, label in rows]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def recipe(folder, changes=(), **loop):
    settings = flow_recipe(folder, **loop)
    for key, value in changes:
        group = settings
        *path, last = key.split(".")
        for name in path:
            group = group.setdefault(name, {})
        group[last] = value
    return settings


CLASSES = [("model.flow.num_class_labels", 4), ("data.label_column", "label"), ("model.flow.dequantization", "uniform")]


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_and_streams_train_and_the_result_is_a_pipeline(labelled, tmp_path, streaming):
    changes = [*CLASSES, ("data.streaming", True), ("data.holdout", 0)] if streaming else CLASSES
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(labelled, changes, steps=2, sample_every=2)))
    train(path, output_dir=tmp_path / "run")
    pipe = GlowPipeline.from_pretrained(tmp_path / "run")
    assert pipe.num_classes == 4 and all(level.steps[0].actnorm.initialized for level in pipe.flow.levels)
    assert len(pipe(class_labels=[0, 3]).images) == 2
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("held-out, bits per dimension (8-bit, uniform dequantisation, 4 pictures)" in card) is not streaming


def test_initialisation_normalises_the_first_layer_and_averages_start_from_it(labelled):
    task = make_task(build(Recipe, recipe(labelled, [("model.flow.pre_transform", "none")]), "recipe"))
    assert not task.flow.levels[0].steps[0].actnorm.initialized
    task.initialize(task.networks)
    assert task.flow.levels[0].steps[0].actnorm.initialized
    before = {key: value.clone() for key, value in task.flow.state_dict().items()}
    task.initialize(task.networks)
    assert all(torch.equal(value, before[key]) for key, value in task.flow.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ([("model.flow", None)], "model.flow is missing"),
        ([("model.flow", {"class": "AutoencoderKL"})], "no normalizing flow"),
        ([("data.resolution", 16)], "make them the same"),
        ([("model.flow.num_class_labels", 4)], "data.label_column"),
        ([("model.init_pictures", 1)], "give 2 or more"),
        ([("sample.temperature", -1.0)], "give 0 or more"),
        ([("objective.weight", 1.0)], "unknown setting"),
        ([("sample.test_split", "missing")], "split 'missing'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(labelled, changes, match):
    with pytest.raises(ValueError, match=match):
        make_task(build(Recipe, recipe(labelled, changes), "recipe"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glow", "realnvp"])
def test_it_learns_digits(kind):
    """From about 2.75 bits per dimension (values alone) to less than 2.35 in 50 steps, on digits that were not trained on."""
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images).clamp(0, 15).mul(16).to(torch.uint8)[:, None]
    small = {"in_channels": 1, "sample_size": 8, "hidden_channels": 16, "place_bias": True, "pre_transform": "marginal"}
    torch.manual_seed(0)
    if kind == "glow":
        flow = GlowModel(num_levels=2, num_steps=2, **small)
    else:
        flow = RealNVPModel(num_levels=2, num_couplings=2, num_blocks=0, normalization="actnorm", **small)
    draws = torch.Generator().manual_seed(0)
    flow.initialize_from_batch((digits[:256] + torch.rand(256, 1, 8, 8, generator=draws)) / 128 - 1)
    objective, optimizer = LikelihoodObjective(), torch.optim.Adam(flow.parameters(), 3e-3)

    @torch.no_grad()
    def held_out() -> float:
        return objective(flow, digits[1500:], generator=torch.Generator().manual_seed(1)).per_sample.mean().item()

    assert held_out() > 2.6
    for _ in range(50):
        batch = digits[torch.randint(1500, (64,), generator=draws)]
        objective(flow, batch, generator=draws).per_sample.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert held_out() < 2.35
