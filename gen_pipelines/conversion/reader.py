"""The one place that opens foreign checkpoints. Nothing in a file is run, and weights stay in the file until they are used.

Read are torch's containers (zip and legacy), plain pickles with torch storages or numpy arrays in them (NVIDIA's networks), safetensors,
and folders of these with their JSON and YAML. What Python objects a pickle may describe is in `pickles.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hub.loading import LoadingError, check_safetensors
from .pickles import MAX_OPERATIONS, Machine, Record, Storage, check_depth, numbers

__all__ = ["Checkpoint", "Record", "plain", "read", "tensors"]

MAX_FILE = 256 * 2**30  # bytes
MAX_FILES = 64  # of a folder
MAX_TEXT = 8 * 2**20
MAX_ENTRIES = 200_000
MAX_TENSORS = 50_000
MAX_LEVELS = 64

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WEIGHTS = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".npy", ".safetensors")
_TEXTS = (".json", ".yaml", ".yml")


@dataclasses.dataclass
class Checkpoint:
    """A foreign file, read as data.

    `tree` is made of dicts, lists, tuples, sets, numbers, strings, bytes (a memoryview where they are long), tensors, torch dtypes, and
    `Record`s. Of a folder it is a dict by file name, with a `Record("file", "unread", (reason,))` for a file that cannot be read.
    `size` is in bytes, `container` one of "zip", "legacy", "pickle", "safetensors", "folder"; `metadata` is the header of safetensors.
    """

    path: Path
    sha256: str
    container: str
    tree: Any
    size: int = 0
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def read(path: str | Path, progress: Callable[[int], None] | None = None) -> Checkpoint:
    """Read a foreign checkpoint without running anything in it.

    Args:
        path: a file, or a folder of files.
        progress: is told, as the file's hash is computed, how many bytes were read since the last call.
    Raises:
        LoadingError: the file is no checkpoint of a known container, damaged or cut short, asks for a name outside the closed table, or
            claims more than it holds. The message names the file.
        OSError: there is no such file.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _read_folder(path, progress)
    if not stat.S_ISREG(mode):
        raise LoadingError(f"{path} is no regular file; give a checkpoint's file or folder.")
    size = path.stat().st_size
    if size > MAX_FILE:
        raise LoadingError(f"{path} has {size} bytes, more than the {MAX_FILE} that are read.")
    if size < 8:
        raise LoadingError(f"{path} has {size} bytes, too few for a checkpoint; download it again.")
    with path.open("rb") as file:
        start = file.read(16)
        try:
            container, tree, metadata = _contents(path, file, start)
        except LoadingError as error:
            raise LoadingError(f"{path} is not read: {str(error).rstrip('.')}; nothing in it was run. {_REMEDY}") from None
        except (EOFError, RecursionError, MemoryError) as error:
            raise LoadingError(f"{path} is damaged or cut short ({_line(error)}); download it again.") from None
        digest = _digest(file, progress)
    return Checkpoint(path, digest, container, tree, size, metadata)


_REMEDY = "If you trust where it comes from, load it there and save its state dict with safetensors."


def _contents(path: Path, file: Any, start: bytes) -> tuple[str, Any, dict[str, str]]:
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        tree, container, metadata = _read_zip(file), "zip", {}
    elif start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        tree, metadata = _read_safetensors(path)
        return "safetensors", tree, metadata
    elif start[:1] == b"\x80" or start[:1] in (b"(", b"]", b"}", b"c"):
        tree, container = _read_pickle(_mapped(file))
        metadata = {}
    else:
        raise LoadingError(f"its first bytes ({start[:8].hex(' ')}) are of no container that is known: {_known_by(start, file)}")
    check_depth(tree)
    return container, tree, metadata


def _known_by(start: bytes, file: Any) -> str:
    if start[:2] == b"\x1f\x8b":
        return "it is packed by gzip, unpack it first"
    if start[:4] == b"\x89HDF":
        return "HDF5 is not converted"
    file.seek(257)
    if file.read(5) == b"ustar":
        return "it is a tar archive, unpack it first, or save the weights again if torch before 0.1.10 wrote them"
    return "torch's zip or legacy container, a pickle, safetensors"


