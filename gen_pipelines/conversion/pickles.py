"""A pickle read as data: a small machine of our own, in which no name of the file is ever looked up, imported or called.

Python's unpickler builds objects by calling what the file names. This one knows a closed table of names. A few of them have a meaning
(a dictionary, a tensor over a storage, an array of numbers), which is written out here; the others become inert `Record`s that hold their
arguments; and a name outside the table stops the reading, by that name. Long byte strings stay where they are in the mapped file, so
weights are not copied.

References: the opcodes are those of Python's `pickletools`; https://peps.python.org/pep-3154 (protocol 4), pep-0574 (5)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hub.loading import LoadingError

# No checkpoint comes near these. A file of 20 GB with optimiser states has about a million operations.
MAX_OPERATIONS = 5_000_000
MAX_DEPTH = 400
MAX_NUMBER = 64  # bytes of an integer
MAX_LINE = 2**20
_LONG = 256  # byte strings from this length on stay in the file


@dataclass(eq=False, repr=False)
class Record:
    """An object of the file that is not built: its class's name and what it would have been built from.

    `args` are the constructor's arguments, None for the bare name of a class or function; `state` the attributes, in most cases a dict;
    `items` what was appended to it and `entries` what was set in it, for a subclass of list or dict.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Record({self.module}.{self.name})"

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, if the record has attributes."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class Storage:
    """The numbers under one or several tensors, one axis long; `values` is None as long as only its description was read."""

    __slots__ = ("dtype", "values")

    def __init__(self, dtype: torch.dtype, values: Tensor | None) -> None:
        self.dtype, self.values = dtype, values


def numbers(view: memoryview, dtype: torch.dtype) -> Tensor:
    """A tensor of one axis over a piece of the file, without a copy; short pieces were copied out of it, and are once more."""
    view = memoryview(bytearray(view)) if view.readonly else view
    return torch.frombuffer(view, dtype=dtype) if len(view) else torch.empty(0, dtype=dtype)


class _Damaged(Exception):
    """The stream is no pickle, or cut short."""


# ---------------------------------------------------------------------------------------------------------------- what names stand for


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**48:
        raise LoadingError(f"a tensor has {what} {_short(value)}")
    return value


def _wholes(value: Any, what: str) -> tuple[int, ...]:
    if isinstance(value, Record) and value.name == "Size" and value.args:
        value = value.args[0]
    if not isinstance(value, (tuple, list)) or len(value) > 32:
        raise LoadingError(f"a tensor has {what} {_short(value)}")
    return tuple(_whole(v, what) for v in value)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any, dtype: torch.dtype | None = None) -> Tensor | None:
    """A view of a storage. It may not reach beyond the storage, nor have more numbers than it (a stride of zero repeats them for free)."""
    if not isinstance(storage, Storage):
        raise LoadingError(f"a tensor lies on {_short(storage)}, which is no storage")
    if storage.values is None:
        return None
    values = storage.values
    if dtype is not None and dtype != values.dtype:
        raw = values.view(torch.uint8)
        if len(raw) % dtype.itemsize:
            raise LoadingError(f"a storage of {len(raw)} bytes holds no whole number of {dtype}")
        values = raw.view(dtype) if len(raw) else torch.empty(0, dtype=dtype)
    offset, size, stride = _whole(offset, "the offset"), _wholes(size, "the shape"), _wholes(stride, "the strides")
    if len(size) != len(stride):
        raise LoadingError(f"a tensor of shape {size} has strides {stride}")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else offset
    if count > len(values) or (count and last >= len(values)):
        raise LoadingError(
            f"a tensor of shape {size}, strides {stride} and offset {offset} claims more than its storage of {len(values)} numbers holds"
        )
    return values.as_strided(size, stride, offset) if count else values.new_empty(size)


def _rebuild_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise LoadingError(f"a tensor has dtype {_short(dtype)}")
    return rebuild_tensor(storage, offset, size, stride, dtype=dtype)


def _rebuild_parameter(data: Any, *ignored: Any) -> Any:
    if data is not None and not isinstance(data, Tensor):
        raise LoadingError(f"a parameter holds {_short(data)}, which is no tensor")
    return data


