import jax.numpy as jnp
import pytest

from cnn import CNN, UserError, create_model
from cnn.models import MODELS, model_schema


def test_a_model_is_built_by_its_name():
    assert create_model("cnn", 10) == CNN(10, dtype=jnp.dtype("float32"))
    fields = {"features": [8], "patch_size": 2}
    assert create_model("dct_cnn", 3, **fields).patch_size == 2


@pytest.mark.parametrize("name", MODELS)
def test_the_schema_of_a_model_lists_what_it_takes(name):
    fields = model_schema(name)
    assert "num_classes" not in fields
    assert "dtype" not in fields or fields["dtype"].default == "float32"
    defaults = {key: field.default for key, field in fields.items()}
    assert create_model(name, 10, **defaults) == create_model(name, 10)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16])
def test_a_dtype_is_a_name_or_a_dtype(dtype):
    assert create_model("cnn", 10, dtype=dtype).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "nothing", jnp.float16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UserError, match=r"model\.dtype='\w+' must be one of float32, bfloat16"):
        create_model("cnn", 10, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("inception", {}, "unknown model 'inception'; known: cnn, "),
        ("cnn", {"patch_size": 4}, r"unknown field model\.patch_size"),
        ("cnn", {"kernel_sise": 4}, r"did you mean kernel_size\?"),
        ("cnn", {"kernel_size": "3"}, r"model\.kernel_size='3' must be a whole number"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        create_model(name, 10, **fields)
