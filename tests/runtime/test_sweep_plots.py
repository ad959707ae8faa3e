"""What the pictures of a sweep draw, in their figures."""

import contextlib
import itertools

import numpy as np
import PIL.Image
import pytest

from cnn.runtime import sweep_plots
from cnn.runtime.plots import drawing
from cnn.runtime.sweep_plots import plot_sweep, plot_sweep_curves


@pytest.fixture
def draw(monkeypatch):
    """Draws a picture, which it does not save; returns the axes and the legend beside them."""
    figures = []

    @contextlib.contextmanager
    def kept(width, height, path, texts):
        with drawing(width, height, texts) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(sweep_plots, "saved_figure", kept)

    def draw(points, plot=plot_sweep):
        plot(points, "", title="")
        legends = [[text.get_text() for text in each.get_texts()] for each in figures[-1].legends]
        return figures[-1].axes[0], legends[0] if legends else []

    return draw


def point(accuracy, radius=0.01, count=3, **settings):
    interval = [accuracy - radius, accuracy + radius] if count > 1 else None
    spread = {"count": count, "mean": accuracy, "std": radius, "interval": interval}
    return {"settings": settings, "num_diverged": 0, "statistics": {"test_accuracy": spread}}


def diverged(**settings):
    return {"settings": settings, "num_diverged": 3, "statistics": {}}


def sweep(*values):
    return [point(0.5 + 0.01 * index, lr=value) for index, value in enumerate(values)]


def lines(axes):
    return [line for line in axes.get_lines() if line.get_label().startswith("_child")]


def tick_labels(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


@pytest.mark.parametrize(
    ("values", "places", "labels"),
    [
        ((1e-4, 1e-3, 0.1), (-4, -3, -1), ["0.0001", "0.001", "0.1"]),
        ((0.0, 1e-4, 1e-3), (-5, -4, -3), ["0", "0.0001", "0.001"]),
        ((0.1, 0.2, 0.9), (0.1, 0.2, 0.9), ["0.1", "0.2", "0.9"]),
        ((-1, 10, 100), (-1, 10, 100), ["-1", "10", "100"]),
        ((8, 2, 4), (2, 4, 8), ["2", "4", "8"]),
        ((0.1, 0.2, 0.201, 0.9), (0.1, 0.2, 0.201, 0.9), ["0.1", "0.2", "", "0.9"]),
        (("b", "$_", (1, 2), True), (0, 1, 2, 3), ["b", "$_", "(1, 2)", "True"]),
    ],
)
def test_values_have_their_places(draw, values, places, labels):
    axes, legend = draw(sweep(*values))
    np.testing.assert_allclose(axes.get_xticks(), places)
    assert tick_labels(axes) == labels
    assert lines(axes)[0].get_linestyle() == ("None" if "b" in labels else "-")
    assert axes.get_xlabel() == "lr"
    assert legend == []


def marks(axes):
    """The texts of what is drawn above the axes, and the data of those lines that have them."""
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    data = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    return texts, {text: data[text] for text in texts if text in data}


def test_intervals_the_best_and_what_diverged(draw):
    axes, _ = draw([point(0.5, lr=1), point(0.7, lr=2, count=2), diverged(lr=3), point(0.6, lr=4)])
    texts, data = marks(axes)
    assert texts == ["mean of 2 to 3 seeds, 95 % interval", "best: 70.00 %", "all diverged"]
    assert data["best: 70.00 %"] == [[2, 70]]
    ((place, height),) = data["all diverged"]
    low, high = axes.get_ylim()
    assert place == 3
    assert low < height < low + 0.1 * (high - low) < 49  # below all intervals
    bars = [bar[:, 1] for bar in axes.collections[0].get_segments() if len(bar)]
    np.testing.assert_allclose(bars, ((49, 51), (69, 71), (59, 61)))


def test_one_seed_has_no_interval(draw):
    axes, _ = draw([point(0.5, lr=1, count=1), point(0.7, lr=2, count=1)])
    assert marks(axes)[0] == ["one seed each", "best: 70.00 %"]
    assert len(axes.collections) == 0


def test_all_diverged(draw):
    axes, _ = draw([diverged(lr=1), diverged(lr=2)])
    assert marks(axes)[0] == ["all diverged"]


def test_a_long_interval_does_not_leave_the_accuracies(draw):
    axes, _ = draw([point(0.98, 0.3, lr=1), point(0.2, 0.5, lr=2)])
    assert axes.get_ylim() == (0, 100)


def grid(**fields):
    combinations = [dict(zip(fields, c, strict=True)) for c in itertools.product(*fields.values())]
    return [point(0.5 + 0.01 * i, **settings) for i, settings in enumerate(combinations)]


def test_the_field_with_most_values_is_the_axis_and_the_others_are_lines(draw):
    axes, legend = draw(grid(name=("$a_", "b"), lr=(1, 2, 3)))
    assert axes.get_xlabel() == "lr"
    assert legend == ["$a_", "b"]
    assert marks(axes)[0][1] == "best: 55.00 % (b)"
    first, second = (line.get_ydata() for line in lines(axes))
    np.testing.assert_allclose((first, second), ((50, 51, 52), (53, 54, 55)))


def test_a_legend_of_many_lines_names_some(draw):
    axes, legend = draw(grid(lr=tuple(range(1, 6)), batch=(1, 2, 3, 4), name=("a", "b", "c")))
    assert len(legend) == 8
    assert (legend[0], legend[-1]) == ("1, a", "4, c")
    assert axes.figure.legends[0].get_title().get_text() == "batch\nname\n(8 of 12)"


def test_curves_of_each_point(draw):
    def records(accuracy):
        return [{"epoch": e, "test_accuracy": accuracy * e} for e in (1, 2)]

    points = [({"lr": lr}, [records(lr), records(3 * lr)]) for lr in (0.1, 0.2)] + [({"lr": 9}, [])]
    axes, legend = draw(points, plot_sweep_curves)
    assert legend == ["0.1", "0.2", "9"]
    values = [line.get_ydata() for line in axes.get_lines()]
    np.testing.assert_allclose(values[:2], ((20, 40), (40, 80)))
    assert axes.get_title("left") == "mean ± std of 2 seeds"


def test_a_picture_is_a_file_that_shows_any_name(tmp_path):
    points = [
        *grid(name=("$$", "a_b^c"), lr=("$5_to_$10", "日本")),
        diverged(name="x", lr="y"),
    ]
    plot_sweep(points, tmp_path / "p.png", title="t $_$")
    with PIL.Image.open(tmp_path / "p.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
