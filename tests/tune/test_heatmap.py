"""The picture of what tuning gained: its size, its cells and their words, from a table made up here."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from llmopt.tune.database import Entry
from llmopt.tune.heatmap import heatmap
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.tune.problems import problem

SMALL, LARGE = "96x64 f32", "160x96 f32 gated"
# weight, height → gain; the last weight was not measured at M=16
GAINS = {(SMALL, 2): 1.05, (SMALL, 16): 1.1, (SMALL, 128): 1.2, (LARGE, 2): 1.3, (LARGE, 128): 1.5}


def entry(weight: str, m: int, gain: float) -> Entry:
    of = problem(m) if weight == SMALL else problem(m, 160, 96, gated=True)
    return Entry(of.facts(), {"span": 2}, 10.0, 10.0 * gain, 0.8, "gained", {})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, Figure]:
    """The pixels [rows, columns, RGB] as bytes, and what they were drawn from."""
    path = tmp_path_factory.mktemp("heatmap") / "x.png"
    entries = [entry(weight, m, gain) for (weight, m), gain in GAINS.items()]
    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", figures.append)
        heatmap(path, entries[::-1], "a title")
    (figure,) = figures
    plt.close(figure)
    return (255 * torch.from_numpy(imread(path))[..., :3]).round().int(), figure


def middle(pixels: torch.Tensor, gain: float) -> tuple[int, int]:
    """Where the colour of a gain is: the row and column in the middle of its pixels."""
    colour = matplotlib.colormaps["Greens"]((gain - 1.0) / 0.5, bytes=True)[:3]
    places = (pixels == torch.tensor(colour)).all(-1).nonzero()
    assert len(places) > 1000, f"no cell has the colour of {gain}"
    row, column = places.median(0).values.tolist()
    return row, column


def test_every_entry_is_a_cell_in_the_colour_of_its_gain(drawn):
    """Weights from above, heights from the left in the order of numbers; what was not measured is white."""
    pixels, _ = drawn
    assert pixels.shape == (348, 696, 3)  # 120 dots an inch
    at = {where: middle(pixels, gain) for where, gain in GAINS.items()}
    rows = [at[weight, 2][0] for weight in (SMALL, LARGE)]
    columns = [at[SMALL, m][1] for m in (2, 16, 128)]
    assert rows == sorted(set(rows))
    assert columns == sorted(set(columns))
    for (weight, m), (row, column) in at.items():
        assert abs(row - rows[weight == LARGE]) <= 3
        assert abs(column - columns[(2, 16, 128).index(m)]) <= 3
    assert (pixels[rows[1], columns[1]] == 255).all()


def test_cells_and_axes_say_what_they_are(drawn):
    _, figure = drawn
    axes, bar = figure.axes
    words = {text.get_position(): text.get_text() for text in axes.texts}
    assert words == {
        ((2, 16, 128).index(m), int(weight == LARGE)): f"{gain:.2f}×\n80% of roof"
        for (weight, m), gain in GAINS.items()
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["M=2", "M=16", "M=128"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [SMALL, LARGE]
    assert axes.get_title(loc="left") == "a title"
    assert bar.get_ylabel() == "times the kernel's own rules"
