"""Griffe extension: the docstrings' reStructuredText, as Optax writes it, in Markdown.

Only what the docstrings use: the math role and directive, cross-references, double backticks.
"""

import re
import textwrap
from typing import Any

import griffe

DIRECTIVE = re.compile(
    r"^([ \t]*)\.\. math::[ \t]*\n((?:[ \t]*\n|\1[ \t]+\S.*(?:\n|$))+)", re.MULTILINE
)
MATH = re.compile(r":math:`([^`]+)`")
REFERENCE = re.compile(r":(?:func|class|mod|meth|attr|data):`~?([^`]+)`")


def to_markdown(docstring: str) -> str:
    """Rewrites one docstring."""

    def display(match: re.Match[str]) -> str:
        indent, formula = match[1], textwrap.dedent(match[2]).strip()
        if "&" in formula:  # as Sphinx does
            formula = f"\\begin{{align*}}\n{formula}\n\\end{{align*}}"
        return textwrap.indent(f"\n$$\n{formula}\n$$\n\n", indent)

    docstring = DIRECTIVE.sub(display, docstring)
    docstring = MATH.sub(lambda match: f"${' '.join(match[1].split())}$", docstring)
    docstring = REFERENCE.sub(r"`\1`", docstring)
    return docstring.replace("``", "`")


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
