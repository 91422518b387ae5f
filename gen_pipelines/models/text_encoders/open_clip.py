"""open_clip's text towers, and the tokenizer that goes with them, as components of a pipeline.

open_clip is imported when a tower is built and never before: it is the extra `open-clip`.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import html
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from ...hub.loading import LoadingError, read_header
from ..base import GenerativeModel

__all__ = ["ConfigMixin", "ModelMixin", "OpenCLIPTextEncoder", "OpenCLIPTokenizer", "PreTrainedTokenizerFast", "TextEncoderOutput"]

# open_clip's layout on the Hub
HUB_CONFIG = "open_clip_config.json"
HUB_WEIGHTS = "open_clip_model.safetensors"
HUB_PICKLE = "open_clip_pytorch_model.bin"

# what a text tower is made of; the rest of a checkpoint is the picture's tower
_TEXT_KEYS = ("token_embedding.", "positional_embedding", "cls_emb", "transformer.", "ln_final.", "text_projection")

# settings of open_clip's text configurations that are not about the network
_NOT_THE_TOWER = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "output_tokens", "hf_model_pretrained", "hf_proj_type",
                  "hf_pooler_type", "final_ln_after_pool", "hf_model_name", "norm_kwargs", "act_kwargs")  # fmt: skip


@dataclass
class TextEncoderOutput(BaseOutput):
    """What a text encoder gives.

    Attributes:
        last_hidden_state: one vector per token, shape (B, L, width), of the layer that the encoder's config chooses, after the final norm.
        text_embeds: one vector per caption, shape (B, embed_dim): open_clip's `encode_text`, always of the last layer.
        hidden_states: the output of every block before the final norm, each (B, L, width), where asked for; `hidden_states[-2]` is the
            penultimate layer as in transformers.
    """

    last_hidden_state: Tensor
    text_embeds: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class OpenCLIPTextEncoder(GenerativeModel):
    """The text half of an open_clip model.

    ```python
    # as Stable Diffusion 2 has it
    text_encoder = OpenCLIPTextEncoder.from_pretrained("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", skip_layers=1)
    ```

    Args:
        architecture: open_clip's name of the model ("ViT-H-14"), or any name where the other arguments say everything.
        text_config: settings of the tower under open_clip's names (context_length, vocab_size, width, heads, layers, ...); what is left out
            has open_clip's defaults. None takes those of `architecture`.
        embed_dim: width of `text_embeds`. None takes that of `architecture`.
        quick_gelu: x sigmoid(1.702 x) in place of GELU (OpenAI's weights). None takes that of `architecture`.
        skip_layers: how many of the last blocks `last_hidden_state` leaves out; 1 is the penultimate layer, which Stable Diffusion 2 reads.
    Raises:
        ImportError: open_clip is not installed, or its torchvision does not fit the installed torch.
        ValueError: open_clip knows no such architecture, or its text tower is a network of transformers.

    References: Radford et al. 2021, section 2.4, https://arxiv.org/abs/2103.00020; Cherti et al. 2023, https://arxiv.org/abs/2212.07143
    """

    config_name = "config.json"
    _no_split_modules = ["ResidualAttentionBlock", "CustomResidualAttentionBlock"]
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        architecture: str = "ViT-B-32",
        text_config: dict[str, Any] | None = None,
        embed_dim: int | None = None,
        quick_gelu: bool | None = None,
        skip_layers: int = 0,
    ) -> None:
        super().__init__()
        if text_config is None or embed_dim is None:
            known = _architecture(architecture)
            text_config = known["text_cfg"] if text_config is None else text_config
            embed_dim = known["embed_dim"] if embed_dim is None else embed_dim
            quick_gelu = known.get("quick_gelu", False) if quick_gelu is None else quick_gelu
        settings = _tower_settings(architecture, text_config, embed_dim, bool(quick_gelu))
        if isinstance(skip_layers, bool) or not isinstance(skip_layers, int) or not 0 <= skip_layers < settings["layers"]:
            raise ValueError(
                f"OpenCLIPTextEncoder: skip_layers must be from 0 to {settings['layers'] - 1} ({settings['layers']} layers), "
                f"got {skip_layers!r}."
            )
        # written out, so that a saved folder does not depend on the table of a version of open_clip
        self.register_to_config(text_config=dict(text_config), embed_dim=embed_dim, quick_gelu=bool(quick_gelu))
        self.tower = _text_transformer()(**settings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> TextEncoderOutput | tuple[Any, ...]:
        """Encodes token ids, (B, L).

        Args:
            input_ids: from `OpenCLIPTokenizer`; L at most the tower's context length.
            attention_mask: taken for the sake of the interface and not needed: a causal tower never looks past a caption's end, and the
                others find the padding in the ids.
            output_hidden_states: return those of every block too.
            return_dict: False returns a tuple.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] > self.tower.context_length:
            raise ValueError(
                f"OpenCLIPTextEncoder: input_ids must have the shape (B, L) with L up to {self.tower.context_length}, "
                f"got {tuple(input_ids.shape)}."
            )
        inner = self.tower.forward_intermediates(input_ids, output_fmt="NLC")
        hidden_states = tuple(inner["text_intermediates"])               # each (B, L, width)
        last = self.tower.ln_final(hidden_states[-1 - self.config.skip_layers])  # (B, L, width)
        output = TextEncoderOutput(last, inner["text_features"], hidden_states if output_hidden_states else None)
        return output if return_dict else output.to_tuple()

    @property
    def final_layer_norm(self) -> nn.Module:
        """The norm after the last block; what reads an inner layer applies it to that layer."""
        return self.tower.ln_final

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        self.tower.set_grad_checkpointing(enable)

    # ------------------------------------------------------------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads what `save_pretrained` wrote, or the text half of a model in open_clip's own layout on the Hub or in a folder.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            subfolder: where in it.
            skip_layers: replaces the stored number (see the class).
            kwargs: as in diffusers' `ModelMixin.from_pretrained`.
        Raises:
            ValueError: only pickled weights are there, or the weights do not fit the configuration.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if not folder.is_dir():
            folder = _fetch_open_clip_layout(str(pretrained_model_name_or_path), kwargs)
        if folder is None or not (folder / HUB_CONFIG).is_file() or _is_ours(folder):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls._from_open_clip_layout(folder, kwargs)

    @classmethod
    def _from_open_clip_layout(cls, folder: Path, kwargs: Mapping[str, Any]) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            stored = json.loads((folder / HUB_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
            settings = {"text_config": stored["text_cfg"], "embed_dim": stored["embed_dim"], "quick_gelu": stored.get("quick_gelu", False)}
            name = stored.get("_name_or_path") or kwargs.get("architecture") or "custom"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadingError(f"{folder / HUB_CONFIG} is no configuration of open_clip ({error!r}); download it again.") from None
        weights = folder / HUB_WEIGHTS
        if not weights.is_file():
            raise LoadingError(
                f"{folder} holds no {HUB_WEIGHTS}"
                + (f", only pickled weights ({HUB_PICKLE}), which are not loaded; convert them once, if you trust their author: "
                   f"python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{folder / HUB_PICKLE}', weights_only=True), "
                   f"'{weights}')\"" if (folder / HUB_PICKLE).is_file() else "; download it again.")
            )  # fmt: skip
        read_header(weights)  # whole, before anything is built
        model = cls(architecture=name, skip_layers=kwargs.get("skip_layers", 0), **settings)
        wanted = model.tower.state_dict()
        state: dict[str, Tensor] = {}
        try:
            with safe_open(weights, framework="pt") as file:  # tensor by tensor: the picture's tower is never read
                keys = set(file.keys())
                prefix = "text." if any(key.startswith("text.transformer.") for key in keys) else ""
                if missing := sorted(key for key in wanted if prefix + key not in keys):
                    raise LoadingError(f"{weights} has no weights for {', '.join(missing[:5])} of the text tower of {HUB_CONFIG}.")
                for key, tensor in wanted.items():
                    there = file.get_slice(prefix + key).get_shape()
                    if list(there) != list(tensor.shape):
                        raise LoadingError(f"{weights}: {prefix + key} has shape {there}, and {HUB_CONFIG} asks for {list(tensor.shape)}.")
                    state[key] = file.get_tensor(prefix + key)
                own = [key for key in keys if key.startswith(tuple(prefix + part for part in _TEXT_KEYS))]
                if unknown := sorted(key for key in own if key.removeprefix(prefix) not in wanted):
                    raise LoadingError(f"{weights} has weights that the text tower of {HUB_CONFIG} lacks: {', '.join(unknown[:5])}.")
        except SafetensorError as error:
            raise LoadingError(f"{weights} is not a whole safetensors file ({error}); download it again.") from None
        model.tower.load_state_dict(state)
        return model.to(kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32).eval()

    @classmethod
    def from_open_clip(cls, model: nn.Module, architecture: str = "custom", text_config: Mapping[str, Any] | None = None,
                       quick_gelu: bool = False, skip_layers: int = 0) -> OpenCLIPTextEncoder:  # fmt: skip
        """A copy of the text tower of a model that `open_clip.create_model` returned.

        Args:
            model: an `open_clip.CLIP` or `CustomTextCLIP`.
            architecture: its name; where open_clip knows it, the other settings follow from it.
            text_config, quick_gelu: what the model was made with, where `architecture` does not say.
        """
        tower = getattr(model, "text", model)
        if text_config is None and architecture != "custom":
            known = _architecture(architecture)
            text_config, quick_gelu = known["text_cfg"], known.get("quick_gelu", False)
        if text_config is None:
            vocab_size, width = tower.token_embedding.weight.shape
            blocks = tower.transformer.resblocks
            text_config = {"context_length": len(tower.positional_embedding), "vocab_size": vocab_size, "width": width,
                           "heads": blocks[0].attn.num_heads, "layers": len(blocks)}  # fmt: skip
        projection = tower.text_projection
        embed_dim = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
        encoder = cls(architecture, dict(text_config), embed_dim, quick_gelu, skip_layers)
        encoder.tower.load_state_dict({key: value for key, value in tower.state_dict().items() if key.startswith(_TEXT_KEYS)})
        return encoder.to(tower.positional_embedding.dtype).eval()


class OpenCLIPTokenizer(CLIPTokenizer):
    """open_clip's tokenizer in transformers' form: the same ids for every caption, padded with 0 as open_clip pads.

    Captions are mended (`ftfy`) and HTML entities decoded before they are split, as open_clip does.

    ```python
    tokenizer = OpenCLIPTokenizer.from_open_clip()
    ids = tokenizer(["a red apple"], padding="max_length", return_tensors="pt").input_ids    # (1, 77)
    ```
    """

    @classmethod
    def from_open_clip(cls, context_length: int = 77) -> OpenCLIPTokenizer:
        """The tokenizer of all open_clip models that do not name another: 49,408 tokens, from the file that open_clip ships.

        Raises:
            ImportError: open_clip is not installed.
        """
        spec = importlib.util.find_spec("open_clip")  # finds without importing
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("OpenCLIPTokenizer.from_open_clip needs open_clip's vocabulary; pip install 'gen_pipelines[open-clip]'.")
        path = Path(next(iter(spec.submodule_search_locations)), "bpe_simple_vocab_16e6.txt.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
        merges = lines[1 : 49152 - 256 - 2 + 1]  # the first line is a title; the rest of the file was not used when CLIP was trained
        keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in keep]
        letters = [chr(byte) for byte in keep] + [chr(256 + i) for i in range(len(others))]
        words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
        words += ["<|startoftext|>", "<|endoftext|>"]
        return cls(
            vocab={word: i for i, word in enumerate(words)},
            merges=[tuple(merge.split()) for merge in merges],
            model_max_length=context_length,
        )

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' tokenizers are called; what is padding gets id 0."""
        mended = [_mend(one) for one in text] if isinstance(text, (list, tuple)) else _mend(text)
        wants_mask = kwargs.pop("return_attention_mask", True)
        tokens = super().__call__(mended, *args, return_attention_mask=True, **kwargs)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if hasattr(ids, "masked_fill"):
            tokens["input_ids"] = ids.masked_fill(mask == 0, 0)
        elif hasattr(ids, "shape"):
            tokens["input_ids"] = ids * mask
        elif ids and isinstance(ids[0], list):
            tokens["input_ids"] = [[i if m else 0 for i, m in zip(*row, strict=True)] for row in zip(ids, mask, strict=True)]
        else:
            tokens["input_ids"] = [i if m else 0 for i, m in zip(ids, mask, strict=True)]
        if wants_mask is False:
            del tokens["attention_mask"]
        return tokens


def _mend(text: Any) -> Any:
    """A caption as open_clip reads it, before lower case and white space, which are the tokenizer's own business."""
    if not isinstance(text, str):
        return text
    try:
        import ftfy
    except ImportError:
        raise ImportError("OpenCLIPTokenizer needs ftfy, which comes with open_clip; pip install 'gen_pipelines[open-clip]'.") from None
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"OpenCLIPTextEncoder needs open_clip ({error}); pip install 'gen_pipelines[open-clip]', or use the model's transformers form."
        ) from error
    except RuntimeError as error:  # a torchvision that was built for another torch
        raise ImportError(
            f"OpenCLIPTextEncoder: open_clip is installed and cannot be imported ({error}); install the torchvision that belongs to "
            f"torch {torch.__version__}."
        ) from error
    return open_clip


def _text_transformer() -> type[nn.Module]:
    _open_clip()
    from open_clip.transformer import TextTransformer

    return TextTransformer


def _architecture(name: str) -> dict[str, Any]:
    settings = _open_clip().get_model_config(name)
    if settings is None:
        raise ValueError(
            f"OpenCLIPTextEncoder: open_clip knows no architecture {name!r} (open_clip.list_models() names those it knows); "
            "or give text_config and embed_dim."
        )
    return settings


def _tower_settings(architecture: str, text_config: Any, embed_dim: Any, quick_gelu: bool) -> dict[str, Any]:
    """The arguments of open_clip's TextTransformer."""
    open_clip = _open_clip()
    from open_clip.transformer import LayerNorm, QuickGELU

    if not isinstance(text_config, Mapping):
        raise ValueError(f"OpenCLIPTextEncoder: text_config must be a table of settings, got {text_config!r}.")
    known = {f.name: f.default for f in dataclasses.fields(open_clip.CLIPTextCfg)}
    if unknown := sorted(set(text_config) - set(known)):
        raise ValueError(f"OpenCLIPTextEncoder: unknown settings {', '.join(unknown)} in text_config; known are {', '.join(known)}.")
    settings = {**known, **text_config}
    if settings["hf_model_name"]:
        raise ValueError(
            f"OpenCLIPTextEncoder: the text tower of {architecture} is {settings['hf_model_name']}, a network of transformers; "
            "load it with transformers."
        )
    for name in ("context_length", "vocab_size", "width", "heads", "layers"):
        _check_count(f"text_config.{name}", settings[name])
    _check_count("embed_dim", embed_dim)
    if settings["width"] % settings["heads"]:
        raise ValueError(f"OpenCLIPTextEncoder: width {settings['width']} is not a multiple of heads {settings['heads']}.")
    activation: Any = QuickGELU if quick_gelu else nn.GELU
    norm: Any = LayerNorm
    if settings["act_kwargs"]:
        activation = functools.partial(activation, **settings["act_kwargs"])
    if settings["norm_kwargs"]:
        norm = functools.partial(norm, **settings["norm_kwargs"])
    own = {key: value for key, value in settings.items() if key not in _NOT_THE_TOWER}
    return {**own, "output_dim": embed_dim, "act_layer": activation, "norm_layer": norm}


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"OpenCLIPTextEncoder: {name} must be a whole number from 1 on, got {value!r}.")


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds what our own `save_pretrained` wrote; open_clip's repositories may have transformers' config.json in them."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name") == "OpenCLIPTextEncoder"
    except (OSError, ValueError, AttributeError):
        return False


def _fetch_open_clip_layout(repo: str, kwargs: Mapping[str, Any]) -> Path | None:
    """Downloads a repository in open_clip's layout; None where the repository is in another."""
    from huggingface_hub import hf_hub_download, resolve_revision
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "token") if kwargs.get(name) is not None}
    revision = resolve_revision(repo, revision=kwargs.get("revision"), **where)  # one commit for both files
    options = {**where, "revision": revision, "subfolder": kwargs.get("subfolder") or None}
    options["force_download"] = bool(kwargs.get("force_download"))
    try:
        config = Path(hf_hub_download(repo, HUB_CONFIG, **options))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None  # another layout, or offline and not in the cache: what is loaded next says so
    try:
        hf_hub_download(repo, HUB_WEIGHTS, **options)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        raise LoadingError(
            f"{repo} holds {HUB_CONFIG} and no {HUB_WEIGHTS}: its weights are pickled, which are not loaded; convert them once, if you "
            f"trust their author: python -c \"import open_clip, safetensors.torch as s; m = open_clip.create_model('hf-hub:{repo}'); "
            f"s.save_model(m, '{HUB_WEIGHTS}')\", and put that file beside {HUB_CONFIG} in a folder."
        ) from None
    return config.parent
