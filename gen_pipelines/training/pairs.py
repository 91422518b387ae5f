"""Pairs of noise and what a sampler makes of it, as a data set on the disk: what reflow learns from.

A folder of `pairs.json` (the settings) and shards `pairs-00000.safetensors` of `noise` and `sample` (n, C, h, w), what the network sees,
and `label` (n,) for a model of classes. Pair i is drawn from a generator of its own, seeded with seed + i, whatever the batch, shard or
process: a run that was stopped goes on with the shards that are missing, and gives what it would have given.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..hub.saving import check_writable, usual_permissions
from ..schedulers import scheduler_class, scheduler_settings

logger = logging.getLogger(__name__)

SETTINGS = "pairs.json"
_FREE = ("count",)  # may grow
_DTYPES = ("float32", "float16", "bfloat16")


@torch.no_grad()
def draw_pairs(
    pipe: Any,
    folder: str | Path,
    count: int,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    shard_size: int = 4096,
    dtype: str = "float32",
    about: dict[str, Any] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> int:
    """Draw pairs with a `DiffusionImagePipeline` and its scheduler, whatever it is, and store them; shards that are there already are kept.

    Args:
        pipe: the pipeline. Classes take turns: pair i has class i mod their number.
        folder: where the data set goes; made if need be.
        count: pairs in all. A later call may ask for more.
        seed: of pair 0; pair i has seed + i.
        num_inference_steps, guidance_scale: of the sampler; the pipeline's own by default.
        batch_size: pairs drawn at once; they do not depend on it beyond rounding.
        shard_size: pairs in a file.
        dtype: in which samples are stored; noise is always float32.
        about: what else `pairs.json` says, such as the model's name and revision.
        rank, ranks: this process draws every `ranks`-th shard.
    Returns: pairs that were drawn now.
    Raises:
        ValueError: no such pipeline, settings that make no sense, or a folder with pairs of other settings; nothing is drawn then.
    """
    folder = Path(folder)
    settings = _settings_of(pipe, count, seed, num_inference_steps, guidance_scale, shard_size, dtype, about or {})
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1 pair at once, got {batch_size}.")
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder, settings)
    if rank == 0 and _draws_noise(pipe, settings):
        logger.warning(
            "%s adds noise on its way: its samples do not follow from the noise that they are paired with, and reflow on such pairs is "
            "flow matching again. Take a deterministic sampler (ddim, heun, rectified_flow, ...).",
            settings["scheduler"],
        )
    written = 0
    for number, start in enumerate(range(0, count, shard_size)):
        path, size = _shard(folder, number), min(shard_size, count - start)
        if number % ranks != rank or _rows(path) >= size:
            continue
        parts = [_draw(pipe, settings, range(i, min(i + batch_size, start + size))) for i in range(start, start + size, batch_size)]
        side = path.with_name(f".writing-{path.name}")
        save_file({key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}, side)
        side.chmod(usual_permissions(folder))  # safetensors leaves it to its owner alone
        os.replace(side, path)
        written += size
        logger.info("%s: %d pairs", path.name, size)
    return written


def _settings_of(
    pipe: Any, count: int, seed: int, steps: int | None, guidance: float | None, shard_size: int, dtype: str, about: dict[str, Any]
) -> dict[str, Any]:
    if type(pipe).__name__ != "DiffusionImagePipeline":
        raise ValueError(f"pairs are drawn by a DiffusionImagePipeline; this is a {type(pipe).__name__}.")
    for name, value in (("count", count), ("shard_size", shard_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: a whole number of at least 1, got {value!r}.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype!r} is none of {', '.join(_DTYPES)}.")
    scheduler = pipe.scheduler
    usual = 1.0 if pipe.null_class is None else pipe.config.default_guidance_scale
    return {
        **about,
        "format": 1,
        "scheduler": scheduler_class(scheduler).__name__,
        "scheduler_settings": json.loads(json.dumps(scheduler_settings(scheduler))) or None,
        "num_inference_steps": pipe.config.default_num_inference_steps if steps is None else steps,
        "guidance_scale": usual if guidance is None else guidance,
        "prediction": pipe.parameterization.prediction,
        "seed": seed,
        "count": count,
        "shard_size": shard_size,
        "shape": list(pipe.latents_shape(1)[1:]),
        "num_classes": pipe.num_classes,
        "dtype": dtype,
    }


def _draws_noise(pipe: Any, settings: dict[str, Any]) -> bool:
    """Whether a sample depends on anything but the noise that it begins with."""
    noise = torch.randn((1, *settings["shape"]), generator=torch.Generator().manual_seed(settings["seed"]))
    labels = None if settings["num_classes"] is None else [0]
    one, two = (_sample(pipe, settings, noise, labels, [torch.Generator().manual_seed(seed)]) for seed in (0, 1))
    return not torch.allclose(one, two, rtol=1e-3, atol=1e-3)


def _agree(folder: Path, settings: dict[str, Any]) -> None:
    """Writes `pairs.json`, or refuses where there are pairs of other settings."""
    path = folder / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text())
        said = {k: v for k, v in settings.items() if k != "scheduler_settings" or k in before}  # older folders do not say them
        different = [k for k in {**before, **said} if k not in _FREE and before.get(k) != said.get(k)]
        if different:
            name = different[0]
            raise ValueError(
                f"{folder} holds pairs of other settings ({name}: {before.get(name)!r} there, {settings.get(name)!r} now); "
                "name another folder, or remove it."
            )
        settings = {**settings, "count": max(before["count"], settings["count"])}
    side = path.with_name(f".writing-{SETTINGS}-{os.getpid()}")
    side.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(side, path)


def _draw(pipe: Any, settings: dict[str, Any], numbers: range) -> dict[str, Tensor]:
    generators = [torch.Generator().manual_seed(settings["seed"] + i) for i in numbers]
    shape = (1, *settings["shape"])
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    labels = None if settings["num_classes"] is None else [i % settings["num_classes"] for i in numbers]
    sample = _sample(pipe, settings, noise, labels, generators)
    pair = {"noise": noise, "sample": sample.to(getattr(torch, settings["dtype"]))}
    return pair if labels is None else {**pair, "label": torch.tensor(labels)}


def _sample(pipe: Any, settings: dict[str, Any], noise: Tensor, labels: list[int] | None, generators: list[torch.Generator]) -> Tensor:
    """What the pipeline draws from noise (B, C, h, w), of that shape, on the CPU."""
    return pipe(
        None if labels else len(noise),
        class_labels=labels,
        latents=noise,
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        generator=generators,
        output_type="latent",
    ).images.cpu()


def _shard(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:05d}.safetensors"


def _rows(path: Path) -> int:
    """Pairs in a shard; 0 where there is none."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("noise").get_shape()[0]
    except SafetensorError as error:
        raise ValueError(f"{path}: a damaged shard ({' '.join(str(error).split())}); remove it, and it is drawn again.") from None


