"""Whatever is wrong with what was given: one line that tells it, exit code 2, nothing written."""

import functools
import io
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from cnn.config import check_config, fields, flatten, load_config, override, to_json_dict
from cnn.data import load_dataset, load_folder
from cnn.errors import UserError
from tests.helpers import REPOSITORY, train_command, without_waits

DIGITS = REPOSITORY / "configs" / "digits.py"
FIELD_NAMES = sorted(fields(load_config(DIGITS)))
# The others have defaults.
DCT = "--config.model.name=dct_cnn"
NEEDED = [
    "dataset.name", "batch_size", "num_epochs", "model.name", "optimizer.name",
    "optimizer.learning_rate",
]  # fmt: skip
LONG = "x" * 5000
VARIABLES = ("TFDS_DATA_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR")


@pytest.fixture
def world(tmp_path, monkeypatch, digits):
    """The folders that a process may find; gives the current one. The digits are decoded."""
    for name in ("here", "home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "here"


def snapshot(world):
    """All paths, and of files the size and the time.

    Without the lock of a run, and the empty folder that each TFDS builder leaves as it looks for
    a dataset in the cloud.
    """
    roots = {world.parent, *(Path(os.environ[name]) for name in VARIABLES)}
    roots = {root for root in roots if os.path.isdir(root)}
    paths = {path for root in roots for path in root.rglob("*")}
    return {
        str(path): (status.st_size, status.st_mtime_ns) if path.is_file() else None
        for path in paths
        if path.name != ".lock" and not path.match("tmp/tmp*tfds")
        for status in [path.lstat()]
    }


def in_new_process(*flags):
    done = subprocess.run(train_command(*flags), capture_output=True, text=True, timeout=240)
    return done.returncode, without_waits(done.stdout), done.stderr


@pytest.fixture
def refused(world, in_process):
    """Checks that a command is refused as it must be; `flags` come after those for the digits."""

    def check(*flags, telling, run=in_process, printed=""):
        before = snapshot(world)
        code, out, err = run("--config", DIGITS, "--workdir", "run", *flags)
        assert code == 2
        assert out.startswith(printed) if printed else not out
        assert telling in err
        line, end = err.split("\n")
        assert not end
        assert line.startswith("error: ")
        assert line.isprintable()
        assert len(line) < 1200
        assert snapshot(world) == before

    return check


COMMAND_LINES = [
    (["--bogus"], "unknown flag '--bogus'"),
    (["-x"], "unknown flag '-x'"),
    (["--conf=a.py"], "unknown flag '--conf=a.py'"),
    (["--work=run"], "unknown flag '--work=run'"),
    (["--batch_size=3"], "unknown flag '--batch_size=3'"),
    (["extra"], "unknown flag 'extra'; did you mean --config extra?"),
    (["run", "run"], "unknown flag 'run'"),
    ([""], "unknown flag ''"),
    (["--", "--config.seed=1"], "unknown flag '--'"),
    (["--x\ny"], r"unknown flag '--x\ny'"),
    ([f"--{LONG}"], "unknown flag '--xxx"),
    (["--workdir"], "--workdir: expected one argument"),
    (["--workdir", "--config.seed=1"], "--workdir: expected one argument"),
    (["--workdir="], "--workdir is empty"),
    (["--workdir=a", "--workdir="], "--workdir is empty"),
    (["--config"], "--config: expected one argument"),
    (["--config="], "'' is not a path: it is empty"),
    (["--config=none.py"], "config file none.py does not exist"),
    (["--config=no\nne.py"], r"config file no\nne.py does not exist"),
    ([f"--config={LONG}"], "does not exist"),
    (["--config=/"], "config file / is a directory"),
    (["--config=/dev/null"], "config file /dev/null is not a file"),
    (["--config=/proc/self/mem"], "/proc/self/mem is broken: OSError"),
    (["--config.model=3"], "unknown config field model; did you mean model.name?"),
    (["--config.optimizer"], "unknown config field optimizer; did you mean"),
    (["--config.batchsize=3"], "did you mean batch_size?"),
    (["--config.Seed=3"], "did you mean seed?"),
    (["--config.seed.x=3"], "unknown config field seed.x; did you mean seed?"),
    (["--config.=3"], "unknown flag '--config.=3'"),
    (["--config..x=3"], "unknown config field .x"),
    (["--config. seed=3"], "unknown config field  seed"),
    (["--config.ba\ntch_size=3"], r"unknown config field ba\ntch_size"),
    ([f"--config.{LONG}=3"], "python train.py --help lists all fields"),
    (["--config.seed"], "--config.seed needs a value"),
    (["--config.seed", "--config.batch_size=3"], "--config.seed needs a value"),
    (["--config.seed", "-1"], "seed=-1 must lie between 0 and 2**32 - 1"),
    (["--config.seed=1", "--config.seed=x"], "'x' is not a whole number"),
    (["--config.seed="], "'' is not a whole number"),
    (["--config.seed= "], "' ' is not a whole number"),
    (["--config.seed='1'"], "is not a whole number"),
    (["--config.seed=0x10"], "'0x10' is not a whole number"),
    (["--config.seed=1e3"], "'1e3' is not a whole number"),
    (["--config.seed=²"], "'²' is not a whole number"),
    (["--config.seed=nan"], "'nan' is not a whole number"),
    (["--config.seed=1\n2"], r"'1\n2' is not a whole number"),
    (["--config.seed=\x1b[31m1"], r"'\x1b[31m1' is not a whole number"),
    (["--config.seed=\u2028"], r"'\u2028' is not a whole number"),
    (["--config.seed=\udcff"], r"'\udcff' is not a whole number"),
    (["--config.seed=99999999999999999999"], "must lie between 0 and 2**32 - 1"),
    (["--config.seed=" + "9" * 5000], "is not a whole number"),
    (["--config.seed=" + LONG], "is not a whole number"),
    (["--config.batch_size=-1"], "batch_size=-1 must be 1 or more"),
    (["--config.batch_size=2000"], "batch_size=2000 must lie between 1 and 1,437"),
    (["--config.batch_size=99999999999999999999"], "be 1 or more, and below 2**31"),
    (["--config.num_epochs=99999999999999999999"], "must be more than 0, and below 2**31"),
    (["--config.runtime.eval_batch_size=0"], "eval_batch_size=0 must be 1 or more"),
    (["--config.runtime.checkpoint_every_steps=-1"], "must be 0 or more"),
    (["--config.runtime.steps_per_execution=1.0"], "'1.0' is not a whole number"),
    (["--config.runtime.num_devices=-1"], "num_devices=-1 must be 0 or more"),
    (["--config.optimizer.grad_accumulation_steps=881"], "more than the 880 steps"),
    (["--config.optimizer.learning_rate=fast"], "'fast' is not a number"),
    (["--config.optimizer.learning_rate=1e999"], "inf must lie between 1e-37 and 1e+38"),
    (["--config.optimizer.learning_rate=1e300"], "1e+300 must lie between 1e-37 and"),
    (["--config.optimizer.learning_rate=1e-320"], "1e-320 must lie between"),
    (["--config.optimizer.learning_rate=nan"], "nan must lie between"),
    (["--config.optimizer.learning_rate=0"], "0.0 must lie between"),
    (["--config.optimizer.learning_rate=1" + "0" * 5000], "inf must lie between"),
    (["--config.optimizer.weight_decay=1e300"], "weight_decay=1e+300 must lie between 0 and"),
    (["--config.optimizer.grad_clip_norm=inf"], "grad_clip_norm=inf must lie between 0 and"),
    (["--config.optimizer.b1=1"], "must be at least 0 and below 1"),
    (["--config.optimizer.momentum=1"], "the optimizer that is chosen has learning_rate, b1, b2"),
    (["--config.schedule.warmup_epochs=nan"], "warmup_epochs=nan must be 0 or more"),
    (["--config.schedule.warmup_epochs=21"], "longer than num_epochs=20"),
    (["--config.schedule.final_lr_fraction=nan"], "must lie between 0 and 1"),
    (["--config.loss.label_smoothing=-0.1"], "must be at least 0 and below 1"),
    (["--config.init_from=none"], "none does not exist; give the run directory of a run"),
    (["--config.init_from=/dev/null"], "/dev/null is not a folder"),
    (["--config.init_from=/"], "init_from=/ is not a run directory"),
    (["--config.init_from=run"], "is the run directory of this run"),
    (["--config.init_from=s3://bucket/run"], "s3://bucket/run is an address"),
    ([f"--config.init_from={LONG}"], "does not exist"),
    (["--config.optimizer.freeze=(Conv_0"], "'(Conv_0' is not a tuple"),
    (["--config.optimizer.freeze=(0,)"], "optimizer.freeze=(0,) must hold strings"),
    (["--config.optimizer.freeze=('Conv_7',)"], "'Conv_7' matches no parameter; did you mean"),
    (["--config.optimizer.freeze=('*/kernel', '*/bias')"], "freezes every parameter"),
    (["--config.model.features="], "'' is not a tuple"),
    (["--config.model.features=32"], "'32' is not a tuple"),
    (["--config.model.features=(1,"], "'(1,' is not a tuple"),
    (["--config.model.features=(1,\n"], r"'(1,\n' is not a tuple"),
    (["--config.model.features={1: 2}"], "'{1: 2}' is not a tuple"),
    (["--config.model.features={[]: 2}"], "'{[]: 2}' is not a tuple"),
    (["--config.model.features='\\d'"], "is not a tuple"),
    (["--config.model.features=open('x', 'w')"], "is not a tuple"),
    (["--config.model.features=" + "(" * 300], "is not a tuple"),
    (["--config.model.features=" + "-" * 5000 + "1"], "is not a tuple"),
    (["--config.model.features=" + "-" * 100_000 + "1"], "is not a tuple"),
    (["--config.model.features=(-1,)"], "must hold whole numbers from 1"),
    (["--config.model.features=(True,)"], "must hold whole numbers"),
    (["--config.model.features=((1, 2),)"], "must hold whole numbers"),
    (["--config.model.features=(99999999999999999999,)"], "must hold whole numbers from 1"),
    (["--config.model.features=(8, 8, 8, 8)"], "too small for CNN"),
    (["--config.model.padding=VALID"], "images of 8x8 pixels are too small for CNN"),
    (["--config.model.kernel_size=65536"], "model.kernel_size=65536 is too much for images of 8x8"),
    (["--config.model.name=dct_cnn", "--config.model.patch_size=9"], "more than the 8 pixels"),
    ([DCT, "--config.model.patch_size=9", "--config.model.features=()"], "more than the 8 pixels"),
    ([DCT, "--config.model.patch_size=2", "--config.model.patch_features=5"], "than the 4 values"),
    (["--config.model.patch_size=2"], "the model that is chosen has features, kernel_size"),
    (["--config.augment.translate=8"], "augment.translate=8 does not fit images of 8x8 pixels"),
    (["--config.model.name='cnn'"], "did you mean cnn?"),
    (["--config.model.name=cnn\n"], r"unknown model 'cnn\n'; did you mean"),
    (["--config.runtime.tensorboard="], "'' is not true or false"),
    (["--config.runtime.tensorboard=yes"], "'yes' is not true or false"),
    (["--config.runtime.platform=npu"], "must be one of auto, cpu, gpu, tpu"),
    (["--config.runtime.platform=tpu"], "platform=tpu: JAX finds no TPU here"),
    (["--config.runtime.platform=gpu"], "platform=gpu: JAX finds no GPU here"),
]


@pytest.mark.parametrize(("flags", "telling"), COMMAND_LINES)
def test_command_lines(refused, flags, telling):
    refused(*flags, telling=telling)


def returning(value):
    return f"from ml_collections import ConfigDict, config_dict\ndef get_config(): return {value}"


def raising(error):
    return f"def get_config(): raise {error}"


def digits_but(*lines):
    """A config that changes what that of the digits gives."""
    body = "\n    ".join(["config = digits.get_config()", *lines, "return config"])
    return (
        "from ml_collections import ConfigDict, config_dict\n"
        f"from configs import digits\ndef get_config():\n    {body}"
    )


BROKEN = "config file bad.py is broken: "
CONFIGS = [
    (b"", "config file bad.py must define get_config()"),
    (b"get_config = 3", "config file bad.py must define get_config()"),
    (b"\0" * 100, BROKEN),
    (bytes(range(256)), BROKEN + "SyntaxError"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", BROKEN),
    (b"PK\3\4" + bytes(100), BROKEN),
    ("x = 'ä'".encode("latin-1"), BROKEN + "SyntaxError"),
    (b"# coding: nothing\n", BROKEN + "SyntaxError"),
    (b"{}" * 2, BROKEN + "SyntaxError"),
    (b"x = " + b"(" * 500, BROKEN + "SyntaxError"),
    (b"x = " + b"-" * 100_000 + b"1", BROKEN),
    (b"import nothing_of_that_name", BROKEN + "ModuleNotFoundError: No module named"),
    (b"import sys; sys.exit(0)", BROKEN + "SystemExit: 0"),
    (b"import sys; sys.path.clear()", "must define get_config()"),
    (b"1 / 0", BROKEN + "ZeroDivisionError"),
    (raising("ValueError('two\\nlines')"), BROKEN + "ValueError: two lines"),
    (raising("ValueError('\\x1b[31m\\0')"), BROKEN + r"ValueError: \x1b[31m\x00"),
    (raising("ValueError('x' * 100_000)"), BROKEN + "ValueError: xxx"),
    (raising("KeyError('key')"), BROKEN + "KeyError: 'key'"),
    (raising("SystemExit"), BROKEN + "SystemExit"),
    (raising("MemoryError"), BROKEN + "MemoryError"),
    (raising("ExceptionGroup('many', [ValueError('one')])"), BROKEN + "ExceptionGroup: many"),
    (b"def get_config(): return get_config()", BROKEN + "RecursionError"),
    (b"def get_config(x): pass", BROKEN + "TypeError"),
    (b"def get_config(): yield", "must return an ml_collections.ConfigDict, not generator"),
    (returning("None"), "must return an ml_collections.ConfigDict, not NoneType"),
    (returning("{}"), "must return an ml_collections.ConfigDict, not dict"),
    (returning("[1]"), "must return an ml_collections.ConfigDict, not list"),
    (returning("ConfigDict"), "must return an ml_collections.ConfigDict, not type"),
    (returning("ConfigDict()"), "config field model.name is missing"),
    (returning("ConfigDict({'seed': {}})"), "config field model.name is missing"),
    (digits_but("del config['dataset']"), "config field dataset.name is missing"),
    (digits_but("del config['model']"), "config field model.name is missing"),
    (digits_but("del config['optimizer']"), "config field optimizer.name is missing"),
    (digits_but("config.model = None"), "config field model.name is missing"),
    (digits_but("config.model = ConfigDict()"), "config field model.name is missing"),
    (digits_but("config.model = 3"), BROKEN + "TypeError"),
    (digits_but("config.seed = '0'"), BROKEN + "TypeError"),
    (digits_but("config.nothing = 3"), "unknown config field nothing"),
    (digits_but("config.model.nothing = 3"), "unknown config field model.nothing"),
    (digits_but("config['two\\nlines'] = 3"), r"unknown config field two\nlines"),
    (digits_but("config.model.name.x = 3"), BROKEN + "AttributeError"),
    (digits_but("config.seed = None"), "seed=None must be a whole number, not NoneType"),
    (digits_but("config.seed = 10**5000"), "seed=a number too long to print must lie between"),
    (digits_but("config.batch_size = 10**5000"), "too long to print must be 1 or more"),
    (digits_but("config.seed = config_dict.placeholder(int)"), "must be a whole number"),
    (digits_but("config.seed = config_dict.required_placeholder(int)"), BROKEN + "RequiredValue"),
    (digits_but("config.model.own = config"), BROKEN + "RecursionError"),
    (digits_but("config.model.features = [4, 'x']"), "must hold whole numbers"),
    (digits_but("config.model.features = (float('nan'),)"), "must hold whole numbers"),
    (digits_but("config.dataset.name = 'a\\nb'"), r"'a\nb' is not a dataset name"),
    (
        digits_but("import numpy", "config.seed = None", "config.seed = numpy.zeros((9, 9))"),
        "must be a whole number, not ndarray",
    ),
]


@pytest.mark.parametrize(("content", "telling"), CONFIGS)
def test_config_files(refused, world, content, telling):
    file = world / "bad.py"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("--config=bad.py", telling=telling)


def test_what_a_broken_config_prints_is_its_own(refused, world):
    (world / "bad.py").write_text("print('hello')\nraise ValueError")
    refused("--config=bad.py", telling=BROKEN + "ValueError", printed="hello\n")


@pytest.mark.parametrize("name", NEEDED)
def test_each_field_is_needed(refused, world, name):
    *sections, leaf = name.split(".")
    (world / "bad.py").write_text(digits_but(f"del config{sections}[{leaf!r}]".replace("[]", "")))
    refused("--config=bad.py", telling=f"config field {name} is missing")


def a_file(world):
    (world / "file").write_text("kept")


def a_dangling_link(world):
    (world / "run").symlink_to("nowhere")


def a_link_to_itself(world):
    (world / "run").symlink_to("run")


def nothing(world):
    pass


WORKDIRS = [
    (a_file, "file", "file is not a writable directory"),
    (a_file, "file/run", "file is not a writable directory"),
    (a_file, "file/ru\nn", r"file/ru\nn cannot be written"),
    (nothing, LONG, "File name too long"),
    (nothing, "~nobody-of-this-name/run", "~nobody-of-this-name"),
    (nothing, "s3://bucket/run", "s3://bucket/run is an address, not a path of this machine"),
    (nothing, "/dev/null", "/dev/null is not a writable directory"),
    (nothing, "/proc/nowhere/run", "/proc/nowhere/run cannot be written"),
    (a_dangling_link, "run", "run cannot be written"),
    (a_link_to_itself, "run", "run cannot be written"),
]


@pytest.mark.parametrize(("make", "workdir", "telling"), WORKDIRS)
def test_work_directories(refused, world, make, workdir, telling):
    make(world)
    refused("--workdir", workdir, telling=telling)


DATASET_NAMES = [
    ("", "must name a dataset"),
    (" ", "' ' is not a dataset name"),
    ("a b", "'a b' is not a dataset name"),
    ("a\nb", r"'a\nb' is not a dataset name"),
    ("digits\0", r"'digits\x00' is not a dataset name"),
    ("../digits", "'../digits' is not a dataset name"),
    ("/digits", "'/digits' is not a dataset name"),
    ("digits/", "'digits/' is not a dataset name"),
    ("digits/a/b", "'digits/a/b' is not a dataset name"),
    (":1.0.0", "':1.0.0' is not a dataset name"),
    ("digits:1", "'digits:1' is not a dataset name"),
    ("digits:newest", "'digits:newest' is not a dataset name"),
    ("huggingface:mnist", "'huggingface:mnist' is not a dataset name"),
    ("digits/large", "digits has no configs"),
    ("digits/..", "digits has no configs"),
    ("digits:9.9.9", "9.9.9"),
    ("cifar10:9.9.9", "9.9.9"),
    ("cifar10/large", "cifar10 has no configs"),
    ("mnist_corrupted/nothing", "mnist_corrupted: "),
    ("digts", "there is no dataset 'digts' in TFDS: did you mean digits"),
    ("CIFAR10", "did you mean cifar10"),
    ("xyzzy", "there is no dataset 'xyzzy' in TFDS"),
    ("ÄÖÜ", "there is no dataset 'ÄÖÜ' in TFDS"),
    (LONG, "xxx"),
]


@pytest.mark.parametrize(("name", "telling"), DATASET_NAMES)
def test_dataset_names(refused, name, telling):
    refused(f"--config.dataset.name={name}", telling=telling)


DATA_DIRS = [
    ("gs://bucket", "gs://bucket is an address, not a path of this machine"),
    ("/proc/nowhere", "cannot be written to prepare it there"),
    ("file", "file, and that directory cannot be written"),
    ("file/tfds", "file/tfds, and that directory cannot be written"),
    ("fi\nle/tfds", r"fi\nle/tfds"),
    (LONG, "File name too long"),
    ("~nobody-of-this-name/tfds", "~nobody-of-this-name"),
]


@pytest.mark.parametrize(("data_dir", "telling"), DATA_DIRS)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_data_directories(refused, world, monkeypatch, by, data_dir, telling):
    a_file(world)
    (world / "fi\nle").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", "" if by == "flag" else data_dir)
    given = [f"--config.runtime.data_dir={data_dir}"] if by == "flag" else []
    refused("--config.dataset.name=mnist", *given, telling=telling)


@pytest.fixture
def own_data(world, monkeypatch):
    """An empty data directory and cache, with nothing decoded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.parent / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(world.parent / "tfds"))
    return world.parent / "tfds"


RECORDS = "digits-train.array_record-00000-of-00001"
DEEP = "[" * 100_000
AGAIN = "to have it prepared again"
DAMAGED = [
    ("dataset_info.json", None, "dataset_info.json is missing"),
    ("dataset_info.json", "", AGAIN),
    ("dataset_info.json", "null", AGAIN),
    ("dataset_info.json", "[]", AGAIN),
    ("dataset_info.json", "{}", AGAIN),
    ("dataset_info.json", "not JSON", AGAIN),
    ("dataset_info.json", DEEP, AGAIN),
    ("dataset_info.json", b"\xff\xfe", AGAIN),
    ("dataset_info.json", '{"name": 3, "version": []}', AGAIN),
    ("dataset_info.json", '{"name": "digits", "version": "1.0.0"}', "digits"),
    ("dataset_info.json", lambda info: info.replace(b'"1437"', b'"many"'), AGAIN),
    ("dataset_info.json", lambda info: info.replace(b'"1437"', b'"-1"'), AGAIN),
    ("dataset_info.json", lambda info: info.replace(b'"1437"', b'"0"'), AGAIN),
    ("dataset_info.json", lambda info: info.replace(b'"1437"', b""), AGAIN),
    ("dataset_info.json", lambda info: info.replace(b'"train"', b'"../train"'), "digits"),
    ("dataset_info.json", lambda info: info.replace(b"array_record", b"csv"), AGAIN),
    ("features.json", lambda info: info.replace(b'"10"', b'"3"'), "run from 0 to 9"),
    ("features.json", None, AGAIN),
    ("features.json", "", AGAIN),
    ("features.json", "[]", AGAIN),
    ("features.json", "{}", AGAIN),
    ("features.json", DEEP, AGAIN),
    ("features.json", b"\xff\xfe", AGAIN),
    ("features.json", '{"pythonClassName": "os.system"}', AGAIN),
    (RECORDS, None, AGAIN),
    (RECORDS, "", AGAIN),
    (RECORDS, "not records", AGAIN),
    (RECORDS, b"\0" * 100_000, AGAIN),
    ("SHA256SUMS", b"\xff" * 100, "SHA256SUMS is damaged"),
    ("SHA256SUMS", "", "SHA256SUMS is damaged"),
]


@pytest.mark.parametrize(("name", "content", "telling"), DAMAGED)
def test_damaged_datasets(refused, own_data, own_home_data, name, content, telling):
    prepared = own_data / "digits" / "1.0.0"
    shutil.copytree(own_home_data / "digits", prepared.parent)
    (prepared / "SHA256SUMS").unlink()  # else its sums would tell all alike
    put(prepared / name, content)
    refused(telling=telling)


def put(path, content):
    """Writes a file, changes it by a function, makes a folder for [] and deletes it for None."""
    if content is None:
        path.unlink()
    elif callable(content):
        path.write_bytes(content(path.read_bytes()))
    elif content == []:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="session")
def own_home_data(digits):
    return Path(os.environ["TFDS_DATA_DIR"])


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Writes a dataset of given features and examples, as a researcher's builder may have."""

    VERSION = tfds.core.Version("1.0.0")
    splits: dict
    features: dict
    keys = ("image", "label")

    def _info(self):
        features = tfds.features.FeaturesDict(self.features)
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=self.keys)

    def _split_generators(self, dl_manager):
        return {name: enumerate(examples) for name, examples in self.splits.items()}

    def _generate_examples(self):
        raise NotImplementedError


def png(size=(8, 8), mode="L", **options):
    content = io.BytesIO()
    PIL.Image.new(mode, size).save(content, options.pop("format", "PNG"), **options)
    return content.getvalue()


def examples(*images, label=0):
    return [{"image": image, "label": label} for image in images]


def image(shape=(None, None, 1), **options):
    return tfds.features.Image(shape=shape, **options)


PNG = png()
WHOLE = {"train": examples(PNG, PNG), "test": examples(PNG)}
UNREADABLE = "cannot read the prepared pictures"
NOT_IMAGES = "pictures is not a dataset of 8-bit images with one class each"


def training(*images, **options):
    return {"splits": {**WHOLE, "train": examples(*images, **options)}}


PICTURES = {
    "no bytes": (training(PNG, b""), UNREADABLE),
    "zero bytes": (training(PNG, bytes(100)), UNREADABLE),
    "a text": (training(b"no image"), UNREADABLE),
    "a header only": (training(PNG[:8]), UNREADABLE),
    "a PNG cut short": (training(png((64, 64))[:60]), UNREADABLE),
    "a PNG with a flipped bit": (training(PNG[:20] + b"\xff" + PNG[21:]), UNREADABLE),
    "a GIF header": (training(b"GIF89a" + bytes(9)), UNREADABLE),
    "a JPEG header": (training(b"\xff\xd8\xff\xe0" + bytes(50)), UNREADABLE),
    "16 bits": (training(PNG, png(mode="I;16")), "more than 8 bits a channel"),
    "a damaged test image": ({"splits": {**WHOLE, "test": examples(PNG[:45])}}, UNREADABLE),
    "several sizes": (training(PNG, png((8, 9))), "images of several sizes"),
    "other sizes to test": (
        {"splits": {**WHOLE, "test": examples(png((9, 8)))}},
        "images of several sizes (such as (8, 8, 1) and (8, 9, 1) in test)",
    ),
    "a negative label": (training(PNG, label=-1), "run from -1 to -1"),
    "no test split": ({"splits": {"train": examples(PNG)}}, "one image of each class"),
    "no train split": ({"splits": {"test": examples(PNG)}}, "train is needed"),
    "other splits": (
        {"splits": {"a": examples(PNG), "b": examples(PNG)}},
        "pictures has the splits a, b",
    ),
    "declared as 16 bits": ({"features": {"image": image(dtype=np.uint16)}}, NOT_IMAGES),
    "two channels": (
        {"features": {"image": image((None, None, 2))}, "splits": {}},
        NOT_IMAGES,
    ),
    "no supervised keys": ({"keys": None}, NOT_IMAGES),
    "keys the other way round": ({"keys": ("label", "image")}, NOT_IMAGES),
    "labels that are texts": (
        {"features": {"label": tfds.features.Text()}, "splits": {"train": examples(PNG, label="")}},
        NOT_IMAGES,
    ),
    "numbers in place of images": (
        {
            "features": {"image": tfds.features.Tensor(shape=(2,), dtype=np.uint8)},
            "splits": {"train": examples(np.zeros(2, np.uint8))},
        },
        NOT_IMAGES,
    ),
}


@pytest.fixture
def pictures(own_data, monkeypatch):
    """Prepares a dataset; what is not given is as it should be."""

    def prepare(splits=WHOLE, features=None, keys=("image", "label")):
        usual = {"image": image(), "label": tfds.features.ClassLabel(num_classes=2)}
        monkeypatch.setattr(Pictures, "features", {**usual, **(features or {})}, raising=False)
        monkeypatch.setattr(Pictures, "splits", splits, raising=False)
        monkeypatch.setattr(Pictures, "keys", keys)
        Pictures(data_dir=own_data).download_and_prepare(file_format="array_record")

    return prepare


@pytest.mark.parametrize(("given", "telling"), PICTURES.values(), ids=PICTURES)
def test_pictures(refused, pictures, given, telling):
    pictures(**given)
    refused("--config.dataset.name=pictures", telling=telling)


@pytest.mark.parametrize(
    ("size", "telling"),
    [
        ((3, 8), "images of 8x3 pixels are too small for CNN"),
        ((8, 8), "batch_size=32 must lie between 1 and 2"),
    ],
)
def test_pictures_that_do_not_fit_the_config(refused, pictures, size, telling):
    small = png(size)
    pictures({"train": examples(small, small), "test": examples(small)})
    load_dataset("pictures")  # decoding them is no fault
    fits = ["--config.batch_size=2"] if "small" in telling else []
    refused("--config.dataset.name=pictures", *fits, telling=telling)


def photos(world):
    """Two classes, with pictures of two sizes and a file that is no image."""
    for name in ("ant", "bee"):
        (world / "photos" / name).mkdir(parents=True)
        for i in range(4):
            picture = PIL.Image.new("RGB", (8 + i % 2, 8))
            picture.save(world / "photos" / name / f"{i}.png")
    (world / "photos" / "bee" / "bad.png").write_bytes(b"no image")


FOLDERS = [
    (["folder=none"], "none does not exist"),
    (["folder=photos/ant/0.png"], "0.png is not a folder"),
    (["folder=photos/ant"], "has pictures, but no folders"),
    (["folder=s3://bucket/photos"], "s3://bucket/photos is an address"),
    ([f"folder={LONG}"], "File name too long"),
    (["folder=photos"], "several sizes, such as 8x8 (ant/"),
    (["folder=photos", "image_size=8", "on_unreadable=stop"], "bee/bad.png: not an image"),
    (["folder=photos", "image_size=-8"], "dataset.image_size=-8 must be a number of pixels"),
    (["folder=photos", "image_size=(8,)"], "dataset.image_size=(8,) must be"),
    (["folder=photos", "image_size=8.0"], "dataset.image_size=8.0 must be"),
    (["folder=photos", "image_size=small"], "dataset.image_size='small' must be"),
    (["folder=photos", "resize=fit"], "dataset.resize='fit' must be one of crop, stretch"),
    (["folder=photos", "test_fraction=1"], "dataset.test_fraction=1.0 must be more than 0"),
    (["folder=photos", "test_fraction=nan"], "dataset.test_fraction=nan must be more than 0"),
    (["folder=photos", "split_seed=-1"], "dataset.split_seed=-1 must be 0 or more"),
    (["folder=photos", "on_unreadable=ask"], "dataset.on_unreadable='ask' must be one of skip"),
]


@pytest.mark.parametrize(("given", "telling"), FOLDERS)
def test_folders_of_pictures(refused, own_data, world, given, telling):
    photos(world)
    if (
        "on_unreadable=stop" in given
    ):  # what was decoded is kept, for the start after the file is removed
        load_folder("photos", image_size=8)
    refused(*(f"--config.dataset.{field}" for field in given), telling=telling)


ANOTHER = "holds a run of another config"
RUNS = [
    ({"config.json": ""}, "config.json is damaged"),
    ({"config.json": "{"}, "config.json is damaged"),
    ({"config.json": "[]"}, "config.json is damaged"),
    ({"config.json": "NaN"}, "config.json is damaged"),
    ({"config.json": DEEP}, "config.json is damaged"),
    ({"config.json": b"\xff\xfe"}, "config.json is damaged"),
    ({"config.json": bytes(1000)}, "config.json is damaged"),
    ({"config.json": []}, "Is a directory"),
    ({"config.json": "{}"}, ANOTHER),
    ({"config.json": '{"seed": NaN}'}, "seed: nan -> 0"),
    ({"config.json": '{"model": 3}'}, "model: 3 -> unset"),
    ({"config.json": '{"two\\nlines": 3}'}, r"two\nlines: 3 -> unset"),
    ({"config.json": '{"a":' * 900 + "1" + "}" * 900}, ANOTHER),
    ({"result.json": ""}, "result.json is damaged"),
    ({"result.json": "null"}, "result.json is damaged"),
    ({"result.json": "{}"}, "result.json is damaged"),
    ({"result.json": DEEP}, "result.json is damaged"),
    ({"result.json": b"\xff\xfe"}, "result.json is damaged"),
    ({"result.json": []}, "Is a directory"),
    ({"metrics.jsonl": "\n"}, "metrics.jsonl is damaged"),
    ({"metrics.jsonl": "{}\n"}, "metrics.jsonl is damaged"),
    ({"metrics.jsonl": "3\n"}, "metrics.jsonl is damaged"),
    ({"metrics.jsonl": DEEP + "\n"}, "metrics.jsonl is damaged"),
    ({"metrics.jsonl": b"\xff\n"}, "metrics.jsonl is damaged"),
    ({"metrics.jsonl": []}, "Is a directory"),
    ({".lock": []}, "run cannot be written (Is a directory)"),
    ({"metrics.jsonl": '{"step": 44}\n'}, "metrics.jsonl is damaged"),
    ({"metrics.jsonl": '{"step": "x"}\n'}, "metrics.jsonl is damaged"),
]


@pytest.mark.parametrize(("files", "telling"), RUNS)
def test_run_directories(refused, world, files, telling):
    for name, content in files.items():
        put(world / "run" / name, content)
    refused("--config.num_epochs=1", telling=telling)


LEFT = "no other is left: restore one from a backup"
RUNS_FOUND_LATE = [
    ({"checkpoints/44": []}, LEFT),
    ({"checkpoints/44": "a file"}, LEFT),
    ({"checkpoints/44/record.json": "{}"}, LEFT),
    ({"checkpoints/44/SHA256SUMS": b"\xff"}, LEFT),
    ({"checkpoints/44/SHA256SUMS": ""}, LEFT),
    ({"checkpoints/99999999999999999999": []}, LEFT),
]


@pytest.mark.parametrize(("files", "telling"), RUNS_FOUND_LATE)
def test_run_directories_found_late(refused, world, files, telling):
    for name, content in files.items():
        put(world / "run" / name, content)
    refused("--config.num_epochs=1", telling=telling, printed="data: digits")


ENVIRONMENTS = [
    ({"JAX_NUM_CPU_DEVICES": "abc"}, "", "for JAX flag jax_num_cpu_devices; look at"),
    ({"JAX_ENABLE_X64": "perhaps"}, "", "JAX_ENABLE_X64"),
    ({"XLA_FLAGS": "junk"}, "", "XLA_FLAGS=junk is neither a list of flags, which begin"),
    ({"XLA_FLAGS": "--xla_x=1"}, "", "XLA rejects XLA_FLAGS=--xla_x=1 (Unknown flag"),
    ({"JAX_PLATFORMS": "nonsense"}, "", "platform=auto: JAX finds no device here"),
    ({"JAX_PLATFORMS": "cuda"}, "", "platform=auto: JAX finds no device here"),
    ({"HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere"}, "--config.seed=x", "'x' is not"),
    ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, "--config.seed=ä", r"'\xe4' is not"),
    ({"LC_ALL": "C", "PYTHONUTF8": "0"}, b"--config.seed=\xff", r"'\udcff' is not"),
]


