"""`gen-pipelines train --push-to-hub`: over real HTTP, with checkpoints on a branch while it runs."""

import pytest
import yaml
from PIL import Image

from tests.hub.client import Client, RemoteError
from tests.hub.loopback import Fault, Server
from tests.training.tiny import COLOURS, SHAPES, autoencoder_recipe, draw

pytestmark = pytest.mark.slow  # starts a process that trains


@pytest.fixture
def hub():
    server = Server()
    yield server
    server.stop()


def test_a_training_is_pushed_with_its_checkpoints(hub, tmp_path):
    import datasets

    data = tmp_path / "shapes"
    data.mkdir()
    rows = [(draw(c, s), f"{size} {c} {s}") for size in ("big", "a") for c in COLOURS for s in SHAPES]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    pictures = datasets.Dataset.from_dict({"image": [p for p, _ in rows], "text": [t for _, t in rows]}, features=features)
    pictures.to_parquet(data / "train-00000-of-00001.parquet")
    recipe = autoencoder_recipe(data, steps=4, checkpoint_every=2, sample_every=4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "card": {"license": "mit", "limits": "It knows shapes."}}))
    client = Client(tmp_path / "client", hub.url, hub.token)
    try:
        with pytest.raises(RemoteError, match="403.*may not write") as caught:  # found out before anything is read or trained
            client.run("""
from gen_pipelines.training.run import train
from gen_pipelines.cli.main import main
train(recipe, output_dir=folder, push_to_hub="somebody/else")
""", recipe=tmp_path / "recipe.yaml", folder=tmp_path / "run")
        assert "OSError" in caught.value.kinds and not (tmp_path / "run").exists()
        hub.faults.append(Fault("POST", "/commit/checkpoints", status=400))  # one checkpoint is lost on the way: the training goes on
        words = ["train", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "run"), "--push-to-hub", "tester/shapes",
                 "--private", "--push-checkpoints"]  # fmt: skip
        assert client.run("result = main(words)", words=words) == 0
    finally:
        client.stop()
    repo = hub.repos["tester/shapes"]
    assert repo.private and not hub.faults
    assert {name.split("/")[0] for name in repo.files("checkpoints") if name != ".gitattributes"} == {"step-00000004"}
    files = repo.files()
    assert {"config.json", "diffusion_pytorch_model.safetensors", "README.md", "recipe.yaml", "samples.png"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoints/", "samples/")) or name == "log.jsonl"]
    card = files["README.md"].data.decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "mit" and head["library_name"] == "gen-pipelines" and "datasets" not in head  # the data is a folder here
    assert "# tester/shapes" in card and 'from_pretrained("tester/shapes")' in card
    assert "![samples](samples.png)" in card and "## Limits\n\nIt knows shapes." in card and "## Recipe" in card
    with Image.open(tmp_path / "run/samples.png") as picture:
        assert picture.width > 16
