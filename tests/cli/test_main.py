"""The command line as a user meets it: help without torch, one line for every bad input, nothing written."""

import subprocess
import sys
import textwrap

import pytest

from gen_pipelines import __version__
from gen_pipelines.cli import main as cli
from gen_pipelines.cli.main import VERBS, main

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "datasets", "huggingface_hub"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_of(capsys, *words: str, status: int = 2) -> str:
    """The one line that a failing command prints."""
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gen-pipelines: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS), ["--version"]])
def test_help_is_quick_and_imports_nothing_heavy(words):
    out = run_python(f"""
        import sys, time
        from gen_pipelines.cli.main import main
        assert main({words!r}) == 0
        assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
        assert time.process_time() < 0.2, time.process_time()  # of this process, the start of Python included
    """)
    assert "gen-pipelines" in out


def test_help_lists_the_verbs_that_exist(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, (module, _) in VERBS.items():
        assert f"\n  {verb} " in out
        assert hasattr(sys.modules.get(module) or __import__(module, fromlist=["run"]), "run")


@pytest.mark.parametrize("words", [["help", "push"], ["-h", "push"], ["--help", "push"]])
def test_help_before_a_verb_is_that_of_the_verb(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: gen-pipelines push")


def test_a_model_that_is_neither_here_nor_on_the_hub(capsys, monkeypatch):
    """The connection fails with an error of the package that huggingface_hub asks with, which is no OSError."""
    from huggingface_hub import HfApi

    class ConnectError(Exception):
        pass

    ConnectError.__module__ = "httpx._exceptions"

    def fail(*args, **kwargs):
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", fail)
    for words in (["info"], ["generate", "--model"]):
        assert "runs/mnst: no such folder, and the Hub does not give it: Name or service" in error_of(capsys, *words, "runs/mnst")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gen-pipelines {__version__}\n"


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "gen_pipelines", "generate"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gen-pipelines: error: no prompt")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], f"a verb comes first, one of {', '.join(VERBS)}"),
        (["generat", "a cat"], "did you mean 'generate'"),
        (["draw"], f"unknown verb 'draw'; there are {', '.join(VERBS)}"),
        (["generate"], "no prompt"),
        (["generate", "a cat", "--steps", "0"], "--steps 0: at least 1"),
        (["generate", "a cat", "--steps", "many"], "invalid int value: 'many'"),
        (["generate", "a cat", "--guidance", "nan"], "--guidance nan: must be a finite number"),
        (["generate", "a cat", "--guidance", "inf"], "--guidance inf: must be a finite number"),
        (["generate", "a cat", "--num", "0"], "--num 0: at least 1"),
        (["generate", "a cat", "--batch-size", "0"], "--batch-size 0: at least 1"),
        (["generate", "a cat", "--seed", "-1"], "--seed -1: must lie between 0"),
        (["generate", "a cat", "--num", "2", "--seed", str(2**63 - 1)], "the last of 2 pictures"),
        (["generate", "a cat", "--size", "big"], "'big' is not a size"),
        (["generate", "a cat", "--size", "0x64"], "--size 0x64: both sides"),
        (["generate", "a cat", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "a cat", "--step", "3"], "unrecognized arguments: --step 3, did you mean --steps?"),
        (["generate", "--model", "."], "is no pipeline: it has no model_index.json"),
        (["edit", "--model", ".", "--walk", "3", "--out", "walk.png"], "is no pipeline: it has no model_index.json"),
        (["generate", "a cat", "--out", "cat.jpg"], "pictures are written as PNG"),
        (["generate", "a cat", "--out", "cat.txt"], "--out cat.txt: .txt is no ending of pictures; name a .png file"),
        (["generate", "a cat", "a dog", "--out", "pets.png"], "one file cannot take 2 pictures"),
        (["generate", "--prompts-file", "nothing.txt"], "--prompts-file nothing.txt: No such file"),
        (["generate", "--like", "nothing.png"], "nothing.png: no such picture"),
        (["generate", "a cat", "--model", "bundled:nothing"], "no bundled pipeline 'nothing'"),
        (["generate", "a cat", "--model", "nothing"], "nothing: no such folder"),
        (["info", "nothing"], "nothing: no such folder"),
        (["info", "nothing.png"], "nothing.png: no such picture"),
        (["train", "recipe.yaml"], "--output-dir"),
        (["train", "recipe.yaml", "--output-dir", "runs", "steps"], "'steps' is not a setting: write key=value"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in error_of(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_prompts_file_without_prompts(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    assert "no prompt in it" in error_of(capsys, "generate", "--prompts-file", str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    assert "not a UTF-8 text file" in error_of(capsys, "generate", "--prompts-file", str(tmp_path / "prompts.txt"))


def test_an_output_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert f"{tmp_path / 'file'} is a file" in error_of(capsys, "generate", "a cat", "--out", str(tmp_path / "file"))
    assert f"{tmp_path / 'file'} is a file" in error_of(capsys, "generate", "a cat", "--out", str(tmp_path / "file" / "a" / "cat.png"))
    assert "cannot write to /proc" in error_of(capsys, "generate", "a cat", "--out", "/proc/pictures")  # for root too


def test_a_folder_that_is_no_pipeline(capsys, tmp_path):
    assert "is no pipeline" in error_of(capsys, "info", str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": ')
    assert "model_index.json is not JSON" in error_of(capsys, "info", str(tmp_path))


def test_debug_shows_the_traceback(capsys):
    assert main(["generate", "a cat", "--steps", "0", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("gen-pipelines: error: --steps 0")


def test_a_defect_is_no_bad_input(capsys, monkeypatch):
    def fail(words):
        raise RuntimeError("the loss is\nnot finite")

    monkeypatch.setattr(cli, "dispatch", fail)
    assert error_of(capsys, "info", "x", status=1).endswith(
        "RuntimeError: the loss is not finite; run again with --debug for the traceback\n"
    )


def test_interruption(capsys, monkeypatch):
    def interrupt(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", interrupt)
    assert main(["info", "x"]) == 130
    assert capsys.readouterr().err == "gen-pipelines: interrupted\n"
