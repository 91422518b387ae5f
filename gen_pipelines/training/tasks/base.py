"""The protocol of a task, and the helpers that tasks share."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ...hub.loading import hub_reason
from ...pipelines.base import local_or_hub
from ..config import coerce
from ..data import PictureData, captions_of, known_words_holdout, load_rows
from ..objectives.base import ObjectiveOutput, Phase
from ..random import Generators
from ..seen import Seen


class Task(Protocol):
    """One thing that a recipe can train. It may have methods `initialize(networks)` and `after_update(networks, phase)`: see `Trainer`."""

    networks: dict[str, nn.Module]
    phases: tuple[Phase, ...]
    data: Any

    def losses(self, networks: dict[str, nn.Module], batch: dict[str, Any], phase: str, generator: Generators) -> ObjectiveOutput:
        """The losses of one batch, shape (B,)."""

    def draw_samples(self, networks: dict[str, nn.Module]) -> Image.Image | Seen:
        """A picture that shows how far the training is; with `Seen` a row for the strip over time, and numbers for the log, as well."""

    def save(self, networks: dict[str, nn.Module], folder: Path, facts: dict[str, Any]) -> None:
        """Write the trained result in the Hub's layout. `facts`: steps, seconds, hardware, for the card."""


def settings_of(recipe: Any, group: str, known: dict[str, Any]) -> dict[str, Any]:
    """A group of the recipe with defaults filled in; numbers and switches get their default's type.

    Raises:
        ValueError: an unknown key, with those that exist, or a value that is no number where the default is one.
    """
    given = dict(getattr(recipe, group))
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{group}.{key}: unknown setting of the task {recipe.task!r}; known: {', '.join(known) or 'none'}.")
        if isinstance(known[key], bool | int | float):
            given[key] = coerce(type(known[key]), value, f"{group}.{key}")
    return {**known, **given}


def latent_size(vae: nn.Module, resolution: int) -> int | None:
    """Height and width of the latents of pictures of `resolution` pixels; None where the autoencoder's config does not say.

    Raises:
        ValueError: the autoencoder does not give pictures of this size back.
    """
    levels = vae.config.get("block_out_channels")
    if levels is None:
        return None
    factor = 2 ** (len(levels) - 1)
    if resolution % factor:
        raise ValueError(f"data.resolution: {resolution} is not a multiple of {factor}, the factor by which model.vae shrinks a picture.")
    return resolution // factor


def build_network(settings: dict[str, Any], where: str) -> nn.Module:
    """A network from `{class: NAME, ...constructor arguments}` or `{from: FOLDER_OR_REPO, subfolder: ...}`.

    Classes are looked up in gen_pipelines, diffusers and transformers (for those, the arguments are the configuration's). A stored network
    is loaded in float32, which training needs, and only if every weight of its class is there; `bundled:NAME` is a folder in the package.

    Raises:
        ValueError: an unknown class or argument, or a weight that the folder does not have.
        OSError: neither a folder nor a repository of the Hub.
    """
    import diffusers
    import transformers

    import gen_pipelines

    if not isinstance(settings, dict):
        raise ValueError(f"{where}: give {{class: NAME, ...}} or {{from: FOLDER_OR_REPO}}; got {settings!r}.")
    settings = dict(settings)
    name = settings.pop("class", None)
    if "from" in settings:
        source, subfolder = str(settings.pop("from")), settings.pop("subfolder", None)
        source = _source(source, f"{where}.from")
        name = name or diffusers.AutoModel.load_config(source, subfolder=subfolder).get("_class_name")
        loader = _find(name, where, (gen_pipelines, diffusers, transformers))
        network, info = loader.from_pretrained(
            source, subfolder=subfolder or "", use_safetensors=True, dtype=torch.float32, output_loading_info=True, **settings
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{where}: {source} has no weights for {', '.join(missing[:3])} of {name}; is it another class?")
        return network
    cls = _find(name, where, (gen_pipelines, diffusers, transformers))
    if hasattr(cls, "config_class") and cls.config_class is not None:  # transformers
        config_class = cls.config_class
        _check_arguments(config_class, settings, f"{where} ({name})")
        return cls(config_class(**settings))
    _check_arguments(cls, settings, f"{where} ({name})")
    return cls(**settings)


def _source(source: str, where: str) -> str:
    """The folder or repository that a recipe names, once it is known to be there: diffusers would ask the Hub for half a minute, and then
    speak of a file."""
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionResolutionError

    path = local_or_hub(source)
    if not Path(path).is_dir():
        try:
            resolve_revision(path)
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionResolutionError, OSError) as error:
            raise FileNotFoundError(f"{where}: there is no folder {source}, and the Hub does not give it: {hub_reason(error)}") from error
    return path


def _find(name: str | None, where: str, libraries: tuple[Any, ...]) -> type:
    for library in libraries:
        cls = getattr(library, name, None) if name else None
        if isinstance(cls, type):
            return cls
    raise ValueError(f"{where}.class: {name!r} is a class of neither gen_pipelines, diffusers nor transformers.")


def _check_arguments(cls: type, settings: dict[str, Any], where: str) -> None:
    known = {n for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self" and p.kind is not p.VAR_KEYWORD}
    known |= set(getattr(cls, "__annotations__", {}))
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{where}: unknown arguments {', '.join(unknown)}; known: {', '.join(sorted(known))}.")


def grid(pictures: Tensor, columns: int, upscale: int = 1) -> Image.Image:
    """Pictures (B, C, H, W) in [-1, 1] as one picture, row by row."""
    pictures = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    canvas[:count] = pictures
    canvas = canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    picture = Image.fromarray(canvas.squeeze(-1).numpy())
    return picture.resize((picture.width * upscale, picture.height * upscale), Image.Resampling.NEAREST) if upscale > 1 else picture


def open_pictures(recipe: Any) -> tuple[Any, Any]:
    """The training pictures of a recipe, and those that `data.holdout` keeps out of it (None for none, and for a stream)."""
    rows = load_rows(recipe.data)
    if recipe.data.streaming:
        return rows, None
    captions = captions_of(rows, recipe.data) if recipe.data.text_column else None
    train, held = known_words_holdout(captions, len(rows), recipe.data.holdout, recipe.seed)
    held_out = PictureData(rows, recipe.data, held, recipe.seed, augmented=False) if held else None
    return PictureData(rows, recipe.data, train, recipe.seed), held_out


def levels_of(pictures: Tensor, num_bits: int = 8) -> Tensor:
    """A batch's pictures, float in [-1, 1], as the integers that they were stored as, cut to `num_bits` bits: uint8, same shape."""
    return ((pictures + 1) * 127.5).round().to(torch.uint8) >> (8 - num_bits)


def check_size(model: nn.Module, recipe: Any, where: str) -> None:
    """Refuses a network that is made for other pictures than the recipe's.

    Raises:
        ValueError: another size or number of channels.
    """
    size, data = (model.height, model.width), recipe.data
    if size != (data.resolution, data.resolution) or model.config.in_channels != data.channels:
        raise ValueError(
            f"{where}: made for pictures of {model.config.in_channels} x {size[0]} x {size[1]}, but data.channels and data.resolution say "
            f"{data.channels} x {data.resolution} x {data.resolution}; set {where}.in_channels and {where}.sample_size."
        )
