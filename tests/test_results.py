"""After the last epoch nothing costs the result."""

import sys

import pytest

import cnn
import cnn.results
from cnn import CrossEntropy, train_and_evaluate
from cnn.config import override


@pytest.fixture
def config(config):
    return override(config, ["--config.num_epochs=1", "--config.loss.label_smoothing=0.2"])


def test_a_failing_picture_is_a_line_of_warning_and_drawn_later(
    config, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        _, result = train_and_evaluate(config, run)
    out, err = capsys.readouterr()
    assert err.startswith(
        "warning: curves.png and samples.png cannot be drawn (ModuleNotFoundError"
    )
    assert err.count("\n") == 1
    assert f"digest: {result['digest']}" in out
    assert (run / "result.json").exists()
    assert not list(run.glob("**/*.png"))
    assert train_and_evaluate(config, run)[1] == result
    out, err = capsys.readouterr()
    assert err == ""
    assert "finished before: test accuracy" in out
    assert {path.name for path in run.glob("**/*.png")} == {"curves.png", "samples.png"}


def test_a_stop_while_it_draws_is_no_failing_picture(config, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise cnn.Interrupted("stopped", 15)

    monkeypatch.setattr(cnn.results, "plot_curves", stop)
    with pytest.raises(cnn.Interrupted):
        train_and_evaluate(config, tmp_path)
    assert (tmp_path / "result.json").exists()


def test_the_test_loss_is_plain_cross_entropy_with_label_smoothing_too(config, tmp_path, digits):
    state, result = train_and_evaluate(config, tmp_path)
    import jax

    test = cnn.DeviceSplit.from_split(digits.test, jax.devices()[0])
    host = jax.device_get(state)
    plain = cnn.evaluate(host.replace(loss_fn=CrossEntropy()), test)
    smoothed = cnn.evaluate(host, test)
    assert result["test_loss"] == pytest.approx(plain.loss, rel=1e-5)
    assert abs(result["test_loss"] - smoothed.loss) > 1e-3
