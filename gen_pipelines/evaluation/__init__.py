"""Features, FID, KID, precision and recall, comparison of families. Empty so far."""
