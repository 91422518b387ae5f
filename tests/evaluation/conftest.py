"""Digits of scikit-learn as a small data set in the Hub's layout, and a cache of its own."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("GEN_PIPELINES_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def enlarged(count: int, first: int = 0) -> tuple[torch.Tensor, list[int]]:
    """sklearn's digits, 8 x 8, enlarged into a frame of 28 x 28: (B, 1, 28, 28) uint8, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.tensor(data.images[first : first + count])[:, None] / 16 * 255
    large = torch.nn.functional.interpolate(small, size=20, mode="bilinear", align_corners=False)
    return torch.nn.functional.pad(large, (4,) * 4).round().to(torch.uint8), data.target[first : first + count].tolist()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of parquet: 300 digits in train and 100 in test."""
    folder = tmp_path_factory.mktemp("digits")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split, count, first in (("train", 300, 0), ("test", 100, 300)):
        pictures, labels = enlarged(count, first)
        rows = {"image": [np.asarray(picture[0]) for picture in pictures], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
