"""MkDocs' hook of `make site`: README.md is the first page, and files outside docs/ that a page links to come along.

Links stay as a code host wants them, relative to the repository; only the site's copies are rewritten.
"""

import os.path
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")

# Files by their place on the site, where a page has been read from.
_sources: dict[str, Path] = {}


def on_files(files: Any, config: Any) -> Any:
    """Adds README.md and, page by page, what is linked and lies outside docs/."""
    _sources.clear()
    _sources.update({file.src_uri: Path(file.abs_src_path) for file in files.documentation_pages()})
    _sources["index.md"] = REPOSITORY / "README.md"
    files.append(File.generated(config, "index.md", abs_src_path=str(_sources["index.md"])))
    waiting = list(_sources)
    while waiting:
        source = _sources[waiting.pop()]
        for link in LINK.findall(source.read_text(encoding="utf-8")):
            target = _target(source, link)
            place = _place(target)
            if target.is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(target)))
                if target.suffix == ".md":
                    _sources[place] = target
                    waiting.append(place)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links to files of the repository into links to their places on the site."""
    place = page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        target = _target(_sources[place], link[0])
        return posixpath.relpath(_place(target), posixpath.dirname(place)) if target.is_file() else link[0]

    return LINK.sub(rewritten, markdown)


def _target(source: Path, link: str) -> Path:
    """The file that a link of a page names; of a folder its README.md."""
    target = Path(os.path.normpath(source.parent / link))
    return target / "README.md" if target.is_dir() else target


def _place(target: Path) -> str:
    if target == REPOSITORY / "README.md":
        return "index.md"
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    # Without a dot at the beginning, whose files MkDocs leaves out.
    return f"source/{os.path.relpath(target, REPOSITORY).replace(os.sep, '/').removeprefix('.')}"
