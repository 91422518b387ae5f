"""`info` reads configs and headers, never weights."""

import json
import struct

import pytest

from gen_pipelines.cli.info import card_metadata, describe_model, layout, read_metrics
from gen_pipelines.cli.main import main
from gen_pipelines.cli.repository import Repository, read_shapes


def write_safetensors(path, tensors: dict[str, list[int]], cut: int = 0) -> None:
    """A safetensors file of zeros, written by hand from the format's definition; `cut` bytes are missing at its end."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(end)
    path.write_bytes(data[: len(data) - cut])


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder with everything that info reads, and no weights that could be loaded."""
    index = {
        "_class_name": "LatentTextToImagePipeline",
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["gen_pipelines", "FlowMatchEulerScheduler"],
        "unet": [None, None],
        "guidance": 3.0,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    metadata = {"license": "apache-2.0", "model-index": [{"results": [{"metrics": [{"type": "top1", "name": "top-1", "value": 0.5}]}]}]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(metadata)}\n---\n# Card\n")  # JSON is YAML
    (tmp_path / "transformer").mkdir()
    write_safetensors(tmp_path / "transformer" / "model.safetensors", {"a": [2, 3], "b": [], "c": [0, 4]})
    write_safetensors(tmp_path / "transformer" / "model.fp16.safetensors", {"a": [2, 3], "b": [], "c": [0, 4]})
    return tmp_path


def test_what_a_folder_says(folder):
    facts = describe_model(str(folder))
    assert facts["pipeline"] == "LatentTextToImagePipeline"
    assert facts["licence"] == "apache-2.0"
    assert facts["components"] == {
        "transformer": {"class": "PixArtTransformer2DModel", "parameters": 7},  # 2 * 3 + 1 + 0, counted once
        "tokenizer": {"class": "CLIPTokenizer", "parameters": None},
        "scheduler": {"class": "FlowMatchEulerScheduler", "parameters": None},
    }
    assert facts["parameters"] == 7
    assert facts["metrics"] == {"top-1": 0.5}


def test_printed_and_as_json(folder, capsys):
    assert main(["info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  transformer  PixArtTransformer2DModel  7 parameters" in lines
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe_model(str(folder))


def test_what_the_network_of_a_diffusers_folder_was_trained_to_do(sd_folder):
    facts = describe_model(sd_folder)
    assert facts["scheduler"] == "DDIMScheduler" and facts["parameters"] > 0
    parameterization = facts["parameterization"]
    assert parameterization == {
        "path": "DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear')",
        "prediction": "epsilon",
        "time_input": "index",
    }


def test_the_fingerprint_follows_the_weights_and_not_the_card(folder):
    before = Repository.open(str(folder)).fingerprint()
    (folder / "README.md").write_text("another card")
    assert Repository.open(str(folder)).fingerprint() == before
    weights = folder / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert Repository.open(str(folder)).fingerprint() != before


@pytest.mark.parametrize("cut", [1, 24, 60, 10_000])
def test_a_weight_file_that_is_cut_short(folder, cut, capsys):
    write_safetensors(folder / "transformer" / "model.safetensors", {"a": [2, 3]}, cut=cut)
    assert main(["info", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "model.safetensors" in err and "save it again" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("../../elsewhere.safetensors", "no safetensors file of its folder; do not trust it"),
        ("/etc/passwd", "no safetensors file of its folder; do not trust it"),
        ("model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors"),  # it is not there
    ],
)
def test_shards_that_loading_would_refuse(folder, shard, says, capsys):
    table = {"weight_map": {"a": "model.safetensors", "b": shard}}
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(table))
    assert main(["info", str(folder)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_component_outside_the_folder(folder, capsys):
    index = json.loads((folder / "model_index.json").read_text()) | {"../evil": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert main(["info", str(folder)]) == 2
    assert "'../evil' is no name of a component" in capsys.readouterr().err


def test_shapes_are_those_that_safetensors_reads(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(()), "c": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    assert read_shapes(tmp_path / "x.safetensors") == {"a": [3, 2], "b": [], "c": [5]}


def test_card_metadata():
    assert card_metadata(None) == {} and card_metadata("# A card") == {}
    assert card_metadata("---\nlicense: mit\n---\ntext\n---\n") == {"license": "mit"}
    with pytest.raises(ValueError, match="README.md"):
        card_metadata("---\na: [\n---\n")


def test_metrics_of_card_and_evaluation():
    assert read_metrics({}, {"fid": 3.5, "protocol": {"n": 5}}) == {"fid": 3.5}


def test_layout_leaves_out_what_is_not_known():
    assert layout({"model": "x", "scheduler": None, "metrics": {}, "parameters": 12345}) == ["model       x", "parameters  12,345"]
