"""Model cards: what they say, that they are the Hub's, and that an edit shows."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from gen_pipelines import VAEModel, VAEPipeline, bundled_path
from gen_pipelines.cli.info import describe_model
from gen_pipelines.cli.main import main
from gen_pipelines.evaluation.report import write_card
from gen_pipelines.hub.card import is_untouched, measured, model_card, stamped, with_evaluation, with_facts, with_name
from gen_pipelines.hub.measured import is_of_weights, weights_hash
from gen_pipelines.hub.push import check_folder, refresh_card
from gen_pipelines.training.card import complete_card, drop_outdated_card
from gen_pipelines.training.config import Recipe, build
from gen_pipelines.training.run import train

PARTS = {"vae": ("diffusers", "AutoencoderKL")}


def head_of(card):
    return yaml.safe_load(card.split("---")[1])


def make(**options):
    options = {"pipeline_tag": "text-to-image", "license": "mit", "example": 'image = pipe("a").images[0]', **options}
    return model_card("user/name", "LatentTextToImagePipeline", PARTS, **options)


def test_a_card_has_what_is_known_and_the_hub_reads_it():
    from huggingface_hub import ModelCard

    card = make(datasets=["mnist"], base_model="user/base", samples=["a.png"], evaluation={"metrics": {"FID": 2.5}, "split": "test"})
    data = ModelCard(card).data
    assert (data.library_name, data.license, data.pipeline_tag, data.base_model) == ("gen-pipelines", "mit", "text-to-image", "user/base")
    assert data.datasets == ["mnist"] and data.eval_results[0].metric_value == 2.5 and data.eval_results[0].dataset_name == "mnist"
    for wanted in ('AutoPipeline.from_pretrained("user/name")', "![samples](a.png)", "`diffusers.AutoencoderKL`", "| FID | 2.5 |"):
        assert wanted in card
    assert card.index("## Evaluation") < card.index("## Limits") and is_untouched(card)


def test_limits_are_those_of_the_author_or_none_are_claimed():
    assert "has described none" in make() and "has described none" not in make(notes="## Limits\n\nIt smears.")
    assert make(notes="## Limits\n\nIt smears.").count("## Limits") == 1


@pytest.mark.parametrize("change", [lambda c: c.replace("mit", "mpl"), lambda c: "x" + c, lambda c: c + "mine"])
def test_any_edit_shows(change):
    card = make()
    assert is_untouched(card) and is_untouched(stamped(card)) and stamped(card) == card
    assert not is_untouched(change(card)) and not is_untouched("# mine\n")


def test_new_measurements_replace_the_old_ones():
    card = with_evaluation(make(evaluation={"metrics": {"FID": 2.5, "KID": 0.1}}), {"metrics": {"FID": 1.5}})
    assert "| FID | 1.5 |" in card and "2.5" not in card and "KID" not in card and card.count("## Evaluation") == 1
    assert len(head_of(card)["model-index"][0]["results"]) == 1
    assert with_evaluation(card, {"metrics": {}}) == card  # nothing measured, nothing said


def test_the_bundled_evaluation_is_told_apart_from_its_protocol():
    evaluation = json.loads(Path(bundled_path("emoji"), "evaluation.json").read_text())
    metrics, protocol = measured(evaluation)
    assert set(metrics) >= {"top-1 %", "top-5 %"} and not set(metrics) & {"steps", "guidance", "captions"}
    assert protocol["steps"] == evaluation["steps"] and "model" not in protocol
    assert measured({"FID": float("nan"), "KID": 0.5, "split": "test", "fast": True}) == ({"KID": 0.5}, {"split": "test", "fast": True})


def test_another_name_and_facts_of_a_run():
    card = with_name(make(), "other/name")
    assert "# other/name" in card and 'from_pretrained("other/name")' in card and "user/name" not in card
    card = with_facts(card, ["mnist"], "user/base", ["samples.png"])
    assert head_of(card)["datasets"] == ["mnist"] and head_of(card)["base_model"] == "user/base"
    assert card.index("![samples](samples.png)") < card.index("## Components")
    assert with_facts(card, samples=["samples.png"]).count("samples.png") == 1


def test_a_folder_is_brought_up_to_date_unless_it_was_edited(tmp_path):
    (tmp_path / "README.md").write_text(make())
    (tmp_path / "evaluation.json").write_text('{"metrics": {"FID": 4.5}}')
    refresh_card(tmp_path, "a/b")
    card = (tmp_path / "README.md").read_text()
    assert "| FID | 4.5 |" in card and "# a/b" in card and is_untouched(card)
    edited = card.replace("It has", "It surely has") + "more\n"
    (tmp_path / "README.md").write_text(edited)
    refresh_card(tmp_path, "c/d")
    assert (tmp_path / "README.md").read_text() == edited
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(ValueError, match="evaluation.json holds a list"):
        refresh_card(tmp_path, "a/b")


def test_numbers_of_other_weights_are_in_no_card(tmp_path, caplog):
    def save(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = VAEPipeline(VAEModel(sample_size=8, latent_dim=2, block_out_channels=(8, 8), layers_per_block=1))
        pipe.save_pretrained(tmp_path)
        return pipe

    recipe = build(Recipe, {"task": "vae", "data": {"name": "./mine"}, "loop": {"steps": 1, "batch_size": 1}}, "recipe")
    told = {"metrics": {"FID": 4.5}, "weights": weights_hash(save(0))}
    (tmp_path / "evaluation.json").write_text(json.dumps(told))
    for update in (lambda: refresh_card(tmp_path, "a/b"), lambda: complete_card(tmp_path, recipe)):
        update()
        assert "| FID | 4.5 |" in (tmp_path / "README.md").read_text() and not caplog.records
    card = (tmp_path / "README.md").read_text()
    save(1)
    for update in (lambda: refresh_card(tmp_path, "a/b"), lambda: complete_card(tmp_path, recipe)):
        caplog.clear()
        (tmp_path / "README.md").write_text(card)  # the numbers stand in it
        update()
        text = (tmp_path / "README.md").read_text()
        assert "FID" not in text and "model-index" not in text and is_untouched(text)
        assert [record.getMessage().count("is of other weights") for record in caplog.records] == [1]
    (tmp_path / "README.md").write_text(card)
    shown = describe_model(str(tmp_path))["metrics"]
    assert list(shown) == ["evaluation.json"] and "of other weights" in shown["evaluation.json"]


@pytest.mark.parametrize("name", ["mnist-vae", "mnist-flow"])  # in float32, and in half precision
def test_what_an_evaluation_is_of_is_told_without_loading(name, monkeypatch):
    import gen_pipelines.pipelines.auto as auto

    monkeypatch.setattr(auto, "AutoPipeline", None)
    evaluation = json.loads(Path(bundled_path(name), "evaluation.json").read_text())
    assert is_of_weights(evaluation, bundled_path(name)) and is_of_weights({"metrics": {"FID": 1.0}}, bundled_path(name))


def test_a_card_that_is_not_utf_8_is_named(tmp_path, capsys):
    (tmp_path / "README.md").write_bytes("# Zeichnungen für mich".encode("latin-1"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "VAEPipeline"}')
    says = r"README\.md is not UTF-8 \(.* at byte 15\); save it as UTF-8"
    recipe = build(Recipe, {"task": "vae", "data": {"name": "./mine"}, "loop": {"steps": 1, "batch_size": 1}}, "recipe")
    calls = (
        lambda: refresh_card(tmp_path, "a/b"), lambda: complete_card(tmp_path, recipe), lambda: drop_outdated_card(tmp_path),
        lambda: describe_model(str(tmp_path)), lambda: write_card(tmp_path, {"metrics": {"FID": 1.0}}),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=says):
            call()
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "recipe.yaml").write_text("{task: vae, data: {name: ./mine}, loop: {steps: 1, batch_size: 1}}")
    with pytest.raises(ValueError, match=says):
        train(tmp_path / "recipe.yaml", output_dir=tmp_path)  # before the data are looked for


def test_what_is_no_model_is_not_pushed(tmp_path, capsys):
    check_folder(Path(bundled_path("emoji")))
    (tmp_path / "empty").mkdir()
    for folder, says in ((tmp_path / "empty", "is no pipeline, network or scheduler"), (tmp_path / "nothing", "is not a folder")):
        assert main(["push", str(folder), "user/name"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and says in err and err.count("\n") == 1
    (tmp_path / "empty/config.json").write_text("{}")
    (tmp_path / "empty/model.safetensors").write_bytes(b"cut")
    assert main(["push", str(tmp_path / "empty"), "user/name"]) == 2
    assert "cut short" in capsys.readouterr().err
