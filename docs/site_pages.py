"""Hook of mkdocs: makes pages of README.md and launch/README.md, and text of links to files outside docs/.

With `repo_url` in mkdocs.yml those links lead to the files of the repository.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "launch/README.md": "launch.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
IMAGE = re.compile(r'(<img src=")docs/')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        text = IMAGE.sub(r"\1", (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=_linked(text, source, config)))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri in PAGES.values():
        return markdown
    return _linked(markdown, f"docs/{page.file.src_uri}", config)


def _linked(text: str, source: str, config: MkDocsConfig) -> str:
    """The text of a file of the repository with its links as the site has them. Raises ValueError for a broken one."""
    folder = "." if source in PAGES else os.path.relpath(os.path.dirname(source), "docs")

    def replaced(match: re.Match) -> str:
        mark, shown, target, anchor = match.groups()
        if not target or "://" in target:
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if not (ROOT / path).exists():
            raise ValueError(f"{source}: the link to {target} is broken")
        if path in PAGES or path.startswith("docs/"):
            page = os.path.relpath(PAGES.get(path, path.removeprefix("docs/")), folder)
            return f"{mark}[{shown}]({page}{anchor or ''})"
        return f"[{shown}]({config.repo_url}/blob/main/{path})" if config.repo_url else shown

    return LINK.sub(replaced, text)
