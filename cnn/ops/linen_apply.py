"""How any linen module is called: its `train` argument, random streams and collections."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn.errors import UserError

# Names of an argument that means "in training"; those that mean the opposite are refused, since
# leaving them at their default would train a network in its evaluation mode.
_TRAIN = ("train", "training", "is_training")
_NOT_TRAIN = ("deterministic", "use_running_average", "eval", "is_eval", "inference", "test")


class ByIdentity:
    """A callable or optimizer that cannot be hashed, as a value that can: it equals itself only.

    Args:
      wrapped: its attributes are reached through this object.

    Attributes:
      wrapped: as given.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls what is wrapped."""
        return self.wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


def hashable(value: Any) -> Any:
    """The value itself if `hash` takes it, as `jit` needs; else the value wrapped `ByIdentity`."""
    return value if _is_hashable(value) else ByIdentity(value)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # a list, a dictionary or an array in a field
        return False
    return True


class ModuleApply:
    """A module's `apply`, called as `apply_fn(variables, image, train=..., **options)`.

    The module may take `train` by position or by keyword, or not at all. Equal modules make equal
    objects, so that `jit` does not compile twice; a module with a field that cannot be hashed (a
    list, a dictionary, an array) equals itself only.

    Args:
      module: any linen module that maps images to logits.

    Attributes:
      module: as given.

    Raises:
      UserError: if the module's `__call__` wants something else than `(image, train)`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._style = _style_of_train(type(module).__name__, module)
        self._hash = hash((ModuleApply, module)) if _is_hashable(module) else None

    def __hash__(self) -> int:
        return id(self.module) if self._hash is None else self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModuleApply):
            return False
        if self.module is other.module:
            return True
        return self._hash is not None and self._hash == other._hash and self.module == other.module

    def __call__(self, variables: Any, image: Any, train: bool = False, **options: Any) -> Any:
        """What `module.apply` returns.

        Args:
          variables: parameters and other collections.
          image: `float[B, ...]`.
          train: whether the module is to behave as in training.
          **options: of `apply`: `mutable`, `rngs`.
        """
        args, keywords = self._arguments(image, train)
        return self.module.apply(variables, *args, **keywords, **options)

    def init(self, key: jax.Array, image: jax.Array) -> tuple[Any, dict[str, Any]]:
        """The output for some images, and initial variables, in evaluation mode."""
        args, keywords = self._arguments(image, train=False)
        output, variables = self.module.init_with_output(key, *args, **keywords)
        return output, dict(variables)

    def _arguments(self, image: jax.Array, train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._style == "":
            return (image,), {}
        if self._style == "by position":
            return (image, train), {}
        return (image,), {self._style: train}


def _style_of_train(title: str, call: Callable[..., Any]) -> str:
    """One of "by position", the keyword that `train` is passed by, or "" where there is none."""
    if isinstance(call, nn.Sequential):
        return _style_of_train(title, call.layers[0]) if call.layers else ""
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):  # a function written in C: jnp.tanh, say, as a first layer
        return ""
    parameters = list(signature.parameters.values())
    names = [one.name for one in parameters]
    required = [
        one.name
        for one in parameters[1:]
        if one.default is inspect.Parameter.empty
        and one.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and one.name not in _TRAIN
    ]
    train = next((name for name in _TRAIN if name in names), None)
    opposite = [name for name in names if name in _NOT_TRAIN and train is None]
    if wrong := required + opposite:
        raise UserError(
            f"{title}.__call__{signature} cannot be trained: it must take (image, train) or "
            f"(image), and {wrong[0]!r} is neither; wrap it in a module that passes it on"
        )
    if train is None:
        takes_all = inspect.Parameter.VAR_KEYWORD in [one.kind for one in parameters]
        return "train" if takes_all else ""
    # By position where it comes second: `nn.remat(..., static_argnums=2)` takes no other.
    place = names.index(train)
    by_position = parameters[place].kind is not inspect.Parameter.KEYWORD_ONLY
    return "by position" if by_position and place == 1 else train


def random_streams(key: jax.Array) -> dict[str, jax.Array]:
    """Keys for one call of a module: "dropout", and "params", from which linen draws all others.

    Args:
      key: of this step (and of this part of its batch).
    """
    return {"dropout": key, "params": jax.random.fold_in(key, 1)}


def carried_collections(
    apply_fn: ModuleApply, params: Any, collections: dict[str, Any], image: Any, key: Any
) -> dict[str, Any]:
    """The collections that one training step hands to the next: running statistics, say.

    What a module only sows (auxiliary losses, intermediate values) is an output of one call. A
    collection is sown if the module runs without it; within a collection, an entry is sown if it
    grows each time.

    Args:
      apply_fn: of the module.
      params: its parameters.
      collections: all other collections, as initialized.
      image: an array `float[B, ...]`, or its shape and dtype.
      key: a random key; only its type matters.
    """

    def run(variables: dict[str, Any], mutable: list[str]) -> Any:
        return jax.eval_shape(
            lambda v, x, k: apply_fn(
                {"params": params, **v}, x, train=True, mutable=mutable, rngs=random_streams(k)
            )[1],
            variables,
            image,
            key,
        )

    carried = {}
    for name in collections:
        others = {other: value for other, value in collections.items() if other != name}
        try:
            run(others, list(others))
        except flax.errors.FlaxError:
            carried[name] = collections[name]
    if not carried:
        return {}
    after = run(carried, list(carried))
    kept = {name: _unchanged(carried[name], after.get(name, {})) for name in carried}
    return {name: value for name, value in kept.items() if jax.tree.leaves(value)}


def _unchanged(before: Any, after: Any) -> Any:
    """The entries of a collection that have the same structure and shapes afterwards."""
    if isinstance(before, Mapping):
        return {
            name: kept
            for name, value in before.items()
            if name in after and (kept := _unchanged(value, after[name])) is not None
        }
    same = jax.tree.structure(before) == jax.tree.structure(after) and all(
        jnp.shape(old) == new.shape
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )
    return before if same else None


def selected(after: Any, before: Any) -> Any:
    """The entries of some collections that another has, each of the other's dtype.

    With dtypes that drift, `jit` would compile the next step anew and a loop would refuse it.

    Args:
      after: the collections that a module returned.
      before: the collections that it was given.
    """
    if isinstance(before, Mapping):
        return {name: selected(after[name], value) for name, value in before.items()}
    return as_before(after, before)


def as_before(after: Any, before: Any) -> Any:
    """A pytree with the dtypes of another one of the same structure; random keys stay as they are.

    Weak types, which Python numbers leave behind, become strong.
    """

    def cast(new: Any, old: Any) -> jax.Array:
        new = jnp.asarray(new)
        if jnp.issubdtype(new.dtype, jax.dtypes.extended):
            return new
        return jax.lax.convert_element_type(new, jnp.asarray(old).dtype)

    return jax.tree.map(cast, after, before)
