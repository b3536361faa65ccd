"""The reference and the scanned model against an independent float64 NumPy model."""

import jax
import numpy as np
import pytest
from flax import nnx

from moda_jax.config import ExecutionConfig
from moda_jax.model import reference
from tests import equations
from tests.attention_suite import assert_close
from tests.tolerances import (
    EQUATIONS,
    EQUATIONS_DERIVATIVE,
    EQUATIONS_FLOAT32,
    EQUATIONS_FLOAT32_DERIVATIVE,
)

FLOAT32 = ExecutionConfig(compute_dtype="float32", remat="full")
# The scanned model has the numbers of all vectors in a fast test, and test_mechanisms.py compares
# it with the reference.
FAST_REFERENCES = ("residual_pre", "moda_row4_pre", "depth_attention_pre")


def references():
    """All cases of the plain model, and one of each other: one function places all their norms."""
    first = {}
    for name in (*FAST_REFERENCES, *equations.CASES):
        base = name.rpartition("_")[0]
        first.setdefault(name if base == "residual" else base, name)
    return sorted(first.values())


def value_and_derivatives(case, logits, params):
    """Logits at real tokens, and the derivatives of sum(cotangent · logits), by parameter."""
    got, vjp = jax.vjp(logits, params)
    (gradients,) = vjp(case.cotangent.astype(got.dtype))
    return at_real_tokens(case, got), equations.directional_derivatives(case, gradients)


def at_real_tokens(case, logits):
    return np.asarray(logits)[case.segment_ids != 0]


def assert_derivatives_close(case, derivatives, tolerance):
    assert derivatives.keys() == case.derivatives.keys()
    for name, expected in case.derivatives.items():
        # A sum of terms of about 1 that may cancel: below 1 its error is an absolute one.
        scale = max(abs(expected), 1.0)
        error = abs(float(derivatives[name]) - expected) / scale
        assert error < tolerance, f"{name}: error {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST_REFERENCES else pytest.mark.slow)
        for name in references()
    ],
)
def test_reference_in_float64(name):
    case = equations.load(name)
    with jax.enable_x64(True):
        model = equations.build(case, FLOAT32, dtype="float64")

        def logits(params):
            return reference.forward(
                case.config,
                params,
                case.tokens,
                segment_ids=case.segment_ids,
                positions=case.positions,
            )

        params = nnx.to_pure_dict(nnx.state(model))
        got, derivatives = value_and_derivatives(case, logits, params)
    assert_close("logits", got, at_real_tokens(case, case.logits), EQUATIONS)
    assert_derivatives_close(case, derivatives, EQUATIONS_DERIVATIVE)


def scanned(case):
    """Parameters, and a compiled function from them to the logits."""
    graph, state = nnx.split(equations.build(case, FLOAT32))
    info = {"segment_ids": case.segment_ids, "positions": case.positions}
    return state, jax.jit(lambda state: nnx.merge(graph, state)(case.tokens, **info))


@pytest.mark.parametrize("name", equations.CASES)
def test_scanned_model_in_float32(name):
    case = equations.load(name)
    state, logits = scanned(case)
    expected = at_real_tokens(case, case.logits)
    assert_close("logits", at_real_tokens(case, logits(state)), expected, EQUATIONS_FLOAT32)


@pytest.mark.parametrize(
    "name",
    [
        "moda_row5_bias_pre",
        "dense_scalar_pre",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("moda_every2_bounded_reordered", "dense_matrix_post", "mhc_pre")
        ),
    ],
)
def test_derivatives_of_the_scanned_model(name):
    """Of five; tests/test_mechanisms.py compares all gradients with the reference's."""
    case = equations.load(name)
    state, logits = scanned(case)
    _, derivatives = value_and_derivatives(case, logits, state)
    assert_derivatives_close(case, derivatives, EQUATIONS_FLOAT32_DERIVATIVE)
