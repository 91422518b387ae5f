"""`train`: what the command adds to `gen_pipelines.training.run.train`, and that a wrong recipe is one line and leaves nothing."""

import json
from pathlib import Path

import pytest
from PIL import Image

from gen_pipelines.cli.main import main

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "emoji" / "autoencoder.yaml")


@pytest.fixture
def pictures(tmp_path_factory):
    """A data set of eight captioned pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"square {i}"}) for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def last_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("gen-pipelines: error: ")
    return line


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("nothing.yaml", [], "nothing.yaml: no such recipe"),
        (RECIPE, ["loop.stepz=3"], "unknown key 'stepz' (did you mean 'steps'?)"),
        (RECIPE, ["loop.steps=many"], "'many'"),
        (RECIPE, ["task=paint"], "'paint' is none of"),
        (RECIPE, ["data.name=./nothing"], "./nothing does not exist"),
    ],
)
def test_a_wrong_recipe(recipe, overrides, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", recipe, "--output-dir", "run", *overrides]) == 2
    assert says in last_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_column_that_the_data_does_not_have(pictures, tmp_path, capsys):
    pytest.importorskip("datasets")
    words = [f"data.name={pictures}", "data.text_column=caption", "--output-dir", str(tmp_path / "run")]
    assert main(["train", RECIPE, *words]) == 2
    line = last_line(capsys)
    assert "no column 'caption'" in line and "image, text" in line
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["train", RECIPE, "--output-dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written" in last_line(capsys)


@pytest.mark.slow
def test_a_run_and_its_resume(pictures, tmp_path, capsys):
    pytest.importorskip("datasets")
    small = ["data.resolution=16", "data.holdout=0", "loop.batch_size=4", "loop.checkpoint_every=1", "loop.sample_every=0"]
    words = ["train", RECIPE, f"data.name={pictures}", *small, "--output-dir", str(tmp_path / "run")]
    assert main([*words, "loop.steps=2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"
    assert main([*words, "loop.steps=3"]) == 2  # not over an earlier run by accident
    assert "--resume" in last_line(capsys)
    assert main([*words, "loop.steps=3", "--resume"]) == 0
    assert "continuing from step 2" in capsys.readouterr().err
    card = (tmp_path / "run" / "README.md").read_text()
    assert "3 steps of 4 samples" in card and "2 steps of 4 samples" not in card  # the card is of these weights
    assert (tmp_path / "run" / "diffusion_pytorch_model.safetensors").is_file()


def test_the_card_of_earlier_weights_goes_unless_somebody_edited_it(tmp_path):
    from gen_pipelines.hub.card import stamped
    from gen_pipelines.training.card import drop_outdated_card

    card = tmp_path / "README.md"
    card.write_text(stamped("# Mine\n"))
    drop_outdated_card(tmp_path)
    assert not card.exists()
    drop_outdated_card(tmp_path)
    card.write_text(stamped("# Mine\n").replace("Mine", "Edited"))
    drop_outdated_card(tmp_path)
    assert "Edited" in card.read_text()
