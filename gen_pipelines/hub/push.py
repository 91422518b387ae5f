"""To the Hub: a folder, or anything that has `save_pretrained`."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .card import CARD_NAME, LIBRARY_NAME, is_untouched, model_card, read_text, stamped, with_evaluation_of, with_name
from .loading import INDEX_NAME, PICKLES, LoadingError, check_safetensors, components_of, read_index, shards_of

logger = logging.getLogger(__name__)

# what lies in a training run's folder and is not the model; hidden files and pickles stay at home too
NOT_UPLOADED = ["checkpoints/*", "samples/*", "averages/*", "logs/*", "log.jsonl", ".*", "*/.*", *(f"*{end}" for end in PICKLES), "*.py"]

# where a component came from: it says something about this machine and nothing about the component
_ORIGIN = ("_name_or_path", "is_local", "local_files_only")


def strip_origin(folder: Path) -> None:
    """Removes paths of this machine from the configs in a folder."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and any(key in content for key in _ORIGIN):
            kept = {key: value for key, value in content.items() if key not in _ORIGIN}
            file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    keep_card: bool = False,
) -> Any:
    """Uploads a folder to a model repository, which is made if need be, as one commit.

    The repository's card stays if a person has edited it, which is told by the mark that a generated card ends with. Checkpoints, logs,
    hidden files and pickles of a training run's folder are left out.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: "user/name", or "name" for the user that is logged in.
        private: for a repository that is made; None leaves it to the account's default.
        token: a token of the Hub; None takes the one of `hf auth login` or of the variable HF_TOKEN.
        commit_message: what the commit says.
        revision: a branch, which is made if need be; the main branch by default.
        create_pr: open a pull request in place of a commit.
        subfolder: where in the repository; then no card is uploaded.
        keep_card: leave a card that is there as it is, edited or not.
    Returns: huggingface_hub's `CommitInfo`; `.oid` is the commit, `.commit_url` its page.
    Raises:
        ValueError: `repo_id` is no name of a repository, or (LoadingError) the folder is no model, or its weights are damaged.
        OSError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    from .. import __version__

    folder = Path(folder)
    check_folder(folder)
    api = HfApi(token=token, library_name=LIBRARY_NAME, library_version=__version__)
    with hub_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        ignored = list(NOT_UPLOADED)
        if subfolder or (folder / CARD_NAME).is_file() and not _may_replace_card(api, repo_id, revision, keep_card):
            ignored.append(CARD_NAME)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {folder.name}",
            ignore_patterns=ignored,
        )


def push_object(
    thing: Any,
    repo_id: str,
    card: Any,
    *,
    commit_message: str | None = None,
    saving: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Saves a pipeline, network or scheduler into a temporary folder and uploads it; a card that the repository has is left as it is.

    Args:
        thing: has `save_pretrained(folder)`.
        repo_id: as in `push_folder`.
        card: function of the repository's full name that gives the card, or None where `save_pretrained` writes it.
        commit_message: "Upload CLASS" by default.
        saving: arguments of `save_pretrained`.
        options: as in `push_folder`.
    """
    repo_id = full_name(repo_id, options.get("token"))
    with tempfile.TemporaryDirectory() as side:
        folder = Path(side) / repo_id.rsplit("/", 1)[-1]
        saving = {name: repo_id if name == "repo_id" else value for name, value in (saving or {}).items()}
        thing.save_pretrained(folder, **saving)
        strip_origin(folder)
        if card is not None:
            (folder / CARD_NAME).write_text(card(repo_id), encoding="utf-8")
        return push_folder(folder, repo_id, commit_message=commit_message or f"Upload {type(thing).__name__}", keep_card=True, **options)


