"""The base of every pipeline: loading, saving, what the network was trained to do, and what all pipelines report alike."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from ..bundled import BUNDLED, bundled_path
from ..hub.card import model_card
from ..hub.loading import INDEX_NAME, LoadingError, check_module, component_class, components_of, hub_reason, load_component, read_index
from ..hub.push import push_folder, push_object, strip_origin
from ..hub.saving import written_at_once
from ..schedulers.base import GaussianScheduler
from ..schedulers.bridge import BridgedScheduler
from .from_diffusers import MAPPED
from .hosting import host_scheduler

if TYPE_CHECKING:
    from ..processes.parameterization import Parameterization

logger = logging.getLogger(__name__)

# what a download never fetches: pickles and code
_NEVER = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5", "*.onnx", "*.pb", "*.py"]

# what from_pretrained takes besides components and the pipeline's own options
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
_LOAD_OPTIONS = (
    "variant",
    "low_cpu_mem_usage",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
    "disable_mmap",
)

# what the indices of diffusers' pipelines hold besides: parts that ours do without, and settings of those parts
_KNOWN_TO_DIFFUSERS = {"safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker", "requires_aesthetics_score",
                       "force_zeros_for_empty_prompt", "add_watermarker", "is_distilled"}  # fmt: skip

_DTYPES = {"float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16}
_DTYPES |= {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float64": torch.float64}


def _says_something(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()  # diffusers warns of every cast, naming no module


logging.getLogger("diffusers.models.modeling_utils").addFilter(_says_something)


def as_dtype(dtype: Any) -> Any:
    """A torch dtype from one, from its name, or from None (float32); a dict of them, by component, likewise."""
    if isinstance(dtype, Mapping):
        return {name: as_dtype(value) for name, value in dtype.items()}
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if str(dtype) not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; allowed are a torch.dtype or one of {', '.join(_DTYPES)}.")
    return _DTYPES[str(dtype)]


def _dtype_given(kwargs: dict[str, Any]) -> Any:
    """Takes `dtype`, or `torch_dtype` as diffusers once had it, out of the arguments; None if neither is there."""
    given = {name: value for name in ("dtype", "torch_dtype") if (value := kwargs.pop(name, None)) is not None}
    if len(given) == 2 and given["dtype"] != given["torch_dtype"]:
        raise ValueError(f"dtype={given['dtype']!r} and torch_dtype={given['torch_dtype']!r} are two names of one thing; give one.")
    return next(iter(given.values()), None)


def local_or_hub(path: str | Path) -> str:
    """What `from_pretrained` was given as a folder or an id: "bundled:NAME" is the folder in the package.

    Raises:
        TypeError, ValueError: no text and no path, or an empty one; a bundled pipeline that there is not.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"from_pretrained: give a folder, a Hub id or 'bundled:NAME', got a {type(path).__name__}.")
    if not str(path).strip() or (isinstance(path, str) and path != path.strip()):
        raise ValueError(f"from_pretrained: {path!r} is no name; give a folder, a Hub id such as 'user/name', or 'bundled:NAME'.")
    return bundled_path(str(path).removeprefix(BUNDLED)) if str(path).startswith(BUNDLED) else str(path)


