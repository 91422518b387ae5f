"""To the Hub and back over real HTTP: the real client against a server on this machine, nothing replaced inside the client."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.hub.client import Client, RemoteError
from tests.hub.loopback import Fault, Server

pytestmark = pytest.mark.slow  # starts processes

SETUP = """
import json, logging, pathlib, sys
sys.path[:0] = [tests]
import conftest, numpy as np, torch
from gen_pipelines import AutoPipeline, DDIMScheduler, EulerScheduler, FlowMatchEulerScheduler, LatentTextToImagePipeline
from gen_pipelines.cli.main import main

def make(seed=3, scheduler=None):
    pipe = LatentTextToImagePipeline(conftest.make_vae(), conftest.make_text_encoder(), conftest.make_tokenizer(),
                                     scheduler or FlowMatchEulerScheduler(shift=2.0), transformer=conftest.make_transformer(seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    return float(np.abs(image).sum()), image.tobytes().hex()
"""


@pytest.fixture(scope="module")
def hub():
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(tmp_path_factory.mktemp("client"), hub.url, hub.token)
    client.run(SETUP, tests=Path(__file__).parents[1])
    yield client
    client.stop()


@pytest.fixture(scope="module")
def pushed(hub, client):
    """A pipeline on the Hub, with the picture that it draws."""
    return client.run("""
pipe = make()
commit = pipe.push_to_hub("tester/tiny", commit_message="the first", license="apache-2.0", private=True, notes="## Data\\n\\nNone.")
result = {"picture": draw(pipe), "oid": commit.oid, "url": commit.commit_url}
""")


@pytest.fixture(autouse=True)
def healthy(hub):
    yield
    hub.faults.clear()


def test_a_pushed_pipeline_is_whole_and_has_a_card(hub, pushed):
    repo = hub.repos["tester/tiny"]
    files = repo.files()
    assert repo.private and repo.messages[pushed["oid"]] == "the first" and repo.references["main"] == pushed["oid"]
    assert {"model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"} <= set(files)
    assert not [name for name in files if not name.endswith((".json", ".safetensors", ".md", ".gitattributes", ".jinja", ".txt"))]
    card = files["README.md"].data.decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "gen-pipelines", "license": "apache-2.0", "pipeline_tag": "text-to-image",
                    "tags": ["gen-pipelines", "diffusers", "LatentTextToImagePipeline"]}  # fmt: skip
    assert 'AutoPipeline.from_pretrained("tester/tiny")' in card and "## Limits" in card and "## Data\n\nNone." in card
    assert b"_name_or_path" not in b"".join(file.data for name, file in files.items() if name.endswith(".json"))


def test_the_snippet_of_the_card_runs(hub, client, pushed):
    snippet = re.search(r"```python\n(.*?)```", hub.repos["tester/tiny"].files()["README.md"].data.decode(), re.DOTALL)[1]
    assert client.run(f"{snippet}\nresult = image.size") == [16, 16]


def test_a_fresh_cache_gives_the_same_picture_and_a_warm_one_asks_once(hub, client, pushed, tmp_path):
    load = "result = draw(AutoPipeline.from_pretrained('tester/tiny', cache_dir=cache))"
    hub.log.clear()
    assert client.run(load, cache=tmp_path) == pushed["picture"]
    fetched = [path for method, path, _ in hub.log if method == "GET" and "/resolve/" in path]
    assert sum(path.endswith("diffusion_pytorch_model.safetensors") for path in fetched) == 2
    hub.log.clear()
    assert client.run(load, cache=tmp_path) == pushed["picture"]
    assert not [path for method, path, _ in hub.log if "/resolve/" in path] and len(hub.log) <= 3, hub.log


def test_pushing_again_changes_nothing_but_what_changed(hub, client, pushed):
    before = hub.repos["tester/tiny"].references["main"]
    client.run("make().push_to_hub('tiny', license='apache-2.0')")  # the name alone: of whoever is logged in
    assert hub.repos["tester/tiny"].references["main"] == before  # equal files: no commit
    client.run("""
pipe = make(); pipe.scheduler = FlowMatchEulerScheduler(shift=3.0); pipe.push_to_hub("tester/again"); pipe.push_to_hub("tester/again")
pipe.scheduler = FlowMatchEulerScheduler(shift=4.0); pipe.push_to_hub("tester/again")
""")
    repo = hub.repos["tester/again"]
    first, last = list(repo.commits.values())[-2:]
    assert len(repo.commits) == 3 and {name for name in last if first[name].etag != last[name].etag} == {"scheduler/scheduler_config.json"}


def test_a_revision_is_a_branch_of_its_own(hub, client, pushed, tmp_path):
    other = client.run("pipe = make(seed=9); pipe.push_to_hub('tester/tiny', revision='experiment'); result = draw(pipe)")
    assert set(hub.repos["tester/tiny"].references) >= {"main", "experiment"}
    load = "result = draw(AutoPipeline.from_pretrained('tester/tiny', cache_dir=cache, **options))"
    assert client.run(load, cache=tmp_path, options={"revision": "experiment"}) == other != pushed["picture"]
    assert client.run(load, cache=tmp_path, options={"revision": pushed["oid"]}) == pushed["picture"]
    assert client.run(load, cache=tmp_path, options={}) == pushed["picture"]
    with pytest.raises(RemoteError, match="no-such-branch") as caught:
        client.run(load, cache=tmp_path, options={"revision": "no-such-branch"})
    assert "OSError" in caught.value.kinds


def test_a_pull_request_leaves_the_main_branch(hub, client, pushed):
    before = hub.repos["tester/tiny"].references["main"]
    url = client.run("result = make(seed=5).push_to_hub('tester/tiny', create_pr=True).pr_url")
    assert url.endswith("/discussions/1") and hub.repos["tester/tiny"].references["main"] == before


def test_a_private_repository_needs_the_token(client, pushed, tmp_path):
    with pytest.raises(RemoteError, match="tester/tiny") as caught:
        client.run("AutoPipeline.from_pretrained('tester/tiny', cache_dir=cache, token=False)", cache=tmp_path)
    assert "OSError" in caught.value.kinds
    with pytest.raises(RemoteError, match="401.*hf auth login") as caught:
        client.run("make().push_to_hub('tester/other', token='hf_wrong')")
    assert "OSError" in caught.value.kinds
    with pytest.raises(RemoteError, match="403.*may not write"):
        client.run("make().push_to_hub('somebody/else')")
    with pytest.raises(RemoteError, match="no name of a repository") as caught:
        client.run("make().push_to_hub('a/b/c')")
    assert "ValueError" in caught.value.kinds


def test_a_file_that_changed_on_the_server_is_fetched_and_nothing_else(hub, client, pushed, tmp_path):
    load = "pipe = AutoPipeline.from_pretrained('tester/changing', cache_dir=cache); result = pipe.scheduler.config.shift"
    client.run("make().push_to_hub('tester/changing')")
    assert client.run(load, cache=tmp_path) == 2.0
    config = json.loads(hub.repos["tester/changing"].files()["scheduler/scheduler_config.json"].data)
    hub.change("tester/changing", "scheduler/scheduler_config.json", json.dumps({**config, "shift": 5.0}).encode())
    hub.log.clear()
    assert client.run(load, cache=tmp_path) == 5.0
    assert not [path for method, path, _ in hub.log if method == "GET" and path.endswith(".safetensors")]


def test_a_cut_connection_is_resumed_where_it_broke(hub, client, pushed, tmp_path):
    ending = "transformer/diffusion_pytorch_model.safetensors"
    hub.faults += [Fault("GET", ending, cut_after=30_000), Fault("GET", ending, cut_after=10_000)]
    hub.log.clear()
    assert client.run("result = draw(AutoPipeline.from_pretrained('tester/tiny', cache_dir=cache))", cache=tmp_path) == pushed["picture"]
    ranges = [asked for method, path, asked in hub.log if method == "GET" and path.endswith(ending)]
    assert not hub.faults and len(ranges) == 3, ranges  # so little was not worth keeping; a longer file goes on where it broke:
    client.run("""
from diffusers.configuration_utils import register_to_config
from gen_pipelines import GenerativeModel

class Wide(GenerativeModel):
    @register_to_config
    def __init__(self, width: int = 2):
        super().__init__()
        self.layer = torch.nn.Linear(width, width, bias=False)

wide = Wide(width=2500)
wide.push_to_hub("tester/wide")
""")
    hub.faults += [Fault("GET", ".safetensors", cut_after=11 * 2**20), Fault("GET", ".safetensors", cut_after=1)]
    hub.log.clear()
    again = "result = torch.equal(Wide.from_pretrained('tester/wide', cache_dir=cache).layer.weight, wide.layer.weight)"
    assert client.run(again, cache=tmp_path)
    ranges = [asked for method, path, asked in hub.log if method == "GET" and path.endswith(".safetensors")]
    assert not hub.faults and ranges == ["", f"bytes={10 * 2**20}-", f"bytes={10 * 2**20}-"], ranges


def test_a_server_error_is_one_line_and_an_upload_is_tried_again(hub, client, pushed, tmp_path):
    hub.faults.append(Fault("GET", "/api/models/tester/tiny/revision/main", status=500, times=100))
    hub.faults.append(Fault("GET", "/api/models/tester/tiny", status=500, times=100))
    with pytest.raises(RemoteError, match="tester/tiny.*could not be fetched.*500") as caught:
        client.run("AutoPipeline.from_pretrained('tester/tiny', cache_dir=cache)", cache=tmp_path)
    assert "OSError" in caught.value.kinds and "\n" not in caught.value.message
    hub.faults[:] = [Fault("POST", "/api/models/tester/tiny/preupload/main", status=500, times=100)]
    with pytest.raises(RemoteError, match="tester/tiny: the Hub refuses.*500") as caught:
        client.run("make(seed=7).push_to_hub('tester/tiny')")
    hub.faults[:] = [Fault("POST", "objects/batch", status=503)]
    sha = client.run("result = make(seed=8).push_to_hub('tester/retried').oid")
    assert not hub.faults and hub.repos["tester/retried"].references["main"] == sha


def test_offline_the_cache_is_enough(hub, client, pushed, tmp_path_factory):
    home = tmp_path_factory.mktemp("offline")
    cache = home / "cache"
    client.run("AutoPipeline.from_pretrained('tester/tiny', cache_dir=cache)", cache=cache)
    assert client.run("result = draw(AutoPipeline.from_pretrained('tester/tiny', cache_dir=cache, local_files_only=True))", cache=cache)
    offline = Client(home, hub.url, offline=True)
    try:
        offline.run(SETUP, tests=Path(__file__).parents[1])
        hub.log.clear()
        assert offline.run("result = draw(AutoPipeline.from_pretrained('tester/tiny', cache_dir=cache))", cache=cache) == pushed["picture"]
        with pytest.raises(RemoteError, match="tester/absent") as caught:
            offline.run("AutoPipeline.from_pretrained('tester/absent', cache_dir=cache)", cache=cache)
        assert "OSError" in caught.value.kinds and not hub.log
        with pytest.raises(RemoteError, match="HF_HUB_OFFLINE"):
            offline.run("make().push_to_hub('tester/tiny')")
    finally:
        offline.stop()


def test_only_what_is_needed_is_fetched(hub, client, tmp_path):
    """The variant where there is one, no pickles, no code, no component that is given."""
    client.run("""
half = make().to(torch.float16)
half.push_to_hub("tester/variants", variant="fp16")
make().push_to_hub("tester/variants", max_shard_size="40KB")
""")
    for path in ("vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "pipeline.py", "vae/evil.py"):
        hub.change("tester/variants", path, b"raise SystemExit")
    hub.log.clear()
    client.run("""
pipe = AutoPipeline.from_pretrained("tester/variants", cache_dir=cache, variant="fp16", vae=conftest.make_vae())
assert pipe.transformer.dtype == torch.float32
""", cache=tmp_path)
    fetched = [path.split("/resolve/")[1].split("/", 1)[1] for method, path, _ in hub.log if method == "GET" and "/resolve/" in path]
    assert sorted(name for name in fetched if name.endswith(".safetensors")) == [
        "text_encoder/model.fp16.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors"
    ]  # fmt: skip
    assert not [name for name in fetched if name.endswith((".bin", ".py")) or name.startswith("vae/")]
    hub.log.clear()
    client.run("result = draw(AutoPipeline.from_pretrained('tester/variants', cache_dir=cache))", cache=tmp_path / "plain")
    fetched = [path for method, path, _ in hub.log if method == "GET" and "/resolve/" in path]
    assert sum("diffusion_pytorch_model-0000" in path for path in fetched) > 2 and not [path for path in fetched if "fp16" in path]


def test_a_card_that_a_person_edited_stays(hub, client, tmp_path):
    client.run("make().save_pretrained(folder, license='mit')", folder=tmp_path / "run")
    evaluation = {"dataset": "mnist", "split": "test", "metrics": {"FID": 3.5}, "protocol": {"n": 9}}
    (tmp_path / "run/evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/state.pt").write_bytes(b"pickled")
    (tmp_path / "run/weights.bin").write_bytes(b"pickled")
    push = "result = main(['push', folder, 'tester/card', '--commit-message', 'from the shell', '--private'])"
    assert client.run(push, folder=tmp_path / "run") == 0
    repo = hub.repos["tester/card"]
    assert repo.private and repo.messages[repo.references["main"]] == "from the shell"
    assert not [name for name in repo.files() if "checkpoints" in name or name.endswith(".bin")]
    card = repo.files()["README.md"].data.decode()
    index = yaml.safe_load(card.split("---")[1])["model-index"]
    assert index[0]["results"][0]["metrics"][0] == {"type": "fid", "value": 3.5, "name": "FID"}
    assert index[0]["results"][0]["dataset"] == {"name": "mnist", "type": "mnist", "split": "test"}
    assert "| FID | 3.5 |" in card and "Measured with: n 9." in card

    (tmp_path / "run/evaluation.json").write_text(json.dumps({"dataset": "mnist", "metrics": {"FID": 2.5}}))
    assert client.run(push, folder=tmp_path / "run") == 0  # a generated card that nobody touched is brought up to date
    card = repo.files()["README.md"].data.decode()
    assert "| FID | 2.5 |" in card and "3.5" not in card
    edited = card.replace("## Limits", "## What I know of it\n\nIt likes red.\n\n## Limits")
    assert 'from_pretrained("tester/card")' in card and "# tester/card" in card
    hub.change("tester/card", "README.md", edited.encode())
    (tmp_path / "run/evaluation.json").write_text(json.dumps({"dataset": "mnist", "metrics": {"FID": 1.5}}))
    assert client.run(push, folder=tmp_path / "run") == 0
    client.run("make().push_to_hub('tester/card')")
    assert repo.files()["README.md"].data.decode() == edited


def test_networks_and_schedulers_are_pushed_and_pulled_alone(hub, client, tmp_path):
    client.run("""
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from gen_pipelines import BridgedScheduler, GenerativeModel
import diffusers

class Line(GenerativeModel):
    @register_to_config
    def __init__(self, width: int = 2):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

line = Line(width=3)
line.push_to_hub("tester/line", license="mit", commit_message="a line")
line.push_to_hub("tester/nested", subfolder="part/line")
again = Line.from_pretrained("tester/line", cache_dir=cache)
nested = Line.from_pretrained("tester/nested", subfolder="part/line", cache_dir=cache)
assert torch.equal(again.layer.weight, line.layer.weight) and torch.equal(nested.layer.weight, line.layer.weight)
DDIMScheduler(beta_end=0.013).push_to_hub("tester/ddim")
assert DDIMScheduler.from_pretrained("tester/ddim", cache_dir=cache).config.beta_end == 0.013
BridgedScheduler(diffusers.DDPMScheduler(beta_end=0.014)).push_to_hub("tester/hosted")
assert diffusers.DDPMScheduler.from_pretrained("tester/hosted", cache_dir=cache).config.beta_end == 0.014
""", cache=tmp_path)
    assert set(hub.repos["tester/line"].files()) >= {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    assert set(hub.repos["tester/nested"].files()) >= {"part/line/config.json"} and "README.md" not in hub.repos["tester/nested"].files()
    card = hub.repos["tester/line"].files()["README.md"].data.decode()
    assert "license: mit" in card and 'Line.from_pretrained("tester/line")' in card
    card = hub.repos["tester/hosted"].files()["README.md"].data.decode()
    assert "from diffusers import DDPMScheduler" in card and 'scheduler = DDPMScheduler.from_pretrained("tester/hosted")' in card


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="the extra open-clip is not installed")
def test_open_clips_own_layout_on_the_hub(hub, client, tmp_path):
    hub_files = client.run("""
from gen_pipelines import OpenCLIPTextEncoder
from tests.models.test_open_clip import TEXT, make_model, write_layout
write_layout(pathlib.Path(folder), make_model(), "plain")
from huggingface_hub import HfApi
HfApi().create_repo("tester/clip"); HfApi().upload_folder(repo_id="tester/clip", folder_path=folder)
HfApi().create_repo("tester/pickled"); HfApi().upload_file(repo_id="tester/pickled", path_in_repo="open_clip_config.json",
                                                           path_or_fileobj=folder + "/open_clip_config.json")
encoder = OpenCLIPTextEncoder.from_pretrained("tester/clip", skip_layers=1, cache_dir=cache)
assert encoder.config.skip_layers == 1
expected = OpenCLIPTextEncoder.from_open_clip(make_model(), text_config=TEXT)
result = all(torch.equal(a, b) for a, b in zip(encoder.parameters(), expected.parameters(), strict=True))
""", folder=tmp_path / "clip", cache=tmp_path / "cache")
    assert hub_files is True
    with pytest.raises(RemoteError, match="tester/pickled.*pickled.*python -c"):
        client.run("OpenCLIPTextEncoder.from_pretrained('tester/pickled', cache_dir=cache)", cache=tmp_path / "cache")


def test_a_server_that_is_gone(client, pushed, tmp_path_factory):
    home = tmp_path_factory.mktemp("gone")
    server = Server()
    lonely = Client(home, server.url, server.token)
    try:
        lonely.run(SETUP, tests=Path(__file__).parents[1])
        lonely.run("make().push_to_hub('tester/tiny'); AutoPipeline.from_pretrained('tester/tiny')")
        server.stop()
        assert lonely.run("result = draw(AutoPipeline.from_pretrained('tester/tiny'))") == pushed["picture"]  # the cache
        with pytest.raises(RemoteError, match="tester/absent") as caught:
            lonely.run("AutoPipeline.from_pretrained('tester/absent')")
        assert "OSError" in caught.value.kinds
        with pytest.raises(RemoteError, match="tester/tiny.*cannot be reached") as caught:
            lonely.run("make().push_to_hub('tester/tiny')")
        assert "OSError" in caught.value.kinds
    finally:
        lonely.stop()
