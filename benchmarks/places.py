"""Places of pages that benchmarks write into, between two comments.

``<!-- MARK -->`` and ``<!-- end of MARK -->``, where MARK says what stands between them.
"""

import re
from collections.abc import Iterable


def filled(page: str, mark: str, lines: Iterable[str]) -> str:
    """Puts lines into a place.

    Args:
        page: the text of the page.
        mark: of the place.
        lines: what stands there afterwards.

    Returns:
        The text with what was between the comments replaced.

    Raises:
        ValueError: if the page does not have the place once.
    """
    first, last = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"The page needs one place for this: {first} ... {last}.")
    body = "\n".join([first, "", *lines, "", last])
    return pattern.sub(lambda _: body, page)
