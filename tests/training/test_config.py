from pathlib import Path

import pytest
import yaml

from gen_pipelines.training.card import training_notes
from gen_pipelines.training.config import CardConfig, load_recipe, to_dict

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = {"task": "autoencoder", "data": {"name": "x"}, "loop": {"steps": 3, "batch_size": 2}}


def write(tmp_path, settings):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_defaults_overrides_and_round_trip(tmp_path):
    recipe = load_recipe(write(tmp_path, RECIPE), ["loop.steps=7", "optimizer.learning_rate=1e-3", "optimizer.betas=[0.5,0.9]", "ema=null"])
    assert (recipe.loop.steps, recipe.optimizer.learning_rate, recipe.optimizer.betas, recipe.ema) == (7, 1e-3, (0.5, 0.9), None)
    assert recipe.data.resolution == 64
    assert load_recipe(write(tmp_path, to_dict(recipe) | {"optimizer": {**to_dict(recipe)["optimizer"], "betas": [0.5, 0.9]}})) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loops": {}}, "unknown key 'loops'.*did you mean 'loop'"),
        ({"loop": {"steps": 3}}, "'batch_size' is missing"),
        ({"loop": {"steps": "many", "batch_size": 2}}, "steps: expected int, got 'many'"),
        ({"loop": {"steps": True, "batch_size": 2}}, "steps: expected int"),
        ({"data": {"name": "x", "resolutoin": 3}}, "did you mean 'resolution'"),
        ({"card": {"licence": "mit"}}, "card: unknown key 'licence' .*did you mean 'license'"),
        ({"loop": {"steps": 0, "batch_size": 2}}, "loop.steps: 0 is not allowed; give at least 1"),
        ({"loop": {"steps": 1, "batch_size": 2, "gradient_accumulation_steps": 0}}, "loop.gradient_accumulation_steps: 0 is not allowed"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: nan is not allowed"),
        ({"ema": {"decay": 1.5}}, "ema.decay: 1.5 is not allowed"),
        ({"ema": {"decay": 0.9, "also": [0.99, 0.9]}}, "ema.also: .0.99, 0.9. is not allowed; give decays"),
        ({"data": {"name": "x", "channels": 4}}, "data.channels: 4 is not allowed; give 3"),
        ({"data": {"name": "x", "streaming": True, "holdout": 3}}, "data.holdout: 3 is not allowed; give 0 for a streamed"),
    ],
)
def test_a_bad_recipe_names_the_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, RECIPE | change))


def test_bad_overrides_and_files(tmp_path):
    with pytest.raises(ValueError, match="write it as key=value"):
        load_recipe(write(tmp_path, RECIPE), ["loop.steps"])
    with pytest.raises(ValueError, match="not a group of settings"):
        load_recipe(write(tmp_path, RECIPE), ["task.name=3"])
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"PAR1\xaa")
    with pytest.raises(ValueError, match=r"recipe\.yaml: not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_network_from_nowhere_is_said_in_one_line_and_at_once(monkeypatch):
    import huggingface_hub

    from gen_pipelines.training.tasks.base import build_network

    def fail(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "resolve_revision", fail)
    with pytest.raises(FileNotFoundError, match=r"model\.vae\.from: there is no folder runs/nothing, .*no connection"):
        build_network({"from": "runs/nothing"}, "model.vae")
    assert type(build_network({"from": "bundled:mnist-vae", "subfolder": "vae"}, "model.vae")).__name__ == "VAEModel"


def test_the_card_s_words_go_with_the_data(tmp_path):
    card = {"data": "MNIST, 60,000 pictures.", "about": "Digits.", "limits": "Digits alone.", "license": "mit"}
    path = write(tmp_path, RECIPE | {"card": card})
    facts = {"steps": 3, "seconds": 60, "hardware": "one CPU"}
    own, other = load_recipe(path, ["data.split=test"]), load_recipe(path, ["data.name=./mine", "data.split=all"])
    assert "MNIST, 60,000 pictures." in training_notes(own, facts)
    notes = training_notes(other, facts)
    assert "MNIST" not in notes and "## Data\n\n`./mine`, split `all`." in notes and other.card == CardConfig() != own.card
    assert "Digits" not in notes
    assert load_recipe(path, ["data.name=x"]) == load_recipe(path)  # the same data, named again
    assert load_recipe(path, ["data.name=./mine", "card.data=Mine."]).card == CardConfig(data="Mine.")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.background=foo", r"data\.background: 'foo' is not allowed; give a colour"),
        ("seed=-1", r"seed: -1 is not allowed; give 0 to 4294967295"),
        ("seed=100000000000000000000", r"seed: 1\d+ is not allowed; give 0 to 4294967295"),
    ],
)
def test_a_colour_and_a_seed_are_checked_up_front(tmp_path, override, says):
    with pytest.raises(ValueError, match=says):
        load_recipe(write(tmp_path, RECIPE), [override])
    assert load_recipe(write(tmp_path, RECIPE), ["data.background='#fff'", "seed=4294967295"]).seed == 2**32 - 1


@pytest.mark.parametrize(("recipe", "setting"), [("reflow", "model.start"), ("consistency_distillation", "model.teacher")])
def test_a_model_to_start_from_that_is_not_there_is_named_with_what_makes_it(recipe, setting, tmp_path, monkeypatch):
    from gen_pipelines.training.tasks.teacher import load_teacher

    source = load_recipe(CONFIGS / "mnist" / f"{recipe}.yaml").model[setting.partition(".")[2]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = r"gen-pipelines train configs/mnist/flow\.yaml --output-dir runs/mnist-flow"
    with pytest.raises(FileNotFoundError, match=rf"^{setting}: there is no folder runs/mnist-flow; make it with `{made}`"):
        load_teacher(source, setting)
    assert (CONFIGS / "mnist" / "flow.yaml").is_file()
