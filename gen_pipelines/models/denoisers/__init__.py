"""Denoisers that diffusers does not have. Empty so far: U-Nets and transformers come from diffusers."""
