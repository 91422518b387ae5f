"""Folders that are damaged or hostile: one clear error each, at once, and nothing of the folder is run."""

import json
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
from diffusers.configuration_utils import register_to_config

from gen_pipelines import AutoPipeline, FlowMatchEulerScheduler, GenerativeModel, LatentTextToImagePipeline, LoadingError
from gen_pipelines.hub.loading import component_class, load_component, read_header

EVIL = "import pathlib; pathlib.Path('ran').touch()\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("safety") / "pipe"
    LatentTextToImagePipeline(
        conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(), FlowMatchEulerScheduler(),
        transformer=conftest.make_transformer(),
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(saved, tmp_path / "pipe"))


def refused(folder, match, load=AutoPipeline.from_pretrained):
    """Loading fails with our error in one line that matches, in a second of this process and with little memory."""
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(LoadingError, match=match) as caught:
        load(folder)
    spent = time.process_time() - start
    assert spent < 1.0, spent
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kilobytes
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500, message
    assert not list(folder.parent.glob("**/ran"))


def edit(file: Path, **changes):
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is KeyError:
            del content[key]
        else:
            content[key] = value
    file.write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------------------------------------- the index


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vae": ["os", "system"]}, "os.system is outside"),
        ({"vae": ["builtins", "eval"]}, "builtins.eval is outside"),
        ({"vae": ["evil_module", "Net"]}, "evil_module.Net is outside.*pass it by its name"),
        ({"vae": ["diffusers.utils", "logging"]}, "diffusers.utils.logging is outside"),
        ({"vae": ["diffusers", "NoSuchClass"]}, "diffusers has no component class 'NoSuchClass'"),
        ({"vae": ["diffusers", "logging"]}, "diffusers has no component class 'logging'"),
        ({"vae": ["transformers", "pipeline"]}, "transformers has no component class"),
        ({"vae": ["../evil", "Net"]}, "names no class of a library"),
        ({"vae": ["/tmp/evil", "Net"]}, "names no class of a library"),
        ({"vae": ["gen_pipelines", "../Net"]}, "names no class of a library"),
        ({"../vae": ["diffusers", "AutoencoderKL"]}, "no name of a component"),
        ({"/etc/vae": ["diffusers", "AutoencoderKL"]}, "no name of a component"),
        ({"vae": ["diffusers"]}, "make no LatentTextToImagePipeline"),
        ({"vae": ["diffusers", 1]}, r"where \[library, class\] is expected"),
        ({"vae": [None, "AutoencoderKL"]}, r"where \[library, class\] is expected"),
        ({"vae": [1, 2]}, "make no LatentTextToImagePipeline"),
        ({"vae": KeyError}, "make no LatentTextToImagePipeline"),
        ({"colour": "red"}, "knows no colour"),
        ({"colour": ["diffusers", "AutoencoderKL"]}, "knows no colour"),
        ({"max_text_tokens": 10**12}, "no model has that"),
        ({"_class_name": ["evil", "Pipe"]}, "code in the repository, which is never run"),
        ({"_class_name": "EvilPipeline"}, "known neither to gen_pipelines nor to diffusers"),
        ({"_class_name": KeyError}, "names no pipeline class"),
    ],
)  # fmt: skip
def test_an_index_that_lies(folder, changes, match):
    for module in ("evil_module", "evil", "pipeline"):
        (folder / f"{module}.py").write_text(EVIL)
        (folder / "vae" / f"{module}.py").write_text(EVIL)
    edit(folder / "model_index.json", **changes)
    refused(folder, match)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b"null", b'{"_class_name": 1e999}'])
