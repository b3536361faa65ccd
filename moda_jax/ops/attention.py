"""The public API of Mixture-of-Depths Attention: checks, defaults, dispatch, differentiation."""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from moda_jax.ops import backends
from moda_jax.ops.checks import (
    check_array,
    check_bool,
    check_int,
    check_integers,
    check_number,
    fail,
    to_jax,
)
from moda_jax.ops.explicit import per_explicit_shard
from pallas_kernels.operands import Operands, Options, depth_tokens
from pallas_kernels.varying import vary_like

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
        segment 0 is padding: it sees nothing, and no query sees it. Query, key and value may hold
        NaN there, and chunk-visible slots. Other slots may with `xla`, `mosaic_tpu` (whose
        gradient is NaN there, then) and `reference`; GPU kernels multiply tiles of several tokens.
      query_offset: [B] int32, query i stands at position query_offset + i (decoding); None: 0.
      kv_length: [B] int32, keys at or after it are invisible and may be NaN; None: Tk.
      depth_chunk: chunk-visible variant (section 3.2 of the paper): query at position t sees the
        depth slots of tokens floor(t/C)·C ... t of its segment. Index 0 of the depth token axis
        stands at the start of the first query's chunk: floor(query_offset/C)·C.
      return_lse: also return lse [B, Tq, N], float32, natural logarithm; differentiable.
      implementation: name of a backend; None: the fastest that takes the call on this device.

    Returns:
      o [B, Tq, N, H] in the query's dtype, or (o, lse).

    Arrays may be NumPy's, and numbers scalars of NumPy or JAX. Integers are converted to int32;
    what does not fit is an error, but wraps where it is traced (with `jax_enable_x64` alone).

    Raises:
      ValueError: bad input; names the argument, what was expected and what came.
      NotImplementedError: the backend asked for, or every backend, cannot do the call.

    Warns `HeadsBeforeTokensWarning` where the arrays seem to be [B, N, T, H].
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
    _warn_of_heads_before_tokens(operands)

    def attend(operands: Operands):
        backend = backends.resolve(operands, options, implementation, stacklevel=6)
        if backend.backward is None:
            return backend.forward(operands, options)
        if return_lse:
            return _attend(backend, options, operands)
        out = _attend_without_lse(backend, options, operands)
        return out, jnp.zeros(out.shape[:3])  # in the place of lse; not returned

    # Under `shard_map` all vary over the same axes: where one did not, gradients are summed.
    operands = vary_like(_without_padding(operands, options), operands)
    out, lse = per_explicit_shard(attend, operands)
    if operands.query_segments is not None:  # for the gradient: d_out may be NaN at padding, too
        out = _where_real(out, operands.query_segments)
    return (out, lse) if return_lse else out


def _where_real(x: Any, segments_BxT: jax.Array) -> Any:
    """x [..., B, T, heads, H], 0 at the tokens of segment 0; None stays."""
    return None if x is None else jnp.where((segments_BxT != 0)[..., None, None], x, 0)


def _without_padding(operands: Operands, options: Options) -> Operands:
    """Zeros for what stands at tokens of segment 0, since 0 · NaN is NaN.

    A slot is seen by its own token alone, and needs no pass over the history, unless it is
    chunk-visible.
    """
    if operands.query_segments is None or operands.key_segments is None:
        return operands
    operands = operands._replace(
        query=_where_real(operands.query, operands.query_segments),
        key=_where_real(operands.key, operands.key_segments),
        value=_where_real(operands.value, operands.key_segments),
    )
    if options.depth_chunk is None or operands.depth_key is None:
        return operands
    segments = depth_tokens(operands, options.depth_chunk).segment
    assert segments is not None
    return operands._replace(
        depth_key=_where_real(operands.depth_key, segments),
        depth_value=_where_real(operands.depth_value, segments),
    )


class HeadsBeforeTokensWarning(UserWarning):
    """A call whose shapes look like [B, N, T, H], the layout of PyTorch."""


def _warn_of_heads_before_tokens(operands: Operands) -> None:
    """Several tokens, but fewer of them than heads, in the query and in the keys."""
    q_len, heads = operands.query.shape[1:3]
    keys = operands.key if operands.key is not None else operands.depth_key
    assert keys is not None
    k_len, kv_heads = keys.shape[-3:-1]
    if 1 < q_len < heads and 1 < k_len < kv_heads:
        warnings.warn(
            f"query has {q_len} tokens and {heads} heads, as an array [B, N, T, H] would; expected "
            f"[B, T, N, H]: if it is not, swap axes 1 and 2 (and 2 and 3 of depth_key)",
            HeadsBeforeTokensWarning,
            stacklevel=3,
        )


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
    return _run(backend, options, operands)


def _run(backend: backends.Backend, options: Options, operands: Operands):
    return vary_like(backend.forward(operands, options), operands)


def _attend_forward(backend: backends.Backend, options: Options, operands: Operands):
    out, lse = _run(backend, options, operands)
    return (out, lse), (operands, out, lse)


def _attend_backward(backend: backends.Backend, options: Options, residuals, cotangents):
    operands, out, lse = residuals
    assert backend.backward is not None
    grads = backend.backward(operands, options, out, lse, *cotangents)
    return (
        Operands(**vary_like(grads, operands)._asdict()),
    )  # the integer operands have no cotangent: None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_without_lse(backend: backends.Backend, options: Options, operands: Operands):
    """o alone: its backward gets d_lse = None, which saves a pass over lse."""
    return _run(backend, options, operands)[0]


