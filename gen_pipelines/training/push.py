"""A run's repository on the Hub: found to be writable before the training, filled while and after it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..hub.card import LIBRARY_NAME
from ..hub.push import hub_errors, push_folder, refresh_card

logger = logging.getLogger(__name__)

CHECKPOINT_BRANCH = "checkpoints"


class HubRun:
    """Where a run is pushed to.

    Args:
        repo_id: "user/name", or "name" for the user that is logged in; the repository is made if need be.
        private: for a repository that is made.
    Raises:
        ValueError: `repo_id` is no name of a repository.
        OSError: the Hub cannot be reached, or the token may not write there.
    """

    def __init__(self, repo_id: str, private: bool = False) -> None:
        from huggingface_hub import HfApi

        from .. import __version__

        self._api: Any = HfApi(library_name=LIBRARY_NAME, library_version=__version__)
        self.private = private
        with hub_errors(repo_id):
            self.repo_id: str = self._api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Puts a checkpoint on the branch `checkpoints`, in place of the one before. A failure is a warning: the training goes on."""
        try:
            with hub_errors(self.repo_id):
                self._api.create_branch(self.repo_id, branch=CHECKPOINT_BRANCH, exist_ok=True)
                self._api.upload_folder(
                    repo_id=self.repo_id,
                    folder_path=checkpoint.parent,
                    revision=CHECKPOINT_BRANCH,
                    allow_patterns=[f"{checkpoint.name}/*"],
                    delete_patterns=["step-*/*"],
                    commit_message=f"Checkpoint {checkpoint.name}",
                )
        except OSError as error:
            logger.warning("the checkpoint %s was not pushed: %s", checkpoint.name, error)

    def push_result(self, folder: Path) -> str:
        """Pushes the finished model to the main branch and returns the page of the commit.

        Raises:
            OSError: the Hub refuses or cannot be reached; the message has the command that pushes the folder later.
        """
        refresh_card(folder, self.repo_id)
        try:
            commit = push_folder(folder, self.repo_id, private=self.private or None, commit_message="Upload the trained model")
        except OSError as error:
            raise OSError(f"{error} The model is whole in {folder}: gen-pipelines push {folder} {self.repo_id}") from error
        return commit.commit_url
