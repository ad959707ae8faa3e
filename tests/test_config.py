import json
import sys

import pytest
from ml_collections import ConfigDict

from cnn import UserError, load_config
from cnn.config import (
    as_flags,
    check_config,
    comments,
    config_diff,
    fields,
    find_config,
    flatten,
    override,
    to_json_dict,
)
from cnn.models import MODELS
from tests.helpers import REPOSITORY

BASELINE, DIGITS = (REPOSITORY / "configs" / f"{name}.py" for name in ("baseline", "digits"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.py")))
def test_every_config_is_whole_and_valid(path):
    config = load_config(path)
    checked = check_config(config)
    assert set(flatten(config)) <= set(flatten(checked)) == set(fields(config))
    assert check_config(checked) == checked


def test_every_field_of_the_baseline_has_a_comment():
    """The help shows it."""
    said = comments(BASELINE.read_text())
    assert said.keys() == flatten(load_config(BASELINE)).keys()
    assert all(said.values())


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("batch_size=0", "batch_size=0 must be 1 or more"),
        ("num_epochs=0", "num_epochs=0.0 must be more than 0"),
        ("seed=-1", "seed=-1 must lie between"),
        ("optimizer.learning_rate=-0.1", "optimizer.learning_rate=-0.1 must lie between"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate=inf must lie between"),
        ("optimizer.b1=1", "optimizer.b1=1.0 must be at least 0 and below 1"),
        ("optimizer.grad_accumulation_steps=0", "=0 must lie between 1 and"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0 must lie between 0 and"),
        ("optimizer.freeze=(1,)", "optimizer.freeze=(1,) must hold strings"),
        ("optimizer.freeze=('',)", "optimizer.freeze=('',) must hold paths of parameters"),
        ("augment.translate=-1", "augment.translate=-1 must be 0 or more"),
        ("metrics=()", 'metrics=() must hold "accuracy"'),
        ('metrics=("accuracy","acuracy")', "unknown metric 'acuracy'; did you mean accuracy?"),
        ("schedule.warmup_epochs=11", "longer than num_epochs=10"),
        ("schedule.plateau_patience=-1", "schedule.plateau_patience=-1 must be 0 or more"),
        ("schedule.plateau_factor=1", "schedule.plateau_factor=1.0 must be more than 0 and less"),
        ("schedule.plateau_min_scale=1", "plateau_min_scale=1.0 must be at least 0 and below 1"),
        ("early_stopping.patience=-1", "early_stopping.patience=-1 must be 0 or more"),
        ("early_stopping.monitor=tets_loss", "is no figure of an epoch; did you mean test_loss?"),
        ("early_stopping.monitor=test_top5_accuracy", "is no figure of an epoch"),
        ("early_stopping.min_delta=nan", "early_stopping.min_delta=nan must be 0 or more"),
        ("model.dtype=int8", "model.dtype"),
        ("model.padding=FULL", "VALID"),
        ("model.features=(32, 0)", "model.features"),
        ("model.features=(32, 1.5)", "model.features"),
        ("model.hidden_features=1000000000000", "model.hidden_features"),
        ("dataset.name=", "must name a dataset"),
        ("dataset.normalization=none", "must be one of scale, standardize"),
        ("runtime.platform=npu", "must be one of auto, cpu, gpu, tpu"),
        ("loss.label_smoothing=1", "at least 0 and below 1"),
        ("loss.reduction=max", "loss.reduction='max' must be one of mean, sum"),
        ("schedule.warmup_from=2", "schedule.warmup_from=2.0 must lie between 0 and 1"),
    ],
)
def test_impossible_values(flag, complaint):
    config = override(load_config(BASELINE), [f"--config.{flag}"])
    with pytest.raises(UserError) as error:
        check_config(config)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("warmup_epochs", 0.1, "warmup_epochs must be 0 with schedule.name=one_cycle"),
        ("pct_start", 1.0, "schedule.pct_start=1.0 must be 0 or more, below 1"),
        ("div_factor", 0.0, "schedule.div_factor=0.0 must lie between 1 and"),
    ],
)
def test_impossible_cycles(field, value, complaint):
    config = load_config(BASELINE)
    config.schedule = ConfigDict({"name": "one_cycle", field: value})
    with pytest.raises(UserError, match=complaint):
        check_config(config)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--config.batchsize=3"], "unknown config field batchsize; did you mean batch_size?"),
        (["--config.model.nothing=3"], "unknown config field model.nothing; the model that is"),
        (["--config.model.patch_size=3"], "unknown config field model.patch_size"),
        (["--config.optimizer.momentum=0.5"], "unknown config field optimizer.momentum"),
        (["--config.augment.flp"], "did you mean augment.flip?"),
        (["--config.optimizer.name=adaam"], "unknown optimizer 'adaam'; did you mean adam?"),
        (["--config.schedule.name=step"], "unknown schedule 'step'; known: constant, cosine"),
        (["--config.model.name=nothing"], "unknown model 'nothing'; known: cnn"),
        (["--config.optimizer=sgd"], "unknown config field optimizer"),
        (["--config.batch_size=many"], "'many' is not a whole number"),
        (["--config.batch_size=1.5"], "'1.5' is not a whole number"),
        (["--config.batch_size"], "--config.batch_size needs a value"),
        (["--config.runtime.data_dir", "--config.seed=1"], "runtime.data_dir needs a value"),
        (["--config.model.features={4, 8}"], "is not a tuple"),
        (["--config.model.features=b'ab'"], "is not a tuple"),
        (["--config.runtime.tensorboard=maybe"], "'maybe' is not true or false"),
        (["--config.model.features=32"], "is not a tuple"),
        (["--config.model.features=(32"], "is not a tuple"),
        (["--batch_size=3"], "unknown flag '--batch_size=3'"),
        (["3"], "unknown flag '3'"),
    ],
)
def test_wrong_flags(flags, complaint):
    with pytest.raises(UserError) as error:
        override(load_config(BASELINE), flags)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_take_both_forms_and_leave_the_original_alone():
    config = load_config(BASELINE)
    flags = [
        "--config.batch_size",
        "64",
        "--config.runtime.tensorboard",
        "--config.model.features=(4,)",
    ]
    changed = override(config, flags)
    assert (changed.batch_size, changed.runtime.tensorboard, changed.model.features) == (
        64,
        True,
        (4,),
    )
    assert (config.batch_size, config.runtime.tensorboard, config.model.features) == (
        32,
        False,
        (32, 64),
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = (", "is broken: SyntaxError"),
        ("import nothing_of_that_name", "is broken: ModuleNotFoundError"),
        ("def get_config():\n    raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("def get_config():\n    return {}['key']", "is broken: KeyError: 'key'"),
        ("x = 1", "must define get_config()"),
        ("def get_config():\n    return {}", "must return an ml_collections.ConfigDict, not dict"),
        ("import sys; sys.exit(0)", "is broken: SystemExit"),
    ],
)
def test_broken_config_files(tmp_path, text, complaint):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert complaint in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_config_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("batch_size", 3.0, "batch_size=3.0 must be a whole number, not float"),
        ("batch_size", True, "must be a whole number, not bool"),
        ("seed", "0", "must be a whole number, not str"),
        ("learning_rte", 1.0, "unknown config field learning_rte"),
    ],
)
def test_wrong_types_and_unknown_fields_of_a_file(field, value, complaint):
    config = load_config(BASELINE)
    config[field] = None  # a file may set anything; flags are checked before
    config = ConfigDict({**config.to_dict(), field: value})
    with pytest.raises(UserError, match=complaint):
        check_config(config)


