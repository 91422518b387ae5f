"""Writing folders so that nobody ever finds one half-written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(folder: str | Path) -> None:
    """Find out, by writing, whether a folder takes files, without creating it.

    Raises:
        OSError: the folder, or the nearest of its parents that exists (the error's `filename`), is a file or takes no files.
    """
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    try:  # os.access is wrong for root, and on read-only and network file systems
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(existing)) from error


def usual_permissions(folder: Path) -> int:
    """The permissions of a new file in a folder: those of the umask, or what its file system gives."""
    with tempfile.TemporaryDirectory(dir=folder) as probe:
        (new := Path(probe) / "new").touch()
        return new.stat().st_mode & 0o777


def readable_as_usual(folder: Path) -> None:
    """Gives every file in a folder the permissions of any new file; safetensors leaves its own to their owner alone."""
    mode = usual_permissions(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def written_at_once(target: str | Path, by_file: bool = False) -> Iterator[Path]:
    """Gives a side folder to write into and moves its content to `target` when the block ends without an error.

    A target that does not exist appears by one rename. In one that exists, each entry that was written replaces the entry of its name
    (so that no stale shard survives inside a component's folder) and every other entry stays; if moving fails, the old entries come back.

    Args:
        target: the folder to fill.
        by_file: replace single files instead of the target's direct entries, so that weights of another variant stay beside new ones.
    Yields: the side folder, next to `target` on the same file system.
    Raises:
        ValueError: the target is a file.
        OSError: the folder cannot be written.
    """
    if not str(target):  # Path would make it the folder that we are in
        raise ValueError("cannot save into '': give a folder; '.' is this one.")
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot save into {target}: it is a file; give a folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        side = Path(tempfile.mkdtemp(prefix=f".{target.name or 'save'}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise type(error)(error.errno, f"cannot save into {target}: {error.strerror}") from error
    try:
        content = side / "new"
        content.mkdir()
        yield content
        readable_as_usual(content)
        if not target.exists():
            os.replace(content, target)
        else:
            _replace_entries(content, target, side / "old", by_file)
    finally:
        shutil.rmtree(side, ignore_errors=True)


def _replace_entries(content: Path, target: Path, old: Path, by_file: bool) -> None:
    found = [p for p in content.rglob("*") if p.is_file()] if by_file else list(content.iterdir())
    # the files that name the others come last: until they do, a reader sees the old whole
    entries = sorted((p.relative_to(content) for p in found), key=lambda p: (p.suffix == ".json", str(p)))
    done: list[tuple[Path, bool]] = []
    try:
        for entry in entries:
            existed = (target / entry).exists()
            if existed:
                (old / entry).parent.mkdir(parents=True, exist_ok=True)
                os.replace(target / entry, old / entry)
            done.append((entry, existed))
            (target / entry).parent.mkdir(parents=True, exist_ok=True)
            os.replace(content / entry, target / entry)
    except BaseException:
        for entry, existed in reversed(done):
            if (target / entry).is_dir():
                shutil.rmtree(target / entry)
            else:
                (target / entry).unlink(missing_ok=True)
            if existed:
                os.replace(old / entry, target / entry)
        raise
