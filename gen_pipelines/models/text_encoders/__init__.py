"""Text encoders that transformers does not have. Empty so far: open_clip's tower goes here."""