@pytest.mark.parametrize(("variables", "flag", "telling"), ENVIRONMENTS)
def test_environments(refused, monkeypatch, variables, flag, telling):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    flags = [os.fsdecode(flag)] if flag else []
    refused(*flags, telling=telling, run=in_new_process)


def test_no_cache_is_begun_for_nothing(refused, own_data, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # which the tests have for themselves
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    refused(telling="JAX finds no device here", run=in_new_process)


def test_a_name_that_the_terminal_cannot_show(refused, world, own_data, own_home_data, monkeypatch):
    shutil.copytree(own_home_data / "digits", own_data / "zöo")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    load_dataset("zöo")  # decoding is no fault
    put(world / "run" / "checkpoints" / "0" / "SHA256SUMS", "")
    refused(
        "--config.dataset.name=zöo",
        telling="no other is left",
        run=in_new_process,
        printed=r"data: z\xf6o",
    )


def test_too_little_memory(refused, monkeypatch):
    def allocate(*_, **__):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 154618822656 bytes.\n")

    monkeypatch.setattr("cnn.training.create_experiment", allocate)
    refused(telling="not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 154618822656")


def test_the_corpus_is_large():
    lists = (COMMAND_LINES, CONFIGS, WORKDIRS, DATASET_NAMES, DATA_DIRS, DAMAGED, PICTURES)
    lists += (RUNS, RUNS_FOUND_LATE, ENVIRONMENTS)
    assert sum(map(len, lists)) >= 250


def is_taken(check):
    """Whether an input is fine; what refuses it must say so in one line."""
    try:
        check()
    except UserError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable()
    return False


def some(number):
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


whole_numbers = st.integers(-(10**30), 10**30)
texts = st.one_of(
    st.text(),
    whole_numbers.map(str),
    st.floats().map(str),
    st.lists(whole_numbers).map(str),
    st.sampled_from(["true", "False", "cnn", "adam", "SAME", "cosine", "(4, 8)"]),
)


@some(100)
@given(name=st.sampled_from(FIELD_NAMES), text=texts)
def test_any_text_for_a_field_is_taken_or_refused(name, text):
    config = ConfigDict()

    def check():
        config.update(override(load_config(DIGITS), [f"--config.{name}={text}"]))
        check_config(config)

    if is_taken(check):
        assert type(flatten(config)[name]) is fields(config)[name].type


@some(30)
@given(content=st.binary(max_size=50) | st.text(max_size=50).map(str.encode))
def test_any_bytes_are_a_config_or_refused(tmp_path, content):
    (tmp_path / "any.py").write_bytes(content)
    assert not is_taken(lambda: load_config(tmp_path / "any.py"))


scalars = st.none() | st.booleans() | whole_numbers | st.floats() | st.text()
keys = st.text(min_size=1).filter(lambda key: "." not in key)
values = st.recursive(scalars, lambda some: st.lists(some) | st.dictionaries(keys, some))


@some(70)
@given(name=st.sampled_from(FIELD_NAMES), value=values)
def test_any_value_of_a_field_is_taken_or_refused(name, value):
    nested = load_config(DIGITS).to_dict()
    *sections, leaf = name.split(".")
    functools.reduce(lambda holder, section: holder.setdefault(section, {}), sections, nested)[
        leaf
    ] = value
    config = ConfigDict(nested)
    if is_taken(lambda: check_config(config)):
        json.dumps(to_json_dict(config))
