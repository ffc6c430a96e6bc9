"""Pages of the site that are no files of docs/: README, CONTRIBUTING, CHANGELOG, examples, the API.

MkDocs calls `on_files` and `on_page_markdown`. Links between files of the repository become links
between pages, so that each file reads well where it is; what leads nowhere stops a strict build.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import probe

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
NOT_DOCUMENTED = ("Sequence", "__version__", "metrics")
"""Public names without an entry: another name of `TokenSequence`, a number, a module."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""

    def add(name: str, text: str) -> None:
        files.append(File.generated(config, name, content=text))

    for source, page in PAGES.items():
        add(page, (ROOT / source).read_text(encoding="utf-8"))
    names = sorted(set(probe.__all__) - set(NOT_DOCUMENTED), key=str.lower)
    add("api.md", "# API\n\n" + "\n\n".join(f"::: probe.{name}" for name in names))
    examples = sorted((ROOT / "examples").glob("[!_]*.*"))
    rows = [f"- [{path.name}]({path.name}.md)" for path in examples]
    add("examples/index.md", "# Examples\n\n" + "\n".join(rows))
    for path in examples:
        language = {".py": "python"}.get(path.suffix, path.suffix[1:])
        text = path.read_text(encoding="utf-8")
        add(f"examples/{path.name}.md", f"# {path.name}\n\n````{language}\n{text}````\n")
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        add(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    here = {name: source for source, name in PAGES.items()}.get(page.file.src_uri)
    folder = "" if here else posixpath.dirname(f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith("examples/"):
        return markdown

    def replaced(match: re.Match[str]) -> str:
        place, mark, heading = match[1].partition("#")
        if not place or ":" in place:
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, place))
        if target in PAGES:
            name = PAGES[target]
        elif target == "examples":
            name = "examples/index.md"
        elif target.startswith("examples/"):
            name = f"{target}.md"
        else:
            name = target.removeprefix("docs/")
        start = posixpath.dirname(page.file.src_uri)
        return f"]({posixpath.relpath(name, start or os.curdir)}{mark}{heading})"

    return re.sub(r"\]\(([^)\s]+)\)", replaced, markdown)
