"""MkDocs hook: stops the build where a page's table is another than that of the file it names."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.results import renewed


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Compares the tables of a page."""
    if renewed(markdown) != markdown:
        raise PluginError(
            f"A table of {page.file.src_uri} is not that of its file: run python -m "
            "benchmarks.results."
        )
    return markdown
