"""How any Optax optimizer is called: its extra arguments and its first state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cnn.errors import UserError


def update(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: optax.OptState,
    params: Any,
    loss: jax.Array,
    loss_fn: Callable[[Any], jax.Array],
) -> tuple[Any, optax.OptState]:
    """`tx.update`, with Optax's extra arguments for an optimizer that takes them.

    These are `value`, `grad`, `value_fn`, `obj_fn` and `grad_fn`.

    Args:
      tx: the optimizer.
      grads: of the mean loss.
      opt_state: the state of `tx`.
      params: the parameters.
      loss: `float32[]`, the mean loss.
      loss_fn: from parameters to the mean loss of the same batch.
    """
    known = inspect.signature(tx.update).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())

    def value_fn(params: Any, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        del obj_fn, grad_fn  # a line search passes on what it does not know itself
        return loss_fn(params)

    extra: dict[str, Any] = {
        "value": loss,
        "grad": grads,
        "value_fn": value_fn,
        "obj_fn": loss_fn,
        "grad_fn": lambda params, *_: jax.grad(loss_fn)(params),
    }
    extra = {name: value for name, value in extra.items() if takes_all or name in known}
    return tx.update(grads, opt_state, params, **extra)


def initial_state(tx: optax.GradientTransformation, params: Any) -> optax.OptState:
    """The optimizer's first state.

    Raises:
      UserError: the optimizer cannot be initialized or updated with these parameters, or an update
        changes the structure of its state.
    """

    def update_once(params: Any, opt_state: Any) -> Any:
        grads = jax.tree.map(jnp.zeros_like, params)
        loss = jnp.zeros((), jnp.float32)
        return update(tx, grads, opt_state, params, loss, lambda _: loss)[1]

    try:
        opt_state = tx.init(params)
        after = jax.eval_shape(update_once, params, opt_state)
    except UserError:  # from an optimizer of this package
        raise
    except Exception as error:  # of any kind, from any optimizer
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"train_step cannot use the optimizer {_title(tx)}: {reason}") from error
    if jax.tree.structure(opt_state) != jax.tree.structure(after):
        raise UserError(
            f"train_step cannot use the optimizer {_title(tx)}: an update changes the structure of "
            f"its state"
        )
    return opt_state


def _title(tx: optax.GradientTransformation) -> str:
    """A name for messages: as a rule that of the function that made the optimizer."""
    return getattr(tx.update, "__qualname__", type(tx).__name__).partition(".<locals>")[0]
