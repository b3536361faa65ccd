"""What the site needs beside MkDocs: equations as MathML, and pages from outside of docs/.

Browsers lay MathML out by themselves, so that equations need neither a script nor a network. A
link is written as it works in the repository, and is rewritten to where its target is in the site.
"""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = {  # patterns of pages and pictures; experiments' results are reached from their list
    "CONTRIBUTING.md": InclusionLevel.UNDEFINED,
    "CHANGELOG.md": InclusionLevel.UNDEFINED,
    "experiments/*.md": InclusionLevel.UNDEFINED,
    "experiments/*.py": InclusionLevel.UNDEFINED,
    "experiments/results/*/README.md": InclusionLevel.NOT_IN_NAV,
    "experiments/results/*/*.png": InclusionLevel.UNDEFINED,
}
# What pymdownx.arithmatex makes of $...$ and $$...$$.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside of docs/, under their paths in the repository."""
    for pattern, inclusion in _OUTSIDE.items():
        for path in sorted(_ROOT.glob(pattern)):
            name = path.relative_to(_ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites relative links between docs/ and the pages from outside of it."""
    source = page.file.src_uri
    in_repository = source if page.file.generated_by else f"docs/{source}"

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.join(posixpath.dirname(in_repository), match[1])
        target = posixpath.normpath(target).removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            return match[0]  # MkDocs says what is wrong with it
        return posixpath.relpath(target, posixpath.dirname(source) or ".")

    return _LINK.sub(rewritten, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces equations by MathML; raises PluginError for a command that it does not know."""

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match[2])
        equation = convert(latex, display="block" if match[1] == "div" else "inline")
        if "\\" in equation:  # latex2mathml writes out what it does not know
            raise PluginError(f"{page.file.src_uri}: unknown command in the equation {latex}")
        return equation

    return _EQUATION.sub(mathml, content)
