"""Autoregressive models of discrete codes."""
