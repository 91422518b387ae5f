"""Log-likelihoods of every family, in one result type: what a number is, in which unit, and with which error."""

from .dequantization import Dequantizer, dequantize, from_levels, to_levels
from .result import KINDS, LikelihoodResult, bits_per_dim

__all__ = ["KINDS", "Dequantizer", "LikelihoodResult", "bits_per_dim", "dequantize", "from_levels", "to_levels"]
