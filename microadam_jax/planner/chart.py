"""A bar for each optimizer, cut into what takes the memory."""

from pathlib import Path

from microadam_jax.memory import GIB

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = {
    "parameters": "#0072B2",
    "gradients": "#56B4E9",
    "state": "#D55E00",
    "other temporaries": "#BBBBBB",
    "temporaries": "#999999",
}


def require_place(path: Path) -> None:
    """Refuses a path that no chart can be written to.

    Raises:
        ValueError: if it does not end with ``.png``, or its directory is not there.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--chart is written as PNG; give a path that ends with .png, not {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"--chart: there is no directory {path.parent}. Make it first.")


def draw(parts: dict[str, dict[str, int]], memory: float | None, path: Path) -> None:
    """Writes a bar chart as PNG.

    Args:
        parts: bytes by optimizer and by what takes them, a key of :data:`COLOURS`.
        memory: GiB of a device, drawn as a line.
        path: the file.

    Raises:
        ValueError: if Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--chart needs Matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(parts)), layout="constrained")
    axes = figure.subplots()
    names = list(parts)
    ends = [0.0] * len(names)
    for part, colour in COLOURS.items():
        widths = [parts[name].get(part, 0) / GIB for name in names]
        if any(widths):
            axes.barh(names, widths, left=ends, color=colour, label=part)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    if memory is not None:
        axes.axvline(memory, color="black", linestyle="--", label="memory")
    axes.invert_yaxis()
    axes.set_xlabel("GiB per device")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