class PairData(torch.utils.data.Dataset):
    """Stored pairs, asked for by (item, draw): `noise` and `sample` float32 (C, h, w), `label`, `row`, `draw`. Shards are mapped, not read.

    Raises:
        ValueError: no pairs there, or shards that are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / SETTINGS
        if not path.is_file():
            raise ValueError(f"data.name: {folder} holds no pairs ({SETTINGS}); draw them with gen-pipelines pairs MODEL --out {folder}.")
        self.settings: dict[str, Any] = json.loads(path.read_text())
        self.count, self.shard_size = self.settings["count"], self.settings["shard_size"]
        self._files: dict[int, Any] = {}
        for number, start in enumerate(range(0, self.count, self.shard_size)):
            if (there := _rows(_shard(self.folder, number))) < (wanted := min(self.shard_size, self.count - start)):
                raise ValueError(
                    f"data.name: {_shard(self.folder, number)} has {there} of {wanted} pairs; finish it with the command that began it."
                )

    def __len__(self) -> int:
        return self.count

    def captions(self) -> None:
        """Pairs have none."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not go to workers

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        item, draw = place
        number, row = divmod(item, self.shard_size)
        if number not in self._files:
            self._files[number] = safe_open(_shard(self.folder, number), "pt")
        file = self._files[number]
        example = {key: file.get_slice(key)[row].float() for key in ("noise", "sample")}
        example |= {"item": item, "row": item, "draw": draw}
        if self.settings["num_classes"] is not None:
            example["label"] = int(file.get_slice("label")[row])
        return example
