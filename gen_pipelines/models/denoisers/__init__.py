"""Denoisers that diffusers does not have, or not with every setting: U-Nets and transformers."""
