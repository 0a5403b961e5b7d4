r"""MkDocs hook: turns the formulas that arithmatex marked, \(...\) and \[...\], into MathML.

Browsers draw MathML themselves, so the pages load no script and read offline.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(page_html: str, **_: Any) -> str:
    """Replaces each formula; a formula that cannot be read stops the build."""

    def to_mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]).strip(), display=display)

    return FORMULA.sub(to_mathml, page_html)
