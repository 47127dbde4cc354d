"""What the Markdown files promise exists: links, paths, flags, and Python that runs."""

import re
from pathlib import Path

import pytest

from hfprune_fast.cli import cli

ROOT = Path(__file__).parent.parent
MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "RELEASE", "SECURITY"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code_blocks(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def python_of(page: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert blocks, f"{page.name} has no Python"
    return "\n".join(blocks)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", without_code_blocks(page)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for path in re.findall(r"`(\w[\w.]*(?:/[\w.-]*)+)`", without_code_blocks(page)):
        if "NAME" not in path:  # stands for a name of one's own
            found = (ROOT / path).exists() or (ROOT / "hfprune_fast" / path).exists()
            assert found, f"{page.name} names {path}"


@pages
def test_tests_that_are_named_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text("utf-8")):
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), f"{page.name} names {name}"


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_flags_of_the_commands_exist(page: Path) -> None:
    known = {
        flag
        for command in cli.commands.values()
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    lines = re.findall(
        r"^ *hfprune .*$|hfprune_fast (?:score|prune) .*$", page.read_text("utf-8"), re.M
    )
    spans = re.findall(r"`((?:hfprune [^`]*)?--[^`]*)`", without_code_blocks(page))
    for text in (line.partition("#")[0] for line in [*lines, *spans]):
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", text):
            assert flag in known | {"--help"}, f"{page.name} has {flag} in {text!r}"


def test_the_readme_is_short_and_its_python_compiles() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 160
    compile(python_of(readme), "README.md", "exec")


@pytest.mark.parametrize("name", ["kernels", pytest.param("python", marks=pytest.mark.slow)])
def test_the_python_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile(python_of(ROOT / "docs" / f"{name}.md"), f"docs/{name}.md", "exec")
    exec(code, {"__name__": name})


@pytest.mark.slow
def test_a_scores_file_is_read_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hfprune_fast as hf

    hf.score("demo", "demo", samples=2).save(tmp_path / "scores.safetensors")
    monkeypatch.chdir(tmp_path)
    read: dict[str, object] = {}
    exec(python_of(ROOT / "docs" / "scores-file.md"), read)
    page = (ROOT / "docs" / "scores-file.md").read_text(encoding="utf-8")
    header = read["header"]
    assert isinstance(header, dict)
    assert f"## Format version {header['format_version']}\n" in page
    for key in header["provenance"]:
        assert f"`{key}`" in page, f"docs/scores-file.md does not have {key}"
