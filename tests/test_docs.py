"""The pages: their library examples run as they stand, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUICK_START = ROOT / "docs" / "quick_start.md"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")})
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.slow
def test_library_example():
    example, loading, custom = re.findall(
        r"```python\n(.*?)```", QUICK_START.read_text(encoding="utf-8"), re.DOTALL
    )
    compile(loading, str(QUICK_START), "exec")  # needs a finished run: test_trainer.py has one
    assert len(example.splitlines()) <= 20
    assert len(custom.splitlines()) <= 20
    exec(compile(custom, str(QUICK_START), "exec"), {})
    names: dict = {}
    exec(compile(example, str(QUICK_START), "exec"), names)
    assert names["out"].shape == (2, 16, 4, 32)
    assert names["logits"].shape == (1, 16, 320)
    assert [len(row) for row in names["tokens"]] == [8, 8]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    """As the repository shows the pages; `make docs` checks the same in the site."""
    broken = [link for link in links(page) if not leads_somewhere(page, link)]
    assert not broken


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A head, `code`\n[a](none.md) [b](#a-head-code) [c](page.md#x) `[d](e)`\n")
    assert [link for link in links(page) if not leads_somewhere(page, link)] == [
        "none.md",
        "page.md#x",
    ]


def links(page: Path) -> list[str]:
    """Links of a page to files and headings, without those in code."""
    found = _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8")))
    return [link for link in found if "://" not in link]


def leads_somewhere(page: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    target = page.parent / name if name else page
    if not target.is_file():
        return False
    return not heading or heading in anchors(target) or target.name == "api.md"  # docstrings'


def anchors(page: Path) -> set[str]:
    """Headings as GitHub and the site make them into anchors."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
