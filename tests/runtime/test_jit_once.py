"""Programs that run seldom, and an XLA that lacks an option for them."""

import jax.numpy as jnp
import pytest

from cnn.runtime import jit_once


@pytest.mark.parametrize("options", [{}, {"xla_option_of_the_past": True}])
def test_an_option_that_xla_does_not_have_is_left_out(monkeypatch, options):
    monkeypatch.setattr(jit_once, "_QUICKLY", {**jit_once._QUICKLY, **options})

    def repeated(x, times):
        return jnp.tile(x, times)

    quick = jit_once.jit_once(repeated, ("times",), on_cpu=True)
    assert quick(jnp.arange(2), times=2).tolist() == [0, 1, 0, 1]
