"""The recipes of configs/speed94.py and speed96.py, and the scripts that they come from.

The golden numbers are those of airbench94_muon.py and legacy/airbench96.py of
KellerJordan/cifar10-airbench, commit f1c599c: their networks, optimizers, schedules and lookahead,
run in float64 with PyTorch on the weights and the images of `drawn`, with narrow networks. Of each
array there is its product with the numbers of `drawn(99, ...)`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import cnn
from cnn.config import check_config
from cnn.experiment import create_experiment
from cnn.models.initializers import whitening_kernel
from cnn.steps import begin_averaging
from tests.helpers import REPOSITORY, Killed, kill_at, steps_in

# Gradient in training, the parameter after 1 update and after 4; of the means, after 1 and 4. The
# whitening bias is trained for 3 updates.
MUON = {
    "whiten/kernel": (-5.48407, -5.48407),
    "whiten/bias": (0.0793841, 0.32248, 0.314892),
    "conv_0_0/kernel": (-1.38997, -2.02315, -1.21832),
    "norm_0_0/bias": (-0.0209464, -0.210005, -0.205936),
    "norm_0_0/mean": (0.114759, 0.291994),
    "conv_0_1/kernel": (1.84431, -3.15028, -3.16704),
    "norm_0_1/bias": (0.164131, 0.00430047, 0.000291915),
    "norm_0_1/mean": (0.0731216, 0.324109),
    "conv_1_0/kernel": (0.689372, 1.07921, 1.67903),
    "norm_1_0/bias": (0.0952592, -0.145412, -0.142904),
    "norm_1_0/mean": (0.0919694, 0.333579),
    "conv_1_1/kernel": (3.00051, -0.546068, -0.334792),
    "norm_1_1/bias": (-0.038333, -0.200907, -0.190632),
    "norm_1_1/mean": (-0.0837074, -0.0788843),
    "conv_2_0/kernel": (0.880692, 3.01281, 1.41801),
    "norm_2_0/bias": (0.0610915, -0.347833, -0.34826),
    "norm_2_0/mean": (0.181303, 0.42284),
    "conv_2_1/kernel": (0.732037, -0.44248, -1.6542),
    "norm_2_1/bias": (0.019646, -0.0477784, -0.0455955),
    "norm_2_1/mean": (0.101856, 0.0529623),
    "head/kernel": (-0.0590602, 1.28514, 0.854596),
}
# Gradient in training, the parameter after 1 update, after 5 and after all 11; of the means, after
# 1, 5 and 11. The whitening bias is trained for 3 updates, and moved once more by the lookahead.
LOOKAHEAD = {
    "whiten/kernel": (-5.48407, -5.48407, -5.48407),
    "whiten/bias": (-0.178779, 0.332609, 0.330943, 0.330943),
    "conv_0_0/kernel": (4.85048, -1.96687, -1.99661, -1.99895),
    "norm_0_0/bias": (0.00656748, -0.213694, -0.221676, -0.203968),
    "norm_0_0/mean": (0.0286897, 0.108988, 0.139254),
    "conv_0_1/kernel": (-2.66067, -2.92847, -2.88725, -2.87774),
    "norm_0_1/bias": (-0.229938, 0.0267758, 0.000593509, 0.00346446),
    "norm_0_1/mean": (0.0182804, 0.077826, 0.10111),
    "conv_0_2/kernel": (-0.139901, 2.55406, 2.55944, 2.55652),
    "norm_0_2/bias": (1.66749e-05, -0.178324, -0.185782, -0.171921),
    "norm_0_2/mean": (-0.0176689, -0.0687836, -0.0908883),
    "conv_1_0/kernel": (0.750365, 1.56, 1.52847, 1.51252),
    "norm_1_0/bias": (0.0962454, -0.208685, -0.182379, -0.159294),
    "norm_1_0/mean": (-0.0668306, -0.240912, -0.305841),
    "conv_1_1/kernel": (2.91184, 3.24812, 3.17328, 3.15088),
    "norm_1_1/bias": (0.224091, -0.350275, -0.40456, -0.406262),
    "norm_1_1/mean": (0.0344981, 0.121948, 0.149781),
    "conv_1_2/kernel": (-1.74239, -0.214428, -0.191055, -0.183766),
    "norm_1_2/bias": (-0.0135054, -0.0458006, -0.0257735, -0.0164124),
    "norm_1_2/mean": (0.0458181, 0.170064, 0.213499),
    "conv_2_0/kernel": (5.11581, 0.591041, 0.561066, 0.553464),
    "norm_2_0/bias": (0.0912146, 0.192442, 0.131641, 0.108126),
    "norm_2_0/mean": (0.126226, 0.462468, 0.572159),
    "conv_2_1/kernel": (0.151825, -3.42462, -3.37971, -3.3642),
    "norm_2_1/bias": (-0.208092, -0.158074, -0.0285369, 0.00847731),
    "norm_2_1/mean": (0.0267019, 0.103896, 0.137231),
    "conv_2_2/kernel": (1.24309, 2.00664, 1.95796, 1.94012),
    "norm_2_2/bias": (0.0753404, -0.425867, -0.473391, -0.491192),
    "norm_2_2/mean": (-0.0378058, -0.141307, -0.182879),
    "head/kernel": (-0.191799, -0.346387, -0.338238, -0.336037),
}


def drawn(seed, shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def projected(array):
    return float((np.asarray(array, np.float64) * drawn(99, array.shape)).sum())


IMAGES = drawn(101, (8, 32, 32, 3)).astype(np.float32)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.arange(8)}


def muon():
    config = cnn.load_config(REPOSITORY / "configs" / "speed94.py")
    config.model.widths = (8, 16, 16)
    config.model.logit_scale = 1 / 16  # airbench94_muon.py divides by the width
    config.model.conv_implementation = "native"
    return config


def lookahead():
    """That of configs/speed96.py which trains on all images: airbench96.py."""
    config = cnn.load_config(REPOSITORY / "configs" / "speed96.py")
    config.model.widths = (8, 16, 16)
    config.model.conv_implementation = "native"
    config.proxy = ConfigDict({"name": "none"})
    config.optimizer.groups.whitening_bias.freeze_after_epochs = 3.0
    config.schedule.warmup_epochs = 1.0
    return config


def begin(config, num_epochs, golden):
    """The state of a run of one batch an epoch, with the weights of `drawn`."""
    config.batch_size, config.num_epochs = 8, num_epochs
    split = cnn.Split(np.zeros((8, 32, 32, 3), np.uint8), np.arange(8, dtype=np.int32))
    names = tuple("abcdefghij")
    data = cnn.Dataset.from_splits("drawn", train=split, test=split, class_names=names)
    experiment = create_experiment(check_config(config), jax.devices()[:1], dataset=data)
    state = experiment.initial_shapes()
    params = {}
    for seed, path in enumerate(golden, start=1):
        module, name = path.split("/")
        if name == "mean":
            continue
        shape = state.params[module][name].shape
        scale = (3 / np.prod(shape[:-1])) ** 0.5 if len(shape) > 1 else 0.2
        weight = jnp.asarray((scale * drawn(seed, shape)), jnp.float32)
        params.setdefault(module, {})[name] = weight
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    stats = {
        norm: {"mean": jnp.zeros(s["mean"].shape), "var": jnp.ones(s["var"].shape)}
        for norm, s in state.model_state["batch_stats"].items()
    }
    tx = optax.chain(recording(), experiment.tx)
    state = state.replace(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state={"batch_stats": stats},
        tx=tx,
        opt_state=tx.init(params),
        key=jax.random.key(0),
    )
    return begin_averaging(state)


def recording():
    """Passes gradients on, and keeps them as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )


