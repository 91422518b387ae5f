"""The restricted reader: what other tools save is read bit for bit, and nothing in a file is ever run."""

import argparse
import collections
import gzip
import io
import os
import pathlib
import pickle
import random
import struct
import sys
import tarfile
import time
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conversion import fakes
from safetensors.torch import save_file

from gen_pipelines import LoadingError
from gen_pipelines.conversion import pickles, reader
from gen_pipelines.conversion.pickles import Record
from gen_pipelines.conversion.reader import plain, read, tensors

WATCHED = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "code.__new__",
           "socket.connect", "shutil.rmtree", "ctypes.dlopen", "webbrowser.open", "os.remove", "os.rename")  # fmt: skip
_heard: list[str] | None = None


def _listen(event, args):
    if _heard is not None and (event in WATCHED or (event in ("exec", "compile") and "ran" in repr(args)[:400])):
        _heard.append(event)


sys.addaudithook(_listen)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """In every test of this file: no file named `ran` appears, and the interpreter hears of no unpickling and no program."""
    global _heard
    monkeypatch.chdir(tmp_path)
    yield
    heard, _heard = _heard, None
    assert not heard, heard
    assert not list(tmp_path.rglob("ran"))


def opened(path):
    """read(path), listened to; an error is ours, in one line, and quick."""
    global _heard
    _heard, start = [], time.process_time()
    try:
        return read(path)
    except LoadingError as error:
        assert "\n" not in str(error) and len(str(error)) < 900 and str(path) in str(error)  # noqa: PT017
        raise
    finally:
        heard, _heard = _heard, None
        assert not heard, heard
        assert time.process_time() - start < 3


def refused(content, match, name="network.pkl"):
    path = pathlib.Path(name)
    path.write_bytes(content)
    with pytest.raises(LoadingError, match=match):
        opened(path)


# ------------------------------------------------------------------------------------------------------------- what is read, bit for bit


def examples():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
    table = collections.OrderedDict(a=base, b=base.t(), c=base[1:3, ::2], scalar=torch.tensor(2.5), none=None, empty=torch.empty(0, 3))
    table._metadata = {"": {"version": 2}}
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    many = {str(kind): (base * 3).to(kind) for kind in (*kinds, torch.complex64)}
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "table": table,
        "dtypes": many,
        "training": {"model": network.state_dict(), "opt": optimizer.state_dict(), "step": 3, "text": "ä\ud800\n", "big": 2**70},
        "parameters": {"p": torch.nn.Parameter(base.clone()), "list": [base, (base, {"x": base})], "set": {1, 2}, "size": base.size()},
        "settings": argparse.Namespace(size=64, inner=argparse.Namespace(lr=0.1), path=pathlib.PurePosixPath("a/b")),
    }


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride() and torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, argparse.Namespace):
        assert (ours.module, ours.name) == ("argparse", "Namespace")
        same(ours.state, vars(theirs))
    elif isinstance(theirs, torch.Size):
        assert ours.name == "Size" and ours.args == (tuple(theirs),)
    elif isinstance(theirs, pathlib.PurePath):
        assert plain(ours) == str(theirs)
    elif isinstance(theirs, (list, tuple)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert ours == theirs and type(ours) is type(theirs)


@pytest.mark.parametrize("name", ["table", "dtypes", "training", "parameters", "settings"])
@pytest.mark.parametrize("container", ["zip", "legacy", "zip of protocol 4"])
def test_what_torch_saves(name, container):
    path = pathlib.Path("x.pt")
    torch.save(examples()[name], path, _use_new_zipfile_serialization=container != "legacy", pickle_protocol=4 if "4" in container else 2)
    if name == "settings" or container == "zip of protocol 4":
        theirs = examples()[name] if name != "training" else None
    else:
        theirs = torch.load(path, weights_only=True)
    checkpoint = opened(path)
    assert checkpoint.container == container.split()[0] and checkpoint.size == path.stat().st_size
    if theirs is not None:
        same(checkpoint.tree, theirs)
    assert checkpoint.sha256 == __import__("hashlib").sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_with_tensors_and_arrays_in_it(protocol):
    arrays = {
        "c": np.arange(600, dtype=np.float32).reshape(20, 30),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "big endian": np.arange(5, dtype=">f4"),
        "whole": np.arange(6, dtype=np.int64)[::2],
        "byte": np.arange(3, dtype=np.uint8),
        "truth": np.array([True, False]),
        "half": np.ones((2, 2), np.float16),
        "none": np.empty((0, 3), np.float32),
        "point": np.array(3.5),
    }
    content = {
        "tensor": torch.arange(1000, dtype=torch.float64), "small": torch.ones(2), "arrays": arrays, "number": np.float32(1.5),
        "truth": np.bool_(True), "long": b"x" * 5000, "short": b"y", "set": {1}, "frozen": frozenset({2}),
        "table": collections.defaultdict(list, a=1),
        "negative": -(2**40), "float": 1e-300, "text": "line\nünd \\ 'quoted'", "twice": (arrays["c"], arrays["c"]),
        "bytes": bytearray(b"abc"),
    }  # fmt: skip
    path = pathlib.Path("x.pkl")
    path.write_bytes(pickle.dumps(content, protocol))
    tree = opened(path).tree
    assert torch.equal(tree["tensor"], content["tensor"]) and torch.equal(tree["small"], content["small"])
    for name, array in arrays.items():
        expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("<")))
        torch.testing.assert_close(tree["arrays"][name], expected, rtol=0, atol=0, msg=name)
    assert tree["twice"][0] is tree["twice"][1] is tree["arrays"]["c"]
    for name in ("truth", "short", "set", "frozen", "table", "negative", "float", "text"):
        assert tree[name] == content[name], name
    assert tree["number"] == 1.5 and bytes(tree["long"]) == content["long"] and bytes(tree["bytes"]) == b"abc"


