"""Autoencoders with a likelihood: variational, and with discrete codes."""
