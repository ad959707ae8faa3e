"""Pictures do not depend on matplotlib's settings, and names are shown as they are."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cnn.runtime.plots import plot_curves, plot_mean, plot_samples

NAMES = (
    "$$",
    "$5_to_$10",
    r"a_b^c \frac{1}{2}",
    "two\nlines",
    "{}%",
    "日本 кот שלום",
    "\ud800 \x07",
)
HOSTILE = {
    "text.usetex": True,
    "font.size": 30,
    "font.family": "None of this name",
    "axes.grid": True,
    "lines.color": "black",
    "figure.facecolor": "red",
    "savefig.dpi": 20,
    "savefig.bbox": "tight",
    "savefig.format": "pdf",
    "image.cmap": "jet",
}


def records():
    fields = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return [{"epoch": e, **dict.fromkeys(fields, 0.1 * e)} for e in (1, 2)]


def draw():
    """Both pictures in the working directory, and their digests."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (7, 8, 8, 3)).astype(np.uint8)
    predictions = np.array([0, 1, 2, 3, 4, 5, 0])
    plot_samples(images, np.arange(7), predictions, NAMES, "samples.png", title="t $_$")
    plot_curves([records()], "curves.png", title="t $_$")
    return [
        hashlib.sha256(Path(name).read_bytes()).hexdigest()
        for name in ("samples.png", "curves.png")
    ]


def test_settings_of_a_script_change_no_byte_and_stay(tmp_path, monkeypatch):
    import matplotlib  # not above: another test imports this file where that cannot be done

    monkeypatch.chdir(tmp_path)
    plain = draw()
    with matplotlib.rc_context(HOSTILE):
        before = dict(matplotlib.rcParams)
        assert draw() == plain
        assert dict(matplotlib.rcParams) == before


def test_settings_of_the_environment_change_no_byte(tmp_path, monkeypatch):
    """A backend that is not there, a matplotlibrc that is no text, and warnings that are errors."""
    monkeypatch.chdir(tmp_path)
    plain = draw()
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe font.size: 3")
    done = subprocess.run(
        [sys.executable, "-c", "from tests.runtime.test_plots import draw; print(*draw())"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MPLBACKEND": "module://nothing.of_this_name",
            "PYTHONWARNINGS": "error",
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.split() == plain


def drawn(image, tmp_path):
    label = np.zeros(1, int)
    plot_samples(image[None], label, label, ("a",), tmp_path / "s.png", title="t")
    with PIL.Image.open(tmp_path / "s.png") as picture:
        return np.asarray(picture.convert("RGB")).reshape(-1, 3)


@pytest.mark.parametrize(
    ("pixel", "shown"),
    [
        ((90,), (90, 90, 90)),
        ((90, 255), (90, 90, 90)),
        ((90, 0), (255, 255, 255)),
        ((0, 255, 0), (0, 255, 0)),
        ((0, 255, 0, 255), (0, 255, 0)),
        ((90, 1, 2, 3, 4), (90, 90, 90)),
    ],
)
def test_images_of_any_number_of_channels_have_their_colour(tmp_path, pixel, shown):
    image = np.full((8, 8, len(pixel)), pixel, np.uint8)
    assert (drawn(image, tmp_path) == shown).all(-1).sum() > 30_000


def test_the_legend_names_the_smoothing_of_the_train_loss(tmp_path):
    pictures = []
    for smoothing in (0.0, 0.1, 0.2):
        plot_curves([records()], tmp_path / "c.png", title="", label_smoothing=smoothing)
        pictures.append((tmp_path / "c.png").read_bytes())
    assert len(set(pictures)) == 3


def curve(*accuracies):
    return [{"epoch": e, "test_accuracy": a} for e, a in enumerate(accuracies, 1)]


def test_a_mean_is_over_the_members_that_reached_the_epoch():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    members = [curve(0.1, 0.2, 0.3), [], curve(0.3, 0.4)]
    plot_mean(axes, members, "test_accuracy", {"color": "red"}, scale=100)
    x, y = axes.get_lines()[0].get_data()
    np.testing.assert_allclose((x, y), ([1, 2, 3], [20, 30, 30]))
    (band,) = axes.collections
    at_1 = [y for x, y in band.get_paths()[0].vertices if x == 1]
    std = 10 * 2**0.5  # of 10 and 30 with n - 1
    assert (min(at_1), max(at_1)) == pytest.approx((20 - std, 20 + std))
    assert max(x for path in band.get_paths() for x in path.vertices[:, 0]) == 2


def test_a_group_has_a_band_and_a_group_of_one_is_the_run(tmp_path):
    pictures = []
    for members in ([records(), []], [records()] * 2, [records()] * 3):
        plot_curves(members, tmp_path / "g.png", title="t")
        pictures.append((tmp_path / "g.png").read_bytes())
    plot_curves([records()], tmp_path / "c.png", title="t")
    assert pictures[0] == (tmp_path / "c.png").read_bytes()
    assert len(set(pictures)) == 3  # the legend has the number of seeds
