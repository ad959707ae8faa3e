"""`python -m cnn report`, as a user runs it."""

import html.parser
import json
import re
import shutil
import signal
import sys

import numpy as np
import pytest

import cnn
from cnn.__main__ import main
from cnn.runtime import cli
from tests.helpers import Killed, kill_at, short_config

VOID = {"meta", "img", "br", "source"}
NASTY = ("<script>alert(1)</script>", "$x$", 'a"b&c', "</style>", "nul\x00", "Ümläut", "7", "8", "9", "\ud800")


class Page(html.parser.HTMLParser):
    """A page whose tags are balanced; its elements with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def report(monkeypatch, capfd):
    """Runs the command in this process; gives exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}

    def run(*flags, command="report"):
        monkeypatch.setattr(sys, "argv", ["cnn", command, *map(str, flags)])
        capfd.readouterr()
        code = 0
        try:
            cli.run(main)
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    yield run
    for signum, handler in handlers.items():
        if signal.getsignal(signum) is not handler:
            signal.signal(signum, handler)


def renamed(digits, names):
    """The dataset with other class names."""
    import dataclasses

    return dataclasses.replace(digits, class_names=names)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """Three runs: two seeds of one config, and one of another."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, rate in (("a-0", 0, 1e-3), ("a-1", 1, 1e-3), ("b-0", 0, 5e-3)):
        config = short_config()
        config.seed, config.optimizer.learning_rate = seed, rate
        cnn.train_and_evaluate(config, folder / name)
    main(["evaluate", str(folder / "a-0")])
    main(["evaluate", str(folder / "b-0")])
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of the runs that a test may damage."""
    return shutil.copytree(trained, tmp_path / "runs")


def check(text):
    """A page is one file that fits both colour schemes."""
    page = Page(text)
    assert len(text) < 3e6
    for tag in ("script", "link", "iframe", "object"):
        assert not page.all(tag)
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert {"name": "color-scheme", "content": "light dark"} in page.all("meta")
    assert re.search(r"@media \(prefers-color-scheme: dark\)", text)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"data:[^\"]+", "", text))
    assert page.all("source")
    assert page.all("html") == [{"lang": "en"}]
    return page


def test_page_about_one_run(runs, report):
    code, out, _ = report(runs / "a-0")
    path = runs / "a-0" / "report.html"
    page = check(path.read_text())
    assert code == 0
    assert out.splitlines()[-1] == f"see {path}: open {path.as_uri()} in a browser"
    result = json.loads((runs / "a-0" / "result.json").read_text())
    for part in (
        f"{100 * result['test_accuracy']:.2f}\N{NO-BREAK SPACE}%",
        "test accuracy on 360 images",
        result["digest"],
        f"{result['num_params']:,}",
        "learning_rate",
        "Confusion",
        "Most confident mistakes",
        "Examples",
        "jaxlib",
        "python -m cnn evaluate",
        f"{runs / 'a-0'}/config.json",
    ):
        assert part in page.text, part
    assert "Not finished" not in page.text
    # Every section of the config, once.
    assert all(page.text.count(f"{name}") for name in ("optimizer", "schedule", "runtime"))


def test_without_an_evaluation_it_names_the_command(runs, report):
    report(runs / "a-1")
    page = check((runs / "a-1" / "report.html").read_text())
    assert f"python -m cnn evaluate {runs / 'a-1'} finds them" in page.text
    assert "Confusion" not in page.text


def test_reproduce_command_repeats_the_run(runs, in_process, tmp_path):
    again = tmp_path / "again"
    config = runs / "a-0" / "config.json"
    code, _, err = in_process("--config", config, "--workdir", again)
    assert (code, err) == (0, "")
    digests = [json.loads((run / "result.json").read_text())["digest"] for run in (runs / "a-0", again)]
    assert digests[0] == digests[1]


def test_comparison(runs, report, monkeypatch):
    monkeypatch.chdir(runs)
    code, out, _ = report("a-0", "a-1", "b-0")
    page = check((runs / "report.html").read_text())
    assert code == 0
    assert out.splitlines()[-1].startswith("see report.html: open file:///")
    assert out.startswith("A: test accuracy ")
    assert "optimizer.learning_rate = 0.001" in page.text
    assert "optimizer.learning_rate = 0.005" in page.text
    assert "none: n = 1" in page.text
    assert "A group with one run gives none" in page.text
    assert "No predictions of the last state: a-1" in page.text
    assert "McNemar" in page.text
    assert "same versions, devices, settings and commit" in page.text