@pytest.mark.parametrize(
    ("make", "num_epochs", "golden", "kept", "loss"),
    [(muon, 8, MUON, (1, 4), 18.47626), (lookahead, 11, LOOKAHEAD, (1, 5, 11), 18.35972)],
)
def test_the_numbers_of_the_original(make, num_epochs, golden, kept, loss):
    state = begin(make(), num_epochs, golden)
    step = jax.jit(cnn.train_step)
    rows = {path: [] for path in golden}
    for number in range(1, max(kept) + 1):
        state, metrics = step(state, BATCH)
        if number == 1:
            grads, _ = state.opt_state
            assert float(metrics.sums["loss"]) == pytest.approx(loss, rel=1e-6)
            assert not grads["whiten"]["kernel"].any()
        for path, row in rows.items():
            module, name = path.split("/")
            is_mean = name == "mean"
            if number == 1 and not is_mean and path != "whiten/kernel":
                row.append(projected(grads[module][name]))
            if number in kept:
                tree = state.model_state["batch_stats"] if is_mean else state.params
                row.append(projected(tree[module][name]))
    for path, expected in golden.items():
        assert rows[path] == pytest.approx(expected, rel=1e-4, abs=2e-4), path


def short(checkpoint_every_steps=0):
    """A run of two epochs of 14 steps on the digits, with a lookahead as well."""
    config = muon()
    config.dataset.name = "digits"
    config.model.widths = (4, 8)
    config.batch_size, config.num_epochs = 96, 2.0
    config.optimizer.groups.whitening_bias.update(schedule_epochs=0.5, freeze_after_epochs=0.5)
    config.averaging = ConfigDict({"name": "lookahead"})
    config.augment.translate = 1
    config.evaluation.tta = "none"
    config.runtime.num_devices = 2
    config.runtime.checkpoint_every_steps = checkpoint_every_steps
    return config


def test_a_run_resumes_within_an_epoch_with_the_same_bits(digits, tmp_path, monkeypatch, capsys):
    """With groups, one of them frozen, a lookahead and alternating flips."""
    monkeypatch.setattr("cnn.results._draw_pictures", lambda *_, **__: None)
    whole, result = cnn.train_and_evaluate(short(), tmp_path / "whole")
    with pytest.raises(Killed):
        cnn.train_and_evaluate(short(20), tmp_path / "part", writers=[kill_at(28)])
    capsys.readouterr()
    _, again = cnn.train_and_evaluate(short(20), tmp_path / "part")
    assert "resuming at step 20 of 28\n" in capsys.readouterr().out
    same = ("digest", "test_accuracy", "test_loss", "train_loss")
    assert [again[name] for name in same] == [result[name] for name in same]
    assert result["test_accuracy"] > 0.3
    # What is frozen keeps its bits: the filters always, and by now their bias.
    earliest = steps_in(tmp_path / "part")[0]
    before, _ = cnn.CheckpointManager(tmp_path / "part" / "checkpoints").read(earliest)
    for module, name, is_kept in (
        ("whiten", "kernel", True), ("whiten", "bias", True), ("head", "kernel", False)
    ):  # fmt: skip
        pair = (np.asarray(tree[module][name]) for tree in (before["params"], whole.params))
        assert np.array_equal(*pair) == is_kept
    # The filters are those of the training images.
    images = (digits.train.images / np.float32(255) - digits.mean) / digits.std
    kernel = whole.params["whiten"]["kernel"]
    np.testing.assert_allclose(kernel, whitening_kernel(images), atol=1e-4)