def test_a_missing_field():
    config = load_config(BASELINE)
    del config.optimizer["learning_rate"]
    with pytest.raises(UserError, match=r"config field optimizer\.learning_rate is missing"):
        check_config(config)


def test_whole_numbers_are_fine_where_a_number_is_asked_for():
    config = load_config(BASELINE)
    config.optimizer = ConfigDict({**config.optimizer.to_dict(), "learning_rate": 1})
    check_config(config)


@pytest.mark.parametrize("text", ["Conv_*", "'Conv_*'", "('Conv_*',)", "['Conv_*']"])
def test_a_single_word_is_a_tuple_of_one_string(text):
    config = override(load_config(BASELINE), [f"--config.optimizer.freeze={text}"])
    assert config.optimizer.freeze == ("Conv_*",)
    assert override(config, ["--config.metrics", "accuracy"]).metrics == ("accuracy",)


def test_differences_name_what_changes_the_result_only():
    before = to_json_dict(load_config(BASELINE))
    flags = ["--config.seed=1", "--config.runtime.tensorboard", "--config.runtime.data_dir=/data"]
    after = to_json_dict(override(load_config(BASELINE), flags))
    assert config_diff(before, after) == ["seed: 0 -> 1"]
    assert config_diff(before, before) == []


def test_a_dataset_name_beside_a_folder_is_no_difference():
    named = {"dataset": {"name": "cifar10", "folder": ""}}
    folder = {"dataset": {"name": "cifar10", "folder": "/photos"}}
    same_folder = {"dataset": {"name": "mnist", "folder": "/photos"}}
    assert config_diff(named, {"dataset": {"name": "mnist", "folder": ""}}) == [
        "dataset.name: cifar10 -> mnist"
    ]
    assert config_diff(folder, same_folder) == []
    assert config_diff(named, same_folder) == ["dataset.folder:  -> /photos"]
    assert config_diff(same_folder, named) == ["dataset.folder: /photos -> "]