def test_json_has_the_same_figures(runs, report):
    output = runs / "new" / "page.html"
    code, out, _ = report(runs / "a-0", runs / "a-1", runs / "b-0", "--output", output, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["page"] == str(output)
    check(output.read_text())
    accuracies = [run["test_accuracy"] for run in found["runs"]]
    assert [group["count"] for group in found["groups"]] == [2, 1]
    assert found["groups"][0]["mean_test_accuracy"] == pytest.approx(np.mean(accuracies[:2]))
    assert found["groups"][0]["std_test_accuracy"] == pytest.approx(np.std(accuracies[:2], ddof=1))
    (comparison,) = found["comparisons"]
    assert comparison["difference"] == pytest.approx(accuracies[2] - np.mean(accuracies[:2]))
    assert comparison["interval_over_seeds"] is None
    (pair,) = comparison["pairs"]
    assert pair["count"] == 360
    assert pair["difference"] == pytest.approx(accuracies[2] - accuracies[0])
    gained = pair["only_second_correct"] - pair["only_first_correct"]
    assert gained == round(360 * pair["difference"])
    assert comparison["same_images"]["difference"] == pytest.approx(pair["difference"])


def test_json_of_one_run(runs, report):
    _, out, _ = report(runs / "a-0", "--json")
    found = json.loads(out)
    low, high = found["test_accuracy_interval"]
    assert found["status"] == "finished"
    assert low < found["test_accuracy"] < high
    assert found["evaluation"]["count"] == 360


def test_runs_that_differ_in_runtime_only_are_one_group(runs, report):
    path = runs / "a-1" / "config.json"
    config = json.loads(path.read_text())
    config["runtime"]["eval_batch_size"] = 7
    path.write_text(json.dumps(config))
    _, out, _ = report(runs / "a-0", runs / "a-1", "--output", runs / "p.html", "--json")
    assert [group["count"] for group in json.loads(out)["groups"]] == [2]
    assert "runtime.eval_batch_size" in check((runs / "p.html").read_text()).text


def test_runs_on_other_images_are_not_paired(runs, report):
    for name in ("dataset.json", "evaluation/test/predictions.npz"):
        path = runs / "b-0" / name
        if path.suffix == ".json":
            path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "other"}))
        else:
            with np.load(path) as file:
                arrays = {**file, "fingerprint": np.array("other")}
            np.savez(path, **arrays)
    _, out, _ = report(runs / "a-0", runs / "b-0", "--output", runs / "p.html", "--json")
    (comparison,) = json.loads(out)["comparisons"]
    assert comparison["same_images"] is None
    assert comparison["pairs"] == []
    assert "Predictions of other images" in check((runs / "p.html").read_text()).text


def test_names_are_texts_and_never_markup(tmp_path, digits, report):
    run = tmp_path / "<b>run & $x$"
    config = short_config()
    config.num_epochs = 1
    cnn.train_and_evaluate(config, run, dataset=renamed(digits, NASTY[:-1] + ("0",)))
    arrays = dict.fromkeys(("labels",), digits.test.labels)
    rng = np.random.default_rng(0)
    folder = run / "evaluation" / "test"
    folder.mkdir(parents=True)
    logits = rng.normal(size=(360, 10)).astype(np.float32)
    np.savez(folder / "predictions.npz", logits=logits, class_names=np.array(NASTY[:-1] + ("0",)),
             fingerprint=np.array(digits.fingerprint), **arrays)  # fmt: skip
    figures = {"split": "test", "tta": "none", "step": 14, "count": 360, "accuracy": 0.1,
               "loss": 1.0, "calibration_error": 0.1, "mean_confidence": 0.5}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(figures))
    (folder / "predictions.csv").write_text("confidence\n" + "0.5\n" * 360)
    code, _, err = report(run)
    assert (code, err.count("error")) == (0, 0)
    text = (run / "report.html").read_text()
    page = check(text)
    assert "<script" not in text
    for name in ("<script>alert(1)</script>", "$x$", 'a"b&c', "</style>", "nul\\x00", "Ümläut"):
        assert name in page.text
    assert "<b>run & $x$" in page.text
    assert "without which it cannot be repeated" in page.text