class GenerativePipeline(DiffusionPipeline):
    """What the pipelines of this library share. A pipeline is a folder in diffusers' layout: one subfolder per component.

    `pipe.parameterization` remembers what the network was trained to do. It is read off the first scheduler and handed to every scheduler
    assigned later, so both idioms work: `pipe.scheduler = X.from_config(pipe.scheduler.config)` and `pipe.scheduler = X()`. A checkpoint
    with a wrong config is corrected by `X.from_config(pipe.scheduler.config, prediction_type="v_prediction")` or by assigning
    `pipe.parameterization`.
    """

    pipeline_tag: str | None = None
    card_example: str = ""

    _denoiser_names = ("unet", "transformer", "denoiser")

    # ------------------------------------------------------------------------------------------------ the network and its scheduler

    @property
    def denoiser(self) -> nn.Module:
        """The denoising network, whatever its component is called."""
        for name in self._denoiser_names:
            if (network := getattr(self, name, None)) is not None:
                return network
        raise AttributeError(f"{type(self).__name__} has no denoiser: none of {', '.join(self._denoiser_names)} is set.")

    @property
    def parameterization(self) -> Parameterization | None:
        """What the denoiser was trained to do; None for a pipeline without a scheduler. Assigning one binds the scheduler to it."""
        return self.__dict__.get("_parameterization")

    @parameterization.setter
    def parameterization(self, value: Parameterization) -> None:
        self.__dict__["_parameterization"] = value
        if self.__dict__.get("scheduler") is not None:
            self.scheduler = self.scheduler

    def register_modules(self, **modules: Any) -> None:
        """As in diffusers; a scheduler of diffusers is hosted in one that knows the network's parameterization before it is recorded."""
        if modules.get("scheduler") is not None:
            modules["scheduler"] = self._bound_scheduler(modules["scheduler"])
        super().register_modules(**modules)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and value is None and self.__dict__.get("scheduler") is not None:
            raise TypeError(f"{type(self).__name__}.scheduler: None draws nothing; assign one of gen_pipelines.schedulers or of diffusers.")
        if name == "scheduler" and value is not None:
            value = self._bound_scheduler(value)
        super().__setattr__(name, value)
        if name == "scheduler" and isinstance(value, BridgedScheduler):  # saved in diffusers' own form: diffusers still loads the folder
            self.register_to_config(scheduler=value.saved_as)

    def _bound_scheduler(self, scheduler: Any) -> Any:
        """A copy of the scheduler bound to what is known of the network; the first scheduler says what that is."""
        known = self.__dict__.get("_parameterization")
        if "scheduler" not in inspect.signature(type(self).__init__).parameters:
            raise AttributeError(f"{type(self).__name__} draws without a scheduler, so one that is assigned would have no effect.")
        if not isinstance(scheduler, SchedulerMixin):
            is_class = isinstance(scheduler, type)
            what = f"{scheduler.__name__} is a class" if is_class else f"a {type(scheduler).__name__} is not a scheduler"
            how = f"an object, {scheduler.__name__}()" if is_class else "one of gen_pipelines.schedulers or of diffusers"
            raise TypeError(f"{type(self).__name__}.scheduler: {what}; assign {how}.")
        decided = isinstance(scheduler, GaussianScheduler) and scheduler.is_bound and scheduler.parameterization == known
        scheduler = host_scheduler(scheduler, known)
        if known is None or scheduler.corrects_network:  # from_config(pipe.scheduler.config, prediction_type=...): the user knows better
            known = self.__dict__["_parameterization"] = scheduler.parameterization
        # the model's grid is that of the pipeline's first scheduler: those in between leave nothing behind
        bound = scheduler.bind(known, grid=None if decided else self.__dict__.get("_first_grid"))
        self.__dict__.setdefault("_first_grid", bound.config)
        return bound

    # -------------------------------------------------------------------------------------------------------------- what is not there

    def log_likelihood(self, *args: Any, **kwargs: Any) -> Any:
        """Log-likelihood of pictures; pipelines that have one override this.

        Raises:
            NotImplementedError: this pipeline has none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no log_likelihood; compare its pictures by FID, KID or precision and recall instead "
            "(gen-pipelines evaluate)."
        )

    def report_non_finite(self, *tensors: Tensor) -> int:
        """Counts the pictures that have a value that is not finite in any of the tensors, each (B, ...), and says so in one warning."""
        bad = torch.zeros(len(tensors[0]), dtype=torch.bool)
        for x in tensors:
            bad |= ~torch.isfinite(x).flatten(1).all(dim=1).cpu()
        if count := int(bad.sum()):
            which = ", ".join(str(i) for i in bad.nonzero().flatten().tolist()[:8])
            logger.warning(
                "%s: %d of %d pictures have values that are not finite (numbers %s%s); use dtype=torch.float32 or bfloat16, "
                "or a lower guidance scale.",
                type(self).__name__, count, len(bad), which, ", ..." if count > 8 else "",
            )  # fmt: skip
        return count

    # ------------------------------------------------------------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads a pipeline from a folder or the Hub: safetensors only, float32 unless told otherwise, no code from the repository.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, a Hub id, or "bundled:NAME".
            dtype: a torch.dtype, its name, or a dict of them by component. float32 by default, whatever the files hold.
            variant, revision, token, cache_dir, force_download, local_files_only, low_cpu_mem_usage, device_map, ...: as in diffusers.
            NAME=component: a component to use instead of the stored one, or an option of the pipeline's constructor.
        Raises:
            ValueError: the folder is no pipeline, or a weight file or key is missing, cut short or of the wrong shape.
            OSError: the Hub cannot be reached or has no such repository.
            TypeError: an argument that nobody knows.
        """
        path = local_or_hub(pretrained_model_name_or_path)
        if kwargs.pop("use_safetensors", True) not in (True, None):
            raise ValueError(
                f"{cls.__name__}.from_pretrained: only safetensors are loaded, got use_safetensors=False; convert pickled weights first."
            )
        if kwargs.pop("trust_remote_code", False) or kwargs.pop("custom_pipeline", None):
            raise ValueError(
                f"{cls.__name__}.from_pretrained: code from a repository is never run; leave out trust_remote_code and custom_pipeline."
            )
        dtype = as_dtype(_dtype_given(kwargs))
        folder = cls._folder(path, kwargs)
        index = read_index(folder)
        ours = set(inspect.signature(cls.__init__).parameters) - {"self"}
        given = set(kwargs)
        cls._check_index(folder, index, ours)
        known = MAPPED.get(index["_class_name"]) if isinstance(index["_class_name"], str) else None
        renamed = {} if known is None else {theirs: name for theirs, name in known.renamed.items() if name in ours}
        index = {renamed.get(name, name): value for name, value in index.items()}
        if known is not None:
            kwargs = {**{k: v for k, v in known.defaults.items() if k in ours and k not in index}, **kwargs}
        cls._check_arguments(kwargs, ours, index)
        cls._check_parts(path, index, kwargs)
        dropped = {name for name in components_of(index) if name not in ours}
        if named := sorted(name for name in dropped if name not in kwargs or kwargs[name] is not None):
            logger.warning("%s does not use these components of %s: %s.", cls.__name__, path, ", ".join(named))
        kwargs = {name: value for name, value in kwargs.items() if name not in dropped and name not in set(index) - ours}
        components = cls._load_components(folder, index, dtype, ours, kwargs, {name: theirs for theirs, name in renamed.items()})
        try:
            pipe = super().from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **components, **kwargs)
        except Exception as error:
            if isinstance(error, (LoadingError, ImportError, OSError)) or given & {*ours, "device_map", "quantization_config"}:
                raise  # what the caller gave may be what is wrong
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise LoadingError(f"{folder}: its components make no {cls.__name__}: {reason[:600]}.") from error
        pipe.register_to_config(_name_or_path=path)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline of this class with the components of another one, ours or diffusers': shared, not copied.

        The other way, `diffusers.XPipeline.from_pipe(ours)` works as between diffusers' own (and casts the weights to float32 unless told
        otherwise, as it does there).

        Args:
            pipeline: the other pipeline.
            dtype: what the components are cast to, those of the other pipeline too; by default they are left as they are.
            NAME=component: a component to use instead, or an option of this pipeline's constructor.
        Raises:
            ValueError: a component that this class needs is neither there nor given.
            TypeError: an argument that nobody knows.
        """
        dtype = _dtype_given(kwargs)
        parameters = {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
        if unknown := sorted(set(kwargs) - set(parameters)):
            raise TypeError(
                f"{cls.__name__}.from_pipe: unknown arguments {', '.join(unknown)}; allowed are {', '.join(parameters)}, dtype."
            )
        known = MAPPED.get(type(pipeline).__name__)
        renamed = {} if known is None else known.renamed
        components = {renamed.get(name, name): value for name, value in pipeline.components.items()}
        options = {name: value for name, value in pipeline.config.items() if name not in pipeline.components}
        values = {**({} if known is None else known.defaults), **options, **components}
        values = {name: value for name, value in {**values, **kwargs}.items() if name in parameters}
        needed = [name for name, p in parameters.items() if p.default is p.empty and name not in cls._optional_components]
        if missing := [name for name in needed if values.get(name) is None]:
            raise ValueError(f"{cls.__name__}.from_pipe: a {type(pipeline).__name__} has no {', '.join(missing)}; pass it as an argument.")
        dropped = [name for name, value in components.items() if value is not None and name not in parameters]
        if dropped:
            logger.warning("%s does not use these components of the %s: %s.", cls.__name__, type(pipeline).__name__, ", ".join(dropped))
        new = cls(**{name: values.get(name) if p.default is p.empty else values.get(name, p.default) for name, p in parameters.items()})
        if (path := pipeline.config.get("_name_or_path")) is not None:
            new.register_to_config(_name_or_path=path)
        return new if dtype is None else new.to(dtype=as_dtype(dtype))

    @classmethod
    def _folder(cls, path: str, kwargs: dict[str, Any]) -> Path:
        if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            return Path(path)  # read_index says what is wrong with it
        hub = {k: kwargs.pop(k) for k in _HUB_OPTIONS if k in kwargs}
        return Path(cls.download(path, variant=kwargs.get("variant"), **hub, **{k: v for k, v in kwargs.items() if k not in _LOAD_OPTIONS}))

    @classmethod
    def _check_arguments(cls, kwargs: Mapping[str, Any], ours: set[str], index: Mapping[str, Any]) -> None:
        if unknown := sorted(set(kwargs) - ours - set(index) - set(_HUB_OPTIONS) - set(_LOAD_OPTIONS)):
            allowed = ", ".join(sorted(ours) + ["dtype", *_LOAD_OPTIONS, *_HUB_OPTIONS])
            raise TypeError(f"{cls.__name__}.from_pretrained: unknown arguments {', '.join(unknown)}; allowed are {allowed}.")

    @classmethod
    def _check_parts(cls, path: str, index: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
        """A folder of another pipeline is told by what it lacks, before anything of it is loaded."""
        needed = {name for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self" and p.default is p.empty}
        there = {*index, *kwargs, *cls._optional_components}
        if (stored := index["_class_name"]) != cls.__name__ and (missing := sorted(needed - there)):
            raise LoadingError(
                f"{path} is a {stored} and has no {', '.join(missing)}, which a {cls.__name__} is made of; load it with AutoPipeline, or "
                "pass what is missing as an argument."
            )

    @classmethod
    def _load_components(
        cls, folder: Path, index: Mapping[str, Any], dtype: Any, ours: set[str], kwargs: dict[str, Any], folders: Mapping[str, str]
    ) -> dict[str, Any]:
        """Every component that the caller does not give, each checked before it is built."""
        placed = kwargs.get("device_map") or kwargs.get("quantization_config")  # diffusers decides where each network's weights go
        components = {}
        for name, (library, class_name) in components_of(index).items():
            if name not in ours or name in kwargs:
                continue
            path = folder / folders.get(name, name)
            if not path.is_dir():
                raise LoadingError(
                    f"{folder} lacks the folder {path.name!r} of a component that its {INDEX_NAME} names; download or save it again."
                )
            component = component_class(library, class_name)
            if placed and issubclass(component, nn.Module):
                check_module(path, library, component, kwargs.get("variant"))
                continue
            wanted = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, Mapping) else dtype
            options = {k: kwargs[k] for k in ("low_cpu_mem_usage",) if k in kwargs}
            components[name] = load_component(path, library, class_name, wanted, kwargs.get("variant"), **options)
        return components

    @classmethod
    def _check_index(cls, folder: Path, index: Mapping[str, Any], ours: set[str]) -> None:
        """A folder of this class may hold only what this class, or a pipeline of diffusers for the same task, knows."""
        import gen_pipelines

        if index["_class_name"] not in gen_pipelines.__all__:
            return  # diffusers' rule for diffusers' classes
        stored = getattr(gen_pipelines, index["_class_name"])  # which may be another pipeline than the one that is asked for
        known = ours | set(inspect.signature(stored.__init__).parameters) - {"self"}
        unknown = sorted(name for name in index if not name.startswith("_") and name not in known and name not in _KNOWN_TO_DIFFUSERS)
        if unknown:
            raise LoadingError(
                f"{folder / INDEX_NAME}: {index['_class_name']} knows no {', '.join(unknown[:5])}; it knows {', '.join(sorted(known))}."
            )

    @classmethod
    def download_index(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetches only `model_index.json` from the Hub and returns the snapshot's folder."""
        return str(cls._resolve(pretrained_model_name, kwargs)[0])

    @classmethod
    def _resolve(cls, repo: str, kwargs: dict[str, Any]) -> tuple[Path, Any, dict[str, Any]]:
        """The snapshot's folder with the index in it, the one commit that everything is taken from, and the Hub's options."""
        from huggingface_hub import resolve_revision, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionResolutionError

        hub = {k: kwargs[k] for k in ("cache_dir", "local_files_only", "token") if kwargs.get(k) is not None}
        try:
            revision = resolve_revision(repo, revision=kwargs.get("revision"), **hub)
            hub["force_download"] = bool(kwargs.get("force_download"))
            return Path(snapshot_download(repo, revision=revision, allow_patterns=[cls.config_name], **hub)), revision, hub
        except HFValidationError as error:
            raise ValueError(f"{repo!r} is neither a folder that exists nor a Hub id such as 'user/name'.") from error
        except (HfHubHTTPError, OfflineModeIsEnabled, RevisionResolutionError, OSError) as error:
            reason = hub_reason(error)
            at = f" at revision {kwargs['revision']!r}" if kwargs.get("revision") else ""
            raise OSError(f"{repo!r} is not a folder here and could not be fetched from the Hub{at}: {reason}") from error

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetches a pipeline from the Hub into the cache and returns its folder: one commit for every file, no pickles, no code.

        A warm cache works without a connection. diffusers' own `download` refuses components of libraries that it does not know.
        """
        from huggingface_hub import get_cached_repo_tree, snapshot_download

        repo, variant = str(pretrained_model_name), kwargs.get("variant")
        root, revision, hub = cls._resolve(repo, kwargs)
        index = read_index(root)
        files = [file.path for file in get_cached_repo_tree(repo, revision=revision, cache_dir=kwargs.get("cache_dir"))]
        allow = [cls.config_name, "README.md"]
        for part in components_of(index):
            if part in kwargs:
                continue  # it comes as an object
            mine = [f for f in files if f.startswith(part + "/")]
            weights = [f for f in mine if f.endswith((".safetensors", ".safetensors.index.json"))]
            plain = [f for f in weights if re.fullmatch(r"[^.]+\.safetensors(\.index\.json)?", f.rsplit("/", 1)[1])]
            wanted = [f for f in weights if variant and f".{variant}" in f.rsplit("/", 1)[1]] or plain
            allow += [f for f in mine if f not in weights] + wanted
        return snapshot_download(repo, revision=revision, allow_patterns=allow, ignore_patterns=_NEVER, **hub)

    # ------------------------------------------------------------------------------------------------------------------------- saving

    def register_to_config(self, **kwargs: Any) -> None:
        """Records our components as ("gen_pipelines", Class), whatever file they live in, so that files may move between versions."""
        for name, value in kwargs.items():
            if isinstance(value, (tuple, list)) and len(value) == 2 and str(value[0]).split(".")[0] == "gen_pipelines":
                kwargs[name] = ("gen_pipelines", value[1])
        super().register_to_config(**kwargs)

    def model_card(self, name: str, license: str | None = None, notes: str = "") -> str:
        """The README.md that is written where there is none. `name` is what AutoPipeline.from_pretrained would be given."""
        parts = {k: v for k, v in self.config.items() if isinstance(v, (list, tuple)) and len(v) == 2 and v[0] and not k.startswith("_")}
        return model_card(name, type(self).__name__, parts, self.pipeline_tag, license, self.card_example, notes=notes)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
        notes: str = "",
    ) -> None:
        """Saves the pipeline as a folder: written aside and moved into place, so that an interrupted save leaves what was there.

        Args:
            save_directory: the folder. Components in it are replaced; other files in it, a README.md among them, stay.
            safe_serialization: only True: weights are safetensors.
            variant, max_shard_size, push_to_hub, repo_id, private, token, commit_message, create_pr: as in diffusers.
            license, notes: for the model card that is written if the folder has none: an identifier such as "apache-2.0", and Markdown.
        """
        if safe_serialization is not True:
            raise ValueError(
                f"{type(self).__name__}.save_pretrained: weights are written as safetensors only, "
                f"got safe_serialization={safe_serialization!r}."
            )
        path = Path(save_directory)
        repo_id = repo_id or path.resolve().name
        with written_at_once(save_directory, by_file=variant is not None) as side:
            super().save_pretrained(str(side), variant=variant, max_shard_size=max_shard_size)
            strip_origin(side)
            if not (path / "README.md").exists():
                (side / "README.md").write_text(self.model_card(repo_id, license, notes), encoding="utf-8")
        if push_to_hub:
            message = commit_message or f"Upload {type(self).__name__}"
            push_folder(path, repo_id, private=private, token=token, commit_message=message, create_pr=create_pr, keep_card=True)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        license: str | None = None,
        revision: str | None = None,
        max_shard_size: int | str | None = None,
        notes: str = "",
    ) -> Any:
        """Uploads the pipeline to the Hub as one commit and returns it; a model card that is there is left as it is.

        Args:
            repo_id: "user/name", or "name" for the user that is logged in; the repository is made if need be.
            commit_message: what the commit says.
            private: for a repository that is made; None leaves it to the account's default.
            token: of the Hub; None takes the one of `hf auth login` or of the variable HF_TOKEN.
            create_pr: open a pull request in place of a commit.
            safe_serialization: only True: weights are safetensors.
            variant, max_shard_size: as in `save_pretrained`.
            subfolder: where in the repository.
            license, notes: for the card, as in `save_pretrained`.
            revision: a branch, which is made if need be.
        Returns: huggingface_hub's `CommitInfo`; `.oid` is the commit, `.commit_url` its page.
        Raises:
            OSError: the Hub cannot be reached, or refuses.
        """
        saving = {"safe_serialization": safe_serialization, "variant": variant, "repo_id": repo_id, "license": license, "notes": notes}
        return push_object(
            self, repo_id, None, commit_message=commit_message, saving={**saving, "max_shard_size": max_shard_size}, private=private,
            token=token, create_pr=create_pr, subfolder=subfolder, revision=revision,
        )  # fmt: skip
