"""`python -m cnn report`, as a user runs it."""

import argparse
import html.parser
import json
import re
import shutil

import numpy as np
import pytest

import cnn
from cnn.commands import evaluate
from cnn.config import check_config, to_json_dict
from cnn.report.comparison import compare, group_runs
from cnn.report.page import report_figures
from cnn.report.runs import read_runs
from cnn.runtime.run_directory import RunDirectory
from tests.helpers import records_of

LOST, GAINED = 3, 8  # images
VOID = {"meta", "img", "br", "source"}
NASTY = ["<script>alert(1)</script>", "$x$", 'a"b&c', "</style>", "Ümläut", *"56789"]


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
def report(command):
    """Runs the command; gives exit code, standard output and standard error."""
    return lambda *flags: command("report", *flags)


@pytest.fixture(scope="module")
def evaluated(trained_run, tmp_path_factory):
    """A run with an evaluation, a-0, and two that are made of it: another seed, another rate."""
    folder = tmp_path_factory.mktemp("runs")
    run = shutil.copytree(trained_run, folder / "a-0")
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args([str(run)]))
    shutil.copytree(run, folder / "a-1")
    shutil.rmtree(folder / "a-1" / "evaluation")
    edit(folder / "a-1" / "config.json", seed=1)
    set_accuracy(folder / "a-1", accuracy_of(run) - 0.02)
    other = shutil.copytree(run, folder / "b-0")
    optimizer = read(other / "config.json")["optimizer"] | {"learning_rate": 0.005}
    edit(other / "config.json", optimizer=optimizer)
    set_accuracy(other, accuracy_of(run) + (GAINED - LOST) / 360)
    edit_arrays(other, logits=other_logits(other))
    return folder


def read(path):
    return json.loads(path.read_text())


def edit(path, **values):
    path.write_text(json.dumps({**read(path), **values}))


def edit_arrays(run, **values):
    path = run / "evaluation" / "test" / "predictions.npz"
    with np.load(path) as file:
        arrays = {**file, **values}
    np.savez(path, **arrays)


def accuracy_of(run):
    return records_of(run)[-1]["test_accuracy"]


def set_accuracy(run, accuracy):
    *before, last = records_of(run)
    write_records(run, [*before, {**last, "test_accuracy": accuracy}])


def write_records(run, records):
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))


def other_logits(run):
    """The run's logits, with LOST images wrong that were right, and GAINED the other way round."""
    with np.load(run / "evaluation" / "test" / "predictions.npz") as file:
        logits, labels = file["logits"], file["labels"]
    correct = logits.argmax(-1) == labels
    lost, gained = np.flatnonzero(correct)[:LOST], np.flatnonzero(~correct)[:GAINED]
    assert len(gained) == GAINED
    logits[lost, (labels[lost] + 1) % 10] = 100
    logits[gained, labels[gained]] = 100
    return logits


@pytest.fixture
def runs(evaluated, tmp_path):
    """A copy of the runs that a test may damage."""
    return shutil.copytree(evaluated, tmp_path / "runs")


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
    assert all(page.text.count(f"{name}") for name in ("optimizer", "schedule", "runtime"))


def test_config_of_a_run_is_a_config_file(runs):
    """So the command that the page gives repeats the run."""
    path = runs / "a-0" / "config.json"
    assert to_json_dict(check_config(cnn.load_config(path))) == read(path)


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
    assert (pair["only_first_correct"], pair["only_second_correct"]) == (LOST, GAINED)
    assert comparison["same_images"]["difference"] == pytest.approx(pair["difference"])


def test_figures_of_one_run(runs):
    found = report_figures(read_runs([str(runs / "a-0")]))
    low, high = found["test_accuracy_interval"]
    assert found["status"] == "finished"
    assert low < found["test_accuracy"] < high
    assert found["evaluation"]["count"] == 360


def test_runs_that_differ_in_runtime_only_are_one_group(runs, report):
    config = read(runs / "a-1" / "config.json")
    edit(runs / "a-1" / "config.json", runtime={**config["runtime"], "eval_batch_size": 7})
    _, out, _ = report(runs / "a-0", runs / "a-1", "--output", runs / "p.html", "--json")
    assert [group["count"] for group in json.loads(out)["groups"]] == [2]
    assert "runtime.eval_batch_size" in check((runs / "p.html").read_text()).text


def test_predictions_of_other_images_are_not_paired(runs):
    edit_arrays(runs / "b-0", fingerprint=np.array("other"))
    found = compare(*group_runs(read_runs([str(runs / "a-0"), str(runs / "b-0")])))
    assert found.means is not None
    assert (found.images, found.pairs) == (None, [])


