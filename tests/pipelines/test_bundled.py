"""What the package ships: every bundled pipeline loads, draws, has a card that is true of it, and measurements of these very weights."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gen_pipelines import AutoPipeline
from gen_pipelines.bundled import bundled_names, bundled_networks, bundled_path
from gen_pipelines.hub.measured import networks_of, weights_hash

MOST = {"emoji": 42e6}  # bytes; a few MB for all others
PLAIN = {".json", ".safetensors", ".md", ".txt"}


def files_of(name):
    return [path for path in Path(bundled_path(name)).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.parametrize("name", bundled_names() + bundled_networks())
def test_only_plain_files_and_few_bytes_are_shipped(name):
    files = files_of(name)
    assert {path.suffix for path in files} <= PLAIN
    assert sum(path.stat().st_size for path in files) < MOST.get(name, 6e6)
    for path in files:
        if path.suffix != ".safetensors":
            assert not re.search(r"/(home|root|tmp|work|mnt)/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", bundled_names())
def test_every_bundled_pipeline_draws(name):
    """The same picture for the same seed, whatever else is in the batch."""
    pipe = AutoPipeline.from_pretrained(f"bundled:{name}")
    takes = inspect.signature(type(pipe).__call__).parameters
    options = {"num_inference_steps": 2} if "num_inference_steps" in takes else {}
    two = {"prompt": ["a red apple", "a house"]} if "prompt" in takes else {"batch_size": 2}
    seeds = lambda *numbers: [torch.Generator().manual_seed(number) for number in numbers]
    pair = pipe(**two, generator=seeds(1, 2), output_type="np", **options).images
    assert np.isfinite(pair).all() and pair.min() >= 0 and pair.max() <= 1 and pair[0].std() > 0.02
    one = {"prompt": ["a house"]} if "prompt" in takes else {"batch_size": 1}
    alone = pipe(**one, generator=seeds(2), output_type="np", **options).images
    np.testing.assert_allclose(alone[0], pair[1], atol=2e-3)


@pytest.mark.parametrize("name", bundled_names())
def test_the_card_and_the_measurements_are_of_these_weights(name):
    folder = Path(bundled_path(name))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f'from_pretrained("bundled:{name}")' in card
    for part in ("license: apache-2.0", "## Data", "## Training", "## Limits", "```yaml"):
        assert part in card, part
    pipe = AutoPipeline.from_pretrained(folder)
    for component in networks_of(pipe):
        assert f"`{component}`" in card
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    if "weights" in evaluation:
        assert evaluation["weights"] == weights_hash(pipe) and evaluation["model"] == f"bundled:{name}"