def test_a_pickle_of_python_2():
    raw = np.arange(3, dtype="<f4").tobytes()
    quoted = "".join(f"\\x{byte:02x}" for byte in raw).encode()
    content = (
        b"(dp0\nS'weights'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\nRp7\n"
        b"(I1\n(I3\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS'"
        + quoted + b"'\np15\ntp16\nbsS'name'\nS'G\\n'\nsS'long'\nL12L\ns."
    )  # fmt: skip
    pathlib.Path("x.pkl").write_bytes(content)
    tree = opened("x.pkl").tree
    assert tree["weights"].tolist() == [0, 1, 2] and tree["name"] == "G\n" and tree["long"] == 12


def test_safetensors_and_a_folder():
    save_file({"a": torch.ones(2)}, "model.safetensors", {"config": "{}"})
    pathlib.Path("model_config.json").write_text('{"name": "VAEConfig"}')
    pathlib.Path("encoder.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    checkpoint = opened("model.safetensors")
    assert checkpoint.metadata == {"config": "{}"} and checkpoint.tree["a"].tolist() == [1, 1]
    folder = opened(os.getcwd())
    assert folder.container == "folder" and folder.tree["model_config.json"] == {"name": "VAEConfig"}
    assert "os.system" in folder.tree["encoder.pkl"].args[0] and list(tensors(folder.tree)) == ["model.safetensors.a"]
    pathlib.Path("more.yaml").write_text("a: !!python/object/apply:os.system ['touch ran']")
    with pytest.raises(LoadingError, match=r"more\.yaml is not valid YAML"):
        opened(os.getcwd())


def test_nvidias_records_without_their_source():
    state = {"a.weight": torch.nn.Parameter(torch.ones(3)), "a.filter": torch.ones(2), "a.b.hidden": torch.zeros(1)}
    state["scale"] = torch.zeros([])
    with fakes.modules(**fakes.NVIDIA):
        record = fakes.module_record(state, "Generator", {"z_dim": 4}, {"a.b": {"_non_persistent_buffers_set": {"hidden"}}})
        pathlib.Path("x.pkl").write_bytes(pickle.dumps({"G_ema": record}))
    tree = opened("x.pkl").tree
    assert (tree["G_ema"].name, tree["G_ema"].get("_init_kwargs")) == ("Generator", {"z_dim": 4})
    assert list(tensors(tree)) == ["G_ema.scale", "G_ema.a.weight", "G_ema.a.filter"]
    assert not {"torch_utils", "dnnlib"} & set(sys.modules)


def test_lightnings_callbacks_and_omegaconfs_nodes_are_records():
    node, leaf, point = (type(name, (), {}) for name in ("DictConfig", "AnyNode", "ModelCheckpoint"))
    homes = {"omegaconf__dictconfig": {"DictConfig": node}, "omegaconf__nodes": {"AnyNode": leaf}}
    with fakes.modules(**homes, pytorch_lightning={"ModelCheckpoint": point}):
        value, config = leaf(), node()
        value.__dict__ = {"_val": 3, "_parent": config}
        config.__dict__ = {"_content": {"channels": value}, "_parent": None}  # a cycle
        content = {"state_dict": {"w": torch.ones(1)}, "callbacks": {point: {"best": torch.tensor(1.0)}}, "hyper_parameters": config}
        torch.save(content, "x.ckpt")
    tree = opened("x.ckpt").tree
    assert plain(tree["hyper_parameters"]) == {"channels": 3}
    assert sorted(tensors(tree)) == ["callbacks.ModelCheckpoint.best", "state_dict.w"]


def test_weights_stay_in_the_file_and_the_file_stays_as_it_is():
    torch.save({"w": torch.ones(1000)}, "x.pt")
    before = pathlib.Path("x.pt").read_bytes()
    opened("x.pt").tree["w"].zero_()
    assert pathlib.Path("x.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------------- what would run code


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module, name, *args):
    """A pickle that calls module.name(*args) when a usual unpickler reads it."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(text(a) for a in args) + b"tR."


def test_the_payload_is_alive():
    """The control: what is refused below does run in Python's own unpickler."""
    pickle.loads(b"cos\nsystem\n(S'touch alive'\ntR.")  # noqa: S301
    assert pathlib.Path("alive").exists()


CALLS = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("os", "execv"), ("subprocess", "Popen"),
    ("subprocess", "run"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "compile"), ("builtins", "__import__"),
    ("builtins", "getattr"), ("builtins", "setattr"), ("builtins", "open"), ("builtins", "globals"), ("builtins", "map"),
    ("builtins", "object.__subclasses__"), ("__builtin__", "eval"), ("__builtin__", "execfile"), ("importlib", "import_module"),
    ("runpy", "_run_code"), ("pickle", "loads"), ("_pickle", "loads"), ("dill", "loads"), ("cloudpickle.cloudpickle", "_builtin_type"),
    ("joblib", "load"), ("marshal", "loads"), ("types", "FunctionType"), ("types", "CodeType"), ("functools", "partial"),
    ("functools", "reduce"), ("operator", "attrgetter"), ("operator", "methodcaller"), ("torch", "load"), ("torch", "save"),
    ("torch.hub", "load"), ("torch.jit", "load"), ("torch", "_load_global_deps"), ("torch.storage", "exec"), ("torch._utils", "eval"),
    ("torch.utils.cpp_extension", "load_inline"), ("torch", "ops.load_library"), ("numpy", "load"), ("numpy", "fromfile"),
    ("numpy.testing._private.utils", "runstring"), ("numpy", "vectorize"), ("ctypes", "CDLL"), ("shutil", "rmtree"),
    ("webbrowser", "open"), ("socket", "socket"), ("pty", "spawn"), ("code", "InteractiveInterpreter"), ("timeit", "timeit"),
    ("pdb", "run"), ("asyncio", "run"), ("multiprocessing", "Process"), ("copyreg", "__newobj__"), ("copyreg", "add_extension"),
    ("torchutils.persistence", "_reconstruct_persistent_obj"), ("collections", "namedtuple"), ("argparse", "open"), ("", "os.system"),
    ("os.path", "os.system"), ("pathlib", "Path.touch"), ("pathlib", "os.system"), ("codecs", "open"), ("_codecs", "lookup"),
    ("logging.config", "dictConfig"), ("sys", "exit"), ("signal", "signal"), ("__main__", "Evil"), ("transformers", "pipeline"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_a_name_outside_the_table_is_refused_by_name(module, name):
    refused(call(module, name, "touch ran"), "is outside the table")
    assert f"{pickles._RENAMED.get(module, module)}.{name}"[:20] in _message("network.pkl")


def _message(path):
    try:
        read(path)
    except LoadingError as error:
        return str(error)


EVIL = b"cos\nsystem\n"
STREAMS = {
    "protocol 0": EVIL + b"(S'touch ran'\ntR.",
    "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93" + text("touch ran") + b"\x85R.",
    "instance": b"(S'touch ran'\nios\nsystem\n.",
    "object": b"(" + EVIL + b"S'touch ran'\no.",
    "new object": b"\x80\x02" + EVIL + text("touch ran") + b"\x85\x81.",
    "new object with keywords": b"\x80\x04" + EVIL + text("touch ran") + b"\x85}\x92.",
    "never called": b"\x80\x02}" + text("f") + EVIL + b"s.",
    "thrown away": b"\x80\x02" + EVIL + text("touch ran") + b"\x85R0}.",
    "after the end of a list": b"\x80\x02](" + EVIL + text("touch ran") + b"\x85Re.",
    "in a state": b"\x80\x02cargparse\nNamespace\n)\x81}" + text("x") + EVIL + text("touch ran") + b"\x85Rsb.",
    "as a reconstructor's class": b"\x80\x02ccopy_reg\n_reconstructor\n(" + EVIL + b"c__builtin__\nobject\nNtR.",
    "as a default factory": b"\x80\x02ccollections\ndefaultdict\n" + EVIL + b"\x85R.",
    "as a tensor's maker": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + EVIL + b"N)NtR.",
    "as a storage's type": b"\x80\x02(" + text("storage") + EVIL + text("0") + text("cpu") + b"K\x01tQ.",
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_way_to_call(name):
    refused(STREAMS[name], r"os\.system")


NUMPY = b"cnumpy\ndtype\n"
OTHERS = {
    "extension registry": (b"\x80\x02\x82\x01......", "operation 0x82"),
    "out-of-band buffer": (b"\x80\x05\x97......", "operation 0x97"),
    "persistent id": (b"\x80\x02" + text("x") + b"Q.", "persistent id"),
    "text persistent id": (b"(Pos.system\n.", "persistent id"),
    "protocol of the future": (b"\x80\x0e}.......", "protocol after 5"),
    "state on a list": (b"\x80\x02]}" + text("append") + b"Nsb.", "state is set on a list"),
    "state on a class": (b"\x80\x02cargparse\nNamespace\n}" + text("x") + b"Nsb.", "state of argparse.Namespace itself"),
    "entries on a class": (b"\x80\x02cargparse\nNamespace\n" + text("x") + b"Ns.", "entries are set on argparse.Namespace itself"),
    "calling a string": (b"\x80\x02" + text("os.system") + text("touch ran") + b"\x85R.", "is called, and is no name"),
    "calling a record": (b"\x80\x02cargparse\nNamespace\n)R)R.", "is called, and is no name"),
    "calling a dtype": (b"\x80\x02ctorch\nFloatStorage\n)R.", "is called, and is no name"),
    "arguments that are no tuple": (b"\x80\x02cargparse\nNamespace\n]R.", "is called"),
    "arguments that do not fit": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "arguments that do not fit"),
    "a version of persistence": (b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(" + text("type") + text("class")
                                 + text("version") + b"K\x07u\x85R.", "version 7"),
    "a function of persistence": (b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(" + text("type") + text("func")
                                  + b"u\x85R.", "another kind than a class|damaged"),
    "array of objects": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01\x85" + NUMPY
        + b"U\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb\x89]Natb.", "objects|plain numbers"),
    "dtype of objects": (
        b"\x80\x02cnumpy.core.multiarray\nscalar\n" + NUMPY + b"U\x02O8K\x00K\x01\x87RU\x08xxxxxxxx\x86R.", "numpy dtype O8"),
    "structured dtype": (b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x03V16K\x00K\x01\x87RU\x02xx\x86R.", "numpy dtype V16"),
    "a number too short": (b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02f4K\x00K\x01\x87RU\x02xx\x86R.", "has 2 bytes"),
    "codec": (b"\x80\x02c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.", "encoded as rot13"),
    "huge integer": (b"\x80\x02\x8b\xff\xff\xff\x00" + b"\x7f" * 0xFFFFFF + b".", "integer of 16777215 bytes"),
    "huge decimal": (b"(I" + b"9" * 5000 + b"\nt.", "integer of 5000 digits"),
    "endless line": (b"(S'" + b"a" * 2_000_000 + b"'\n.", "damaged or cut short|first bytes"),
    "key that is a list": (b"\x80\x02}]Ns...", "list is used as the key"),
    "key of nested tuples": (b"\x80\x02})" + b"2\x86" * 60 + b"Ns.", "tuple is used as the key"),
    "member of nested tuples": (b"\x80\x04\x8f()" + b"2\x86" * 60 + b"\x90.", "tuple is used as the key"),
    "deep lists": (b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b".", "nested more than"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 30_000 + b".", "nested more than"),
    "nothing on the stack": (b"\x80\x02.......", "damaged"),
    "no mark": (b"\x80\x02Nt......", "damaged"),
    "unknown memo": (b"\x80\x02h\x07.....", "damaged"),
    "no end": (b"\x80\x02}}}}}}}}", "damaged or cut short"),
    "bytes beyond the end": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fxx.", "damaged or cut short"),
    "odd items": (b"\x80\x02}(NNNu...", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_streams_that_no_checkpoint_has(name):
    refused(*OTHERS[name])


def test_a_storage_inside_the_stream_is_read_by_the_same_table():
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    for payload, match in {inner + call("os", "system", "touch ran"): r"os\.system", call("os", "system", "touch ran"): r"os\.system",
                           b"PK\x03\x04" + b"\0" * 300: "damaged", inner: "damaged"}.items():  # fmt: skip
        raw = b"B" + struct.pack("<I", len(payload)) + payload
        refused(b"\x80\x03ctorch.storage\n_load_from_bytes\n" + raw + b"\x85R.", match)
    nested = b"\x80\x03ctorch.storage\n_load_from_bytes\nC\x01x\x85R."
    raw = b"B" + struct.pack("<I", len(inner + nested)) + inner + nested
    refused(b"\x80\x03ctorch.storage\n_load_from_bytes\n" + raw + b"\x85R.", "inside|damaged")


def test_a_hostile_object_in_torchs_containers():
    class Evil:
        def __reduce__(self):
            return os.system, ("touch ran",)

    for new in (True, False):
        torch.save({"w": torch.ones(2), "x": Evil()}, "x.pt", _use_new_zipfile_serialization=new)
        refused(pathlib.Path("x.pt").read_bytes(), r"(posix|os|nt)\.system", "x.pt")


# --------------------------------------------------------------------------------------------------------- claims beyond what is there


def tensor_stream(size, stride, offset=0, count=4, dtype="Float"):
    """data.pkl of one tensor, written by hand."""

    def numbers(values):
        return b"(" + b"".join(b"\x8a\x09" + int(v).to_bytes(9, "little", signed=True) for v in values) + b"t"

    kind = b"ctorch\n" + dtype.encode() + b"Storage\n"
    storage = b"(" + text("storage") + kind + text("0") + text("cpu") + numbers([count])[1:-1] + b"tQ"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers([offset])[1:-1] + numbers(size) + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


def archive(stream, data=b"\0" * 16, compression=zipfile.ZIP_STORED, **more):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", stream)
        if data is not None:
            file.writestr("archive/data/0", data)
        for name, content in more.items():
            file.writestr(f"archive/{name.replace('__', '/')}", content)
    return buffer.getvalue()


def test_the_hand_written_container_is_right():
    pathlib.Path("x.pt").write_bytes(archive(tensor_stream([2, 2], [2, 1]), struct.pack("<4f", 1, 2, 3, 4)))
    assert opened("x.pt").tree.tolist() == [[1, 2], [3, 4]]


def without_bytes(value):
    """The id of a parameter: containers have the time of day in them, and every process must collect the same tests."""
    return "file" if isinstance(value, bytes) else None


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (archive(tensor_stream([1 << 40], [0])), "claims more"),
        (archive(tensor_stream([1 << 20, 1 << 20], [0, 0])), "claims more"),
        (archive(tensor_stream([5], [1])), "claims more"),
        (archive(tensor_stream([2, 2], [3, 1])), "claims more"),
        (archive(tensor_stream([2], [1], offset=3)), "claims more"),
        (archive(tensor_stream([4], [1], offset=-1)), "the offset -1"),
        (archive(tensor_stream([-1], [1])), "the shape -1"),
        (archive(tensor_stream([2, 2], [-2, 1])), "the strides -2"),
        (archive(tensor_stream([2, 2], [1])), "has strides"),
        (archive(tensor_stream([1] * 40, [1] * 40)), "the shape"),
        (archive(tensor_stream([1 << 60], [1])), "the shape"),
        (archive(tensor_stream([4], [1], count=1 << 40)), "claims 1099511627776 numbers"),
        (archive(tensor_stream([4], [1], count=-4)), "no length"),
        (archive(tensor_stream([4], [1], count=5)), "claims 5 numbers"),
        (archive(tensor_stream([2], [1], count=4, dtype="Double")), "claims 4 numbers of torch.float64"),
        (archive(tensor_stream([4], [1]), None), "lacks 'archive/data/0'"),
        (archive(tensor_stream([4], [1]), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (archive(b"\x80\x02}.", b"\0" * 50_000_000, zipfile.ZIP_DEFLATED), "compressed"),
        (archive(tensor_stream([4], [1]), code__model="import os"), "TorchScript"),
        (archive(tensor_stream([4], [1]), byteorder="big"), "big-endian"),
        (archive(tensor_stream([4], [1]), more__data_pkl="x").replace(b"more/data_pkl", b"more/data.pkl"), "not torch's"),
        (archive(b"\x80\x02(" + text("module") + b"NNNNtQ."), "no storage"),
        (archive(b"\x80\x02NQ."), "no storage"),
        (archive(tensor_stream([4], [1]))[:-30], "damaged or cut short"),
        (archive(tensor_stream([4], [1]))[:100], "damaged or cut short"),
    ],
    ids=without_bytes,
)  # fmt: skip
def test_claims_of_a_zip_container(content, match):
    refused(content, match, "x.pt")


def legacy(stream, keys=("0",), counts=(4,), data=b"\0" * 16, magic=0x1950A86A20F9469CFC6C, protocol=1001, little=True):
    head = pickle.dumps(magic, 2) + pickle.dumps(protocol, 2) + pickle.dumps({"little_endian": little}, 2)
    return head + stream + pickle.dumps(list(keys), 2) + b"".join(struct.pack("<q", c) for c in counts) + data


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (legacy(tensor_stream([4], [1]), counts=(1 << 40,)), "cut short"),
        (legacy(tensor_stream([4], [1]), counts=(-1,)), "cut short"),
        (legacy(tensor_stream([4], [1]), counts=(3,)), "claims 4 numbers and has 3"),
        (legacy(tensor_stream([5], [1])), "claims more"),
        (legacy(tensor_stream([1 << 30], [0])), "claims more"),
        (legacy(tensor_stream([4], [1]), data=b"\0" * 15), "cut short"),
        (legacy(tensor_stream([4], [1]), keys=("1",)), "does not fit"),
        (legacy(tensor_stream([4], [1]), keys=("0", "0")), "does not fit"),
        (legacy(tensor_stream([4], [1]), keys=()), "does not fit"),
        (legacy(tensor_stream([4], [1]), little=False), "big-endian"),
        (legacy(tensor_stream([4], [1]), protocol=1002), "another container"),
    ],
    ids=without_bytes,
)  # fmt: skip
def test_claims_of_a_legacy_container(content, match):
    refused(content, match, "x.pt")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "too few"),
        (b"hello, this is a text", "of no container"),
        (gzip.compress(b"x" * 100), "gzip"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5"),
        (b"\xff" * 600, "of no container"),
        ((200).to_bytes(8, "little") + b"{" + b" " * 50, r"cut short|truncated|header|download"),
        ((2**40).to_bytes(8, "little") + b"{}", "of no container|header"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged"),
    ],
    ids=without_bytes,
)
def test_what_is_no_container(content, match):
    refused(content, match, "x.bin")


def test_a_tar_archive_is_named():
    with tarfile.open("x.pt", "w") as file:
        file.addfile(tarfile.TarInfo("zzz/storages"), io.BytesIO(b""))
    refused(pathlib.Path("x.pt").read_bytes(), "tar archive", "x.pt")


def test_what_is_no_file():
    with pytest.raises(FileNotFoundError):
        read("missing.pkl")
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/zero"):
        with pytest.raises(LoadingError, match="no regular file"):
            read(path)
    os.mkdir("empty")
    with pytest.raises(LoadingError, match="no checkpoint in it"):
        read("empty")


def test_a_file_that_is_too_large(monkeypatch):
    monkeypatch.setattr(reader, "MAX_FILE", 1000)
    torch.save({"w": torch.ones(1000)}, "x.pt")
    with pytest.raises(LoadingError, match="more than the 1000"):
        opened("x.pt")


# ------------------------------------------------------------------------------------------------------------- what grows out of a little


def test_operations_are_counted(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 1000)
    monkeypatch.setattr(reader, "MAX_OPERATIONS", 1000)
    refused(b"\x80\x04" + b"\x8f0" * 600 + b"N.", "more than 1000 operations")


def test_copies_are_counted():
    """A table of a thousand entries, copied ten thousand times by a few bytes each."""
    table = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(2000)) + b"uq\x00"
    copies = b"ccollections\nOrderedDict\nq\x01]q\x02(" + b"h\x01h\x00\x85R" * 5000 + b"e."
    refused(b"\x80\x02" + table + b"0" + copies, "far more than its length")


def test_a_tree_whose_branches_meet_again_and_again_has_an_end(monkeypatch):
    monkeypatch.setattr(reader, "MAX_ENTRIES", 2000)
    monkeypatch.setattr(reader, "MAX_TENSORS", 2000)
    pathlib.Path("x.pkl").write_bytes(b"\x80\x02]" + b"2\x86" * 60 + b".")
    tree = opened("x.pkl").tree
    start = time.process_time()
    assert tensors(tree) == {}
    with pytest.raises(LoadingError, match="nested too deep"):
        plain(tree)
    whole = tree
    while isinstance(tree, tuple):
        tree = tree[0]
    tree.append(torch.ones(1))
    with pytest.raises(LoadingError, match="over and over"):
        tensors(whole)
    assert time.process_time() - start < 20


def test_a_memo_index_costs_nothing():
    pathlib.Path("x.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\xff......")
    assert opened("x.pkl").tree == {}


def test_changed_bytes_give_our_error_or_a_tree(tmp_path):
    """Files of every container with a few bytes changed, cut or doubled: never another error, never a long time."""
    with fakes.modules(**fakes.NVIDIA):
        state = {"a.w": torch.nn.Parameter(torch.ones(80)), "b": torch.ones(3)}
        record = fakes.module_record(state, init_kwargs={"size": np.array([3, 4])})
        files = {"x.pkl": pickle.dumps({"G": record, "n": np.arange(99.0)}, 4), "y.pkl": pickle.dumps({"G": record}, 2)}
    for name, new in (("z.pt", True), ("l.pt", False)):
        torch.save(examples()["training"], name, _use_new_zipfile_serialization=new)
        files[name] = pathlib.Path(name).read_bytes()
    save_file({"a": torch.ones(9)}, "s.safetensors")
    files["s.safetensors"] = pathlib.Path("s.safetensors").read_bytes()
    draw = random.Random(0)
    outcomes = collections.Counter()
    for name, content in files.items():
        for _ in range(60):
            changed = bytearray(content)
            for _ in range(draw.choice((1, 1, 3))):
                at = draw.randrange(len(changed))
                kind = draw.randrange(4)
                if kind == 0:
                    changed[at] = draw.randrange(256)
                elif kind == 1:
                    del changed[at : at + draw.randrange(1, 9)]
                elif kind == 2:
                    changed[at:at] = changed[at : at + draw.randrange(1, 60)]
                else:
                    changed[at] ^= 1 << draw.randrange(8)
            path = tmp_path / name
            path.write_bytes(changed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    tensors(opened(path).tree)
                    outcomes["read"] += 1
                except LoadingError:
                    outcomes["refused"] += 1
    assert outcomes["read"] > 20 and outcomes["refused"] > 80, outcomes


def test_records_are_inert():
    record = Record("os", "system", ("touch ran",))
    assert repr(record) == "Record(os.system)" and not callable(record) and record.get("x") is None
    assert not any(isinstance(value, types.FunctionType) for value in pickles._VALUES.values())