def test_a_config_may_import_its_neighbours_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", str(REPOSITORY))])
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    monkeypatch.delitem(sys.modules, "configs.baseline", raising=False)
    assert load_config(REPOSITORY / "configs" / "digits.py").dataset.name == "digits"


def test_an_override_may_mend_a_wrong_type_in_the_file():
    config = load_config(BASELINE)
    config.optimizer = ConfigDict({**config.optimizer.to_dict(), "learning_rate": 1})
    changed = override(config, ["--config.optimizer.learning_rate=0.01"])
    assert changed.optimizer.learning_rate == 0.01


def test_an_override_of_a_field_that_the_file_lacks():
    config = load_config(BASELINE)
    del config.model["hidden_features"]
    changed = override(config, ["--config.model.hidden_features=8"])
    assert changed.model.hidden_features == 8
    config = ConfigDict({**config.to_dict(), "model": None})
    with pytest.raises(UserError, match=r"unknown config field model\.hidden_features"):
        override(config, ["--config.model.hidden_features=8"])


def test_a_config_that_was_json_in_between_is_the_same(tmp_path):
    """Lists for tuples; as a file, and in a config of one's own."""
    config = check_config(override(load_config(BASELINE), ["--config.model.features=(4, 8)"]))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json_dict(config)))
    own = tmp_path / "own.py"
    own.write_text(
        "import json, pathlib\nfrom ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(json.loads(pathlib.Path({str(path)!r}).read_text()))"
    )
    for again in (load_config(path), load_config(own), ConfigDict(to_json_dict(config))):
        assert check_config(again) == config
        assert isinstance(check_config(again).model.features, tuple)
    path.write_text("[1]")
    with pytest.raises(UserError, match="ConfigDict, not list"):
        load_config(path)


def test_another_name_brings_its_own_fields():
    """The config's fields that it lacks are left out; a flag that it lacks is an error."""
    config = load_config(BASELINE)
    changed = override(config, ["--config.optimizer.momentum=0.5", "--config.optimizer.name=sgd"])
    assert check_config(changed).optimizer.to_dict() == {
        "name": "sgd", "learning_rate": 1e-3, "momentum": 0.5, "nesterov": True,
        "weight_decay": 0.0, "grad_clip_norm": 0.0, "grad_accumulation_steps": 1,
        "freeze": (),
    }  # fmt: skip
    back = override(changed, ["--config.optimizer.name=adam"])
    assert "momentum" not in back.optimizer
    with pytest.raises(UserError, match="the optimizer that is chosen has learning_rate, b1, b2"):
        override(changed, ["--config.optimizer.name=adam", "--config.optimizer.nothing=1"])


@pytest.mark.parametrize("padding", ["same", "Same", "SAME"])
def test_padding_has_one_spelling(padding):
    config = override(load_config(BASELINE), [f"--config.model.padding={padding}"])
    assert check_config(config).model.padding == "SAME"


def test_any_model_of_the_registry_replaces_another():
    for path in sorted((REPOSITORY / "configs").glob("*.py")):
        for name in MODELS:
            changed = check_config(override(load_config(path), [f"--config.model.name={name}"]))
            assert changed.model.name == name