def _mapped(file: Any) -> memoryview:
    """The file in memory, copied only where it is written to (which is never in the file)."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _digest(file: Any, progress: Callable[[int], None] | None) -> str:
    """SHA-256; read and not mapped, so that the pages do not count as this process's memory."""
    digest, block = hashlib.sha256(), bytearray(2**22)
    file.seek(0)
    while count := file.readinto(block):
        digest.update(memoryview(block)[:count])
        if progress is not None:
            progress(count)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------- the containers


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as mapped:
            return {name: mapped.get_tensor(name) for name in mapped.keys()}, dict(mapped.metadata() or {})
    except SafetensorError as error:
        raise LoadingError(f"its safetensors cannot be read: {_line(error)}") from None


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int, Any]:
    """(dtype, key, numbers, view) of a persistent id ("storage", type, key, location, numbers[, view])."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
        raise LoadingError("it refers to something outside the file that is no storage")
    dtype, key, count = pid[1], pid[2], pid[4]
    if not isinstance(key, str) or isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**48:
        raise LoadingError("a storage has no name or no length")
    return dtype, key, count, pid[5] if len(pid) == 6 else None


def _read_zip(file: Any) -> Any:
    data = _mapped(file)
    try:
        names = {entry.filename: entry for entry in zipfile.ZipFile(file).infolist()}
    except Exception as error:  # of a damaged table of contents, all sorts
        raise LoadingError(f"its archive is damaged or cut short ({_line(error)})") from None
    roots = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise LoadingError("a zip archive, but not torch's: it has no data.pkl")
    root = roots[0].removesuffix("data.pkl")
    if any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in names):
        raise LoadingError("a TorchScript archive, which is a program; only its state dict can be converted")

    def entry(name: str) -> memoryview:
        if name not in names:
            raise LoadingError(f"its archive lacks {name[:80]!r}")
        info = names[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise LoadingError("its archive is compressed or encrypted, as torch's never are; unpack and pack it without compression")
        header = data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise LoadingError("its archive is damaged")
        start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if start + info.file_size > len(data) or info.file_size != info.compress_size:
            raise LoadingError("its archive is damaged or cut short")
        return data[start : start + info.file_size]

    if f"{root}byteorder" in names and bytes(entry(f"{root}byteorder")) != b"little":
        raise LoadingError("its numbers are big-endian; save it again on a common machine")
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Storage:
        dtype, key, count, _ = _storage_id(pid)
        if key not in storages:
            raw = entry(f"{root}data/{key}")
            storages[key] = Storage(dtype, _checked_numbers(raw, dtype, count))
        storage = storages[key]
        if storage.dtype != dtype:
            return Storage(dtype, _checked_numbers(entry(f"{root}data/{key}"), dtype, count))
        return storage

    tree, _ = Machine(entry(roots[0]), persistent).run()
    return tree


def _checked_numbers(raw: memoryview, dtype: torch.dtype, count: int) -> Tensor:
    if count * dtype.itemsize > len(raw):
        raise LoadingError(f"a storage claims {count} numbers of {dtype} and has {len(raw)} bytes")
    return numbers(raw[: count * dtype.itemsize], dtype)


def _read_pickle(data: memoryview) -> tuple[Any, str]:
    budget = [MAX_OPERATIONS]
    first, end = Machine(data, _refused_storage, lambda raw: _read_legacy(raw, budget)).run(0, budget)
    if first == _LEGACY_MAGIC:
        return _read_legacy(data, [2 * MAX_OPERATIONS]), "legacy"
    return first, "pickle"


def _refused_storage(pid: Any) -> Any:
    raise LoadingError("it refers to an object outside the file (a persistent id), and is no container of torch")


def _read_legacy(data: memoryview, budget: list[int]) -> Any:
    """torch's container before 1.6: four pickles, then the storages one after another. Also what a storage is pickled as by itself."""
    machine = Machine(data)
    magic, at = machine.run(0, budget)
    protocol, at = machine.run(at, budget)
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise LoadingError("a storage of another container than torch's legacy one")
    system, at = machine.run(at, budget)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise LoadingError("its numbers are big-endian; save it again on a common machine")
    # the storages come after the object that speaks of them: it is read twice, first for their names and lengths
    claims: dict[str, tuple[torch.dtype, int]] = {}

    def claim(pid: Any) -> Storage:
        dtype, key, count, _ = _storage_id(pid)
        claims.setdefault(key, (dtype, count))
        return Storage(dtype, None)

    _, end = Machine(data, claim).run(at, budget)
    keys, end = machine.run(end, budget)
    storages: dict[str, Tensor] = {}
    if not isinstance(keys, list) or set(map(str, keys)) != set(claims) or len(keys) != len(claims):
        raise LoadingError("the list of its storages does not fit; it is damaged")
    for key in keys:
        dtype, count = claims[key]
        there = int.from_bytes(data[end : end + 8], "little")
        start, end = end + 8, end + 8 + there * dtype.itemsize
        if end > len(data):
            raise LoadingError("it is cut short")
        if there < count:
            raise LoadingError(f"a storage claims {count} numbers and has {there}")
        storages[key] = numbers(data[start:end], dtype)

    def persistent(pid: Any) -> Storage:
        dtype, key, count, view = _storage_id(pid)
        values = storages[key]
        if view is not None:
            _, offset, length = view
            if not 0 <= offset <= offset + length <= len(values):
                raise LoadingError("a view reaches beyond its storage")
            values = values[offset : offset + length]
        if dtype != values.dtype:
            raise LoadingError(f"a storage of {values.dtype} is read as {dtype}")
        return Storage(dtype, values)

    tree, _ = Machine(data, persistent).run(at, budget)
    return tree


