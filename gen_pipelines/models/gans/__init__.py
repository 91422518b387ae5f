"""Generators and discriminators, one architecture per file; `base.py` has what they share."""
