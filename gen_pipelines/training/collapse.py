"""Mode collapse seen while a generator trains: what it draws beside the data, in features and in classes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bundled import BUNDLED, bundled_path
from ..models.classifiers.conv_classifier import ConvClassifier

logger = logging.getLogger(__name__)

SMALLEST = 12  # pictures below which neighbours say nothing


class CollapseAlarm(nn.Module):
    """Remembers the best that was reached, and warns when a number has fallen to less than half of it, or classes are lost.

    The best are buffers: they are saved and resumed with the networks.
    """

    WATCHED = ("recall", "coverage", "classes")

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("best", torch.zeros(len(self.WATCHED)))

    def hear(self, metrics: dict[str, float]) -> list[str]:
        """Take the numbers of a moment, and say what has collapsed: one sentence each, also logged as warnings."""
        found: list[str] = []
        if metrics.get("variety", 1.0) < 0.5:
            found.append(f"samples of different noise differ {metrics['variety']:.2f} times as much as the data's pictures do")
        for i, name in enumerate(self.WATCHED):
            if name not in metrics:
                continue
            best = self.best[i].item()
            if name == "classes" and metrics[name] < best:
                found.append(f"{metrics[name]:.0f} classes are drawn, there were {best:.0f}")
            if name != "classes" and metrics[name] < best / 2 and best > 0.05:
                found.append(f"{name} is {metrics[name]:.2f}, it was {best:.2f}")
            self.best[i] = max(best, metrics[name])
        for reason in found:
            logger.warning("mode collapse: %s.", reason)
        return found


class ClassifierFeatures:
    """A `ConvClassifier` as what a watch calls.

    Args:
        name: of a bundled classifier (mnist-classifier), or the folder of one that the training task `classifier` wrote.
        channels, size: of the pictures.
    Raises:
        ValueError: it takes other pictures.
    """

    def __init__(self, name: str, channels: int, size: int) -> None:
        folder = name if Path(name).is_dir() else bundled_path(name.removeprefix(BUNDLED))
        self.classifier = ConvClassifier.from_pretrained(folder, dtype=torch.float32).eval()
        config = self.classifier.config
        if (config.in_channels, config.sample_size) != (channels, size):
            own = f"{config.in_channels} x {config.sample_size} x {config.sample_size}"
            raise ValueError(
                f"sample.classifier: {name} takes pictures of {own}, these are {channels} x {size} x {size}; train one on "
                "pictures like these (task: classifier), or leave it out."
            )

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        output = self.classifier(pictures.float() / 127.5 - 1)
        return output.features, output.logits


class CollapseWatch:
    """Compares drawn pictures with real ones.

    Args:
        real: uint8 (N, C, H, W), some hundreds.
        labels: their classes (N,), where the data has any.
        extractor: features, and the classes that a picture looks like: `ClassifierFeatures`, or anything else that is called with uint8
            pictures and returns features (B, D) and logits (B, K) or None (an extractor of an evaluation). Without one, features are
            pixels, and a picture has the class of the real one that is nearest.
    """

    def __init__(self, real: Tensor, labels: Tensor | None = None, extractor: Any = None) -> None:
        self.real, self.labels, self.extractor = real, labels, extractor
        self.features, _ = self._features(real)
        self.scale = self.features.std(0).clamp_min(1e-6) if extractor is not None else torch.ones(1)
        self.features = self.features / self.scale

    def _features(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.extractor is None:
            return pictures.flatten(1).float() / 127.5, None
        return self.extractor(pictures)

    def look(self, drawn: Tensor, asked: Tensor | None = None) -> dict[str, float]:
        """Numbers of drawn pictures, uint8 (M, C, H, W).

        Args:
            asked: the classes that the generator was asked for, (M,).
        Returns: `variety` (root mean squared distance of two pictures, over the data's), `recall` and `coverage` of the real pictures
            (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991; Naeem et al. 2020, https://arxiv.org/abs/2002.09797, 5 neighbours);
            with classes `classes`, how many have at least a fifth of their share in the data, `class_entropy`, over the data's, and
            `class_accuracy`, how many pictures look like what was asked for.
        """
        features, logits = self._features(drawn)
        features = features / self.scale
        found = {"variety": variety(drawn) / max(variety(self.real), 1e-12)}
        if min(len(features), len(self.features)) >= SMALLEST:
            found |= dict(zip(("recall", "coverage"), recall_and_coverage(self.features, features), strict=True))
        if self.labels is not None:
            looks = logits.argmax(1) if logits is not None else self.labels[torch.cdist(features, self.features).argmin(1)]
            count = int(max(looks.max(), self.labels.max())) + 1
            ours, theirs = (torch.bincount(classes, minlength=count) / len(classes) for classes in (looks, self.labels))
            found["classes"] = float(((ours >= theirs / 5) & (theirs > 0)).sum())
            found["class_entropy"] = entropy(ours) / max(entropy(theirs), 1e-12)
            if asked is not None:
                found["class_accuracy"] = (looks == asked.cpu()).float().mean().item()
        return found


def recall_and_coverage(real: Tensor, drawn: Tensor, neighbours: int = 5) -> tuple[float, float]:
    """The shares of real features (N, D) in a ball of a drawn one, (M, D), and with a drawn one in their own ball.

    A ball reaches to the k-th neighbour in its own set. For some hundreds: of all distances at once.
    """
    between = torch.cdist(real, drawn)                                                                 # (N, M)
    own, theirs = (torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values for x in (real, drawn))
    return (between <= theirs).any(1).float().mean().item(), (between <= own[:, None]).any(1).float().mean().item()


def variety(pictures: Tensor) -> float:
    """Root mean squared distance between two different pictures, per value; pictures (B, C, H, W)."""
    return (pictures.float().var(0, unbiased=True).mean() * 2).sqrt().item() if len(pictures) > 1 else 0.0


def entropy(shares: Tensor) -> float:
    """-sum p log p in nats, of probabilities (K,)."""
    return torch.special.entr(shares.double()).sum().item()
