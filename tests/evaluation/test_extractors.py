"""Extractors: what they take, their hashes, the bundled classifier on digits, one trained by a recipe, Inception by a local file."""

import datasets
import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close

from gen_pipelines import ConvClassifier, bundled_path
from gen_pipelines.evaluation.extractors import find_extractor
from gen_pipelines.training.run import train


def digits(count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """sklearn's digits, 8 x 8, enlarged into a frame of 28 x 28: (B, 1, 28, 28) uint8 and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.tensor(data.images[:count])[:, None] / 16 * 255
    large = torch.nn.functional.interpolate(small, size=20, mode="bilinear", align_corners=False)
    return torch.nn.functional.pad(large, (4,) * 4).round().to(torch.uint8), torch.tensor(data.target[:count])


def test_the_bundled_classifier_knows_digits_of_another_set():
    pictures, labels = digits()
    extractor = find_extractor(None, 1, (28, 28))
    features, logits = extractor(pictures)
    assert features.shape == (300, 64) and features.dtype == torch.float32 and logits.shape == (300, 10)
    assert (logits.argmax(1) == labels).double().mean() > 0.8  # other pens, other scanner, an eighth of the pixels
    assert extractor.hash.startswith("sha256:") and extractor.name == "mnist-classifier" and extractor.normalised
    assert_close(extractor(pictures[:7])[0], features[:7], rtol=1e-4, atol=1e-4)  # no statistics of the batch


def test_the_bundled_classifier_loads_by_its_name():
    model = ConvClassifier.from_pretrained("bundled:mnist-classifier", dtype=torch.float32)
    extractor = find_extractor(bundled_path("mnist-classifier"), 1, (28, 28))
    pictures = digits(3)[0]
    with torch.no_grad():
        assert torch.equal(model(pictures.float() / 127.5 - 1).features, extractor(pictures)[0])


@pytest.mark.parametrize(
    ("name", "channels", "size", "message"),
    [
        ("mnist-classifier", 3, (28, 28), r"takes pictures of 1 x 28 x 28, these are 3 x 28 x 28"),
        ("no-such", 1, (28, 28), r"'no-such' is not known; there are inception, mnist-classifier"),
        ("bundled:emoji", 1, (28, 28), r"'bundled:emoji' is not known"),
    ],
)
def test_what_cannot_be_used_is_said(name, channels, size, message):
    with pytest.raises(ValueError, match=message):
        find_extractor(name, channels, size)


def test_a_folder_that_is_no_classifier(tmp_path):
    with pytest.raises(ValueError, match="holds no ConvClassifier"):
        find_extractor(str(tmp_path), 1, (28, 28))


def test_a_classifier_of_other_pictures_trains_from_a_recipe(tmp_path):
    """Dark against bright squares: a task that a network of a few weights learns in a second."""
    values = [(i % 2) * 120 + 40 + i for i in range(64)]
    rows = {"image": [np.full((8, 8), value, np.uint8) for value in values], "label": [i % 2 for i in range(64)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    recipe = {
        "task": "classifier",
        "data": {"name": str(tmp_path / "data"), "label_column": "label", "resolution": 8, "channels": 1, "holdout": 16},
        "model": {"classifier": {"class": "ConvClassifier", "sample_size": 8, "num_classes": 2, "base_channels": 2, "feature_dim": 4}},
        "optimizer": {"learning_rate": 1e-2},
        "loop": {"steps": 60, "batch_size": 16, "sample_every": 60},
        "sample": {"pictures": 4, "columns": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = train(tmp_path / "recipe.yaml", output_dir=tmp_path / "run")
    extractor = find_extractor(str(folder), 1, (8, 8))
    dark, bright = torch.full((2, 1, 8, 8), 60, dtype=torch.uint8), torch.full((2, 1, 8, 8), 200, dtype=torch.uint8)
    assert extractor(torch.cat([dark, bright]))[1].argmax(1).tolist() == [0, 0, 1, 1]
    assert "accuracy on 16 held-out pictures | 100.00%" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="a class 1"):
        recipe["model"]["classifier"]["num_classes"] = 1
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        train(tmp_path / "recipe.yaml", output_dir=tmp_path / "other")


def test_inception_says_what_is_missing(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity >= 0.4: pip install 'gen-pipelines[eval]'")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"download https://.*6726825d\.pth there, or say where"):
        find_extractor("inception", 3, (32, 32))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="not the published file"):
        find_extractor("inception", 3, (32, 32))
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        find_extractor("inception", 3, (32, 32), inception_weights=tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth")


@pytest.mark.slow
def test_inception_is_torch_fidelitys(monkeypatch, tmp_path):
    """With random weights, which the real file would only replace: the same features as torch-fidelity's own extractor gives."""
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity >= 0.4: pip install 'gen-pipelines[eval]'")
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    monkeypatch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    monkeypatch.undo()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = find_extractor("inception", 1, (28, 28), inception_weights=tmp_path / "weights.pth")
    pictures = digits(2)[0]
    features, logits = extractor(pictures)
    assert logits is None and features.shape == (2, 2048) and not extractor.normalised
    assert torch.equal(features, network(pictures.expand(-1, 3, -1, -1))[0])