def _dictionary(*args: Any) -> dict[Any, Any]:
    pairs = args[0] if args else {}
    if isinstance(pairs, dict):
        return dict(pairs)
    return {_key(pair[0]): pair[1] for pair in _sequence(pairs) if len(_sequence(pair)) == 2}


def _default_dictionary(factory: Any = None, *args: Any) -> dict[Any, Any]:
    return _dictionary(*args)


def _encoded(text: Any, encoding: Any = "utf-8", *ignored: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise LoadingError(f"bytes are encoded as {_short(encoding)}")
    return text.encode(encoding)


def _bytes(*args: Any) -> bytes:
    return _encoded(*args) if args and isinstance(args[0], str) else b"".join(args)


def _sequence(value: Any) -> Any:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise LoadingError(f"{_short(value)} stands where a list is expected")
    return value


def _persistent(meta: Any) -> Record:
    """An object of NVIDIA's persistence: the source code that comes with it is left alone."""
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise LoadingError("a persistence record is of another kind than a class")
    if meta.get("version") != 6:
        raise LoadingError(f"a persistence record has version {_short(meta.get('version'))}, and 6 is the one that is known")
    state = meta.get("state")
    return Record("torch_utils.persistence", str(meta.get("class_name")), (), state=state if isinstance(state, dict) else {})


# Numbers only: other dtypes hold references to objects, or layouts that no weights have.
_NUMPY = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


def _numpy_dtype(dtype: Any) -> np.dtype:
    if not isinstance(dtype, Record) or (dtype.module, dtype.name) != ("numpy", "dtype") or not dtype.args:
        raise LoadingError(f"an array has dtype {_short(dtype)}")
    kind = dtype.args[0]
    if kind not in _NUMPY:
        raise LoadingError(f"an array has the numpy dtype {_short(kind)}; only plain numbers are read")
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "="
    return np.dtype(kind).newbyteorder(order if order in ("<", ">") else "=")


def _array(shape: Any, dtype: np.dtype, fortran: bool, raw: Any) -> Tensor:
    shape = _wholes(shape, "the shape")
    raw = memoryview(raw.encode("latin1") if isinstance(raw, str) else raw)
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise LoadingError(f"an array of shape {shape} and dtype {dtype} has {len(raw)} bytes")
    if dtype.byteorder == ">":
        raw = memoryview(np.frombuffer(raw, dtype).astype(dtype.newbyteorder("<")).tobytes())
        dtype = dtype.newbyteorder("<")
    flat = numbers(raw, torch.from_numpy(np.empty(0, dtype)).dtype)
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if fortran else flat.reshape(shape)


def _array_frombuffer(raw: Any, dtype: Any, shape: Any, order: Any = "C", *ignored: Any) -> Tensor:
    return _array(shape, _numpy_dtype(dtype), order == "F", raw)


def _empty_array(*args: Any) -> Record:
    return Record("numpy", "ndarray", ())


def _scalar(dtype: Any, raw: Any = b"") -> int | float | bool:
    kind = _numpy_dtype(dtype)
    raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    if len(raw) != kind.itemsize:
        raise LoadingError(f"a number of dtype {kind} has {len(raw)} bytes")
    return np.frombuffer(raw, kind)[0].item()


def _reconstructor(cls: Any, base: Any, state: Any) -> Any:
    """How protocols 0 and 1 write an object."""
    if not isinstance(cls, Record) or cls.args is not None:
        raise _Damaged
    built = _construct(cls, ())
    if state is None:
        return built
    if isinstance(built, dict):
        built.update(_dictionary(state))
    elif isinstance(state, dict):
        built.entries.update(state)
    else:
        built.args = (state,)
    return built


def _from_type(function: Any, cls: Any, args: Any, state: Any) -> Any:
    """A tensor subclass, read as the plain tensor that it holds."""
    known = (rebuild_tensor, _rebuild_v3, _rebuild_parameter)
    if not isinstance(function, Record) or _MEANINGS.get((function.module, function.name)) not in known:
        raise LoadingError(f"a tensor is made by {_short(function)}")
    return _MEANINGS[function.module, function.name](*_sequence(args))


_MEANINGS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "defaultdict"): _default_dictionary,
    ("collections", "Counter"): _dictionary,
    ("dnnlib.util", "EasyDict"): _dictionary,
    ("dnnlib", "EasyDict"): _dictionary,
    ("builtins", "dict"): _dictionary,
    ("builtins", "set"): lambda *args: {_key(v) for v in _sequence(args[0] if args else ())},
    ("builtins", "frozenset"): lambda *args: frozenset(_key(v) for v in _sequence(args[0] if args else ())),
    ("builtins", "list"): lambda *args: list(_sequence(args[0] if args else ())),
    ("builtins", "tuple"): lambda *args: tuple(_sequence(args[0] if args else ())),
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytes,
    ("_codecs", "encode"): _encoded,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("numpy", "dtype"): lambda *args: Record("numpy", "dtype", args),
}
for _package in ("numpy.core", "numpy._core"):
    _MEANINGS[f"{_package}.multiarray", "_reconstruct"] = _empty_array
    _MEANINGS[f"{_package}.multiarray", "scalar"] = _scalar
    _MEANINGS[f"{_package}.numeric", "_frombuffer"] = _array_frombuffer