class PushMixin:
    """`push_to_hub` for networks and schedulers."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        license: str | None = None,
    ) -> Any:
        """Uploads it to the Hub with a card and returns the commit; a card that is there is left as it is.

        Args:
            repo_id: "user/name", or "name" for the user that is logged in.
            commit_message, private, token, create_pr, subfolder, revision: as in `gen_pipelines.hub.push.push_folder`.
            safe_serialization: only True: weights are safetensors.
            variant: a name in the weight file's, such as "fp16".
            license: for the card: an identifier of the Hub's list.
        Raises:
            ValueError: pickles were asked for, or `repo_id` is no name of a repository.
            OSError: the Hub cannot be reached, or refuses.
        """
        if safe_serialization is not True:
            raise ValueError(f"{type(self).__name__}.push_to_hub: weights are safetensors only, got safe_serialization=False.")
        # a hosted scheduler of diffusers is saved in diffusers' own form
        library, name = getattr(self, "saved_as", None) or (type(self).__module__.split(".")[0], type(self).__name__)
        return push_object(
            self, repo_id, lambda full: model_card(full, name, {}, license=license, library=library),
            commit_message=commit_message, saving={"variant": variant} if variant else {}, private=private, token=token,
            create_pr=create_pr, subfolder=subfolder, revision=revision,
        )  # fmt: skip


def check_folder(folder: Path) -> None:
    """Finds out, before anything is sent, whether a folder is a pipeline, a network or a scheduler, and whole.

    Raises:
        LoadingError: it is neither, or a weight file is missing or damaged.
    """
    if (folder / INDEX_NAME).is_file():
        for name in components_of(read_index(folder)):
            if not (folder / name).is_dir():
                raise LoadingError(f"{folder} lacks the folder {name!r} that its {INDEX_NAME} names; save the pipeline again.")
            if any(p.suffix in PICKLES for p in (folder / name).iterdir()) and not any((folder / name).glob("*.safetensors")):
                raise LoadingError(f"{folder / name} holds pickled weights only, which are not pushed; load and save the pipeline first.")
    elif not any((folder / name).is_file() for name in ("config.json", "scheduler_config.json", "open_clip_config.json")):
        if not folder.is_dir():
            raise LoadingError(f"{folder} is not a folder; pass the folder that save_pretrained(...) or a training wrote.")
        raise LoadingError(f"{folder} is no pipeline, network or scheduler: it has no {INDEX_NAME}, config.json or scheduler_config.json.")
    for file in folder.rglob("*.safetensors*"):
        if "checkpoints" in file.relative_to(folder).parts:
            continue
        for weights in [file] if file.suffix == ".safetensors" else shards_of(file):
            check_safetensors(weights)


def refresh_card(folder: Path, name: str) -> None:
    """Brings a generated card up to date with its repository's name and the `evaluation.json` beside it; an edited card stays as it is."""
    file = folder / CARD_NAME
    if file.is_file() and is_untouched(text := read_text(file)):
        file.write_text(stamped(with_evaluation_of(with_name(text, name), folder)), encoding="utf-8")


def full_name(repo_id: str, token: str | bool | None = None) -> str:
    """ "user/name" from "name": the Hub says who is logged in.

    Raises:
        OSError: the Hub cannot be reached, or knows nobody of this token.
    """
    if "/" in repo_id:
        return repo_id
    from huggingface_hub import HfApi

    with hub_errors(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def _may_replace_card(api: Any, repo_id: str, revision: str | None, keep: bool) -> bool:
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return True
    if keep:
        return False
    with tempfile.TemporaryDirectory() as side:
        there = read_text(Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision, local_dir=side)))
    if not is_untouched(there):
        logger.info("%s: its card was edited and stays as it is.", repo_id)
        return False
    return True


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """One line with a remedy for whatever the Hub's client raises."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository: give 'user/name' ({error})") from error
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        remedy = "unset HF_HUB_OFFLINE" if isinstance(error, OfflineModeIsEnabled) else "log in with `hf auth login`, or pass a token"
        raise OSError(f"{repo_id}: the Hub was not asked ({_first_line(error)}); {remedy}.") from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = getattr(error, "server_message", None) or _first_line(error)
        remedy = {
            401: "log in with `hf auth login`, or pass a token that may write",
            403: "this token may not write there: use one that may",
            404: "there is no such repository, or this token may not see it",
        }.get(status, "try again later")
        raise OSError(f"{repo_id}: the Hub refuses ({status}: {reason}); {remedy}.") from error
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise OSError(f"{repo_id}: the Hub cannot be reached ({_first_line(error)}); check the connection and try again.") from error


def is_connection_error(error: BaseException) -> bool:
    """Whether an error is one of the connection that is no `OSError`: those of the packages that huggingface_hub asks the Hub with."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