def test_killed_run_is_reported_as_what_it_is(tmp_path, digits, report):
    config = short_config()
    with pytest.raises(Killed):
        cnn.train_and_evaluate(config, tmp_path / "run", writers=[kill_at(14)])
    code, out, _ = report(tmp_path / "run")
    page = check((tmp_path / "run" / "report.html").read_text())
    assert code == 0
    assert "epoch 1 of 2; stopped, not finished" in out
    assert "interrupted or killed. The figures are those after epoch 1 of 2" in page.text
    with cnn.runtime.run_directory.RunDirectory(tmp_path / "run") as run:
        run.lock()
        _, out, _ = report(tmp_path / "run")
        assert "epoch 1 of 2; running, not finished" in out
    config.runtime.num_devices = 1
    cnn.train_and_evaluate(config, tmp_path / "run")
    report(tmp_path / "run")
    page = check((tmp_path / "run" / "report.html").read_text())
    assert "trained by 2 processes, in 2 environments: resumed at step 0" in page.text
    assert "What changed: 1 x cpu (was 2 x cpu)" in page.text
    assert "Not finished" not in page.text


def test_evaluation_of_an_earlier_step_is_named_and_not_compared(runs, report):
    path = runs / "a-0" / "evaluation" / "test" / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 14}))
    report(runs / "a-0")
    assert "It is of step 14, while the run is at step 28" in (
        Page((runs / "a-0" / "report.html").read_text()).text
    )
    _, out, _ = report(runs / "a-0", runs / "b-0", "--output", runs / "p.html", "--json")
    assert json.loads(out)["comparisons"][0]["pairs"] == []


def write(name, content):
    def damage(run):
        (run / name).write_bytes(content)

    return damage


def cut(name):
    def damage(run):
        path = run / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("config.json", b"{"), "config.json is damaged"),
        (write("config.json", b"{}"), "it lacks num_epochs or seed"),
        (write("metrics.jsonl", b"{}\n"), "metrics.jsonl is damaged"),
        (write("metrics.jsonl", b'{"step": 1, "epoch": 1}\n'), "no test accuracy at step 1"),
        (write("metrics.jsonl", b""), "no records yet"),
        (write("result.json", b'{"digest": "0"}'), "result.json is damaged"),
        (write("environment.json", b"[]"), "environment.json is damaged"),
        (write("environment.json", b'{"starts": [0], "packages": 3}'), "environment.json is damaged"),
        (write("dataset.json", b"{}"), "dataset.json is damaged"),
        (cut("samples.png"), "samples.png is damaged"),
        (cut("evaluation/test/evaluation.json"), "evaluation.json is damaged"),
        (cut("evaluation/test/predictions.npz"), "predictions.npz is damaged"),
        (cut("evaluation/test/predictions.csv"), "do not belong together"),
        (write("evaluation/test/predictions.csv", b"\xff"), "predictions.csv is damaged"),
        (cut("evaluation/test/mistakes.png"), "mistakes.png is damaged"),
        (lambda run: (run / "config.json").unlink(), "it has no config.json"),
        (lambda run: shutil.rmtree(run), "does not exist"),
    ],
)  # fmt: skip
def test_damage_is_one_line_and_writes_nothing(runs, report, damage, message):
    damage(runs / "a-0")
    before = {path for path in runs.rglob("*")}
    code, out, err = report(runs / "a-0")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert {path for path in runs.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a-0", "a-0/../a-0"], "is given twice"),
        (["a-0/checkpoints"], "did you mean"),
        (["s3://a/b"], "is an address"),
        (["a-0", "--output", "a-0/config.json"], "must be the name of a file that ends in .html"),
        (["a-0", "--output", "folder.html"], "is a directory"),
        (["a-0", "--output", "a-0/config.json/x.html"], "cannot be written"),
        ([], "required: RUN"),
    ],
)
def test_bad_flags(runs, report, monkeypatch, flags, message):
    monkeypatch.chdir(runs)
    (runs / "folder.html").mkdir()
    before = (runs / "a-0" / "config.json").read_bytes()
    code, out, err = report(*flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(runs.rglob("report.html"))
    assert (runs / "a-0" / "config.json").read_bytes() == before