# names that are values of their own
_VALUES: dict[tuple[str, str], Any] = {
    **{("torch", f"{name}Storage"): dtype for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
        "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
        "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch", "UntypedStorage"): torch.uint8,
    **{("torch", name): getattr(torch, name) for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "float8_e4m3fn",
        "float8_e5m2")},
}  # fmt: skip

# Names that become records. What ends in a star covers the modules below too. Nothing here has a meaning: a record is never called.
_RECORDS: dict[str, tuple[str, ...]] = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "builtins": ("object", "int", "float", "complex", "bool", "str", "slice", "range", "type", "NoneType"),
    "typing": ("Any", "Dict", "List", "Tuple", "Optional", "Union"),
    "numpy": ("ndarray", "float16", "float32", "float64", "int32", "int64", "bool_"),
    "torch": ("Size", "device", "Tensor", "memory_format"),
    "torch.nn.parameter": ("Parameter", "Buffer"),
    "torch.nn.modules.*": (),
    "torch.nn.functional": (),
    "torch.optim.*": (),
    "torch.distributions.*": (),
    "torch.torch_version": ("TorchVersion",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "omegaconf.*": (),
    "pytorch_lightning.*": (),
    "lightning.*": (),
    "lightning_fabric.*": (),
    "lightning_utilities.*": (),
    "ml_collections.*": (),
    "absl.flags.*": (),
    "dnnlib.tflib.network": ("Network",),
    "dnnlib.tflib.*": (),
    "torch_utils.*": (),
    "training.*": (),
    "diffusers.configuration_utils": ("FrozenDict",),
}
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections"}


def _is_record(module: str, name: str) -> bool:
    for known, names in _RECORDS.items():
        if known.endswith(".*"):
            if module == known[:-2] or module.startswith(known[:-1]):
                return True
        elif module == known and (not names or name in names):
            return True
    return False


