"""Which calls raise, and what the error says: argument, expectation, value."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moda_jax import explain_attention, moda_attention
from moda_jax.ops import backends
from pallas_kernels import platforms

B, T, N, K, H, S = 2, 5, 4, 2, 8, 3
F32 = jnp.float32


def arrays(**changes):
    """A good call's arguments, with changes; an absent depth pair is spelled None."""
    good = {
        "query": jnp.ones((B, T, N, H)),
        "key": jnp.ones((B, T, K, H)),
        "value": jnp.ones((B, T, K, H)),
        "depth_key": jnp.ones((S, B, T, K, H)),
        "depth_value": jnp.ones((S, B, T, K, H)),
    }
    return good | changes


NO_SEQUENCE = {"key": None, "value": None}
NO_DEPTH = {"depth_key": None, "depth_value": None}
IDS = np.ones((B, T), np.int32)
LONG_DEPTH = dict.fromkeys(("depth_key", "depth_value"), jnp.ones((S, B, 7, K, H)))

BAD = [
    ({"query": [1.0]}, "query: expected an array [B, Tq, N, H], got list"),
    ({"query": None}, "query: expected an array [B, Tq, N, H], got NoneType"),
    (
        {"query": jnp.ones((B, T, H))},
        "query: expected rank 4, [B, Tq, N, H], got rank 3, [2, 5, 8]",
    ),
    (
        {"query": jnp.ones((B, T, N, H), jnp.int32)},
        "query: expected dtype float32, bfloat16, float16, got int32",
    ),
    (
        {"query": np.ones((B, T, N, H))},
        "query: expected dtype float32, bfloat16, float16, got float64",
    ),
    (
        {"query": jnp.ones((B, T, 3, H))},
        "query: expected a number of heads that is a multiple of the 2 key heads, got 3",
    ),
    ({"key": jnp.ones((B, T, H))}, "key: expected rank 4, [2, Tk, K, 8], got rank 3, [2, 5, 8]"),
    ({"key": jnp.ones((B, T, K, 4))}, "key: expected [2, Tk, K, 8], got [2, 5, 2, 4]"),
    ({"key": jnp.ones((3, T, K, H))}, "key: expected [2, Tk, K, 8], got [3, 5, 2, 8]"),
    (
        {"key": jnp.ones((B, T, 0, H)), "value": jnp.ones((B, T, 0, H))} | NO_DEPTH,
        "key: expected at least one head, got 0",
    ),
    ({"value": jnp.ones((B, 4, K, H))}, "value: expected [2, 5, 2, 8], got [2, 4, 2, 8]"),
    (
        {"value": jnp.ones((B, T, K, H), jnp.bfloat16)},
        "value: expected dtype float32, as query, got bfloat16",
    ),
    ({"key": None}, "key: expected an array, since key and value come together, got None"),
    ({"value": None}, "value: expected an array, since key and value come together, got None"),
    (
        {"depth_key": None},
        "depth_key: expected an array, since depth_key and depth_value come together, got None",
    ),
    (
        {"depth_value": None},
        "depth_value: expected an array, since depth_key and depth_value come together, got None",
    ),
    (NO_SEQUENCE | NO_DEPTH, "key: expected an array, since depth_key is None too, got None"),
    (
        {"depth_key": jnp.ones((B, T, K, H))},
        "depth_key: expected rank 5, [S, 2, Td, 2, 8], got rank 4, [2, 5, 2, 8]",
    ),
    (
        {"depth_key": jnp.ones((S, B, T, 1, H))},
        "depth_key: expected [S, 2, Td, 2, 8], got [3, 2, 5, 1, 8]",
    ),
    (
        {"depth_key": jnp.ones((S, B, T, K, H), jnp.float16)},
        "depth_key: expected dtype float32, as query, got float16",
    ),
    (
        {"depth_value": jnp.ones((4, B, T, K, H))},
        "depth_value: expected [3, 2, 5, 2, 8], got [4, 2, 5, 2, 8]",
    ),
    (LONG_DEPTH, "depth_key: expected token axis (2) of 5, as query, got 7"),
    (LONG_DEPTH | {"depth_chunk": 4}, "depth_key: expected token axis (2) of 5, as query, got 7"),
    (
        dict.fromkeys(("depth_key", "depth_value"), jnp.ones((S, B, 4, K, H)))
        | {"depth_chunk": 4, "query_offset": jnp.zeros(B, int)},
        "depth_key: expected token axis (2) of 5 or more (chunk-visible decoding), as query, got 4",
    ),
    ({"depth_length": 4}, "depth_length: expected at most the 3 slots of depth_key, got 4"),
    (
        {"depth_length": jnp.int32(4)},
        "depth_length: expected at most the 3 slots of depth_key, got 4",
    ),
    ({"depth_length": -1}, "depth_length: expected an int >= 0, got -1"),
    ({"depth_length": 2.0}, "depth_length: expected an int >= 0, got 2.0"),
    ({"depth_length": True}, "depth_length: expected an int >= 0, got True"),
    ({"depth_length": jnp.ones(1, int)}, "depth_length: expected rank 0, [], got rank 1, [1]"),
    ({"depth_length": jnp.float32(2)}, "depth_length: expected an integer dtype, got float32"),
    (
        {"depth_length": 1} | NO_DEPTH,
        "depth_key: expected an array, since a depth_ argument is given, got None",
    ),
    (
        {"depth_chunk": 1} | NO_DEPTH,
        "depth_key: expected an array, since a depth_ argument is given, got None",
    ),
    ({"depth_window": 0}, "depth_window: expected an int >= 1, got 0"),
    ({"depth_window": "2"}, "depth_window: expected an int >= 1, got '2'"),
    ({"depth_window": 2, "depth_reserved": -1}, "depth_reserved: expected an int >= 0, got -1"),
    (
        {"depth_reserved": 1},
        "depth_reserved: expected 0 while depth_window is None (all slots are visible), got 1",
    ),
    ({"depth_chunk": 0}, "depth_chunk: expected an int >= 1, got 0"),
    ({"is_causal": 1}, "is_causal: expected a bool, got 1"),
    ({"scale": float("nan")}, "scale: expected None or a finite number, got nan"),
    ({"scale": "1"}, "scale: expected None or a finite number, got '1'"),
    ({"segment_ids": IDS[0]}, "segment_ids (query): expected rank 2, [2, 5], got rank 1, [5]"),
    (
        {"segment_ids": IDS.astype(np.float32)},
        "segment_ids (query): expected an integer dtype, got float32",
    ),
    ({"segment_ids": (IDS, IDS[:, :4])}, "segment_ids (key): expected [2, 5], got [2, 4]"),
    (
        {"segment_ids": (IDS,)},
        "segment_ids: expected an array or a (query, key) pair, got 1 arrays",
    ),
    ({"query_offset": 3}, "query_offset: expected an array [2], got int"),
    ({"query_offset": jnp.zeros(3, int)}, "query_offset: expected [2], got [3]"),
    ({"kv_length": jnp.zeros(B)}, "kv_length: expected an integer dtype, got float32"),
    (
        {"kv_length": jnp.zeros(B, int)} | NO_SEQUENCE,
        "kv_length: expected None when key is None, got an array",
    ),
    (
        {"implementation": "cudnn"},
        "implementation: expected None or one of xla, reference, got 'cudnn'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_named_with_expectation_and_value(changes, message):
    if message.startswith("implementation"):  # the registry may have grown
        message = message.replace("xla, reference", ", ".join(backends.BACKENDS))
    for call in (moda_attention, explain_attention):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            call(**arrays(**changes))
        assert str(error.value) == message


def test_arguments_after_the_arrays_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        moda_attention(*arrays().values(), 3)  # type: ignore[misc]


def trace_call(**kwargs):
    """Checks, picks and warns as a call does, and compiles nothing."""
    return jax.eval_shape(lambda: moda_attention(**kwargs))


def unsupported(operands, options, platform):
    return f"no {operands.query.dtype} on {platform}"


@pytest.fixture
def fake(monkeypatch):
    """Registers a fastest backend `fake` with the function `unsupported_reason` given."""

    def register(unsupported_reason, **changes):
        changes["unsupported_reason"] = unsupported_reason
        xla = backends.BACKENDS["xla"]
        backend = dataclasses.replace(xla, name="fake", **changes)
        others = {name: x for name, x in backends.BACKENDS.items() if name != "fake"}
        registry = {"fake": backend} | others
        monkeypatch.setattr(backends, "BACKENDS", registry)
        return registry

    return register


def test_reason_of_the_backend_asked_for(fake):
    fake(unsupported)
    message = "no attention implementation takes this call: fake: no float32 on cpu$"
    with pytest.raises(NotImplementedError, match=message):
        moda_attention(**arrays(), implementation="fake")


def test_when_no_backend_can_each_reason_is_listed(fake, monkeypatch):
    registry = fake(unsupported)
    no = {
        name: dataclasses.replace(
            backend, unsupported_reason=lambda *_, name=name: f"{name} says no"
        )
        for name, backend in registry.items()
        if name != "fake"
    }
    monkeypatch.setattr(backends, "BACKENDS", registry | no)
    with pytest.raises(NotImplementedError) as error:
        trace_call(**arrays())
    for reason in ("fake: no float32 on cpu", "xla: xla says no", "reference: reference says no"):
        assert reason in str(error.value)


def test_float64_is_for_the_reference_only():
    with jax.enable_x64(True):
        doubles = {name: x.astype(np.float64) for name, x in arrays().items()}
        assert trace_call(**doubles, implementation="reference").dtype == np.float64
        with pytest.raises(ValueError, match="query: expected dtype float32.*got float64"):
            moda_attention(**doubles, implementation="xla")


def test_a_registered_backend_is_picked_and_one_that_cannot_explained(fake):
    fake(lambda *_: None)
    assert explain_attention(**arrays()).name == "fake"
    fake(unsupported)
    choice = explain_attention(**arrays())
    assert (choice.name, choice.platform) == ("xla", "cpu")
    assert choice.unsupported_reasons["fake"] == "no float32 on cpu"
    assert "fake: no float32 on cpu" in str(choice)
    assert str(choice).startswith("xla on cpu")


def test_explain_takes_shapes_alone_and_every_argument():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays())
    rows = jax.ShapeDtypeStruct((B,), np.int32)
    choice = explain_attention(
        **shapes,
        depth_length=jax.ShapeDtypeStruct((), np.int32),
        depth_window=2,
        depth_reserved=1,
        is_causal=False,
        scale=1.0,
        depth_chunk=2,
        return_lse=True,
        segment_ids=(jax.ShapeDtypeStruct((B, T), np.int32),) * 2,
        query_offset=rows,
        kv_length=rows,
        implementation="xla",
    )
    assert choice.name == "xla"
    assert choice.is_slow == (jax.default_backend() != "cpu")
    with pytest.raises(ValueError, match="depth_length: expected at most the 3 slots"):
        explain_attention(**shapes, depth_length=4)


def test_slow_fallback_warns_once_and_not_where_it_was_asked_for(fake, pretend):
    fake(unsupported)
    pretend("gpu")
    backends.warn_once.cache_clear()
    assert explain_attention(**arrays()).is_slow
    assert "no kernel built for gpu takes this call" in str(explain_attention(**arrays()))
    trace_call(**arrays(), implementation="xla")  # asked for: silent
    message = "slow attention: xla on gpu.*fake: no float32 on gpu"
    with pytest.warns(backends.SlowAttentionWarning, match=message) as record:
        trace_call(**arrays())
    assert record[0].filename == __file__  # points at the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace_call(**arrays())
    backends.warn_once.cache_clear()


@pytest.mark.parametrize(("device", "platform"), [("cuda", "gpu"), ("rocm", "gpu"), ("tpu", "tpu")])
def test_platform_names(pretend, device, platform):
    pretend(device)
    assert explain_attention(**arrays(), implementation="reference").platform == platform


def test_no_warning_on_the_platform_a_backend_is_built_for(fake):
    fake(lambda *_: None, fast_on=("cpu",))
    choice = explain_attention(**arrays())
    assert not choice.is_slow
    trace_call(**arrays())  # a warning would be an error


def test_interpreted_backend_is_taken_only_by_name(fake):
    fake(lambda *_: None, only_by_name_on=("cpu",))
    assert (
        explain_attention(**arrays()).unsupported_reasons["fake"].startswith("interpreted on cpu")
    )
    assert explain_attention(**arrays(), implementation="fake").name == "fake"


def test_compiling_for_another_platform():
    with platforms.compiling_for("tpu"):
        assert not platforms.interpreted()
        assert explain_attention(**arrays(), implementation="xla").platform == "tpu"
    assert platforms.current() == jax.default_backend()
