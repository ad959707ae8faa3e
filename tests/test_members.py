import pytest

from cnn import UserError
from cnn.config import check_config, override
from cnn.members import group_members, is_group
from tests.helpers import short_config


def members(*flags):
    return group_members(check_config(override(short_config(), list(flags))))


def test_a_config_is_one_run_unless_it_asks_for_more():
    config = check_config(short_config())
    assert not is_group(config)
    assert is_group(check_config(override(config, ["--config.num_seeds=2"])))
    assert is_group(check_config(override(config, ["--config.sweep.batch_size=(32,)"])))


def test_the_values_of_a_sweep_are_crossed_with_each_other_and_with_the_seeds():
    found = members(
        "--config.sweep.optimizer.learning_rate=(1e-3, 0.01)",
        "--config.sweep.loss.label_smoothing=(0, 0.1)",
        "--config.num_seeds=2",
        "--config.seed=7",
    )
    assert [one.name for one in found] == [
        f"loss.label_smoothing={smoothing},optimizer.learning_rate={rate},seed={seed}"
        for smoothing in (0, 0.1)
        for rate in (0.001, 0.01)
        for seed in (7, 8)
    ]
    last = found[-1].config
    assert (last.optimizer.learning_rate, last.loss.label_smoothing, last.seed) == (0.01, 0.1, 8)


def test_a_member_has_the_config_of_a_single_run():
    _, second = members("--config.num_seeds=2")
    assert second.config == check_config(override(short_config(), ["--config.seed=1"]))


def test_what_is_built_by_name_is_swept_with_its_defaults():
    adam, sgd = members("--config.sweep.optimizer.name=('adam', 'sgd')")
    assert (adam.config.optimizer.b1, sgd.config.optimizer.momentum) == (0.9, 0.9)
    assert adam.name == "optimizer.name=adam,seed=0"
    wide, deep = members("--config.sweep.model.features=((8,), (4, 8))")
    assert (wide.config.model.features, deep.config.model.features) == ((8,), (4, 8))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("sweep.optimizer.lerning_rate=(1,)", "did you mean optimizer.learning_rate"),
        ("sweep.seed=(1, 2)", "seed cannot be swept; num_seeds trains several seeds"),
        ("sweep.runtime.num_devices=(1, 2)", "runtime.num_devices cannot be swept"),
        ("sweep.batch_size=()", "has no value"),
        ("sweep.batch_size=(8, 8)", "has twice the same value"),
        ("sweep.batch_size=(8.5, 8)", "must hold whole numbers"),
        ("sweep.batch_size=(8, 0)", "batch_size=0 must be 1 or more"),
        ("sweep.optimizer.learning_rate=1e-3", "is not a tuple such as"),
        ("num_seeds=0", "num_seeds=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_a_group_is_refused(flag, message):
    with pytest.raises(UserError) as error:
        members(f"--config.{flag}")
    assert message in str(error.value)


def test_the_last_seed_is_one_too():
    with pytest.raises(UserError, match="seed=4294967296 must lie between"):
        members("--config.seed=4294967295", "--config.num_seeds=2")
