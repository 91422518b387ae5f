"""Layers that several families share, one operation per file, each with a slow reference in the tests."""
