"""What `mkdocs.yml` needs beyond mkdocs: the README as the first page, links into the repository, and no network.

The pages are written to be read in the repository too, so links to its files are relative. A site has no such files:
there, they become text, and a link to a file that does not exist fails the build, as links between pages do.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[1]
#: Links and pictures whose target is no address and no part of the same page.
_LINK: Final = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
#: What a browser would load from elsewhere.
_FOREIGN: Final = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\bhref=\"?(?:https?:)?//"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(
        File.generated(config, "index.md", content=_LINK.sub(lambda link: _within(link, ROOT, "README.md"), text))
    )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn links to files of the repository into text."""
    if page.file.src_uri == "index.md":
        return markdown
    return _LINK.sub(lambda link: _within(link, Path(config.docs_dir), page.file.src_uri), markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse a page that would load something from the network: clusters are read about where there is none."""
    found = _FOREIGN.search(output)
    if found is not None:
        raise PluginError(
            f"{page.file.src_uri} loads something from elsewhere: {output[found.start() : found.end() + 80]}"
        )
    return output


def _within(link: re.Match[str], start: Path, source: str) -> str:
    """Return a link as the site can follow it: between pages, otherwise as text.

    :param start: the directory that the link starts from.
    :param source: the page, for messages.
    """
    text, target, anchor = link[1], link[2], link[3] or ""
    path = Path(os.path.normpath(start / target))
    if not path.exists():
        raise PluginError(f"{source}: the link to {target} leads nowhere")
    if path == ROOT / "README.md":
        return f"[{text}](index.md{anchor})"
    if path.parent == ROOT / "docs" and path.suffix == ".md":
        return f"[{text}]({path.name}{anchor})"
    place = path.relative_to(ROOT).as_posix()
    return text if text.strip("`").rstrip("/") == place else f"{text} (`{place}`)"
