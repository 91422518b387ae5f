"""Feature extractors by name. A distance between pictures means nothing without the name, and the hash, of the network that saw them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bundled import BUNDLED, bundled_networks, bundled_path
from ..models.classifiers.conv_classifier import ConvClassifier

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's; its name ends in the first digits of its SHA-256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_WEIGHTS}"


@dataclass(frozen=True)
class Extractor:
    """A network that turns pictures into features.

    Attributes:
        name: "mnist-classifier", "inception", or the folder of a classifier.
        hash: SHA-256 of its weights file.
        resizer: what is done to a picture before the network sees it.
        network: pictures (B, C, H, W), uint8 -> features (B, D) and logits (B, K) or None.
        channels, size: what pictures it takes; None where any will do.
        classes: K of its logits; None where it is no classifier of this data.
        normalised: whether features are divided by their deviation on the reference pictures before distances are taken. The standard
            Inception distances are taken without; for a network of our own no standard exists, and its units mean nothing.
    """

    name: str
    hash: str
    resizer: str
    network: nn.Module
    channels: int | None
    size: int | None
    classes: int | None
    normalised: bool

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Refuses pictures that it does not take.

        Raises:
            ValueError: another size or number of channels; nothing is resized silently.
        """
        if self.channels is not None and (channels, *size) != (self.channels, self.size, self.size):
            raise ValueError(
                f"extractor {self.name}: takes pictures of {self.channels} x {self.size} x {self.size}, these are {channels} x {size[0]} "
                f"x {size[1]}; take --extractor inception, or the folder of a classifier trained on pictures like these (task: classifier)."
            )

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, D), float32, and logits (B, K) or None, on the CPU; pictures: uint8 (B, C, H, W)."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4:
            raise TypeError(f"an extractor takes uint8 pictures (B, C, H, W), got {pictures.dtype} {tuple(pictures.shape)}.")
        self.check(pictures.shape[1], tuple(pictures.shape[2:]))
        features, logits = self.network(pictures)
        return features.float().cpu(), None if logits is None else logits.float().cpu()


class _Classifier(nn.Module):
    def __init__(self, classifier: ConvClassifier) -> None:
        super().__init__()
        self.classifier = classifier.eval()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        output = self.classifier(pictures.to(self.classifier.device).float() / 127.5 - 1)
        return output.features, output.logits


class _Inception(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> tuple[Tensor, None]:
        colour = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures
        return self.network(colour.to(next(self.network.parameters()).device))[0], None


def find_extractor(
    name: str | None, channels: int, size: tuple[int, int], device: Any = "cpu", inception_weights: str | Path | None = None
) -> Extractor:
    """The extractor of a name, loaded.

    Args:
        name: "mnist-classifier"; "inception"; or a folder that the training task `classifier` wrote. None: the bundled classifier for grey
            pictures of 28 x 28, else inception.
        channels, size: of the pictures.
        device: where it computes.
        inception_weights: torch-fidelity's file; by default it is looked for where torch.hub keeps it. Nothing is downloaded.
    Raises:
        ValueError: an unknown name, or pictures that it does not take.
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: its weights are not here; the message says where to put them.
    """
    if name is None:
        name = "mnist-classifier" if (channels, *size) == (1, 28, 28) else "inception"
    bare = name.removeprefix(BUNDLED)
    if bare == "inception":
        found = _inception(inception_weights, device)
    elif bare in bundled_networks():
        found = _classifier(bare, Path(bundled_path(bare)), device)
    elif Path(name).is_dir():
        found = _classifier(name, Path(name), device)
    else:
        raise ValueError(
            f"extractor {name!r} is not known; there are inception, {', '.join(bundled_networks())}, or the folder of a ConvClassifier."
        )
    found.check(channels, size)
    return found


def _classifier(name: str, folder: Path, device: Any) -> Extractor:
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if config.get("_class_name") != "ConvClassifier":
        raise ValueError(f"extractor {name}: this folder holds no ConvClassifier; the training task `classifier` makes one.")
    classifier = ConvClassifier.from_pretrained(folder, dtype=torch.float32).to(device)
    settings = classifier.config
    return Extractor(
        name, _sha256(folder / "diffusion_pytorch_model.safetensors"), "none", _Classifier(classifier), settings.in_channels,
        settings.sample_size, settings.num_classes, normalised=True,
    )  # fmt: skip


def _inception(weights: str | Path | None, device: Any) -> Extractor:
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(f"extractor inception: needs torch-fidelity >= 0.4: pip install 'gen-pipelines[eval]' ({error}).") from None
    if tuple(int(part) for part in torch_fidelity.__version__.split(".")[:2]) < (0, 4):
        raise ImportError(f"extractor inception: needs torch-fidelity >= 0.4, this is {torch_fidelity.__version__}; update it.")
    file = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(
            f"extractor inception: its weights are not at {file}; download {INCEPTION_URL} there, or say where they are "
            "(--inception-weights FILE)."
        )
    digest = _sha256(file)
    if weights is None and not digest.startswith("sha256:6726825d"):
        raise ValueError(f"extractor inception: {file} is not the published file ({digest}); cut short or changed: download it again.")
    try:  # torch-fidelity reads it without this limit: what passes here holds tensors alone
        torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"extractor inception: {file} is not a file of tensors alone ({type(error).__name__}); it is not read.") from None
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)).to(device)
    resizer = "bilinear to 299 x 299 as in TensorFlow 1"
    return Extractor("inception", digest, resizer, _Inception(network), None, None, None, normalised=False)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
