"""What holds for every format: told from its keys, every key placed, the same bytes twice, whole pipelines, clear errors.

`checkpoints/NAME.py` writes a checkpoint of the format NAME: `write(folder) -> path`, `OPTIONS` for the conversion, and, where the
target is a network that can be built at once, `networks()`, the weights that must come out, by component.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gen_pipelines import AutoPipeline, convert
from gen_pipelines.conversion import FORMATS, read, tensors
from gen_pipelines.conversion.base import PROVENANCE_NAME, detect


def example(name):
    return importlib.import_module(f"conversion.checkpoints.{name}")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}

    def source(name):
        if name not in made:
            made[name] = example(name).write(tmp_path_factory.mktemp(name))
        return made[name]

    return source


def test_every_format_has_an_example():
    there = {file.stem for file in (Path(__file__).parent / "checkpoints").glob("*.py")}
    assert set(FORMATS) <= there, "write tests/conversion/checkpoints/NAME.py"


@pytest.mark.parametrize("name", FORMATS)
class TestFormat:
    def test_says_what_it_is(self, name):
        format = FORMATS[name]
        assert format.name == name and format.title and format.licence and isinstance(format.options, dict | type(FORMATS))

    def test_is_told_from_all_others(self, name, sources):
        assert detect(read(sources(name))).name == name

    def test_a_dry_run_writes_nothing_and_names_every_key(self, name, sources):
        before = sorted(sources(name).parent.rglob("*"))
        plan = convert(sources(name), dry_run=True, options=example(name).OPTIONS)
        text = plan.describe()
        assert sorted(sources(name).parent.rglob("*")) == before
        keys = tensors(read(sources(name)).tree)
        placed = [key for key in keys if key in plan.used]
        dropped = [key for key in keys if key not in plan.used]
        assert placed and all(f"{key} -> " in text for key in placed)
        patterns = tuple(pattern.rstrip("*") for pattern in plan.dropped)
        assert all(key.startswith(patterns) for key in dropped)

    def test_twice_the_same_bytes_and_the_weights_of_the_source(self, name, sources, tmp_path):
        folders = [tmp_path / "a" / "net", tmp_path / "b" / "net"]
        for folder in folders:
            convert(sources(name), folder, options=example(name).OPTIONS)
        files = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in folders]
        assert files[0] == files[1] and Path(PROVENANCE_NAME) in files[0]
        for file in files[0]:
            assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
        facts = json.loads((folders[0] / PROVENANCE_NAME).read_text())
        card = (folders[0] / "README.md").read_text()
        assert facts["source"]["sha256"] in card and facts["licence"] in card and str(tmp_path) not in card + json.dumps(facts)
        convert(sources(name), folders[0], options=example(name).OPTIONS)  # over an earlier conversion
        assert (folders[0] / "README.md").read_text() == card
        if (folders[0] / "model_index.json").is_file():
            pipe = AutoPipeline.from_pretrained(str(folders[0]))
            for component, network in getattr(example(name), "networks", dict)().items():
                state = getattr(pipe, component).state_dict()
                assert set(state) == set(network.state_dict())
                for key, tensor in network.state_dict().items():
                    near = getattr(example(name), "TOLERANCE", 0)  # where the map computes, and rounds
                    torch.testing.assert_close(state[key], tensor, rtol=near, atol=0, msg=f"{component}.{key}")
            pipe.save_pretrained(tmp_path / "again")
            for file in (f for f in files[0] if f.suffix == ".safetensors"):
                again, first = (load_file(side / file) for side in (tmp_path / "again", folders[0]))
                if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in first.values()):  # loaded, and so saved, in float32
                    assert all(torch.equal(again[key], tensor.to(again[key].dtype)) for key, tensor in first.items())
                else:
                    assert (tmp_path / "again" / file).read_bytes() == (folders[0] / file).read_bytes(), file

    def test_an_unknown_option_is_refused(self, name, sources):
        with pytest.raises(ValueError, match="has no option nonsense"):
            convert(sources(name), dry_run=True, format=name, options={"nonsense": 1})

    def test_a_file_cut_short_leaves_nothing(self, name, sources, tmp_path):
        source = sources(name)
        if source.is_dir():
            pytest.skip("a folder of files")
        whole = source.read_bytes()
        for share in (0.1, 0.6, 0.999):
            cut = tmp_path / source.name
            cut.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(ValueError, match=source.name):
                convert(cut, tmp_path / "out")
            assert [p.name for p in tmp_path.iterdir()] == [source.name]