def _read_folder(path: Path, progress: Callable[[int], None] | None) -> Checkpoint:
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in (*_WEIGHTS, *_TEXTS))
    if not files:
        raise LoadingError(f"{path} has no checkpoint in it; files that are read end in {', '.join(_WEIGHTS)}.")
    if len(files) > MAX_FILES:
        raise LoadingError(f"{path} has {len(files)} files that could be checkpoints; give one of them.")
    tree: dict[str, Any] = {}
    digests, size = [], 0
    for file in files:
        if file.suffix in _TEXTS:
            tree[file.name] = read_text(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            try:
                found = read(file, progress)
                tree[file.name], digest = found.tree, found.sha256
            except LoadingError as error:
                with file.open("rb") as stream:
                    tree[file.name], digest = Record("file", "unread", (str(error),)), _digest(stream, None)
        size += file.stat().st_size
        digests.append(f"{digest}  {file.name}\n")
    return Checkpoint(path, hashlib.sha256("".join(digests).encode()).hexdigest(), "folder", tree, size)


def read_text(path: str | Path) -> Any:
    """The content of a JSON or YAML file: tables, lists, strings and numbers. Tags of YAML that build Python objects are refused.

    Raises:
        LoadingError: it is too long, not valid, or not what its name says.
        OSError: there is no such file.
    """
    import yaml

    path = Path(path)
    if path.stat().st_size > MAX_TEXT:
        raise LoadingError(f"{path} has {path.stat().st_size} bytes, and no configuration is that long.")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise LoadingError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'YAML'} ({_line(error)}).") from None


# -------------------------------------------------------------------------------------------------------------------- what is in a tree


def tensors(tree: Any) -> dict[str, Tensor]:
    """All tensors in a tree, by their path: keys, indices and names of attributes, joined by dots.

    A network in NVIDIA's persistence gives the keys of its state dict: parameters and buffers, without those that are not stored.

    Raises:
        LoadingError: there are more than any network has.
    """
    found: dict[str, Tensor] = {}
    leading = _leading_to_tensors(tree) if isinstance(tree, (dict, list, tuple, Record)) else set()
    # (path, value, the containers that it lies in): a stack instead of recursion, in the order of the file
    todo: list[tuple[str, Any, tuple[int, ...]]] = [("", tree, ())]
    while todo:
        path, value, inside = todo.pop()
        if isinstance(value, Tensor):
            found[path] = value
            if len(found) > MAX_TENSORS:
                raise LoadingError("the checkpoint has more tensors than any network; its parts refer to each other over and over.")
        elif id(value) in leading and id(value) not in inside and len(inside) < MAX_LEVELS:
            inner = (*inside, id(value))
            todo += reversed([(f"{path}.{name}" if path else name, part, inner) for name, part in _named_parts(value)])
    return found


def _leading_to_tensors(tree: Any) -> set[int]:
    """The containers with a tensor somewhere below them: parts that meet again and again below no tensor need not be walked."""
    above: dict[int, list[int]] = {}
    seen, todo, reached = {id(tree)}, [tree], []
    while todo:
        value = todo.pop()
        for _, part in _named_parts(value):
            if isinstance(part, Tensor):
                reached.append(id(value))
            elif isinstance(part, (dict, list, tuple, Record)):
                above.setdefault(id(part), []).append(id(value))
                if id(part) not in seen:
                    seen.add(id(part))
                    todo.append(part)
    leading = set()
    while reached:
        if (value := reached.pop()) not in leading:
            leading.add(value)
            reached += above.get(value, ())
    return leading


def _named_parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Record):
        if isinstance(value.state, dict) and {"_parameters", "_buffers", "_modules"} <= set(value.state):
            hidden = value.state.get("_non_persistent_buffers_set") or ()
            for kind in ("_parameters", "_buffers", "_modules"):
                table = value.state[kind]
                for name, part in table.items() if isinstance(table, dict) else ():
                    if kind != "_buffers" or name not in hidden:
                        yield str(name), part
            return
        yield from _named_parts(value.entries)
        yield from _named_parts(value.items)
        if isinstance(value.state, (dict, list, tuple)):
            yield from _named_parts(value.state)
        yield from _named_parts(value.args or ())
    elif isinstance(value, dict):
        for name, part in value.items():
            yield str(getattr(name, "name", name)), part
    else:
        for name, part in enumerate(value):
            yield str(name), part


def plain(value: Any) -> Any:
    """Settings as plain tables: `argparse.Namespace`, omegaconf's nodes, Lightning's attribute dicts and ml_collections' become dicts.

    Raises:
        LoadingError: there are too many, or they are nested too deep.
    """
    return _plain(value, 0, [MAX_ENTRIES])


def _plain(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if depth > MAX_LEVELS or left[0] < 0:
        raise LoadingError("the settings in the checkpoint are nested too deep.")
    if isinstance(value, Record):
        if value.module.startswith("omegaconf"):
            inner = value.get("_content", value.get("_val"))
        elif value.module.startswith("pathlib"):
            return "/".join(str(part) for part in value.args or ())
        elif value.entries:
            inner = value.entries
        elif isinstance(value.get("_fields"), dict):
            inner = value.state["_fields"]
        elif isinstance(value.state, dict):
            inner = value.state
        else:
            return value
        return _plain(inner, depth + 1, left)
    if isinstance(value, dict):
        return {key: _plain(part, depth + 1, left) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part, depth + 1, left) for part in value)
    return value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
