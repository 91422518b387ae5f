"""Normalizing flows: bijections that return (y, log_det) together, and the models made of them."""
