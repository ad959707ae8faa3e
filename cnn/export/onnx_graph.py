"""A trained model as an ONNX file, through jax2onnx.

jax2onnx replaces functions of JAX and Flax while it traces, in ways that do not fit every call of
them. So the model is traced with plain JAX first, and jax2onnx is given its primitives only; where
it has no usable translation of one, that is computed by a function that it does translate.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.extend.core.primitives import reduce_window_max_p, reduce_window_sum_p

from cnn.data.pipeline import normalize
from cnn.errors import UserError, one_line
from cnn.inference import TrainedModel
from cnn.ops.convolution import native_operators

INPUT, OUTPUT = "image", "logits"
_BFLOAT16 = jnp.dtype("bfloat16")
# Calls of other functions, which are traced into.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint")


def onnx(run: TrainedModel) -> bytes:
    """The model as an ONNX file: `image` uint8[B, H, W, C] -> `logits` float32[B, K], with B free.

    The weights and the normalization are inside. A bfloat16 model computes in float32 there, since
    runtimes lack kernels for bfloat16.

    Raises:
      UserError: jax2onnx cannot translate the model.
    """
    variables, (mean, std) = jax.device_get(run.variables), run.normalization

    def logits(images: jax.Array) -> jax.Array:
        image = normalize(images, mean, std)
        return run.state.apply_fn(variables, image, train=False).astype(jnp.float32)

    (batch,) = jax.export.symbolic_shape("batch")
    with native_operators():
        traced = jax.make_jaxpr(logits)(jax.ShapeDtypeStruct((batch, *run.image_shape), jnp.uint8))
    with _silence():
        from jax2onnx import to_onnx  # type: ignore  # an extra, which takes a second to import

        try:
            model = to_onnx(
                lambda image: _evaluate(traced.jaxpr, traced.consts, [image])[0],
                [jax.ShapeDtypeStruct(("batch", *run.image_shape), jnp.uint8)],  # type: ignore
                model_name=type(run.model).__name__,
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
        except Exception as error:  # of any kind, for what it has no translation of
            reason = one_line(f"{type(error).__name__}: {error}".splitlines()[0], limit=200)
            raise UserError(
                f"jax2onnx cannot translate {type(run.model).__name__} of {run.path} ({reason}); "
                f"leave onnx out of --format"
            ) from error
        return model.SerializeToString()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hides what a converter prints, logs and warns of; its errors are raised all the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)


def _evaluate(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """What a jaxpr computes of these inputs, with float32 in place of bfloat16."""
    values: dict[Any, Any] = {}

    def read(variable: Any) -> Any:
        return _widened(variable.val) if isinstance(variable, Literal) else values[variable]

    values.update(zip(jaxpr.constvars, map(_widened, constants), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        operands = list(map(read, eqn.invars))
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in _CALLS and inner is not None:
            closed = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            results = _evaluate(*closed, operands)
        elif _is_image_pooling(eqn):
            results = [_pool(operands[0], eqn)]
        else:
            params = {name: _widened_type(value) for name, value in eqn.params.items()}
            results = eqn.primitive.bind(*operands, **params)
            results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _widened(value: Any) -> Any:
    is_short = getattr(value, "dtype", None) == _BFLOAT16
    return np.asarray(value).astype(np.float32) if is_short else value


def _widened_type(value: Any) -> Any:
    is_short = isinstance(value, np.dtype) and value == _BFLOAT16
    return np.dtype(np.float32) if is_short else value


def _is_image_pooling(eqn: Any) -> bool:
    """Whether it pools height and width of `[B, H, W, C]`.

    jax2onnx pools all four axes, which runtimes refuse.
    """
    if eqn.primitive not in (reduce_window_max_p, reduce_window_sum_p):
        return False
    p = eqn.params
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    is_dilated = {*p["base_dilation"], *p["window_dilation"]} != {1}
    along_images = (window[0], window[-1], strides[0], strides[-1]) == (1, 1, 1, 1)
    along_images &= (*padding[0], *padding[-1]) == (0, 0, 0, 0)
    return len(window) == 4 and along_images and not is_dilated


def _pool(images: Any, eqn: Any) -> Any:
    """Maximum or sum over windows, by a function of Flax that jax2onnx replaces.

    It takes keywords only, and no padding by numbers.
    """
    window, strides = eqn.params["window_dimensions"][1:-1], eqn.params["window_strides"][1:-1]
    is_max, padding = eqn.primitive is reduce_window_max_p, eqn.params["padding"]
    if any(map(any, padding)):
        fill = np.asarray(-np.inf if is_max else 0, images.dtype)
        images = lax.pad(images, fill, [(low, high, 0) for low, high in padding])
    pool = nn.max_pool if is_max else nn.avg_pool
    pooled = pool(images, window_shape=window, strides=strides, padding="VALID")
    return pooled if is_max else pooled * np.float32(math.prod(window))
