"""The README and docs/: every snippet is marked, every link leads somewhere, and what is marked runnable runs.

Above each bash or python block stands `<!-- run -->`, or `<!-- shown: why it is not run -->`. The blocks of a page run in order, in one new
folder; its python blocks share their names. `make docs` runs them (marker docs); the rest of this file is in the fast tests.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<above>[^\n]*)\n(?P<indent> *)```(?P<language>python|bash)\n(?P<code>.*?)\n(?P=indent)```", re.DOTALL)
MARK = re.compile(r" *<!-- (?:(?P<run>run)|shown: (?P<why>[^\n]+)) -->")
LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?P<target>[^)#\s]+)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Snippet:
    language: str
    code: str
    line: int
    run: bool


def snippets(page: Path) -> list[Snippet]:
    text = "\n" + page.read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        mark = MARK.fullmatch(block["above"])
        assert mark, f"{page.relative_to(ROOT)}:{line}: write <!-- run --> or <!-- shown: why --> above this {block['language']} block"
        indent = len(block["indent"])
        code = "\n".join(row[indent:] for row in block["code"].splitlines())
        found.append(Snippet(block["language"], code, line, run=mark["run"] is not None))
    return found


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_snippet_is_marked_and_parses(page):
    text = page.read_text(encoding="utf-8")
    assert len(snippets(page)) == len(re.findall(r"^ *```(?:python|bash)\b", text, re.MULTILINE)), (
        "a fence that is not closed, or has options"
    )
    for snippet in snippets(page):
        if snippet.language == "python":
            compile(snippet.code, f"{page_id(page)}:{snippet.line}", "exec")
        else:
            subprocess.run(["bash", "-n", "-c", snippet.code], check=True)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_somewhere(page):
    for link in LINK.finditer(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)):
        target = link["target"]
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page_id(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_recipes_and_names_in_snippets_exist(page):
    """Also of the blocks that are only shown: what they name is there."""
    import gen_pipelines

    for snippet in snippets(page):
        for recipe in re.findall(r"\bconfigs/[\w./-]+\.yaml", snippet.code):
            assert (ROOT / recipe).is_file(), f"{page_id(page)}:{snippet.line}: {recipe}"
        for names in re.findall(r"^from gen_pipelines import (.+)$", snippet.code, re.MULTILINE):
            for name in names.split(","):
                assert name.strip() in gen_pipelines.__all__, f"{page_id(page)}:{snippet.line}: {name}"


def test_every_page_of_docs_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

    # mkdocs.yml is plain YAML; if it ever holds Python tags this must become mkdocs' own loader
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert pages(navigation) == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if ROOT / "docs" in page.parents}


DRIVER = """
import subprocess, sys
names = {"__name__": "__main__"}
for language, code, where in SNIPPETS:
    print("---", where, flush=True)
    if language == "python":
        exec(compile(code, where, "exec"), names)
    elif subprocess.run(["bash", "-euo", "pipefail", "-c", code]).returncode:
        sys.exit(f"{where} failed")
"""


@pytest.mark.docs
@pytest.mark.parametrize("page", [page for page in PAGES if any(s.run for s in snippets(page))], ids=page_id)
def test_snippets_run(page, tmp_path):
    todo = [(s.language, s.code, f"{page_id(page)}:{s.line}") for s in snippets(page) if s.run]
    for folder in ("configs", "examples"):  # as from the root of the repository
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    hub = None
    if page.name == "push.md":  # speaks to a Hub: one on this machine
        from tests.hub.loopback import Server

        hub = Server()
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", f"SNIPPETS = {todo!r}\n{DRIVER}"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    if hub is not None:
        hub.stop()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
