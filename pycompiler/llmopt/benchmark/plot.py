"""The rows of a benchmark as one PNG: a panel per phase, a bar per system, a mark at its roof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmopt.benchmark.results import Row, Setting, number

OURS, THEIRS, ROOF = "#1f6feb", "#9aa4b2", "#d1242f"


def plot(path: Path, rows: Sequence[Row], setting: Setting) -> None:
    """Writes the picture; raises ModuleNotFoundError when matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row.phase, row.title, row.unit) for row in rows))
    systems = list(dict.fromkeys(row.system for row in rows))
    height = 1.4 + len(panels) * (0.7 + 0.28 * len(systems))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, height), squeeze=False, layout="constrained"
    )
    for axis, (phase, title, unit) in zip(axes[:, 0], panels, strict=True):
        shown = [row for row in rows if row.phase == phase]
        colours = [OURS if row.system.startswith("llmopt") else THEIRS for row in shown]
        bars = axis.barh([r.system for r in shown], [r.value for r in shown], color=colours)
        axis.bar_label(bars, labels=[number(row.value) for row in shown], padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        better = "more is better" if unit == "tokens/s" else "less is better"
        axis.set_title(f"{title}, {unit} ({better})", loc="left", fontsize=10)
        roofs = {row.system: _roof(row) for row in shown if row.of_bound}
        if roofs:
            axis.plot(list(roofs.values()), list(roofs), "|", color=ROOF, markersize=12)
    heading = f"{setting.title} — {setting.machine()}"
    figure.suptitle(f"{heading}\nred: each system's roofline on the probes around it", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _roof(row: Row) -> float:
    """The bound in the row's unit."""
    assert row.of_bound
    return row.value / row.of_bound if row.unit == "tokens/s" else row.value * row.of_bound
