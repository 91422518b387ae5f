"""What holds for the package as a whole: lazy imports, exports, layers, folder names, the contents of the wheel."""

import ast
import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import gen_pipelines

PACKAGE = Path(gen_pipelines.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# DESIGN order: a module imports only from its own layer and from those before it. `bundled` holds data and imports nothing.
LAYERS = "bundled hub processes schedulers models likelihood pipelines training evaluation testing conversion cli".split()


def test_import_is_quick_and_imports_no_torch():
    code = (
        "import sys, time; start = time.process_time(); import gen_pipelines; spent = time.process_time() - start;"
        "assert spent < 0.1, spent; assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*gen_pipelines._EXPORTS, *gen_pipelines._REEXPORTS])
def test_every_public_name_resolves(name):
    value = getattr(gen_pipelines, name)
    assert value is not None and name in dir(gen_pipelines)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        gen_pipelines.NoSuchName  # noqa: B018


def test_every_scheduler_is_public():
    from gen_pipelines.schedulers import SCHEDULERS

    for scheduler in SCHEDULERS.values():
        assert getattr(gen_pipelines, scheduler.__name__) is scheduler


def test_no_folder_is_named_like_a_pipeline_of_diffusers():
    """diffusers records such a folder's name as the library of a component, which then cannot be loaded."""
    import diffusers.pipelines

    for folder in {path.parent.name for path in MODULES if path.parent != PACKAGE}:
        assert not hasattr(diffusers.pipelines, folder), folder


def imported_layers(path: Path) -> set[str]:
    package = ["gen_pipelines", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names |= {f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("gen_pipelines.")} & set(LAYERS)


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != PACKAGE], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_layers_before_its_own(path):
    own = LAYERS.index(path.relative_to(PACKAGE).parts[0])
    later = {layer for layer in imported_layers(path) if LAYERS.index(layer) > own}
    assert not later, f"{path.relative_to(ROOT)} imports from {later}"


def setup_arguments() -> dict:
    """What setup.py hands to setuptools, without building anything."""
    import setuptools

    arguments: dict = {}
    original, setuptools.setup = setuptools.setup, lambda **given: arguments.update(given)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return arguments


def test_the_wheel_takes_every_file_and_every_package():
    given = setup_arguments()
    assert given["version"] == gen_pipelines.__version__
    packages = {".".join(["gen_pipelines", *path.parent.relative_to(PACKAGE).parts]) for path in PACKAGE.rglob("__init__.py")}
    assert set(given["packages"]) == packages
    shipped = {file for pattern in given["package_data"]["gen_pipelines"] for file in PACKAGE.glob(pattern)}
    data = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in {".py", ".pyc"}}
    assert data <= shipped, f"missing from the wheel: {data - shipped}"


def test_the_console_script_exists():
    target = setup_arguments()["entry_points"]["console_scripts"][0].partition("=")[2]
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_bundled_pipelines_are_small_and_safe():
    files = [file for file in (PACKAGE / "bundled").rglob("*") if file.is_file() and file.suffix not in {".py", ".pyc"}]
    assert sum(file.stat().st_size for file in files) < 80e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".txt", ".yaml"}


def test_bundled_configs_hold_no_path():
    """diffusers writes `_name_or_path`, a path of the machine that saved, on every re-save."""
    for file in (PACKAGE / "bundled").rglob("*.json"):
        assert "_name_or_path" not in file.read_text(encoding="utf-8"), file
