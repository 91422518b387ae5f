"""Metadata, dependencies and entry point of gen_pipelines. The configuration of tools is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "gen_pipelines/__init__.py").read_text(encoding="utf-8"), re.MULTILINE).group(1)

# The lower bounds are those of diffusers 0.42 and transformers 5 where these are stricter than what we need.
CORE = [
    "torch>=2.6",
    "diffusers>=0.42",
    "transformers>=5.0",
    "accelerate>=1.10",
    "huggingface-hub>=1.32",
    "safetensors>=0.8",
    "numpy>=1.26",
    "pillow>=10.0",
    "pyyaml>=6.0",  # recipes, and the metadata of model cards
]

EXTRAS = {
    # Brings torchvision, whose version must match torch's: a mismatch breaks even the import of diffusers. Hence no core dependency.
    "open-clip": ["open-clip-torch>=3.0"],
    "train": ["datasets>=4.0", "tensorboard>=2.16"],
    # torch-fidelity: the standard Inception features; it needs a torchvision that fits torch, as open-clip does
    "eval": ["scipy>=1.11", "torchdiffeq>=0.2.4", "torch-fidelity>=0.4"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
}
EXTRAS["all"] = sorted(EXTRAS["open-clip"] + EXTRAS["train"] + EXTRAS["eval"])
EXTRAS["dev"] = EXTRAS["all"] + [
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",  # hostile configs and weight files by the thousand
    "ruff>=0.17,<0.18",  # pinned: its formatting may change between minor versions
    "scikit-learn>=1.4",  # its digits, which need no download
    "peft>=0.17",  # adapters of diffusers' loaders
    "matplotlib>=3.8",  # the examples' figures
    "torchsde>=0.2.6",  # diffusers' SDE schedulers, which are tested beside ours, need it
    "setuptools>=77",  # a test reads what setup.py hands to it
]

PACKAGE_DATA = {
    # named by ending, so that no stray checkpoint or cache file is shipped
    "gen_pipelines": ["py.typed", *[f"bundled/**/*.{end}" for end in ("json", "safetensors", "md", "txt", "yaml")]],
}

setup(
    name="gen_pipelines",
    version=VERSION,
    description="Every generative family as a Hugging Face style pipeline: load, swap the scheduler, train and push",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["gen_pipelines", "gen_pipelines.*"]),
    package_data=PACKAGE_DATA,
    include_package_data=False,
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["gen-pipelines=gen_pipelines.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
