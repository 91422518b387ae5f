"""What a model's pictures are worth: features, distances, coverage, likelihood, cost; and families compared under one protocol."""