def test_an_index_or_config_that_is_no_table(folder, content):
    for file in ("model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        refused(folder, Path(file).name if b"1e999" not in content else ".")
        (folder / file).write_bytes(before)


# ------------------------------------------------------------------------------------------------------------------------- components


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("vae/config.json", {"block_out_channels": "wide"}, "vae"),
        ("vae/config.json", {"down_block_types": ["EvilBlock", "EvilBlock"]}, "vae.*EvilBlock"),
        ("vae/config.json", {"norm_num_groups": 0}, "vae"),
        ("vae/config.json", {"latent_channels": -4}, "vae"),
        ("vae/config.json", {"layers_per_block": 10**6}, "far more parameters"),
        ("vae/config.json", {"block_out_channels": [2**20, 2**21]}, "vae"),
        ("transformer/config.json", {"num_layers": 10**6}, "far more parameters"),
        ("transformer/config.json", {"sample_size": 10**5}, "numbers in its tables"),
        ("transformer/config.json", {"attention_head_dim": 2**20}, "numbers in its parameters"),
        ("transformer/config.json", {"num_layers": 10**30}, "no model has that"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}, "far more parameters"),
        ("text_encoder/config.json", {"vocab_size": 2**30}, "numbers in its parameters"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "text_encoder"),
        ("text_encoder/config.json", {"hidden_size": 48, "intermediate_size": 96}, "text_encoder.*shape"),
        ("text_encoder/config.json", {"attn_implementation": "evil/kernel"}, "code from the Hub, which is never run"),
        ("text_encoder/config.json", {"_attn_implementation": "evil/kernel:main"}, "code from the Hub, which is never run"),
        ("text_encoder/config.json", {"transformers_weights": "../evil.bin"}, "names another weight file"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "no model has that"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "scheduler|make no"),
        ("scheduler/scheduler_config.json", {"colour": "red"}, "colour"),
        ("scheduler/scheduler_config.json", {"prediction_type": "evil"}, "evil"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -1}, "not a number of tokens"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "all"}, "not a number of tokens|tokenizer"),
    ],
)  # fmt: skip
def test_a_config_that_lies(folder, file, changes, match):
    edit(folder / file, **changes)
    refused(folder, match)


def test_code_that_a_config_asks_for_is_not_run(folder):
    for part in ("text_encoder", "tokenizer", "vae"):
        (folder / part / "evil.py").write_text(EVIL)
    for file in ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "vae/config.json"):
        edit(folder / file, auto_map={"AutoModel": "evil.Net", "AutoTokenizer": ["evil.Net", "evil.Net"], "AutoConfig": "evil.Config"})
    assert isinstance(AutoPipeline.from_pretrained(folder), LatentTextToImagePipeline)
    assert not list(folder.parent.glob("**/ran"))
    for options in ({"trust_remote_code": True}, {"custom_pipeline": "evil"}):
        with pytest.raises(ValueError, match="code from a repository is never run"):
            LatentTextToImagePipeline.from_pretrained(folder, **options)


