"""The public API of Mixture-of-Depths Attention: checks, defaults, dispatch, differentiation."""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moda_jax.ops import backends
from pallas_kernels.operands import Operands, Options

SegmentIds = jax.Array | tuple[jax.Array, jax.Array]

_DTYPES = ("float32", "bfloat16", "float16")


def moda_attention(
    query: jax.Array,
    key: jax.Array | None,
    value: jax.Array | None,
    depth_key: jax.Array | None = None,
    depth_value: jax.Array | None = None,
    *,
    depth_length: int | jax.Array | None = None,
    depth_window: int | None = None,
    depth_reserved: int = 0,
    is_causal: bool = True,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    query_offset: jax.Array | None = None,
    kv_length: jax.Array | None = None,
    depth_chunk: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attends, under one softmax, to the sequence and to the depth keys of the query's own token.

        z_seq[j] = scale · q·k[j]      z_depth[s] = scale · q·kd[s]
        lse = log(Σ_j e^z_seq[j] + Σ_s e^z_depth[s])
        o = Σ_j e^(z_seq[j] - lse) v[j] + Σ_s e^(z_depth[s] - lse) vd[s]

    Source: Zhu et al., Mixture-of-Depths Attention, arXiv 2603.15619, eq. 7-9 and section 6.2.
    Products accumulate in float32 and the softmax is float32. A query that sees nothing gets o = 0,
    lse = -inf and zero gradients.

    Args:
      query: [B, Tq, N, H], float32, bfloat16 or float16 (float64: `implementation="reference"`).
      key, value: [B, Tk, K, H] in the query's dtype; query head n reads head n // (N/K). Both None:
        depth only.
      depth_key, depth_value: [S, B, Tq, K, H], slot-major, in the query's dtype. With `depth_chunk`
        and `query_offset` the token axis may be longer: see `depth_chunk`.
      depth_length: slots at or after it are invisible, are never read into a product (their memory
        may hold NaN) and get zero gradient. int or int32 scalar, may be traced (then clipped to
        0 ... S, since no error can be raised); None: S.
      depth_window, depth_reserved: bounded slots: of the slots below `depth_length` only the first
        `depth_reserved` and the last `depth_window` are visible.
      is_causal: query i sees keys j <= query_offset + i; else all keys.
      scale: of the scores; None: H^-0.5.
      segment_ids: [B, T] int32, or a pair ([B, Tq], [B, Tk]): tokens see their own segment only;
        segment 0 is padding: it sees nothing, and no query sees it.
      query_offset: [B] int32, query i stands at position query_offset + i (decoding); None: 0.
      kv_length: [B] int32, keys at or after it are invisible and may be NaN; None: Tk.
      depth_chunk: chunk-visible variant (section 3.2 of the paper): query at position t sees the
        depth slots of tokens floor(t/C)·C ... t of its segment. Index 0 of the depth token axis
        stands at the start of the first query's chunk: floor(query_offset/C)·C.
      return_lse: also return lse [B, Tq, N], float32, natural logarithm; differentiable.
      implementation: name of a backend; None: the fastest that takes the call on this device.

    Returns:
      o [B, Tq, N, H] in the query's dtype, or (o, lse).

    Raises:
      ValueError: bad input; names the argument, what was expected and what came.
      NotImplementedError: the backend asked for, or every backend, cannot do the call.
    """
    operands, options = check(
        query,
        key,
        value,
        depth_key,
        depth_value,
        depth_length=depth_length,
        depth_window=depth_window,
        depth_reserved=depth_reserved,
        is_causal=is_causal,
        scale=scale,
        segment_ids=segment_ids,
        query_offset=query_offset,
        kv_length=kv_length,
        depth_chunk=depth_chunk,
        implementation=implementation,
    )
    backend = backends.resolve(operands, options, implementation)
    if backend.backward is None:
        out, lse = backend.forward(operands, options)
    elif return_lse:
        out, lse = _attend(backend, options, operands)
    else:
        return _attend_without_lse(backend, options, operands)
    return (out, lse) if return_lse else out


def explain_attention(
    query: Any, key: Any, value: Any, depth_key: Any = None, depth_value: Any = None, **kwargs: Any
) -> backends.AttentionChoice:
    """Which implementation `moda_attention` would pick for a call, and why not the others.

    Takes the arguments of `moda_attention`; arrays may be `jax.ShapeDtypeStruct`. Runs nothing.
    """
    kwargs.pop("return_lse", None)
    implementation = kwargs.pop("implementation", None)
    arguments = (query, key, value, depth_key, depth_value), kwargs
    leaves, structure = jax.tree.flatten(arguments)
    shapes = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)}
    choice: list[backends.AttentionChoice] = []

    def trace(tracers: dict[int, jax.Array]) -> None:
        given = [tracers.get(i, x) for i, x in enumerate(leaves)]
        arrays, settings = jax.tree.unflatten(structure, given)
        operands, options = check(*arrays, **settings, implementation=implementation)
        choice.append(backends.choose(operands, options, implementation))

    jax.eval_shape(trace, shapes)
    return choice[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(backend: backends.Backend, options: Options, operands: Operands):
    return backend.forward(operands, options)


def _attend_forward(backend: backends.Backend, options: Options, operands: Operands):
    out, lse = backend.forward(operands, options)
    return (out, lse), (operands, out, lse)


def _attend_backward(backend: backends.Backend, options: Options, residuals, cotangents):
    operands, out, lse = residuals
    assert backend.backward is not None
    grads = backend.backward(operands, options, out, lse, *cotangents)
    return (Operands(**grads._asdict()),)  # the integer operands have no cotangent: None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_without_lse(backend: backends.Backend, options: Options, operands: Operands):
    """o alone: its backward gets d_lse = None, which saves a pass over lse."""
    return backend.forward(operands, options)[0]


def _attend_without_lse_forward(backend, options, operands):
    out, lse = backend.forward(operands, options)
    return out, (operands, out, lse)


def _attend_without_lse_backward(backend, options, residuals, d_out):
    return _attend_backward(backend, options, residuals, (d_out, None))


_attend_without_lse.defvjp(_attend_without_lse_forward, _attend_without_lse_backward)


def _fail(name: str, expected: str, got: Any) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_array(name: str, x: Any, shape: tuple[int | str, ...], dtype: Any = None) -> None:
    """Checks rank, the dimensions given as int (a str only names one), and the dtype."""
    wanted = "[" + ", ".join(map(str, shape)) + "]"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        _fail(name, f"an array {wanted}", type(x).__name__)
    if len(x.shape) != len(shape):
        _fail(name, f"rank {len(shape)}, {wanted}", f"rank {len(x.shape)}, {list(x.shape)}")
    if any(isinstance(n, int) and n != m for n, m in zip(shape, x.shape, strict=True)):
        _fail(name, wanted, list(x.shape))
    if dtype is not None and x.dtype != dtype:
        _fail(name, f"dtype {dtype}, as query", x.dtype)


def _check_integers(name: str, x: Any, shape: tuple[int | str, ...]) -> jax.Array:
    _check_array(name, x, shape)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        _fail(name, "an integer dtype", x.dtype)
    return jnp.asarray(x, jnp.int32)


def _check_int(name: str, x: Any, minimum: int) -> None:
    if not isinstance(x, numbers.Integral) or isinstance(x, bool) or x < minimum:
        _fail(name, f"an int >= {minimum}", repr(x))


def _check_pair(name: str, key: Any, value: Any) -> bool:
    """Whether the pair is given; one without the other is an error."""
    if (key is None) != (value is None):
        missing = f"{name}key" if key is None else f"{name}value"
        _fail(missing, f"an array, since {name}key and {name}value come together", "None")
    return key is not None


def check(
    query: Any,
    key: Any,
    value: Any,
    depth_key: Any = None,
    depth_value: Any = None,
    *,
    depth_length: Any = None,
    depth_window: Any = None,
    depth_reserved: Any = 0,
    is_causal: bool = True,
    scale: Any = None,
    segment_ids: Any = None,
    query_offset: Any = None,
    kv_length: Any = None,
    depth_chunk: Any = None,
    implementation: str | None = None,
) -> tuple[Operands, Options]:
    """Validates a call once, here, and fills in the defaults. Arguments as `moda_attention`."""
    _check_array("query", query, ("B", "Tq", "N", "H"))
    if str(query.dtype) not in _DTYPES and not (
        str(query.dtype) == "float64" and implementation == "reference"
    ):
        _fail("query", f"dtype {', '.join(_DTYPES)}", query.dtype)
    batch, q_len, heads, head_dim = query.shape
    has_sequence, has_depth = (
        _check_pair("", key, value),
        _check_pair("depth_", depth_key, depth_value),
    )
    kv_heads = _check_keys(query, key, value, depth_key, depth_value, has_sequence, has_depth)
    if heads % kv_heads:
        _fail("query", f"a number of heads that is a multiple of the {kv_heads} key heads", heads)
    if query_offset is not None:
        query_offset = _check_integers("query_offset", query_offset, (batch,))
    if kv_length is not None:
        if not has_sequence:
            _fail("kv_length", "None when key is None", "an array")
        kv_length = _check_integers("kv_length", kv_length, (batch,))
    if not isinstance(is_causal, bool | np.bool_):
        _fail("is_causal", "a bool", repr(is_causal))
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    elif not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        _fail("scale", "None or a finite number", repr(scale))
    if has_depth:
        depth_key, depth_value, depth_length = _check_depth(
            query,
            depth_key,
            depth_value,
            depth_length,
            depth_window,
            depth_reserved,
            depth_chunk,
            query_offset is not None,
        )
    elif not (
        depth_length is None
        and depth_window is None
        and depth_chunk is None
        and depth_reserved == 0
    ):
        _fail("depth_key", "an array, since a depth_ argument is given", "None")
    k_len = key.shape[1] if has_sequence else (depth_key.shape[2] if depth_chunk else q_len)
    q_segments, k_segments = _check_segments(segment_ids, batch, q_len, k_len)
    operands = Operands(
        query,
        key,
        value,
        depth_key,
        depth_value,
        depth_length,
        q_segments,
        k_segments,
        query_offset,
        kv_length,
    )
    return operands, Options(
        float(scale), bool(is_causal), depth_window, int(depth_reserved), depth_chunk
    )


def _check_keys(query, key, value, depth_key, depth_value, has_sequence, has_depth) -> int:
    """Shapes of the four key and value arrays against the query's; returns K."""
    batch, _, _, head_dim = query.shape
    if has_sequence:
        _check_array("key", key, (batch, "Tk", "K", head_dim), query.dtype)
        _check_array("value", value, key.shape, query.dtype)
    if has_depth:
        kv_heads = key.shape[2] if has_sequence else "K"
        _check_array("depth_key", depth_key, ("S", batch, "Td", kv_heads, head_dim), query.dtype)
        _check_array("depth_value", depth_value, depth_key.shape, query.dtype)
    if not has_sequence and not has_depth:
        _fail("key", "an array, since depth_key is None too", "None")
    kv_heads = key.shape[2] if has_sequence else depth_key.shape[3]
    if kv_heads == 0:
        _fail("key" if has_sequence else "depth_key", "at least one head", 0)
    return kv_heads


def _check_depth(query, depth_key, depth_value, length, window, reserved, chunk, has_offset):
    """Returns the depth arrays cut to a static depth_length, and the traced one or None."""
    q_len, d_len, slots = query.shape[1], depth_key.shape[2], depth_key.shape[0]
    if chunk is not None:
        _check_int("depth_chunk", chunk, 1)
    if d_len != q_len and not (chunk is not None and has_offset and d_len > q_len):
        also = " or more (chunk-visible decoding)" if chunk is not None and has_offset else ""
        _fail("depth_key", f"token axis (2) of {q_len}{also}, as query", d_len)
    if window is not None:
        _check_int("depth_window", window, 1)
    _check_int("depth_reserved", reserved, 0)
    if reserved and window is None:
        _fail("depth_reserved", "0 while depth_window is None (all slots are visible)", reserved)
    if length is None:
        return depth_key, depth_value, None
    if hasattr(length, "dtype"):
        length = _check_integers("depth_length", length, ())
    if isinstance(length, jax.core.Tracer):  # out of range it cannot raise: clip, as slices do
        return depth_key, depth_value, jnp.clip(length, 0, slots)
    if isinstance(length, jax.Array):
        length = int(length)
    _check_int("depth_length", length, 0)
    if length > slots:
        _fail("depth_length", f"at most the {slots} slots of depth_key", length)
    # A static prefix is a free slice; what lies behind it cannot be read at all.
    return depth_key[:length], depth_value[:length], None


def _check_segments(segment_ids, batch, q_len, k_len):
    """(query, key) segment ids, or (None, None)."""
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2:
        _fail("segment_ids", "an array or a (query, key) pair", f"{len(pair)} arrays")
    return (
        _check_integers("segment_ids (query)", pair[0], (batch, q_len)),
        _check_integers("segment_ids (key)", pair[1], (batch, k_len)),
    )
