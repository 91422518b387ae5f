"""Distances and manifolds: closed forms, identities, published conventions, and torch-fidelity on the same features."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gen_pipelines.evaluation.distances import frechet_distance, kernel_distance, kernel_mmd
from gen_pipelines.evaluation.neighbours import manifolds, nearest, radii
from gen_pipelines.evaluation.statistics import FeatureStatistics


def draw(n: int, dim: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix + shift


def test_statistics_do_not_depend_on_how_they_are_gathered():
    x = draw(500) + 1000.0  # a large mean is where sums of squares lose their digits
    whole = FeatureStatistics.of(x)
    assert_close(whole.covariance, torch.cov(x.T))
    streamed = FeatureStatistics.empty(6)
    for part in x.split([1, 7, 200, 0, 292]):
        streamed = streamed.update(part)
    merged = FeatureStatistics.of(x[300:]).merge(FeatureStatistics.empty(6)).merge(FeatureStatistics.of(x[:300]))
    for other in (streamed, merged):
        assert other.count == 500
        assert_close(other.mean, whole.mean, rtol=1e-13, atol=0)
        assert_close(other.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    assert_close(whole.scaled(whole.std).std, torch.ones(6, dtype=torch.float64))


def test_a_feature_that_is_not_finite_is_refused():
    x = draw(10)
    x[3, 2] = math.nan
    with pytest.raises(ValueError, match="1 of 10 vectors of features are not finite"):
        FeatureStatistics.of(x)
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(x, draw(10))
    with pytest.raises(ValueError, match="at least 2 vectors"):
        FeatureStatistics.of(draw(1)).covariance  # noqa: B018


def gaussian(mean, covariance) -> FeatureStatistics:
    return FeatureStatistics(2, torch.as_tensor(mean).double(), torch.as_tensor(covariance).double())  # n - 1 = 1


def test_frechet_distance_of_gaussians_has_its_closed_form():
    a, b = gaussian([0.0, 1.0], [[4.0, 0.0], [0.0, 9.0]]), gaussian([3.0, 5.0], [[1.0, 0.0], [0.0, 25.0]])
    assert frechet_distance(a, b) == pytest.approx(9 + 16 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)
    turn = torch.linalg.qr(draw(2, 2)).Q  # a rotation of both changes nothing
    turned = [gaussian(turn @ s.mean, turn @ s.scatter @ turn.T) for s in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    flat = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])  # singular: no epsilon, no complex roots
    assert frechet_distance(flat, flat) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(flat, gaussian([0.0, 0.0], [[0.0, 0.0], [0.0, 1.0]])) == pytest.approx(2.0, rel=1e-12)


def test_frechet_distance_is_symmetric_and_zero_on_itself():
    a, b = FeatureStatistics.of(draw(300)), FeatureStatistics.of(draw(200, seed=1, shift=0.3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_kernel_mmd_is_the_sum_over_pairs():
    x, y = draw(5), draw(7, seed=1)
    k = lambda a, b: (float(a @ b) / 6 + 1) ** 3
    within = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 20
    within += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 42
    assert kernel_mmd(x, y) == pytest.approx(within - 2 * sum(k(a, b) for a in x for b in y) / 35, rel=1e-12)


def test_kernel_distance_is_unbiased_and_repeats():
    x, y = draw(400), draw(400, seed=1)
    mean, spread = kernel_distance(x, y, subsets=50, subset_size=100)
    assert abs(mean) < 4 * spread  # of two sets of one distribution; the subsets overlap, so their spread is an upper bound
    assert kernel_distance(x, y, subsets=5, subset_size=100) == kernel_distance(x, y, subsets=5, subset_size=100)
    assert kernel_distance(x, y + 5.0, subsets=5, subset_size=100)[0] > 10 * spread


def reference_manifolds(real, drawn, k):
    """The definitions, point by point."""
    norm = lambda a, b: float((a - b).norm())
    ball = lambda z: [sorted(norm(p, q) for j, q in enumerate(z) if j != i)[k - 1] for i, p in enumerate(z)]
    of_real, of_drawn = ball(real), ball(drawn)
    inside = [[norm(r, d) <= of_real[i] for d in drawn] for i, r in enumerate(real)]
    return {
        "precision": np.mean([any(inside[i][j] for i in range(len(real))) for j in range(len(drawn))]),
        "recall": np.mean([any(norm(r, d) <= of_drawn[j] for j, d in enumerate(drawn)) for r in real]),
        "density": np.mean([sum(inside[i][j] for i in range(len(real))) for j in range(len(drawn))]) / k,
        "coverage": np.mean([any(row) for row in inside]),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_manifolds_are_their_definitions(k, monkeypatch):
    monkeypatch.setattr("gen_pipelines.evaluation.neighbours.BLOCK", 16)  # several blocks, the last one partial
    real, drawn = draw(40, 3), 0.7 * draw(30, 3, seed=1, shift=0.4)
    found = manifolds(real, drawn, k_precision=k, k_density=k)
    for name, value in reference_manifolds(real, drawn, k).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-6), name


def test_collapse_costs_recall_and_coverage_and_noise_costs_precision():
    real = draw(300)
    collapsed = manifolds(real, real[:1] + 1e-3 * draw(300, seed=1))
    assert collapsed.precision > 0.95 and collapsed.recall < 0.05 and collapsed.coverage < 0.1
    wide = manifolds(real, 5 * draw(300, seed=1))
    assert wide.precision < 0.3 and wide.recall > 0.8 and wide.density < 0.3
    same = manifolds(real, real)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)


def test_too_few_pictures_for_the_neighbours():
    with pytest.raises(ValueError, match="5 neighbours need more than 5 pictures"):
        manifolds(draw(5), draw(50))


def test_nearest_is_exact_on_copies():
    x = draw(50).float() * 100
    assert nearest(x[:7], x).tolist() == [0.0] * 7
    assert_close(nearest(x[:7].double(), x[7:].double()), torch.cdist(x[:7].double(), x[7:].double()).min(1).values)
    assert_close(radii(x.double(), 2), torch.cdist(x.double(), x.double()).kthvalue(3, dim=1).values)


def test_agrees_with_torch_fidelity_on_the_same_features():
    """To 1e-6 relative. torch-fidelity takes the drawn pictures first; its subsets of KID are other ones, so those are the whole sets."""
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity >= 0.4: pip install 'gen-pipelines[eval]'")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, drawn = draw(400, 16), draw(300, 16, seed=1, shift=0.2)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(drawn), fid_features_to_statistics(real), verbose=False)
    ours = frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(drawn))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    theirs = kid_features_to_metric(drawn, real[:300], kid_subsets=2, kid_subset_size=300, verbose=False)
    assert kernel_distance(real[:300], drawn, subsets=2, subset_size=300)[0] == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-6
    )
    theirs = prc_features_to_metric(drawn, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    found = manifolds(real, drawn)
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
