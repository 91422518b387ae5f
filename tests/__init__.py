"""A package, so that `tests` is this folder and not the one that torch-fidelity installs under the same name."""
