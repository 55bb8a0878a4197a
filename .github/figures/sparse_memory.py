"""Draws sparse_memory.png: how a sparse neural memory selects, computes and combines.

    python .github/figures/sparse_memory.py

The scores and activations are those of Avg-K with random tables.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

TOKENS = ("the", "house", "passed", "a", "law")
WIDTH, BLOCKS, CELLS, ACTIVE = 6, 8, 3, 2
SHOWN = 2
"""Row of the token that the right half of the picture follows."""
COLOURS = ("#d1495b", "#2e86ab")
"""One for each of its active blocks."""
PALE, LINE, TEXT = "#e9ecef", "#868e96", "#212529"


def cells(
    ax: Axes, x: float, y: float, values: np.ndarray, size: float = 0.22, cmap: str = "PuOr"
) -> None:
    """Draw a matrix of coloured squares.

    Args:
        x, y: its upper left corner.
        values: (rows, columns), from -1 to 1.
    """
    colours = plt.get_cmap(cmap)
    for (row, column), value in np.ndenumerate(np.atleast_2d(values)):
        corner = (x + column * size, y - (row + 1) * size)
        face = colours(0.5 + 0.45 * float(np.clip(value, -1, 1)))
        ax.add_patch(Rectangle(corner, size, size, facecolor=face, edgecolor="white", lw=0.8))


def frame(ax: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """Outline a rectangle, whose upper left corner is (x, y)."""
    ax.add_patch(Rectangle((x, y - height), width, height, fill=False, edgecolor=colour, lw=2.2))


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = LINE
) -> None:
    """Draw an arrow between two points."""
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.5, shrinkA=0,
            shrinkB=0, connectionstyle="arc3,rad=0",
        )
    )  # fmt: skip


def label(ax: Axes, x: float, y: float, text: str, **style: object) -> None:
    """Write text, centred at x unless ``ha`` says otherwise."""
    ax.text(x, y, text, **{"ha": "center", "va": "center", "color": TEXT, "fontsize": 10} | style)


def draw(ax: Axes) -> None:
    """Draw the whole picture."""
    rng = np.random.default_rng(5)
    x_ND = rng.normal(size=(len(TOKENS), WIDTH))
    keys_BGD = rng.normal(size=(BLOCKS, CELLS, WIDTH)) / WIDTH**0.5
    values_BGD = rng.normal(size=(BLOCKS, CELLS, WIDTH)) * 0.6
    scores_NB = x_ND @ keys_BGD.mean(axis=1).T
    blocks_NA = np.argsort(-scores_NB, axis=1)[:, :ACTIVE]
    chosen = sorted(blocks_NA[SHOWN])
    pre_AG = np.stack([keys_BGD[block] @ x_ND[SHOWN] for block in chosen])
    hidden_AG = np.maximum(pre_AG, 0)
    parts_AD = np.stack(
        [hidden @ values_BGD[block] for hidden, block in zip(hidden_AG, chosen, strict=True)]
    )

    # Tokens.
    size, top = 0.3, 4.1
    left = 1.0
    label(ax, left + WIDTH * size / 2, 4.95, "tokens $x$", fontsize=12, weight="bold")
    label(ax, left + WIDTH * size / 2, 4.55, "width $d$", color=LINE)
    for row, token in enumerate(TOKENS):
        y = top - row * 0.6
        cells(ax, left, y, x_ND[row] / 2, size)
        weight = "bold" if row == SHOWN else "normal"
        label(ax, left - 0.15, y - size / 2, token, ha="right", weight=weight, fontsize=11)

    # Scores.
    left = 3.7
    middle = left + BLOCKS * size / 2
    label(ax, middle, 4.95, "1  select", fontsize=12, weight="bold")
    label(ax, middle, 4.55, f"a score per block, top $b$ = {ACTIVE}", color=LINE)
    for row in range(len(TOKENS)):
        y = top - row * 0.6
        arrow(ax, (2.9, y - size / 2), (3.6, y - size / 2))
        cells(ax, left, y, scores_NB[row] / 1.5, size, cmap="PRGn")
        for block in blocks_NA[row]:
            colour = COLOURS[chosen.index(block)] if row == SHOWN else TEXT
            frame(ax, left + block * size, y, size, size, colour)
    for block in range(BLOCKS):
        label(ax, left + (block + 0.5) * size, 1.2, str(block + 1), color=LINE, fontsize=9)
    label(ax, middle, 0.85, "block", color=LINE)

    # Memory.
    small, gap = 0.16, 0.07
    left_K, left_V = 7.35, 8.85
    label(ax, 8.6, 4.95, "key-value memory", fontsize=12, weight="bold")
    label(ax, left_K + WIDTH * small / 2, 4.55, "keys $K$", color=LINE)
    label(ax, left_V + WIDTH * small / 2, 4.55, "values $V$", color=LINE)
    tops = {}
    for block in range(BLOCKS):
        y = 4.32 - block * (CELLS * small + gap)
        tops[block] = y
        for x, table in ((left_K, keys_BGD), (left_V, values_BGD)):
            if block in chosen:
                cells(ax, x, y, table[block] * 1.3, small)
                colour = COLOURS[chosen.index(block)]
                frame(ax, x, y, WIDTH * small, CELLS * small, colour)
            else:
                for row in range(CELLS):
                    corner = (x, y - (row + 1) * small)
                    shape = Rectangle(
                        corner, WIDTH * small, small, facecolor=PALE, edgecolor="white"
                    )
                    ax.add_patch(shape)
        label(ax, left_K - 0.15, y - CELLS * small / 2, str(block + 1), color=LINE, fontsize=9)
    label(ax, 8.6, -0.22, f"$B$ blocks of $g$ cells; “{TOKENS[SHOWN]}” uses two", color=LINE)
    for place, block in enumerate(chosen):
        y = tops[block] - CELLS * small / 2
        score = (left + (block + 0.5) * size, top - SHOWN * 0.6 - (size if place else 0))
        arrow(ax, score, (left_K - 0.35, y), COLOURS[place])

    # Compute.
    left = 11.2
    label(ax, left + 0.75, 4.95, "2  compute", fontsize=12, weight="bold")
    label(ax, left + 0.75, 4.55, "$f(x K_i^\\top + c_i)\\, V_i$", color=LINE, fontsize=11)
    for place, block in enumerate(chosen):
        y = 3.75 - place * 1.75
        colour = COLOURS[place]
        arrow(
            ax,
            (left_V + WIDTH * small + 0.1, tops[block] - CELLS * small / 2),
            (left - 0.12, y - 0.15),
            colour,
        )
        cells(ax, left, y, hidden_AG[place] / 2, size, cmap="PRGn")
        frame(ax, left, y, CELLS * size, size, colour)
        label(
            ax, left + CELLS * size + 0.12, y - size / 2, "$g$ activations", ha="left", color=LINE
        )
        arrow(ax, (left + 0.45, y - size - 0.05), (left + 0.45, y - size - 0.37), colour)
        cells(ax, left, y - 0.7, parts_AD[place] / 2, size)
        frame(ax, left, y - 0.7, WIDTH * size, size, colour)

    # Combine.
    left = 14.9
    middle = left + WIDTH * size / 2
    label(ax, middle, 4.95, "3  combine", fontsize=12, weight="bold")
    label(ax, middle, 4.55, "weighted sum + output bias", color=LINE)
    y = 2.6 + size / 2
    for place in range(ACTIVE):
        start = (11.2 + WIDTH * size + 0.1, 3.75 - place * 1.75 - 0.7 - size / 2)
        end = (left - 0.12, y - size / 2)
        arrow(ax, start, end, COLOURS[place])
        at = ((start[0] + end[0]) / 2 + 0.1, (start[1] + end[1]) / 2 + (-0.3 if place else 0.3))
        label(ax, *at, f"$\\times\\, w_{chosen[place] + 1}$", color=COLOURS[place], fontsize=11)
    cells(ax, left, y, parts_AD.sum(axis=0) / 2, size)
    frame(ax, left, y, WIDTH * size, size, TEXT)
    label(ax, middle, y + 0.3, f"$y$ for “{TOKENS[SHOWN]}”", fontsize=11)


def main() -> None:
    """Write the picture beside this script."""
    figure, ax = plt.subplots(figsize=(13, 4.4))
    ax.set(xlim=(0.1, 17.1), ylim=(-0.45, 5.2), aspect="equal")
    ax.axis("off")
    draw(ax)
    path = Path(__file__).with_name("sparse_memory.png")
    figure.savefig(
        path, dpi=130, bbox_inches="tight", facecolor="white", metadata={"Software": None}
    )


if __name__ == "__main__":
    main()
