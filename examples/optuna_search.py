"""Searches learning rate and weight decay with Optuna; poor trials stop early.

    pip install optuna
    python examples/optuna_search.py --num-trials 30

Successive halving: of the trials that reach epoch 1, 3, 9 and so on, each time the best third goes
on. The data are scikit-learn's digits; trials are compared on a fifth of the training images, so
that the test images remain for the winner. The same command resumes the study.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import cnn
from cnn.data.holdout import hold_out
from cnn.runtime import cli


def load_data() -> cnn.Dataset:
    """The training images of digits, divided into images to train on and images to compare on."""
    digits = cnn.load_dataset("digits")
    images, labels = digits.train.images, digits.train.labels
    names = list(map(str, range(len(labels))))
    is_held_out = hold_out(names, labels, test_fraction=0.2, split_seed=0)
    return cnn.Dataset.from_splits(
        "digits for the search",
        train=cnn.Split(images[~is_held_out], labels[~is_held_out]),
        test=cnn.Split(images[is_held_out], labels[is_held_out]),
        class_names=digits.class_names,
    )


def create_optimizer(num_steps: int) -> optax.GradientTransformation:
    """AdamW with a cosine schedule, as `optimizer.name=adamw` of a config.

    What is searched is a part of its state, not of the program: so all trials are one program.
    """
    fraction = cnn.create_schedule("cosine", 1.0, num_updates=num_steps)

    def adamw(learning_rate: jax.Array, weight_decay: jax.Array) -> optax.GradientTransformation:
        return optax.adamw(
            lambda update: learning_rate * fraction(update),
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda one: one.ndim > 1, params),  # of kernels
        )

    return optax.inject_hyperparams(adamw)(learning_rate=0.0, weight_decay=0.0)


def create_objective(data: cnn.Dataset, num_epochs: int) -> Callable[[optuna.Trial], float]:
    """The function from a trial to the accuracy on the images that are held out."""
    pipeline = cnn.Pipeline(data, batch_size=32)
    model = cnn.CNN(data.num_classes, padding="SAME")
    tx = create_optimizer(num_epochs * pipeline.steps_per_epoch)

    def objective(trial: optuna.Trial) -> float:
        chosen = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
        }
        state = cnn.create_train_state(model, tx, jax.random.key(0), data.image_shape)
        chosen = jax.tree.map(jnp.float32, chosen)
        state = state.replace(opt_state=optax.tree.set(state.opt_state, **chosen))
        train_steps = cnn.compile_train_steps(state, pipeline)
        accuracy = 0.0
        for epoch in range(num_epochs):
            for batches, num_steps in pipeline.epoch(epoch):
                state, _ = train_steps(state, batches, num_steps)
            accuracy = cnn.evaluate(state, pipeline.test).accuracy
            trial.report(accuracy, epoch + 1)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    return objective


def main(argv: list[str]) -> None:
    """Flags -> study -> the best settings, and the command that trains with them."""
    parser = cli.Parser("python examples/optuna_search.py", __doc__)
    parser.add_argument("--num-trials", type=int, default=30, help="of the whole study")
    parser.add_argument("--epochs", type=int, default=9, help="of a trial that is not stopped")
    parser.add_argument("--study", type=Path, default="checkpoints/optuna_search.log")
    arguments = parser.parse_args(argv)
    if arguments.num_trials < 1 or arguments.epochs < 1:
        parser.error("--num-trials and --epochs must be 1 or more")
    arguments.study.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(arguments.study))),
        study_name=f"digits, {arguments.epochs} epochs",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    )
    # Another seed each time that the study is resumed: one seed would draw the same points again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    missing = arguments.num_trials - len(study.get_trials(states=done))
    study.optimize(create_objective(load_data(), arguments.epochs), n_trials=max(missing, 0))
    pruned = len(study.get_trials(states=(TrialState.PRUNED,)))
    flags = [f"--config.optimizer.{name}={value:.3g}" for name, value in study.best_params.items()]
    words = ["python", "train.py", "--config=digits", f"--config.num_epochs={arguments.epochs}"]
    print(
        f"{len(study.get_trials(states=done))} trials, {pruned} of them stopped early; "
        f"the best has {study.best_value:.1%} of the images that were held out. Test it with\n\n"
        + cli.shell_command([*words, "--config.optimizer.name=adamw", *flags])
    )


if __name__ == "__main__":
    cli.run(main, interrupted="the same command resumes the study")
