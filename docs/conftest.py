"""The pages' examples run in JAX as its users have it: optax mixes types and ranks, which tests/conftest.py forbids."""

import jax
import pytest


@pytest.fixture(autouse=True)
def as_users():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