def test_groups_on_different_images_are_not_compared(runs, report):
    """Neither on the screen, nor in the JSON, nor on the page; other groups are as usual."""
    for name, seed in (("c-0", 0), ("c-1", 1)):
        run = shutil.copytree(runs / "a-0", runs / name)
        dataset = {**read(run / "config.json")["dataset"], "folder": "/photos"}
        edit(run / "config.json", dataset=dataset, seed=seed)
        edit(run / "dataset.json", fingerprint="other", name="photos")
        edit_arrays(run, fingerprint=np.array("other"))
    names = [runs / name for name in ("a-0", "a-1", "b-0", "c-0", "c-1")]
    code, out, _ = report(*names, "--output", runs / "p.html")
    lines = out.splitlines()
    assert code == 0
    assert "B - A: +" in out
    assert "C - A: not compared, as C and A were tested on different images" in lines
    assert "dataset.folder = /photos" in lines[2]
    assert "dataset.name" not in lines[2]
    text = check((runs / "p.html").read_text()).text
    assert "none: different images" in text
    assert "Tested on different images than group A: C." in text
    assert "Predictions of other images" not in text
    _, out, _ = report(*names, "--output", runs / "p.html", "--json")
    same, different = json.loads(out)["comparisons"]
    assert same["tested_on_same_images"] is True
    assert different == {
        "first": "A", "second": "C", "tested_on_same_images": False, "difference": None,
        "interval_over_seeds": None, "p_value_over_seeds": None, "same_images": None, "pairs": [],
    }  # fmt: skip


def test_a_page_of_groups_that_cannot_be_compared(runs, report):
    edit(runs / "b-0" / "dataset.json", fingerprint="other")
    code, out, _ = report(runs / "a-0", runs / "b-0", "--output", runs / "p.html")
    assert code == 0
    assert "points" not in out
    assert "Welch" not in check((runs / "p.html").read_text()).text


def test_names_are_texts_and_never_markup(runs, report):
    run = (runs / "a-0").rename(runs / "<b>run & $x$")
    edit(run / "dataset.json", name="<i>", class_names=NASTY)
    edit_arrays(run, class_names=np.array(NASTY))
    config = read(run / "config.json")
    model = {"object": "</style><script>", "source": None, "value": "\ud800"}
    edit(run / "config.json", model=model, dataset={**config["dataset"], "name": "<i>"})
    code, _, err = report(run)
    assert (code, err) == (0, "")
    text = (run / "report.html").read_text()
    page = check(text)
    assert not re.search(r"<script|<i>|<b>", text)
    for name in (*NASTY, "<b>run & $x$", "</style><script> on <i>", "\\ud800"):
        assert name in page.text
    assert "without which it cannot be repeated" in page.text


def test_run_that_was_killed_and_resumed_is_reported_as_such(runs, report):
    run = runs / "a-0"
    (run / "result.json").unlink()
    shutil.rmtree(run / "evaluation")
    write_records(run, records_of(run)[:1])
    now = read(run / "environment.json")
    edit(
        run / "environment.json", starts=[14], devices=["cpu"], earlier=[{**now, "starts": [0, 7]}]
    )
    code, out, _ = report(run)
    page = check((run / "report.html").read_text())
    assert code == 0
    assert "epoch 1 of 2; stopped, not finished" in out
    assert "interrupted or killed. The figures are those after epoch 1 of 2" in page.text
    assert "trained by 3 processes, in 2 environments: resumed at step 7, 14" in page.text
    assert "What changed: 1 x cpu (was 2 x cpu)" in page.text
    assert f"python -m cnn evaluate {run} finds them" in page.text
    with RunDirectory(run) as directory:
        directory.lock()
        assert read_runs([str(run)])[0].status == "running"
    assert read_runs([str(run)])[0].status == "stopped"


def test_evaluation_of_an_earlier_step_is_named_and_not_compared(runs, report):
    edit(runs / "a-0" / "evaluation" / "test" / "evaluation.json", step=14)
    report(runs / "a-0")
    assert "It is of step 14, while the run is at step 28" in (
        Page((runs / "a-0" / "report.html").read_text()).text
    )
    groups = group_runs(read_runs([str(runs / "a-0"), str(runs / "b-0")]))
    assert compare(*groups).pairs == []


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
        (write("config.json", b"{}"), "it is not the config of a run"),
        (write("metrics.jsonl", b"{}\n"), "metrics.jsonl is damaged"),
        (write("metrics.jsonl", b'{"step": 1, "epoch": 1}\n'), "no test accuracy at step 1"),
        (write("metrics.jsonl", b""), "no records yet"),
        (write("result.json", b'{"digest": "0"}'), "result.json is damaged"),
        (write("environment.json", b"[]"), "environment.json is damaged"),
        (write("environment.json", b'{"starts": [0], "packages": 3}'), "environment.json is"),
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
    before = set(runs.rglob("*"))
    code, out, err = report(runs / "a-0")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert set(runs.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a-0", "a-0/../a-0"], "is given twice"),
        (["a-0/checkpoints"], "did you mean"),
        (["s3://a/b"], "is an address"),
        (["a-0", "--output", "a-0/config.json"], "a file that ends in .html or .htm"),
        (["a-0", "--output", "folder.html"], "is a folder; give"),
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
