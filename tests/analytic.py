"""The problems with a closed-form answer that the tests share; the oracle itself is public, in `gen_pipelines.testing`."""

from gen_pipelines.testing import NETWORKS, GaussianOracle, sample

__all__ = ["GAUSSIAN", "NETWORKS", "sample"]

GAUSSIAN = GaussianOracle(mean=0.5, std=0.3)