def test_fields_that_take_anything():
    flags = ["--config.optimizer.name=rmsprop", "--config.optimizer.momentum=0.9"]
    assert override(load_config(BASELINE), flags).optimizer.momentum == 0.9
    flags = ["--config.optimizer.mu_dtype=bfloat16"]
    assert check_config(override(load_config(BASELINE), flags)).optimizer.mu_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["optimizer.name=rmsprop", "optimizer.momentum=abc"], "momentum='abc' must be at least 0"),
        (["optimizer.eps=nan"], "optimizer.eps=nan must be finite"),
        (["metrics=accuracy,top5"], "is not a tuple such as \"('accuracy',)\""),
        (["optimizer.freeze=(Conv_0"], "is not a tuple such as \"('Conv_*',)\""),
        (["optimizer.freeze=3"], "is not a tuple such as \"('Conv_*',)\""),
        (["model.features=8"], 'is not a tuple such as "(32, 64)"'),
    ],
)
def test_values_of_such_fields(flags, complaint):
    with pytest.raises(UserError) as error:
        check_config(override(load_config(BASELINE), [f"--config.{flag}" for flag in flags]))
    assert complaint in str(error.value)


def test_a_field_that_was_added_since_had_its_default():
    after = to_json_dict(check_config(load_config(BASELINE)))
    before = json.loads(json.dumps(after))
    del before["augment"]["cutout"], before["optimizer"]["b1"]
    assert config_diff(before, after) == []
    after["augment"]["cutout"] = 8
    assert config_diff(before, after) == ["augment.cutout: 0 -> 8"]


def test_runs_from_before_there_were_folders_resume():
    after = to_json_dict(check_config(load_config(BASELINE)))
    before = json.loads(json.dumps(after))
    before["dataset"] = {key: after["dataset"][key] for key in ("name", "normalization")}
    assert config_diff(before, after) == []


def test_the_size_of_images_is_a_number_or_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(BASELINE)
    config.dataset.image_size = (24, 32)  # a config file may set either
    config.dataset.image_size = 32
    flags = ["--config.dataset.image_size=(24, 32)", "--config.dataset.folder=photos"]
    checked = check_config(override(config, flags))
    assert checked.dataset.image_size == (24, 32)
    assert checked.dataset.folder == str(tmp_path / "photos")
    again = check_config(ConfigDict(json.loads(json.dumps(checked.to_dict()))))
    assert again == checked
    assert config_diff(to_json_dict(again), to_json_dict(checked)) == []


def test_defaults_fill_a_short_config():
    config = ConfigDict(
        {
            "dataset": {"name": "digits"},
            "model": {"name": "cnn"},
            "optimizer": {"name": "sgd", "learning_rate": 0.1},
            "batch_size": 32,
            "num_epochs": 0.5,
        }
    )
    checked = check_config(config)
    assert (checked.loss.name, checked.schedule.name, checked.seed) == (
        "cross_entropy", "constant", 0
    )  # fmt: skip
    assert checked.runtime.eval_batch_size == 1000


def test_configs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = REPOSITORY / "configs"
    (tmp_path / "digits").mkdir()  # a directory hides no config
    for name in ("digits", "digits.py", str(DIGITS)):
        assert find_config(name, folder) == DIGITS
    (tmp_path / "digits.py").touch()
    assert find_config("digits.py", folder).resolve() == tmp_path / "digits.py"
    assert find_config("digits", folder) == DIGITS
    for name, complaint in (
        ("digit", r"config file digit does not exist; did you mean --config digits\?"),
        ("configs/baselin.py", r"did you mean --config baseline\?"),
        ("xyz", "there are baseline, digits, fast94_cpu, fast_cpu"),
        ("", "'' is not a path: it is empty"),
        ("x" * 5000, "does not exist"),
    ):
        with pytest.raises(UserError, match=complaint):
            find_config(name, folder)


def test_flags_of_a_config_make_it_again():
    base = load_config(BASELINE)
    flags = [
        "--config.model.features=(4,)", "--config.runtime.tensorboard=True", "--config.seed=7",
        "--config.optimizer.learning_rate=1e-07", "--config.runtime.data_dir=a b",
    ]  # fmt: skip
    config = override(base, flags)
    assert sorted(as_flags(config, base)) == sorted(flags)
    assert override(base, as_flags(config, base)) == config


def test_the_source_of_the_weights_is_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = check_config(override(load_config(DIGITS), ["--config.init_from=runs/1"]))
    assert config.init_from == str(tmp_path / "runs" / "1")
    with pytest.raises(UserError, match=r"s3://bucket/run is an address"):
        check_config(override(load_config(DIGITS), ["--config.init_from=s3://bucket/run"]))
