"""`convert` from the command line: one line for every error, nothing half-written, and what a dry run says."""

import pickle
import subprocess

import pytest
import torch
import yaml
from conversion.checkpoints import stylegan3

from gen_pipelines.cli.main import main
from tests.hub.client import Client
from tests.hub.loopback import Server


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return stylegan3.write(tmp_path_factory.mktemp("source"))


def failing(words, capsys, match):
    assert main(["convert", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("gen-pipelines: error: ") and "Traceback" not in err
    assert match in err


def test_a_file_becomes_a_folder_that_draws(source, tmp_path, capsys):
    assert main(["convert", str(source), "--to", str(tmp_path / "cats"), "--license", "other", "--set", "network=G"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cats'}\n"
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["cats/README.md", "cats/conversion.json", "cats/generator/config.json",
                     "cats/generator/diffusion_pytorch_model.safetensors", "cats/model_index.json"]  # fmt: skip
    assert main(["generate", "--model", str(tmp_path / "cats"), "--out", str(tmp_path / "cat.png"), "--seed", "1"]) == 0
    assert (tmp_path / "cat.png").is_file()


def test_a_dry_run(source, tmp_path, capsys):
    assert main(["convert", str(source), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("format: stylegan3", "licence: NVIDIA", "pipeline: StyleGANPipeline", "variant: 'r'", "numbers,",
                 "G_ema.mapping.w_avg -> generator.mapping.w_avg", "G.*: the moving average G_ema is taken"):  # fmt: skip
        assert part in out
    assert not list(tmp_path.iterdir())


def test_every_error_is_one_line_and_leaves_nothing(source, tmp_path, capsys):
    to = ["--to", tmp_path / "out"]
    failing([source], capsys, "--to FOLDER is needed")
    failing([tmp_path / "no.pkl", *to], capsys, "no.pkl")
    failing([source, *to, "--format", "nonsense"], capsys, "is none of")
    failing([source, *to, "--set", "network"], capsys, "write --set key=value")
    failing([source, *to, "--set", "networks=G"], capsys, "has no option networks")
    failing([source, "--dry-run", "--push", "a/b"], capsys, "leave one of them out")
    failing([source, "--to", source], capsys, "it is a file")
    failing([source, "--to", source.parent], capsys, "is not empty")
    torch.save({"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}, tmp_path / "mine.pt")
    seen = "is of no layout that is known (its first keys of 2 are layer.weight (2, 3), layer.bias (2,))"
    failing([tmp_path / "mine.pt", *to], capsys, seen)
    (tmp_path / "trap.pkl").write_bytes(b"\x80\x04" + pickle.dumps(subprocess.call)[2:])
    failing([tmp_path / "trap.pkl", *to], capsys, "asks for subprocess.call")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.pt", "trap.pkl"]


@pytest.mark.slow  # starts a process
def test_push(source, tmp_path):
    server = Server()
    client = Client(tmp_path / "client", server.url, server.token)
    try:
        words = ["convert", str(source), "--to", str(tmp_path / "cats"), "--push", "tester/cats", "--private"]
        assert client.run("from gen_pipelines.cli.main import main\nresult = main(words)", words=words) == 0
    finally:
        client.stop()
        server.stop()
    files = server.repos["tester/cats"].files()
    assert {"model_index.json", "generator/diffusion_pytorch_model.safetensors", "README.md"} <= set(files)
    card = files["README.md"].data.decode()
    assert "# tester/cats" in card and yaml.safe_load(card.split("---")[1])["license"] == "other"
