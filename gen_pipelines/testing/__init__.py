"""The conformance suite for schedulers, bijections and likelihoods. Empty so far: the oracle it grows from is in tests/analytic.py."""