def _construct(cls: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
    if not isinstance(cls, Record) or cls.args is not None or not isinstance(args, tuple):
        raise LoadingError(f"{_short(cls)} is called, and is no name of a class or function")
    meaning = _MEANINGS.get((cls.module, cls.name))
    if meaning is None:
        return Record(cls.module, cls.name, args, kwargs or {})
    try:
        return meaning(*args)
    except (TypeError, IndexError, ValueError) as error:
        if isinstance(error, LoadingError):
            raise
        raise LoadingError(f"{cls.module}.{cls.name} is called with {len(args)} arguments that do not fit") from None


def _key(value: Any) -> Any:
    """What may be a key: the hash of nested tuples would take a time that doubles with every level."""
    if isinstance(value, tuple) and len(value) <= 64 and not any(isinstance(v, (tuple, frozenset)) for v in value):
        return tuple(_key(v) for v in value)
    if value is None or isinstance(value, (str, bytes, int, float, bool, Record, torch.dtype)):
        return value
    raise LoadingError(f"a {type(value).__name__} is used as the key of a table")


def _short(value: Any) -> str:
    """A value of the file in an error's message, of bounded length."""
    if isinstance(value, str):
        text = value[:100]
    elif isinstance(value, int) and value.bit_length() > 200:
        text = "a number beyond all bounds"
    elif isinstance(value, (int, float, bool, type(None), Record, torch.dtype)):
        text = repr(value)
    elif isinstance(value, tuple) and len(value) < 9 and all(isinstance(v, (int, float, str)) for v in value):
        text = "(" + ", ".join(map(_short, value)) + ")"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


# -------------------------------------------------------------------------------------------------------------------------- the machine

_MARK = object()


class Machine:
    """Runs one pickle stream.

    Args:
        data: the bytes, of the file's mapping or of a part of it.
        persistent: what a persistent id stands for (the storages of torch's containers); None where there may be none.
        nested: reads the bytes of a storage that was saved inside the stream; None where there may be none.
    """

    def __init__(
        self,
        data: memoryview,
        persistent: Callable[[Any], Any] | None = None,
        nested: Callable[[memoryview], Any] | None = None,
    ) -> None:
        self.data, self.persistent, self.nested = data, persistent, nested
        self.position, self.stack, self.marks, self.memo = 0, [], [], {}
        self.names: dict[tuple[str, str], Any] = {}
        # what the meanings below copy, in entries and characters: of a real file nothing is copied more than once
        self.copies = 4 * len(data) + 2**20

    def run(self, start: int = 0, budget: list[int] | None = None) -> tuple[Any, int]:
        """The object that the stream at `start` describes, and where the stream ends.

        Args:
            budget: how many operations are left, in a list of one, shared by the streams of a file.
        Raises:
            LoadingError: a name outside the table, a claim beyond the bounds, or a damaged stream.
        """
        budget = [MAX_OPERATIONS] if budget is None else budget
        self.position, self.stack, self.marks, self.memo = start, [], [], {}
        try:
            while True:
                op = self.data[self.position]
                self.position += 1
                if op == 0x2E:  # STOP
                    break
                budget[0] -= 1
                if budget[0] < 0:
                    raise LoadingError(f"more than {MAX_OPERATIONS} operations, and no checkpoint has so many")
                action = _ACTIONS.get(op)
                if action is None:
                    raise LoadingError(f"the pickle has the operation {op:#04x}, which no checkpoint has")
                action(self)
            return self.stack.pop(), self.position
        except (_Damaged, IndexError, KeyError, AttributeError, TypeError, struct.error, UnicodeError, OverflowError) as error:
            raise LoadingError("the pickle is damaged or cut short") from error

    # ---------------------------------------------------------------------------------------------------------------------- reading

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise _Damaged
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> bytes:
        size = 256
        while True:
            piece = bytes(self.data[self.position : self.position + size])
            if (end := piece.find(b"\n")) >= 0:
                self.position += end + 1
                return piece[:end]
            if size >= MAX_LINE or len(piece) < size:
                raise _Damaged
            size *= 16

    def counted(self, form: str) -> memoryview:
        return self.take(self.number(form))

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def memoize(self, index: int) -> None:
        value = self.stack[-1]
        self.memo[index] = value
        if isinstance(value, Record) and value.name == "ndarray" and value.args == ():
            value.kwargs.setdefault("memo", []).append(index)

    def integer(self, raw: memoryview) -> int:
        if len(raw) > MAX_NUMBER:
            raise LoadingError(f"an integer of {len(raw)} bytes")
        return int.from_bytes(raw, "little", signed=True)

    def text_integer(self, raw: bytes) -> int | bool:
        if raw in (b"00", b"01"):
            return raw == b"01"
        if len(raw) > 2 * MAX_NUMBER:
            raise LoadingError(f"an integer of {len(raw)} digits")
        try:
            return int(raw.rstrip(b"L"))
        except ValueError:
            raise _Damaged from None

    def text_float(self, raw: bytes) -> float:
        try:
            return float(raw)
        except ValueError:
            raise _Damaged from None

    def bytes_(self, raw: memoryview) -> Any:
        return raw if len(raw) >= _LONG else bytes(raw)

    def quoted(self, raw: bytes) -> str:
        raw = raw.strip()
        if len(raw) < 2 or raw[0] != raw[-1] or raw[:1] not in (b"'", b'"'):
            raise _Damaged
        return raw[1:-1].decode("unicode_escape")

    # --------------------------------------------------------------------------------------------------------------------- building

    def named(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Damaged
        module = _RENAMED.get(module, module)
        if (module, name) not in self.names:
            if (module, name) in _VALUES:
                self.names[module, name] = _VALUES[module, name]
            elif (module, name) in _MEANINGS or _is_record(module, name) or (module, name) == ("torch.storage", "_load_from_bytes"):
                self.names[module, name] = Record(module, name)
            else:
                raise LoadingError(f"it asks for {_short(f'{module}.{name}')}, which is outside the table of what a checkpoint may hold")
        return self.names[module, name]

    def construct(self, cls: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if isinstance(cls, Record) and (cls.module, cls.name, cls.args) == ("torch.storage", "_load_from_bytes", None):
            if self.nested is None or not isinstance(args, tuple) or len(args) != 1 or not isinstance(args[0], (bytes, memoryview)):
                raise LoadingError("a storage inside a storage")
            return self.nested(memoryview(args[0]))
        for arg in args if isinstance(args, tuple) else ():
            self.charge(arg)
        return _construct(cls, args, kwargs)

    def charge(self, value: Any) -> None:
        if isinstance(value, (dict, list, tuple, set, frozenset, str, bytes, memoryview)):
            self.copies -= len(value)
            if self.copies < 0:
                raise LoadingError("it describes far more than its length could hold")

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.construct(self.stack[-1], args)

    def new_object(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.construct(self.stack[-1], args)

    def new_object_with_keywords(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        if not isinstance(kwargs, dict):
            raise _Damaged
        self.stack[-1] = self.construct(self.stack[-1], args, kwargs)

    def old_object(self) -> None:
        cls, *args = self.since_mark()
        self.push(self.construct(cls, tuple(args)))

    def instance(self) -> None:
        cls = self.named(self.line().decode(), self.line().decode())
        self.push(self.construct(cls, tuple(self.since_mark())))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(self.named(module, name))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            if target.args is None:
                raise LoadingError(f"the state of {target.module}.{target.name} itself is set")
            if target.name == "ndarray" and target.module == "numpy":
                _, shape, dtype, fortran, raw = state
                if not isinstance(raw, (bytes, memoryview, str)):
                    raise LoadingError("an array holds objects; only plain numbers are read")
                self.charge(raw)
                built = self.stack[-1] = _array(shape, _numpy_dtype(dtype), bool(fortran), raw)
                for index in target.kwargs.get("memo", ()):
                    self.memo[index] = built
            else:
                target.state = state
        elif not isinstance(target, dict):  # of a dictionary, attributes such as a state dict's versions, which nothing needs
            raise LoadingError(f"a state is set on a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if len(values) % 2:
            raise _Damaged
        table = self._own(target).entries if isinstance(target, Record) else target
        if not isinstance(table, dict):
            raise _Damaged
        for key, value in zip(values[::2], values[1::2], strict=True):
            table[_key(key)] = value

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        row = self._own(target).items if isinstance(target, Record) else target
        if not isinstance(row, list):
            raise _Damaged
        row.extend(values)

    def add(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], set):
            raise _Damaged
        self.stack[-1].update(_key(value) for value in values)

    def _own(self, record: Record) -> Record:
        if record.args is None:
            raise LoadingError(f"entries are set on {record.module}.{record.name} itself")
        return record

    def persistent_id(self, pid: Any) -> None:
        if self.persistent is None:
            raise LoadingError("it refers to an object outside the file (a persistent id)")
        self.push(self.persistent(pid))

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[len(self.stack) - count :])
        if len(values) != count:
            raise _Damaged
        del self.stack[len(self.stack) - count :]
        self.push(values)

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def protocol(self) -> None:
        if self.number("<B") > 5:
            raise LoadingError("the pickle is of a protocol after 5")

    def table(self) -> None:
        values = self.since_mark()
        self.push({})
        self.set_items(values)

    def one_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])


_ACTIONS: dict[int, Callable[[Machine], None]] = {
    0x80: lambda m: m.protocol(),
    0x95: lambda m: m.take(8),  # FRAME: the length of what follows, which says nothing
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("0"): lambda m: m.pop(),
    ord("1"): lambda m: m.since_mark(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): lambda m: m.push(m.text_integer(m.line())),
    ord("L"): lambda m: m.push(m.text_integer(m.line())),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.push(m.integer(m.counted("<B"))),
    0x8B: lambda m: m.push(m.integer(m.counted("<i"))),
    ord("F"): lambda m: m.push(m.text_float(m.line())),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("S"): lambda m: m.push(m.quoted(m.line())),
    ord("T"): lambda m: m.push(str(m.counted("<i"), "latin1")),
    ord("U"): lambda m: m.push(str(m.counted("<B"), "latin1")),
    ord("V"): lambda m: m.push(str(m.line(), "raw-unicode-escape")),
    ord("X"): lambda m: m.push(str(m.counted("<I"), "utf-8", "surrogatepass")),
    0x8C: lambda m: m.push(str(m.counted("<B"), "utf-8", "surrogatepass")),
    0x8D: lambda m: m.push(str(m.counted("<Q"), "utf-8", "surrogatepass")),
    ord("B"): lambda m: m.push(m.bytes_(m.counted("<I"))),
    ord("C"): lambda m: m.push(m.bytes_(m.counted("<B"))),
    0x8E: lambda m: m.push(m.bytes_(m.counted("<Q"))),
    0x96: lambda m: m.push(m.bytes_(m.counted("<Q"))),
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.push(set()),
    0x91: lambda m: m.push(frozenset(_key(value) for value in m.since_mark())),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("l"): lambda m: m.push(m.since_mark()),
    ord("d"): lambda m: m.table(),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("s"): lambda m: m.one_item(),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    0x90: lambda m: m.add(m.since_mark()),
    ord("g"): lambda m: m.push(m.memo[m.text_integer(m.line())]),
    ord("h"): lambda m: m.push(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    ord("p"): lambda m: m.memoize(m.text_integer(m.line())),
    ord("q"): lambda m: m.memoize(m.number("<B")),
    ord("r"): lambda m: m.memoize(m.number("<I")),
    0x94: lambda m: m.memoize(len(m.memo)),
    ord("c"): lambda m: m.push(m.named(m.line().decode(), m.line().decode())),
    0x93: lambda m: m.stack_global(),
    ord("R"): lambda m: m.reduce(),
    0x81: lambda m: m.new_object(),
    0x92: lambda m: m.new_object_with_keywords(),
    ord("o"): lambda m: m.old_object(),
    ord("i"): lambda m: m.instance(),
    ord("b"): lambda m: m.build(),
    ord("Q"): lambda m: m.persistent_id(m.stack.pop()),
    ord("P"): lambda m: m.persistent_id(m.line().decode()),
}


def parts(value: Any) -> Iterator[Any]:
    """What a container or record holds, one level down."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, Record):
        yield from value.args or ()
        yield from (value.kwargs, value.state, value.items, value.entries)


def check_depth(tree: Any) -> None:
    """That nothing lies deeper than `MAX_DEPTH` containers, counted along the shortest way, so that a cycle has an end."""
    seen, level = {id(tree)}, [tree]
    for _ in range(MAX_DEPTH):
        following = []
        for value in level:
            for part in parts(value):
                if isinstance(part, (dict, list, tuple, set, frozenset, Record)) and id(part) not in seen:
                    seen.add(id(part))
                    following.append(part)
        if not following:
            return
        level = following
    raise LoadingError(f"containers are nested more than {MAX_DEPTH} deep")
