"""Resampling, filters and modulated convolution against slow and independent computations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gen_pipelines.models.layers.equalized import EqualizedConv2d, EqualizedLinear
from gen_pipelines.models.layers.filter_design import lowpass
from gen_pipelines.models.layers.filtered_lrelu import filtered_lrelu
from gen_pipelines.models.layers.modulated_conv import modulated_conv2d
from gen_pipelines.models.layers.upfirdn import downsample2d, fir_filter, upfirdn2d, upsample2d


def slow_upfirdn(x, taps, up, down, padding, gain):
    """The definition, one output pixel at a time."""
    left, right, top, bottom = padding
    batch, channels, height, width = x.shape
    wide = torch.zeros(batch, channels, height * up, width * up, dtype=x.dtype)
    wide[:, :, ::up, ::up] = x
    wide = F.pad(wide, (left, right, top, bottom))
    kh, kw = taps.shape
    rows, columns = (wide.shape[2] - kh) // down + 1, (wide.shape[3] - kw) // down + 1
    out = torch.zeros(batch, channels, rows, columns, dtype=x.dtype)
    for i, j in itertools.product(range(rows), range(columns)):
        window = wide[:, :, i * down : i * down + kh, j * down : j * down + kw]
        out[:, :, i, j] = (window * taps.flip((0, 1))).sum((2, 3)) * gain
    return out


@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("down", [1, 2, 3])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 1, 3, 0), (-1, 2, 4, -2), (5, 5, 5, 5)])
def test_upfirdn_is_its_definition(up, down, padding):
    torch.manual_seed(0)
    x, taps = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert_close(upfirdn2d(x, taps, up, down, padding, 1.7), slow_upfirdn(x, taps, up, down, padding, 1.7))


def test_resampling_keeps_means_and_has_second_derivatives():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    flat = torch.full((1, 1, 6, 6), 0.3)
    taps = fir_filter((1, 3, 3, 1))
    assert_close(taps.sum(), torch.tensor(1.0))
    assert_close(upsample2d(flat, taps)[:, :, 2:-2, 2:-2], torch.full((1, 1, 8, 8), 0.3))
    assert_close(downsample2d(flat, taps)[:, :, 1:-1, 1:-1], torch.full((1, 1, 1, 1), 0.3))
    assert upsample2d(flat, taps).shape == (1, 1, 12, 12) and downsample2d(flat, taps).shape == (1, 1, 3, 3)
    for function in (upsample2d, downsample2d):
        assert torch.autograd.gradcheck(lambda v, f=function: f(v, taps.double()).square(), x)
        assert torch.autograd.gradgradcheck(lambda v, f=function: f(v, taps.double()).square(), x)
    with pytest.raises(ValueError, match="sum 0"):
        fir_filter((1, -1))


def explicit_modulation(x, weight, style, demodulate, up, taps):
    """One set of weights per sample, as in eq. 1 and 3 of the paper, sample by sample."""
    outputs = []
    for one, s in zip(x, style, strict=True):
        w = weight * s[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up == 1:
            outputs.append(F.conv2d(one[None], w, padding=weight.shape[-1] // 2))
        else:  # zeros between the pixels, 'same' convolution on an infinite plane, then the filter
            wide = torch.zeros(1, one.shape[0], *(2 * n for n in one.shape[1:]), dtype=x.dtype)
            wide[:, :, ::2, ::2] = one
            wide = F.conv2d(F.pad(wide, (4, 4, 4, 4)), w.flip((2, 3)))  # true convolution; three pixels of margin are left
            wide = F.conv2d(wide, (4 * taps.flip((0, 1)))[None, None].expand(w.shape[0], 1, 4, 4).to(x), groups=w.shape[0])
            outputs.append(wide[:, :, 1 : 1 + 2 * one.shape[1], 1 : 1 + 2 * one.shape[2]])
    return torch.cat(outputs)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_modulation_without_weights_per_sample_is_that_with_them(demodulate, up):
    torch.manual_seed(0)
    x, style = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight, taps = torch.randn(6, 4, 3, 3, dtype=torch.float64), fir_filter((1, 3, 3, 1))
    ours = modulated_conv2d(x, weight, style, demodulate, up, taps)
    assert ours.shape == (3, 6, 5 * up, 5 * up)
    assert_close(ours, explicit_modulation(x, weight, style, demodulate, up, taps), rtol=1e-5, atol=1e-5)  # styles are float32 inside


@pytest.mark.parametrize("up", [1, 2])
def test_modulation_has_right_first_and_second_derivatives(up, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # gradcheck needs float64 all through
    x, style = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    weight, taps = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True), fir_filter((1, 3, 3, 1)).double()

    def function(x, weight, style):
        return modulated_conv2d(x, weight, style, True, up, taps)

    assert torch.autograd.gradcheck(function, (x, weight, style))
    assert torch.autograd.gradgradcheck(function, (x, weight, style), atol=1e-4)


def test_demodulated_outputs_have_variance_one_whatever_the_styles():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64, 32, 32), torch.randn(48, 64, 3, 3) * 5
    out = modulated_conv2d(x, weight, torch.randn(4, 64) * 3 + 1)
    inner = out[:, :, 2:-2, 2:-2]
    assert_close(inner.var((2, 3)).mean(), torch.tensor(1.0), rtol=0.02, atol=0)


def test_half_precision_does_not_overflow_where_styles_are_large():
    x, weight, style = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3) * 300, torch.randn(2, 8) * 300
    half = modulated_conv2d(x.bfloat16(), weight, style)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), modulated_conv2d(x, weight, style), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("taps", "cutoff", "width", "rate"), [(12, 8.0, 8.6, 64.0), (24, 2.3, 1.1, 32.0), (6, 20.0, 30.0, 128.0)])
def test_filters_are_scipys(taps, cutoff, width, rate):
    signal = pytest.importorskip("scipy.signal")
    expected = torch.tensor(signal.firwin(taps, cutoff, width=width, fs=rate))
    assert_close(lowpass(taps, cutoff, width, rate).double(), expected, rtol=0, atol=1e-7)


def test_radial_filters_are_scipys_jinc():
    special, signal = pytest.importorskip("scipy.special"), pytest.importorskip("scipy.signal")
    taps, cutoff, width, rate = 12, 8.0, 8.6, 64.0
    at = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) / rate
    r = torch.hypot(at[:, None], at[None, :]).numpy()
    window = signal.windows.kaiser(taps, signal.kaiser_beta(signal.kaiser_atten(taps, width / (rate / 2))))
    expected = torch.tensor(special.j1(2 * cutoff * math.pi * r) / (math.pi * r) * window[:, None] * window[None, :])
    ours = lowpass(taps, cutoff, width, rate, radial=True)
    assert_close(ours.double(), expected / expected.sum(), rtol=0, atol=1e-7)
    assert torch.isfinite(lowpass(7, cutoff, width, rate, radial=True)).all()  # an odd number of taps meets the centre
    assert lowpass(1, cutoff, width, rate) is None


@pytest.mark.parametrize("radial", [False, True])
def test_filtered_lrelu_is_bias_up_relu_down(radial):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 7, 7), torch.randn(3)
    up_filter, down_filter = lowpass(12, 4.0, 4.0, 32.0), lowpass(12, 4.0, 4.0, 32.0, radial=radial)
    full = [f if f.ndim == 2 else torch.outer(f, f) for f in (up_filter, down_filter)]
    wide = upfirdn2d(x + bias[:, None, None], full[0], up=2, padding=(9, 8), gain=4)
    expected = upfirdn2d((F.leaky_relu(wide, 0.2) * 1.5).clamp(-0.8, 0.8), full[1], down=2)
    assert_close(filtered_lrelu(x, up_filter, down_filter, bias, 2, 2, (9, 8), 1.5, 0.2, 0.8), expected, rtol=1e-5, atol=1e-6)


def test_equalised_layers_use_weights_of_the_right_scale():
    """Stored with deviation one; the output of unit inputs has variance one; a smaller learning rate changes no output."""
    torch.manual_seed(0)
    x = torch.randn(512, 256)
    plain, slow = EqualizedLinear(256, 256), EqualizedLinear(256, 256, lr_multiplier=0.01, bias_init=0.5)
    assert_close(plain(x).var(), torch.tensor(1.0), rtol=0.05, atol=0)
    assert_close(slow(x).var(), torch.tensor(1.0), rtol=0.05, atol=0)
    assert_close(slow(torch.zeros(1, 256)), torch.full((1, 256), 0.5))
    assert_close(slow.weight.std(), torch.tensor(100.0), rtol=0.05, atol=0)
    conv = EqualizedConv2d(16, 32, 3, down=2)
    assert conv(torch.randn(2, 16, 8, 8)).shape == (2, 32, 4, 4)