def _attend_without_lse_forward(backend, options, operands):
    out, lse = _run(backend, options, operands)
    return out, (operands, out, lse)


def _attend_without_lse_backward(backend, options, residuals, d_out):
    return _attend_backward(backend, options, residuals, (d_out, None))


_attend_without_lse.defvjp(_attend_without_lse_forward, _attend_without_lse_backward)


def _check_pair(name: str, key: Any, value: Any) -> bool:
    """Whether the pair is given; one without the other is an error."""
    if (key is None) != (value is None):
        missing = f"{name}key" if key is None else f"{name}value"
        fail(missing, f"an array, since {name}key and {name}value come together", "None")
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
    check_array("query", query, ("B", "Tq", "N", "H"))
    if str(query.dtype) not in _DTYPES and not (
        str(query.dtype) == "float64" and implementation == "reference"
    ):
        fail("query", f"dtype {', '.join(_DTYPES)}", query.dtype)
    batch, q_len, heads, head_dim = query.shape
    has_sequence, has_depth = (
        _check_pair("", key, value),
        _check_pair("depth_", depth_key, depth_value),
    )
    kv_heads = _check_keys(query, key, value, depth_key, depth_value, has_sequence, has_depth)
    query, key, value, depth_key, depth_value = map(
        to_jax, (query, key, value, depth_key, depth_value)
    )
    if heads % kv_heads:
        fail("query", f"a number of heads that is a multiple of the {kv_heads} key heads", heads)
    if query_offset is not None:
        query_offset = check_integers("query_offset", query_offset, (batch,))
    if kv_length is not None:
        if not has_sequence:
            fail("kv_length", "None when key is None", "an array")
        kv_length = check_integers("kv_length", kv_length, (batch,))
    is_causal = check_bool("is_causal", is_causal)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else check_number("scale", scale)
    if has_depth:
        depth_window = None if depth_window is None else check_int("depth_window", depth_window, 1)
        depth_chunk = None if depth_chunk is None else check_int("depth_chunk", depth_chunk, 1)
        depth_reserved = check_int("depth_reserved", depth_reserved, 0)
        if depth_reserved and depth_window is None:
            expected = "0 while depth_window is None (all slots are visible)"
            fail("depth_reserved", expected, depth_reserved)
        _check_depth_tokens(query, depth_key, depth_chunk, query_offset is not None)
        depth_key, depth_value, depth_length = _cut(depth_key, depth_value, depth_length)
    elif not (
        depth_length is None
        and depth_window is None
        and depth_chunk is None
        and depth_reserved == 0
    ):
        fail("depth_key", "an array, since a depth_ argument is given", "None")
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
    return operands, Options(scale, is_causal, depth_window, depth_reserved, depth_chunk)


def _check_keys(query, key, value, depth_key, depth_value, has_sequence, has_depth) -> int:
    """Shapes of the four key and value arrays against the query's; returns K."""
    batch, _, _, head_dim = query.shape
    if has_sequence:
        check_array("key", key, (batch, "Tk", "K", head_dim), query.dtype)
        check_array("value", value, key.shape, query.dtype)
    if has_depth:
        kv_heads = key.shape[2] if has_sequence else "K"
        check_array("depth_key", depth_key, ("S", batch, "Td", kv_heads, head_dim), query.dtype)
        check_array("depth_value", depth_value, depth_key.shape, query.dtype)
    if not has_sequence and not has_depth:
        fail("key", "an array, since depth_key is None too", "None")
    kv_heads = key.shape[2] if has_sequence else depth_key.shape[3]
    if kv_heads == 0:
        fail("key" if has_sequence else "depth_key", "at least one head", 0)
    return kv_heads


def _check_depth_tokens(query, depth_key, chunk: int | None, has_offset: bool) -> None:
    q_len, d_len = query.shape[1], depth_key.shape[2]
    if d_len != q_len and not (chunk is not None and has_offset and d_len > q_len):
        also = " or more (chunk-visible decoding)" if chunk is not None and has_offset else ""
        fail("depth_key", f"token axis (2) of {q_len}{also}, as query", d_len)


def _cut(depth_key, depth_value, length):
    """The depth arrays, cut to a static depth_length, and the traced one or None."""
    if length is None:
        return depth_key, depth_value, None
    slots = depth_key.shape[0]
    if hasattr(length, "dtype"):
        length = check_integers("depth_length", length, ())
    if isinstance(length, jax.core.Tracer):  # out of range it cannot raise: clip, as slices do
        return depth_key, depth_value, jnp.clip(length, 0, slots)
    length = check_int("depth_length", length, 0)
    if length > slots:
        fail("depth_length", f"at most the {slots} slots of depth_key", length)
    # A static prefix is a free slice; what lies behind it cannot be read at all.
    return depth_key[:length], depth_value[:length], None


def _check_segments(segment_ids, batch, q_len, k_len):
    """(query, key) segment ids, or (None, None)."""
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2:
        fail("segment_ids", "an array or a (query, key) pair", f"{len(pair)} arrays")
    return (
        check_integers("segment_ids (query)", pair[0], (batch, q_len)),
        check_integers("segment_ids (key)", pair[1], (batch, k_len)),
    )
