"""The hourglass transformer's attention against loops, its positions, its sizes."""

import pytest
import torch
from conversion.foreign_unets import neighbourhood_attention, window_attention
from torch.testing import assert_close

from gen_pipelines import HDiTModel
from gen_pipelines.models.denoisers import hdit

TINY = {"sample_size": 16, "patch_size": 2, "block_out_channels": (8, 16), "layers_per_block": (1, 1), "mapping_channels": 16,
        "attention_types": ("neighborhood", "global"), "attention_sizes": (3, None), "attention_head_dims": (8, 8)}  # fmt: skip


def qkv(height, width):
    generator = torch.Generator().manual_seed(height * width)
    return (2 * torch.randn(2, 3, height, width, 4, dtype=torch.float64, generator=generator) for _ in range(3))


@pytest.mark.parametrize(("height", "width", "size"), [(3, 5, 3), (7, 7, 7), (8, 16, 3), (11, 10, 5), (16, 9, 7), (6, 4, 1)])
def test_a_neighbourhood_stays_inside(height, width, size):
    q, k, v = qkv(height, width)
    ours = hdit.attend_in_blocks(q, k, v, hdit.neighborhoods(height, size), hdit.neighborhoods(width, size))
    assert_close(ours, neighbourhood_attention(q, k, v, size))


@pytest.mark.parametrize(("height", "width", "size", "shift"), [(4, 4, 4, 2), (8, 4, 4, 2), (6, 9, 3, 1), (4, 6, 2, 0), (3, 2, 1, 0)])
def test_shifted_windows(height, width, size, shift):
    q, k, v = qkv(height, width)
    ours = hdit.attend_in_blocks(q, k, v, *(hdit.shifted_windows(length, size, shift) for length in (height, width)))
    assert_close(ours, window_attention(q, k, v, size, shift))


def test_checkpointing_changes_no_gradient():
    model, generator, grads = HDiTModel(**TINY), torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    for _ in range(2):
        model.zero_grad()
        model(x, 0.3).sample.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing
    assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kinds", [("neighborhood", "global"), ("shifted-window", "none")])
def test_half_precision_runs(kinds):
    model = HDiTModel(**{**TINY, "attention_types": kinds, "attention_sizes": (3 if kinds[0] == "neighborhood" else 4, None)})
    torch.nn.init.normal_(model.patch_out.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, half = model(x, 0.3).sample, model.to(torch.bfloat16)(x.bfloat16(), 0.3).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()  # eight bits, about ten layers


@pytest.mark.parametrize(("changes", "message"), [
    ({"layers_per_block": (1,)}, "layers_per_block 1 entries"),
    ({"attention_types": ("local", "global")}, "none of neighborhood"),
    ({"attention_head_dims": (4, 8)}, "heads of 4"),
    ({"attention_sizes": (4, None)}, "an odd one"),
    ({"attention_sizes": (9, None)}, "leaves 8 tokens at level 0, a neighbourhood has 9"),
    ({"attention_types": ("shifted-window", "global")}, "no windows of 3"),
    ({"sample_size": 18}, "multiples of 4"),
    ({"mapping_channels": 15}, "must be even"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HDiTModel(**{**TINY, **changes})


def test_inputs_that_do_not_fit_are_refused():
    model = HDiTModel(**TINY, augmentation_channels=0)
    x = torch.zeros(1, 3, 16, 16)
    for name in ("condition", "augmentation"):
        with pytest.raises(ValueError, match=f"{name}_channels=0"):
            model(x, 0.3, **{name: torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="multiples of 4"):
        model(torch.zeros(1, 3, 16, 18), 0.3)
