"""Draws the pictures beside this file: python docs/pictures/draw.py.

The pictures bring their own light background, so they read the same on light and dark pages.
"""

import colorsys
import math
import pathlib

INK, SOFT, PAPER = "#1f2937", "#64748b", "#fbfbf8"
BLUE, ORANGE, GREEN = "#dbe7fb", "#fde3c8", "#d9f0dc"  # a link, a state, a value that travels
BLUE_EDGE, ORANGE_EDGE, GREEN_EDGE = "#3b6fc4", "#c2681b", "#3a8a4a"


class Picture:
    """Collects SVG elements; lengths are pixels, the origin is the top left corner."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def add(self, tag: str, body: str = "", **attributes: object) -> None:
        """One element; underscores in attribute names become dashes."""
        spelled = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
        self.parts.append(f"<{tag}{spelled}>{body}</{tag}>")

    def text(self, x, y, words, size=13, anchor="middle", fill=INK, mono=False, bold=False):
        """One line of text."""
        mono_family = "DejaVu Sans Mono, Menlo, Consolas, monospace"
        family = mono_family if mono else "DejaVu Sans, Verdana, sans-serif"
        words = str(words).replace("&", "&amp;").replace("<", "&lt;")
        self.add("text", words, x=x, y=y, font_size=size, text_anchor=anchor, fill=fill,
                 font_family=family, font_weight="bold" if bold else "normal")  # fmt: skip

    def box(self, x, y, w, h, fill, edge, radius=6, width=1.5):
        """A rectangle."""
        self.add("rect", x=x, y=y, width=w, height=h, rx=radius, fill=fill, stroke=edge,
                 stroke_width=width)  # fmt: skip

    def arrow(self, *points, dashed=False):
        """A line through the points with a head at the last."""
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        dash = {"stroke_dasharray": "5 4"} if dashed else {}
        self.add("path", d=path, fill="none", stroke=INK, stroke_width=1.6,
                 marker_end="url(#head)", **dash)  # fmt: skip

    def line(self, x1, y1, x2, y2, stroke=SOFT, width=1.0, dash="none"):
        """A plain line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, stroke_width=width,
                 stroke_dasharray=dash)  # fmt: skip

    def write(self, name: str) -> None:
        """Writes the file beside this script."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<title>{self.title}</title>\n"
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto-start-reverse">'
            f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="10" fill="{PAPER}"/>\n'
        )
        path = pathlib.Path(__file__).with_name(name)
        path.write_text(head + "\n".join(self.parts) + "\n</svg>\n")


def draw_chain() -> None:
    """MicroAdam as a chain, with what each link keeps."""
    p = Picture(1080, 400, "MicroAdam as a chain of Optax transformations")
    top, height = 66, 70
    middle = top + height / 2

    def link(x, w, name, rest="", argument=""):
        p.box(x, top, w, height, BLUE, BLUE_EDGE)
        p.text(x + w / 2, middle - 4, name, mono=True, bold=True, size=12.5)
        p.text(x + w / 2, middle + 14, rest, mono=True, bold=True, size=12.5)
        p.text(x + w / 2, middle + 16, argument, mono=True, size=12, fill=SOFT)

    def travels(x0, x1, above, below=""):
        p.arrow((x0, middle), (x1, middle))
        p.text((x0 + x1) / 2, middle - 10, above, size=12, fill=GREEN_EDGE, bold=True)
        p.text((x0 + x1) / 2, middle + 19, below, size=11, fill=SOFT)

    travels(16, 104, "gradient", "dense")
    link(108, 168, "error_feedback", argument="(top_k())")
    travels(280, 400, "BlockSparse", "3 of 256")
    link(404, 196, "scale_by_window_adam", argument="(10 rows)")
    travels(604, 676, "dense")
    link(680, 132, "add_decayed_", "weights")
    p.arrow((816, middle), (840, middle))
    link(844, 132, "scale_by_", "learning_rate")
    travels(980, 1062, "update", "dense")
    p.text(16, 34, "optax.chain( … )", mono=True, size=14, anchor="start", bold=True)
    p.text(1064, 34, "the last two links are Optax's own", size=12, anchor="end", fill=SOFT)

    # The residual and its loop.
    y = 216
    p.box(60, y, 264, 132, ORANGE, ORANGE_EDGE)
    p.text(192, y + 24, "residual: what was not sent yet", size=13, bold=True)
    for i in range(16):  # a block of 4-bit codes, each with its level
        level = (7 * i * i + 3 * i + 5) % 16
        p.box(96 + 12 * i, y + 36, 12, 26, "#ffffff", ORANGE_EDGE, radius=0, width=0.8)
        p.box(96 + 12 * i, y + 62 - 26 * level / 15, 12, 26 * level / 15, "#f0a868", "none", 0, 0)
    p.text(192, y + 80, "a 4-bit code per parameter,", size=11.5)
    p.text(192, y + 96, "a minimum and a maximum per block", size=11.5)
    p.text(192, y + 121, "0.53 bytes per parameter", size=13, bold=True, fill=ORANGE_EDGE)
    p.arrow((150, y - 2), (150, top + height + 3))
    p.text(142, (y + top + height) / 2 - 3, "decode,", size=11.5, anchor="end")
    p.text(142, (y + top + height) / 2 + 12, "add", size=11.5, anchor="end")
    p.arrow((234, top + height + 2), (234, y - 3))
    p.text(242, (y + top + height) / 2 - 3, "encode", size=11.5, anchor="start")
    p.text(242, (y + top + height) / 2 + 12, "the rest", size=11.5, anchor="start")

    # The window as a ring of ten rows.
    p.box(370, y, 264, 132, ORANGE, ORANGE_EDGE)
    p.text(502, y + 24, "window: the last 10 selections", size=13, bold=True)
    cx, cy, outer, inner = 424, y + 69, 32, 16
    for i in range(10):
        a, b = (2 * math.pi * j / 10 - math.pi / 2 for j in (i, i + 1))
        points = [
            (cx + r * math.cos(t), cy + r * math.sin(t))
            for r, t in ((inner, a), (outer, a), (outer, b), (inner, b))
        ]
        age = (3 - i) % 10
        shade = f"rgb(255,{252 - 7 * age},{246 - 15 * age})" if age else "#c2681b"
        path = "M" + " L".join(f"{x:.1f} {z:.1f}" for x, z in points) + " Z"
        p.add("path", d=path, fill=shade, stroke=ORANGE_EDGE, stroke_width=0.9)
    p.text(470, y + 54, "3 per block and row,", size=11.5, anchor="start")
    p.text(470, y + 71, "each a bfloat16 value", size=11.5, anchor="start")
    p.text(470, y + 88, "and a uint8 index", size=11.5, anchor="start")
    p.text(502, y + 121, "0.35 bytes per parameter", size=13, bold=True, fill=ORANGE_EDGE)
    p.arrow((462, top + height + 2), (462, y - 3))
    p.text(454, (y + top + height) / 2 - 3, "overwrite", size=11.5, anchor="end")
    p.text(454, (y + top + height) / 2 + 12, "the oldest row", size=11.5, anchor="end")
    p.arrow((542, y - 2), (542, top + height + 3))
    p.text(550, (y + top + height) / 2 - 3, "first and second", size=11.5, anchor="start")
    p.text(550, (y + top + height) / 2 + 12, "moments, at once", size=11.5, anchor="start")

    # Legend.
    x = 680
    for i, (fill, edge, words) in enumerate((
        (BLUE, BLUE_EDGE, "a link: one Optax transformation"),
        (ORANGE, ORANGE_EDGE, "state kept between steps"),
    )):  # fmt: skip
        p.box(x, y + 8 + 28 * i, 22, 15, fill, edge, radius=3)
        p.text(x + 32, y + 20 + 28 * i, words, size=12.5, anchor="start")
    p.text(
        x, y + 84, "0.53 + 0.35 = 0.88 bytes per parameter", size=13.5, anchor="start", bold=True
    )
    p.text(x, y + 106, "Adam in float32 keeps 8", size=12.5, anchor="start", fill=SOFT)
    p.text(540, 384, "Nothing else is kept: the moments live for one step only, and the row "
           "to overwrite follows from the step count.", size=12, fill=SOFT)  # fmt: skip
    p.write("chain.svg")


def draw_blocks() -> None:
    """How one tensor is cut, what its state looks like, and how a mesh cuts both."""
    p = Picture(1000, 604, "A parameter and its state arrays, cut along the same lines")
    left, block, blocks, rows, cell = 196, 150, 4, 3, 24
    width = block * blocks
    cut = left + width / 2

    def grid(y, name, shape, dtype, fill, edge, columns, note):
        for row in range(rows):
            for b in range(blocks):
                x = left + b * block
                p.box(x, y + row * cell, block, cell, fill, edge, radius=0, width=1.4)
                for c in range(1, columns):
                    p.line(x + c * block / columns, y + row * cell, x + c * block / columns,
                           y + (row + 1) * cell, stroke=edge, width=0.5)  # fmt: skip
        p.text(left - 14, y + 22, name, anchor="end", bold=True, size=13.5)
        p.text(left - 14, y + 42, shape, anchor="end", mono=True, size=12)
        p.text(left - 14, y + 60, dtype, anchor="end", mono=True, size=12, fill=SOFT)
        for i, words in enumerate(note):
            p.text(left + width + 16, y + 22 + 18 * i, words, anchor="start", size=12)

    y0, step = 74, 106
    grid(y0, "parameter", "(rows, n)", "float32", GREEN, GREEN_EDGE, 16,
         ("n elements in a row,", "nb = n / B blocks,", "here 4; B = 256"))  # fmt: skip
    grid(y0 + step, "residual codes", "(rows, nb, B/2)", "uint8", ORANGE, ORANGE_EDGE, 8,
         ("128 bytes a block:", "element j and element", "j + 128 share one"))  # fmt: skip
    grid(y0 + 2 * step, "residual low, high", "(rows, nb)", "float32", ORANGE, ORANGE_EDGE, 1,
         ("one number a block,", "in each of two arrays"))  # fmt: skip
    grid(y0 + 3 * step, "window values", "(rows, nb, m, k)", "bfloat16", ORANGE, ORANGE_EDGE, 10,
         ("m = 10 rows of k = 3:", "30 values a block"))  # fmt: skip
    grid(y0 + 4 * step, "window indices", "(rows, nb, m, k)", "uint8", ORANGE, ORANGE_EDGE, 10,
         ("positions in the block,", "0 to 255"))  # fmt: skip

    bottom = y0 + 4 * step + rows * cell + 8
    p.add("line", x1=cut, y1=y0 - 12, x2=cut, y2=bottom, stroke="#b91c1c", stroke_width=2.4,
          stroke_dasharray="8 5")  # fmt: skip
    for centre, words in ((left + width / 4, "device 0"), (left + 3 * width / 4, "device 1")):
        p.text(centre, y0 - 14, words, fill="#b91c1c", bold=True, size=12.5)
    p.text(left, 30, "one block is a run of the last axis", anchor="start", size=12.5)
    p.text(left + width, 30, 'PartitionSpec(None, "model") cuts every array here', anchor="end",
           size=12.5, fill="#b91c1c")  # fmt: skip
    p.line(left + 2, 40, left + block - 2, 40, stroke=INK, width=1.4)
    for x in (left + 2, left + block - 2):
        p.line(x, 36, x, 44, stroke=INK, width=1.4)
    p.write("blocks.svg")


def shades(count: int) -> list[str]:
    """Colours that differ from their neighbours, also in lightness."""
    return [
        "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(i / count, light, 0.62))
        for i, light in zip(range(count), (0.72, 0.84) * count, strict=False)
    ]


def draw_second_moments() -> None:
    """The blocks of one transformer layer, a colour for each, and what is kept of them."""
    p = Picture(1080, 600, "The parameters of a transformer layer that share a second moment")
    cell, edge = 13, "#475569"

    def grid(x, y, colours, gap_after=()):
        """Rows of coloured cells, a thicker line below the given rows."""
        for r, row in enumerate(colours):
            for c, colour in enumerate(row):
                p.box(x + cell * c, y + cell * r, cell, cell, colour, "#ffffff", 0, 0.6)
        w, h = cell * len(colours[0]), cell * len(colours)
        p.box(x, y, w, h, "none", edge, radius=0, width=1.2)
        for r in gap_after:
            p.line(x, y + cell * r, x + w, y + cell * r, stroke=edge, width=1.2)
        return x + w, y + h

    def kept(x, y, colours, widths, vertical=False):
        for i, colour in enumerate(colours):
            offset = cell * sum(widths[:i])
            if vertical:
                p.box(x, y + offset, cell, cell * widths[i], colour, edge, radius=0, width=1.2)
            else:
                p.box(x + offset, y, cell * widths[i], cell, colour, edge, radius=0, width=1.2)

    def panel(x, y, name, notation, colours, blocks, widths, words, vertical=False, splits=()):
        p.text(x, y, name, anchor="start", bold=True, size=13.5)
        p.text(x, y + 18, notation, anchor="start", mono=True, size=10.5, fill=SOFT)
        right, bottom = grid(x, y + 30, colours)
        for column in splits:
            p.line(x + cell * column, y + 30, x + cell * column, bottom, stroke=edge, width=1.2)
        if vertical:
            kept(right + 10, y + 30, blocks, widths, vertical=True)
            at = (right + 10 + cell + 10, y + 41)
        else:
            kept(x, bottom + 8, blocks, widths)
            at = (x, bottom + 40)
        for i, line in enumerate(words):
            p.text(at[0], at[1] + 16 * i, line, anchor="start", size=12, bold=not i)

    embed, heads, kv_heads, head_dim, hidden, tokens = 8, 4, 2, 3, 16, 8

    def by_head(count):
        return [colour for colour in shades(count) for _ in range(head_dim)]

    columns = (24, 290, 530, 810)
    top, low = 76, 362
    panel(columns[0], top, "query", "embed | heads head_dim -> heads", [by_head(heads)] * embed,
          shades(heads), [head_dim] * heads, ("4 numbers", "one for each head"),
          splits=(3, 6, 9))  # fmt: skip
    panel(columns[1], top, "key", "embed | heads head_dim -> heads", [by_head(kv_heads)] * embed,
          shades(kv_heads), [head_dim] * kv_heads,
          ("2 numbers", "one for each head,", "of which there may be fewer"),
          splits=(3,))  # fmt: skip
    outputs = kv_heads * head_dim
    panel(columns[2], top, "value", "embed | heads head_dim -> heads head_dim",
          [shades(outputs)] * embed, shades(outputs), [1] * outputs,
          ("6 numbers", "one for each output"), splits=(3,))  # fmt: skip
    panel(columns[3], top, "out", "heads head_dim | embed -> embed",
          [shades(embed)] * (heads * head_dim), shades(embed), [1] * embed,
          ("8 numbers", "one for each output"))  # fmt: skip
    panel(columns[0], low, "MLP", "in | out -> out", [shades(hidden)] * embed, shades(hidden),
          [1] * hidden, ("16 numbers", "one for each output"))  # fmt: skip
    panel(columns[1], low, "embedding", "token embed -> token",
          [[colour] * embed for colour in shades(tokens)], shades(tokens), [1] * tokens,
          ("8 numbers", "one for", "each token"), vertical=True)  # fmt: skip
    panel(columns[2], low, "norm", "feature ->", [shades(1) * embed], shades(1), [1],
          ("1 number", "for the whole scale"))  # fmt: skip
    panel(columns[3], low, "bias", "... -> ...", [shades(hidden)], shades(hidden), [1] * hidden,
          ("16 numbers", "nothing is shared"))  # fmt: skip

    p.text(
        24, 34, "One colour within a tensor: one shared second moment.", anchor="start", bold=True
    )
    p.text(1056, 34, "rows are inputs, columns are outputs; what is kept lies below or beside",
           anchor="end", size=12, fill=SOFT)  # fmt: skip
    p.text(540, 582, "Adam keeps a number for each of these 504 elements, Adam-mini one for each "
           "of 61 blocks.", size=12.5)  # fmt: skip
    p.write("second_moments.svg")


def draw_activations() -> None:
    """Draws what each layer of a Llama block saves, in sizes of its bfloat16 input."""
    p = Picture(1000, 560, "What a Llama block saves for its backward pass")
    wide = 1376 / 512  # intermediate by hidden channels, of benchmarks/activation_memory.py
    group = 1.125 / 2  # an 8-bit code and a sixteenth of a bfloat16 scale, beside bfloat16
    norm = ("RMSNorm", 6, 3 * group, group)  # JAX saves three float32 arrays of each
    stages = [
        norm,
        ("query, key, value: input", 1, group, 0.5),
        ("attention: its three inputs", 3, 3 * group, 3),
        ("output projection: input", 1, group, 0.5),
        norm,
        ("gate, up: input", 1, group, 0.5),
        ("SiLU and product", 5 * wide, 5 * wide * group, 2 * wide * group),
        ("down projection: input", wide, wide * group, wide / 2),
    ]
    kinds = (("bfloat16", "#cbd5e1", SOFT), ("codes", BLUE, BLUE_EDGE), ("COAT", GREEN, GREEN_EDGE))
    x, y, row, unit = 260, 62, 54, 46
    for column, (name, fill, edge) in enumerate(kinds):
        total = sum(stage[1 + column] for stage in stages)
        left = x + 210 * column
        p.box(left, 22, 16, 14, fill, edge, radius=3)
        p.text(left + 24, 34, f"{name}: {total:.1f} units", anchor="start", bold=True)
    for index, (name, *sizes) in enumerate(stages):
        top = y + row * index
        p.box(16, top, 226, 40, PAPER, INK)
        p.text(129, top + 25, name)
        if index:
            p.arrow((129, top - row + 41), (129, top - 2))
        for line, (size, (_, fill, edge)) in enumerate(zip(sizes, kinds, strict=True)):
            p.box(x, top + 14 * line, unit * size, 11, fill, edge, radius=2, width=1)
            p.text(
                x + unit * size + 6, top + 14 * line + 10, f"{size:.2f}", size=11, anchor="start"
            )
    note = "A unit is the block's input in bfloat16. Rotary positions and sums save nothing."
    p.text(16, 530, note, size=12, anchor="start", fill=SOFT)
    p.write("activations.svg")


if __name__ == "__main__":
    draw_activations()
    draw_chain()
    draw_blocks()
    draw_second_moments()
