"""Configs and weight files changed at random: what comes out is a pipeline's component, or our own error; never anything else."""

import contextlib
import json
import struct
from pathlib import Path

import conftest
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gen_pipelines import DDIMScheduler, FlowMatchEulerScheduler, LoadingError
from gen_pipelines.hub.loading import load_component, read_header, read_index

COMPONENTS = {
    "vae": ("diffusers", "AutoencoderKL", "config.json"),
    "transformer": ("diffusers", "PixArtTransformer2DModel", "config.json"),
    "unet": ("diffusers", "UNet2DConditionModel", "config.json"),
    "text_encoder": ("transformers", "CLIPTextModel", "config.json"),
    "tokenizer": ("transformers", "CLIPTokenizer", "tokenizer_config.json"),
    "scheduler": ("gen_pipelines", "FlowMatchEulerScheduler", "scheduler_config.json"),
    "hosted": ("diffusers", "DDIMScheduler", "scheduler_config.json"),
}

NUMBERS = st.one_of(st.sampled_from([0, 1, -1, 2, 3, 7, 10**6, 2**31 - 1, 2**31, 10**30, 0.5, -0.5, 1e308]), st.integers(-(2**40), 2**40))
WORDS = st.sampled_from(["", "evil", "../evil", "/etc/passwd", "gelu", "linear", "epsilon", "evil/kernel", "torch.nn", "\x00", "x" * 300])
PLAIN = st.one_of(NUMBERS, WORDS, st.none(), st.booleans())
VALUES = st.recursive(PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=3)), max_leaves=6)
# key (by its place), new value; place -1 adds a key, and no value removes one
CHANGES = st.lists(st.tuples(st.integers(-1, 60), st.one_of(st.just(KeyError), VALUES), WORDS), min_size=1, max_size=3)

quick = settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
thorough = settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("vae", "transformer", "unet", "text_encoder", "tokenizer"):
        getattr(conftest, f"make_{name}")().save_pretrained(str(folder / name))
    FlowMatchEulerScheduler().save_pretrained(folder / "scheduler")
    DDIMScheduler().save_pretrained(folder / "hosted")
    return folder


def changed(content, changes):
    content = dict(content)
    for place, value, word in changes:
        keys = sorted(content)
        key = f"new {word}" if place < 0 or not keys else keys[place % len(keys)]
        if value is KeyError:
            content.pop(key, None)
        else:
            content[key] = value
    return content


def loads_or_is_refused(folder: Path, library: str, name: str) -> None:
    message = "fine"
    try:
        loaded = load_component(folder, library, name)
    except LoadingError as error:
        message = str(error)
    else:
        assert type(loaded).__name__ == name
    assert message and "\n" not in message and len(message) < 2000


def check_config(parts: Path, name: str, changes) -> None:
    library, cls, config = COMPONENTS[name]
    file = parts / name / config
    before = file.read_text()
    try:
        file.write_text(json.dumps(changed(json.loads(before), changes)))
        loads_or_is_refused(file.parent, library, cls)
    finally:
        file.write_text(before)


@pytest.mark.parametrize("name", ["vae", "scheduler", "tokenizer"])
def test_changed_configs(parts, name):
    quick(given(CHANGES)(lambda changes: check_config(parts, name, changes)))()


@pytest.mark.slow  # thousands of examples
@pytest.mark.parametrize("name", COMPONENTS)
def test_changed_configs_by_the_thousand(parts, name):
    thorough(given(CHANGES)(lambda changes: check_config(parts, name, changes)))()


@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode), VALUES.map(lambda v: json.dumps(v).encode())))
@settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_index(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_bytes(content)
    with pytest.raises(LoadingError):
        read_index(folder)


def check_weights(parts: Path, edits, flips, end) -> None:
    """A weight file with header entries replaced, bits flipped and its end cut or padded."""
    file = parts / "vae/diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    names = sorted(header)
    for place, field, value in edits:
        entry = header[names[place % len(names)]]
        if isinstance(entry, dict):
            entry[field] = value
    text = json.dumps(header).encode() if edits else whole[8 : 8 + length]
    data = bytearray(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    for place in flips:  # mostly in the header: a flipped bit among the numbers is another number
        data[place // 8 % (8 + len(text))] ^= 1 << (place % 8)
    data = bytes(data[:end]) if end < 0 else bytes(data) + bytes(end)
    try:
        file.write_bytes(data)
        with contextlib.suppress(LoadingError):
            read_header(file)
            loads_or_is_refused(file.parent, "diffusers", "AutoencoderKL")
    finally:
        file.write_bytes(whole)


FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", "evil"])
ENTRIES = st.one_of(VALUES, st.sampled_from(["F16", "I64", "F8_E4M3", [1], [2**40], [0, 2**50], [0, 0]]))
EDITS = st.lists(st.tuples(st.integers(0, 300), FIELDS, ENTRIES), max_size=3)
FLIPS = st.lists(st.integers(0, 10**6), max_size=2)
ENDS = st.sampled_from([0, 0, 0, -1, -1000, -(10**5), 1, 8])


def test_changed_weight_files(parts):
    quick(given(EDITS, FLIPS, ENDS)(lambda edits, flips, end: check_weights(parts, edits, flips, end)))()


@pytest.mark.slow  # thousands of examples
def test_changed_weight_files_by_the_thousand(parts):
    many = settings(thorough, max_examples=1500)
    many(given(EDITS, FLIPS, ENDS)(lambda edits, flips, end: check_weights(parts, edits, flips, end)))()
