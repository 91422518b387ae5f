"""What the tests of editing share."""

import numpy as np
import pytest
import torch
from PIL import Image


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(size=16, seed=0):
    """A smooth random picture."""
    values = np.random.default_rng(seed).uniform(0, 255, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def rectangle(size=16, box=(4, 4, 12, 12)):
    """White in the box (left, top, right, bottom), black elsewhere; the box lies on cells of 2 x 2 pixels, the size of a latent."""
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, box)
    return mask


def some(names, fast):
    """All names as parameters of a test; those that are not among `fast` run with the long comparisons."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.parity) for name in names]
