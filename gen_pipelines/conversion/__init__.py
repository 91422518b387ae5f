"""Readers of foreign checkpoints, one file per format. Empty so far: the first converter goes here."""
