"""A tiny captioned data set and an untrained autoencoder, in temporary folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.tiny import COLOURS, SHAPES, autoencoder_recipe, draw


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parquet with 24 transparent pictures and captions."""
    import datasets

    folder = tmp_path_factory.mktemp("shapes")
    rows = [(draw(c, s), f"{size} {c} {s}") for size in ("big", "a") for c in COLOURS for s in SHAPES]
    data = datasets.Dataset.from_dict(
        {"image": [picture for picture, _ in rows], "text": [text for _, text in rows]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the untrained autoencoder of `autoencoder_recipe`."""
    from diffusers import AutoencoderKL

    settings = {k: v for k, v in autoencoder_recipe(Path("."))["model"]["vae"].items() if k != "class"}
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(**settings).save_pretrained(folder)
    return folder
