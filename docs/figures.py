"""The figures of the pages, as SVG: ``python docs/figures.py [FOLDER]``, by default into ``docs/images``.

What can come from the code does: the attention mask is the one that training uses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from collm_dist.llm.packed.passes import build_allowed

INK, MUTED, LINE = "#23303d", "#6b7885", "#c3ccd5"
CONTEXT, SLOT, TARGET, PADDING = "#9cc3e6", "#f2b84b", "#a8d5a2", "#eceff2"
RAY, DEEPSPEED, RESULT = "#cfe3f5", "#d9edd6", "#f6e3bd"


def make_axes(width: float, height: float, columns: float, rows: float) -> tuple[Figure, Axes]:
    """Return a figure of so many inches and its empty axes, ``columns`` x ``rows`` units with the origin at the top."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.axis("off")
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.98)
    return figure, axes


def draw_box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str = "") -> None:
    """Draw a box with rounded corners, its first line of text in bold."""
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=0.8))
    head, _, rest = text.partition("\n")
    middle = y + height / 2
    if rest:
        axes.text(x + width / 2, y + 0.3 * height, head, ha="center", va="center", weight="bold", color=INK)
        axes.text(x + width / 2, y + 0.68 * height, rest, ha="center", va="center", size=8, color=INK)
    else:
        axes.text(x + width / 2, middle, head, ha="center", va="center", color=INK)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    """Draw an arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1, "shrinkA": 0})


def draw_cells(axes: Axes, x: float, y: float, colors: list[str], size: float = 1.0, texts: str = "") -> None:
    """Draw a row of cells, one a token or row, with a character in each."""
    for index, color in enumerate(colors):
        axes.add_patch(Rectangle((x + index * size, y), size, size, facecolor=color, edgecolor="white", linewidth=1))
        if index < len(texts):
            place = x + (index + 0.5) * size, y + 0.52 * size
            axes.text(*place, texts[index], ha="center", va="center", size=8, color=INK)


def draw_brace(axes: Axes, x: float, width: float, y: float, text: str, color: str = INK) -> None:
    """Draw a line below something, with a text below it."""
    axes.plot([x + 0.1, x + width - 0.1], [y, y], color=color, linewidth=1.4)
    axes.text(x + width / 2, y + 0.25, text, ha="center", va="top", size=8, color=color)


def draw_pipeline() -> Figure:
    """The steps, and what goes from one to the next."""
    figure, axes = make_axes(9, 2.5, 27, 7.5)
    steps = [
        ("data", "logs to samples,\nshards, order", RAY),
        ("cf", "collaborative\nvectors", RAY),
        ("stage 1", "LoRA on\ntext prompts", DEEPSPEED),
        ("stage 2", "mapping of vectors\nto soft tokens", DEEPSPEED),
        ("eval", "tables, baselines,\nintervals", DEEPSPEED),
    ]
    for index, (name, what, color) in enumerate(steps):
        draw_box(axes, 0.2 + 5.4 * index, 1.6, 4.6, 2.6, color, f"{name}\n{what}")
        if index:
            draw_arrow(axes, (5.4 * index - 0.6, 2.9), (5.4 * index + 0.15, 2.9))
    axes.plot([7.9, 7.9, 18.7], [1.6, 0.8, 0.8], color=INK, linewidth=1)
    draw_arrow(axes, (18.7, 0.8), (18.7, 1.55))
    axes.text(13.3, 0.55, "vectors of users and items", ha="center", va="bottom", size=8, color=MUTED)
    draw_box(axes, 11.0, 5.2, 15.4, 1.5, RESULT, "ranking in Python, of files, as a service; export")
    draw_arrow(axes, (18.7, 4.25), (18.7, 5.15))
    for x, color, text in ((0.2, RAY, "Ray"), (2.6, DEEPSPEED, "DeepSpeed")):
        axes.add_patch(Rectangle((x, 5.6), 0.7, 0.7, facecolor=color, edgecolor=INK, linewidth=0.6))
        axes.text(x + 0.95, 5.97, text, va="center", size=8, color=INK)
    return figure


def draw_prompt() -> Figure:
    """A prompt of stage 2 in its three regions, two targets behind one context."""
    figure, axes = make_axes(9, 3.1, 36, 12.4)
    context = [CONTEXT] * 12 + [SLOT] + [CONTEXT] * 3
    target = [TARGET] * 5 + [SLOT] + [TARGET] * 3
    draw_cells(axes, 1, 4.5, context)
    for row, name in ((2.2, "first target"), (6.8, "second target")):
        draw_cells(axes, 21, row, target)
        draw_arrow(axes, (17.2, 5.0), (20.8, row + 0.5), MUTED)
        axes.text(30.4, row + 0.5, "Yes / No", va="center", size=9, weight="bold", color=INK)
        axes.text(21, row - 0.25, name, va="bottom", size=8, color=MUTED)
    axes.text(
        7, 4.25, "\u201cliked so far: Alien, Brazil, Clue, \u2026\u201d", ha="center", va="bottom", size=8, color=INK
    )
    axes.text(13.5, 4.25, "<UserID>", ha="center", va="bottom", size=8, color=INK)
    axes.text(26.5, 1.95, "<TargetItemID>", ha="center", va="bottom", size=8, color=INK)
    draw_brace(axes, 1, 12, 6.0, "constant prefix\nno gradient; may be cached")
    draw_brace(axes, 13, 4, 6.0, "context tail\nonce a context")
    draw_brace(axes, 21, 9, 8.3, "target part\nonce a target")
    axes.add_patch(Rectangle((1, 10.4), 1, 1, facecolor=SLOT, edgecolor="white"))
    note = (
        "slot: a vector of the collaborative model, carried into the model's input space by the mapping, which is all"
    )
    axes.text(2.4, 10.9, f"{note}\nthat stage 2 trains", va="center", size=8, color=INK)
    return figure


def draw_shared_context() -> Figure:
    """Padded rows beside a tree row with its attention mask."""
    num_context, lengths = 8, (3, 4, 2, 3)
    figure, axes = make_axes(9, 4.6, 42, 21.5)
    longest = num_context + max(lengths)
    axes.text(0.5, 1.1, "plain: one padded row a target", weight="bold", color=INK)
    for row, length in enumerate(lengths):
        colors = [CONTEXT] * num_context + [TARGET] * length + [PADDING] * (longest - num_context - length)
        draw_cells(axes, 0.5, 2 + 1.3 * row, colors)
    axes.text(0.5, 8.3, f"{len(lengths)} x {longest} = {len(lengths) * longest} tokens", size=9, color=MUTED)

    axes.text(0.5, 11.4, "shared: the context once, its targets after it", weight="bold", color=INK)
    branches = [0] * num_context + [one for one, length in enumerate(lengths, start=1) for _ in range(length)]
    positions = [*range(num_context), *(num_context + one for length in lengths for one in range(length))]
    colors = [CONTEXT if one == 0 else TARGET for one in branches]
    draw_cells(axes, 0.5, 12.3, colors)
    for column, position in enumerate(positions):
        axes.text(column + 1, 14.0, str(position), ha="center", size=7, color=MUTED)
    axes.text(0.5, 15.2, "position ids: each token stands where it stands in its own plain prompt", size=8, color=MUTED)
    axes.text(0.5, 16.7, f"1 x {len(branches)} = {len(branches)} tokens", size=9, color=MUTED)

    allowed = build_allowed(torch.tensor([branches]) - 1)[0].numpy()  # -1: the context
    size, left, top = 17.0 / len(branches), 24.0, 2.4
    axes.text(left, 1.1, "who sees whom in the shared row", weight="bold", color=INK)
    axes.add_patch(Rectangle((left, top), 17.0, 17.0, facecolor=PADDING))
    for query, key in np.argwhere(allowed):
        color = CONTEXT if branches[key] == 0 else TARGET
        place = left + key * size, top + query * size
        axes.add_patch(Rectangle(place, size, size, facecolor=color, edgecolor="white", linewidth=0.6))
    axes.text(left, top + 17.9, "a row: what a token attends to; targets never see each other", size=8, color=MUTED)
    return figure


def draw_sample_order() -> Figure:
    """Contexts permuted, targets laid end to end, cut into global batches, shared out to processes."""
    figure, axes = make_axes(9, 4.2, 40, 18)
    targets = {"A": 3, "B": 1, "C": 4, "D": 2, "E": 2}
    tints = dict(zip(targets, ("#9cc3e6", "#a8d5a2", "#f2b84b", "#d9b3e6", "#f0a8a0"), strict=True))
    x = 8.0
    axes.text(0.2, 1.5, "contexts,\npermuted by the seed", va="center", size=8.5, color=INK)
    order = "CAEBD"
    for name in order:
        draw_box(axes, x, 0.6, 5.2, 1.8, tints[name], f"{name}: {targets[name]} target{'s' * (targets[name] > 1)}")
        x += 5.8
    rows = "".join(name * targets[name] for name in order)
    axes.text(0.2, 5.9, "targets end to end,\ncut every 4 rows", va="center", size=8.5, color=INK)
    draw_cells(axes, 8, 5, [tints[name] for name in rows], 1.8, rows)
    for step in range(3):
        left = 8 + step * 7.2
        axes.plot([left, left], [4.3, 7.5], color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
        axes.text(left + 3.6, 4.6, f"step {step + 1}", ha="center", va="bottom", size=8, color=MUTED)
    axes.plot([29.6, 29.6], [4.3, 7.5], color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
    for y, label, parts in (
        (9.6, "on one process", ["CCCC", "AAAE", "EBDD"]),
        (13.2, "on two processes:\nslices of equal work", ["CC|CC", "AA|AE", "EB|DD"]),
    ):
        axes.text(0.2, y + 0.9, label, va="center", size=8.5, color=INK)
        for step, part in enumerate(parts):
            left = 8 + step * 9.2
            for number, piece in enumerate(part.split("|")):
                draw_cells(axes, left + number * 4.2, y, [tints[name] for name in piece], 1.8, piece)
    axes.text(8, 16.6, "a step trains on the same rows whatever the number of processes, of loader workers, or of "
              "restarts", size=8.5, color=MUTED)  # fmt: skip
    return figure


def draw_no_leak() -> Figure:
    """Time folds: what a training row's slots carry comes from before it."""
    figure, axes = make_axes(9, 3.9, 40, 17)
    left, width = 8.5, 7.0
    names = ["fold 1", "fold 2", "fold 3", "fold 4"]
    for index, name in enumerate(names):
        draw_box(axes, left + index * width, 0.6, width - 0.2, 1.6, RAY, name)
    axes.text(0.2, 1.4, "training rows by time", va="center", size=8.5, color=INK)
    for index in range(4):
        y = 3.4 + 2.1 * index
        scored = left + index * width
        if index:
            axes.add_patch(Rectangle((left, y), index * width - 0.2, 1.2, facecolor=CONTEXT, edgecolor="none"))
            axes.text(left + index * width / 2, y + 0.62, "fitted on", ha="center", va="center", size=8, color=INK)
        axes.add_patch(Rectangle((scored, y), width - 0.2, 1.2, facecolor=SLOT, edgecolor="none"))
        text = "vectors for stage 2" if index else "unknown vector"
        axes.text(scored + width / 2, y + 0.62, text, ha="center", va="center", size=8, color=INK)
        axes.text(0.2, y + 0.62, f"rows of fold {index + 1}", va="center", size=8.5, color=INK)
    y = 11.8
    axes.add_patch(Rectangle((left, y), 4 * width - 0.2, 1.2, facecolor=CONTEXT, edgecolor="none"))
    axes.text(left + 2 * width, y + 0.62, "fitted on all training rows", ha="center", va="center", size=8, color=INK)
    axes.text(left + 4 * width + 0.2, y + 0.62, "-> valid, test,\n    ranking", va="center", size=8, color=INK)
    axes.text(0.2, y + 0.62, "everything later", va="center", size=8.5, color=INK)
    axes.text(left, 15.2, "each model begins with the weights of the one before and is rotated onto it; a row's own "
              "label is in none of its inputs", size=8.5, color=MUTED)  # fmt: skip
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "pipeline": draw_pipeline,
    "prompt": draw_prompt,
    "shared-context": draw_shared_context,
    "sample-order": draw_sample_order,
    "no-leak": draw_no_leak,
}


def main() -> int:
    """Draw all figures; returns the exit code."""
    mpl.use("svg")
    # Paths rather than text: the same picture in every browser; a fixed salt and no date: the same bytes every time.
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "collm-dist", "font.size": 9})
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, facecolor="white")
        plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
