"""What tuning gained, as one PNG: a row per weight, a column per height, the gain as colour, the share of the roof in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmopt.tune.database import Entry


def heatmap(path: Path, entries: Sequence[Entry], title: str) -> None:
    """Writes the picture; raises ModuleNotFoundError when matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = sorted({int(e.problem["m"]) for e in entries})
    weights = sorted({_weight(e) for e in entries})
    gains = [[float("nan")] * len(heights) for _ in weights]
    figure, axes = plt.subplots(
        figsize=(2.5 + 1.1 * len(heights), 1.8 + 0.55 * len(weights)), layout="constrained"
    )
    for entry in entries:
        row, column = weights.index(_weight(entry)), heights.index(int(entry.problem["m"]))
        gain = entry.default_us / entry.us if entry.us else 1.0
        gains[row][column] = gain
        axes.text(
            column,
            row,
            f"{gain:.2f}×\n{entry.roof:.0%} of roof",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if gain > 1.3 else "black",
        )
    image = axes.imshow(gains, cmap="Greens", vmin=1.0, vmax=1.5, aspect="auto")
    axes.set_xticks(range(len(heights)), [f"M={m}" for m in heights], fontsize=8)
    axes.set_yticks(range(len(weights)), [f"{n}x{k} {w}" for n, k, w in weights], fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    figure.colorbar(image, label="times the kernel's own rules")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _weight(entry: Entry) -> tuple[int, int, str]:
    problem = entry.problem
    around = "+".join(name for name in ("gated", "residual") if problem.get(name))
    return int(problem["n"]), int(problem["k"]), " ".join(filter(None, (str(problem["w"]), around)))