def test_adapters_and_broken_tokenizers(folder):
    (folder / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    refused(folder, "asks for another model's weights")
    (folder / "text_encoder/adapter_config.json").unlink()
    whole = (folder / "tokenizer/tokenizer.json").read_text()
    wrong = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["x", "y"]]}}'
    for broken in (whole[: len(whole) // 2], "{}", wrong):
        (folder / "tokenizer/tokenizer.json").write_text(broken)
        refused(folder, "tokenizer")


# ---------------------------------------------------------------------------------------------------------------------------- weights


def rewrite(file: Path, change):
    """The same weights under a header that `change` edits."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first_of(header):
    return min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])


def claim(**changes):
    return lambda header: header[first_of(header)].update(changes)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (claim(shape=[2**40]), "claims"),
        (claim(shape=[2**62, 2**62]), "claims"),
        (claim(shape=[-1]), "header cannot be read"),
        (claim(shape="wide"), "header cannot be read"),
        (claim(dtype="EVIL"), "header cannot be read"),
        (claim(data_offsets=[0, 2**50]), "claims|begins"),
        (claim(data_offsets=[0]), "header cannot be read"),
        (lambda header: header.pop(first_of(header)), "begins at byte"),
        (lambda header: header.update(evil=header.pop(first_of(header))), "no weights for|cannot be loaded"),
        (lambda header: header.update(evil={"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}), "begins|claims"),
        (lambda header: [entry.update(dtype="I32") for name, entry in header.items() if name != "__metadata__" and entry["dtype"] == "F32"],
         "floating point numbers are expected"),
        (lambda header: header[first_of(header)].update(shape=[1, *header[first_of(header)]["shape"]]), "shape"),
    ],
)  # fmt: skip
def test_a_header_that_lies(folder, part, change, match):
    rewrite(next((folder / part).glob("*.safetensors")), change)
    refused(folder, match)


def test_files_that_are_cut_or_flipped(folder):
    file = next((folder / "vae").glob("*.safetensors"))
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for data, match in [
        (whole[:-1], "cut short"),
        (whole[: 8 + length // 2], "cut short"),
        (whole[:5], "cut short"),
        (b"", "cut short"),
        (whole + b"\0", "longer than its header says"),
        (struct.pack("<Q", 2**62) + whole[8:], "not a safetensors file"),
        (struct.pack("<Q", length + 1) + whole[8:], "header cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + whole, "not a safetensors file"),
    ]:
        file.write_bytes(data)
        refused(folder, match)


@pytest.mark.parametrize("name", ["../text_encoder/model.safetensors", "/etc/passwd", "..", "x.bin", "a/b.safetensors", 3])
def test_an_index_of_shards_that_leads_elsewhere(folder, name):
    file = next((folder / "vae").glob("*.safetensors"))
    (folder / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file.name, "b": name}}))
    refused(folder, "no safetensors file of its folder|names no weight files")


def test_pickles_are_refused_with_the_command_that_converts_them(folder):
    marker = folder.parent / "ran"
    for part in ("vae", "text_encoder"):
        file = next((folder / part).glob("*.safetensors"))
        pickle = file.with_name({"vae": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}[part])
        file.rename(pickle)
        refused(folder, f"{part}.*pickled weights only.*not loaded.*python -c")
        pickle.rename(file)
    assert not marker.exists()


@pytest.mark.slow  # starts a process
def test_the_command_that_converts_pickles_works(folder):
    from safetensors.torch import load_file

    file = next((folder / "vae").glob("*.safetensors"))
    expected = load_file(file)
    torch.save(expected, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(LoadingError) as caught:
        AutoPipeline.from_pretrained(folder)
    command = str(caught.value).split("author: ")[1]
    arguments = shlex.split(command)
    assert arguments[0] == "python"
    done = subprocess.run([sys.executable, *arguments[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert AutoPipeline.from_pretrained(folder).vae.state_dict().keys() == expected.keys()


# ------------------------------------------------------------------------------------------------------------------ single components


class Line(GenerativeModel):
    """A network of ours, as small as can be."""

    @register_to_config
    def __init__(self, width: int = 2, depth: int = 1):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth))


def test_a_network_of_ours_alone(tmp_path):
    line = Line(width=3)
    line.save_pretrained(tmp_path / "pipe/line")
    again = Line.from_pretrained(tmp_path / "pipe", subfolder="line")
    assert torch.equal(again.parts[0].weight, line.parts[0].weight)
    config = tmp_path / "pipe/line/config.json"
    good = config.read_text()
    load = lambda folder: Line.from_pretrained(folder, subfolder="line")
    for changes, match in [
        ({"colour": 1}, "Line knows no colour"),
        ({"_class_name": "Glow"}, "is of a Glow, not of a Line"),
        ({"depth": 10**8}, "far more parameters"),
        ({"depth": 2}, "no weights for parts.1"),
        ({"width": 4}, "shape|size"),
        ({"width": None}, "cannot be loaded|line"),
    ]:
        edit(config, **changes)
        with pytest.raises(LoadingError, match=match):
            load(tmp_path / "pipe")
        config.write_text(good)
    with pytest.raises(LoadingError, match="only safetensors"):
        Line.from_pretrained(tmp_path / "pipe", subfolder="line", use_safetensors=False)
    with pytest.raises(LoadingError, match="is not a folder"):
        Line.from_pretrained(tmp_path / "nothing")
    with pytest.raises(LoadingError, match="is not a folder"):
        Line.from_pretrained(tmp_path / "pipe", subfolder="circle")


def test_known_classes_resolve():
    import diffusers
    import transformers

    assert component_class("diffusers", "AutoencoderKL") is diffusers.AutoencoderKL
    assert component_class("transformers", "CLIPTextModel") is transformers.CLIPTextModel
    assert component_class("transformers", "CLIPTokenizerFast") is transformers.CLIPTokenizerFast
    assert component_class("gen_pipelines", "FlowMatchEulerScheduler") is FlowMatchEulerScheduler
    assert component_class("gen_pipelines.schedulers.anything", "FlowMatchEulerScheduler") is FlowMatchEulerScheduler


def test_components_load_one_by_one(saved):
    index = json.loads((saved / "model_index.json").read_text())
    for name in ("vae", "text_encoder", "tokenizer", "scheduler", "transformer"):
        assert type(load_component(saved / name, *index[name])).__name__ == index[name][1]
    header = read_header(saved / "vae/diffusion_pytorch_model.safetensors")
    assert all(set(entry) == {"dtype", "shape", "data_offsets"} for entry in header.values())


def test_why_the_hub_does_not_give_a_repository_is_said_in_words():
    """The Hub's own text is "401 Client Error" both for a name that does not exist and for a private repository."""
    from types import SimpleNamespace

    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    from gen_pipelines.hub.loading import hub_reason

    response = SimpleNamespace(headers={}, request=None)
    said = {kind: hub_reason(kind("401 Client Error.\n\nmore", response=response)) for kind in
            (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError)}  # fmt: skip
    assert "agreement" in said[GatedRepoError] and "no such repository" in said[RepositoryNotFoundError]
    assert "no such branch" in said[RevisionNotFoundError] and said[HfHubHTTPError] == "401 Client Error. more"
