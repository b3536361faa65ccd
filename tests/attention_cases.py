"""Calls of `moda_attention` that every implementation must get right, and their inputs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from moda_jax import moda_attention

ALL_DTYPES = ("float32", "bfloat16", "float16")
HALF = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Sizes, integer operands and static options of one call; symbols as in `moda_attention`."""

    name: str
    q_len: int = 65
    k_len: int | None = None  # None: q_len
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    slots: int | None = 5  # None: no depth operands
    depth_tokens: int | None = None  # None: q_len
    sequence: bool = True
    depth_lengths: tuple[int, ...] = ()  # values of a traced depth_length, in one compilation
    segments: str | None = None  # "packed", or "pair": query and key axes differ
    query_offset: tuple[int, ...] | None = None  # one per row
    kv_length: tuple[int, ...] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)


CASES = (
    Case("one_token", q_len=1, heads=8, kv_heads=1, slots=1),
    Case("sequence_only", slots=None, dtypes=HALF),
    Case("no_slots", q_len=7, slots=0),
    Case("basic", dtypes=ALL_DTYPES),
    Case("group_1", q_len=129, heads=2, slots=9, depth_lengths=(0, 5, 9)),
    Case(
        "group_3_many_slots",
        q_len=7,
        heads=6,
        slots=33,
        depth_lengths=(0, 1, 8, 17, 33),
        dtypes=ALL_DTYPES,
    ),
    Case("group_7_scale", q_len=33, heads=7, kv_heads=1, head_dim=24, options={"scale": 0.3}),
    Case("group_8", q_len=65, heads=16, head_dim=8, slots=3, dtypes=HALF),
    Case("static_length", slots=9, segments="packed", options={"depth_length": 3}),
    Case("static_length_0", q_len=7, options={"depth_length": 0}),
    Case("full", slots=12, options={"is_causal": False}, dtypes=HALF),
    Case(
        "full_segments_lengths",
        options={"is_causal": False},
        segments="packed",
        kv_length=(65, 20),
        depth_lengths=(2, 5),
    ),
    Case("packed", segments="packed", depth_lengths=(0, 3), dtypes=HALF),
    Case("cross_short", q_len=20, k_len=33, segments="pair"),
    Case("cross_long", q_len=33, k_len=20, slots=2),
    Case(
        "window",
        slots=33,
        q_len=7,
        depth_lengths=(0, 1, 3, 6, 7, 20, 33),
        options={"depth_window": 4, "depth_reserved": 2},
        dtypes=HALF,
    ),
    Case("window_static", slots=33, q_len=7, options={"depth_window": 9, "depth_length": 30}),
    Case("window_wider_than_cache", q_len=7, options={"depth_window": 40, "depth_reserved": 3}),
    Case("chunk", depth_lengths=(0, 3, 5), options={"depth_chunk": 16}, dtypes=ALL_DTYPES),
    Case("chunk_packed", segments="packed", options={"depth_chunk": 24}),
    Case("chunk_whole_sequence", slots=2, options={"depth_chunk": 100}),
    Case(
        "chunk_window",
        q_len=20,
        slots=6,
        depth_lengths=(2, 6),
        options={"depth_chunk": 8, "depth_window": 2, "depth_reserved": 1},
    ),
    Case("depth_only", sequence=False, depth_lengths=(0, 4), dtypes=HALF),
    Case("depth_only_packed", sequence=False, segments="packed"),
    Case("depth_only_chunk", sequence=False, segments="packed", options={"depth_chunk": 16}),
    Case(
        "decode",
        q_len=1,
        k_len=65,
        query_offset=(10, 61),
        kv_length=(11, 62),
        depth_lengths=(0, 5),
        dtypes=HALF,
    ),
    Case(
        "decode_several",
        q_len=3,
        k_len=65,
        query_offset=(0, 61),
        kv_length=(3, 64),
        segments="pair",
    ),
    Case("decode_full", q_len=3, k_len=65, kv_length=(0, 33), options={"is_causal": False}),
    Case(
        "decode_chunk",
        q_len=3,
        k_len=65,
        depth_tokens=20,
        query_offset=(10, 60),
        kv_length=(13, 63),
        segments="pair",
        options={"depth_chunk": 16},
    ),
    Case(
        "decode_chunk_only",
        q_len=3,
        depth_tokens=20,
        sequence=False,
        query_offset=(10, 60),
        segments="pair",
        options={"depth_chunk": 16},
    ),
    Case("sees_nothing", q_len=7, slots=None, kv_length=(0, 4)),
    Case("long", q_len=1100, batch=1, heads=2, kv_heads=1, slots=9, dtypes=HALF),
    Case(
        "long_packed",
        q_len=1100,
        batch=1,
        heads=5,
        kv_heads=1,
        head_dim=8,
        slots=2,
        segments="packed",
        options={"is_causal": False},
    ),
    Case(
        "long_chunk",
        q_len=1100,
        batch=1,
        heads=2,
        kv_heads=1,
        slots=2,
        options={"depth_chunk": 200},
    ),
    Case(
        "long_cache",
        q_len=5,
        k_len=2100,
        batch=2,
        heads=2,
        kv_heads=1,
        slots=None,
        query_offset=(1200, 20),
        kv_length=(1205, 25),
    ),
)


def smaller(case: Case) -> Case:
    """The same loops for an interpreter: one row, one key head, some blocks of tokens, few lengths.

    For cases without `query_offset` and `kv_length`.
    """
    few = case.depth_lengths[:: 2 if len(case.depth_lengths) > 2 else 1]
    return dataclasses.replace(
        case,
        batch=1,
        heads=case.heads // case.kv_heads,
        kv_heads=1,
        q_len=min(case.q_len, 220),
        depth_lengths=few,
    )


class Problem(NamedTuple):
    """Inputs that are exact in bfloat16 and float16, so that one expectation serves all dtypes."""

    arrays: dict[str, np.ndarray]  # the differentiable operands, float32
    integers: dict[str, Any]
    cotangents: tuple[np.ndarray, np.ndarray]  # of o and lse


class Results(NamedTuple):
    """What is compared: o, lse and the gradients by operand, as float64."""

    out: np.ndarray
    lse: np.ndarray
    grads: dict[str, np.ndarray]


def _segments(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Documents 1, 2, 3 of random lengths, then about a tenth of padding."""
    ids = np.sort(rng.integers(1, 4, size=(batch, length)), axis=1)
    ids[:, length - length // 10 :] = 0
    return ids.astype(np.int32)


@functools.cache
def make_problem(case: Case) -> Problem:
    """Normal inputs for a case, seeded by its name."""
    rng = np.random.default_rng(list(case.name.encode()))

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)

    k_len = case.k_len or case.q_len
    queries = (case.batch, case.q_len, case.heads)
    keys = (case.batch, k_len, case.kv_heads, case.head_dim)
    arrays = {"query": normal(*queries, case.head_dim)}
    if case.sequence:
        arrays |= {"key": normal(*keys), "value": normal(*keys)}
    if case.slots is not None:
        tokens = case.depth_tokens or case.q_len
        slots = (case.slots, case.batch, tokens, case.kv_heads, case.head_dim)
        arrays |= {"depth_key": normal(*slots), "depth_value": normal(*slots)}
    integers: dict[str, Any] = {}
    if case.segments is not None:
        ids = _segments(rng, case.batch, k_len if case.sequence else tokens)
        integers["segment_ids"] = (
            ids if case.segments == "packed" else (_segments(rng, case.batch, case.q_len), ids)
        )
    for name in ("query_offset", "kv_length"):
        if getattr(case, name) is not None:
            integers[name] = np.asarray(getattr(case, name), np.int32)
    return Problem(arrays, integers, (normal(*queries, case.head_dim), normal(*queries)))


def poison(case: Case, depth_length: int | None) -> dict[str, np.ndarray]:
    """The case's arrays with NaN wherever no query may look: slots and keys that were not written.

    Slots that a window hides are poisoned too: a kernel must not even read them.
    """
    arrays = dict(make_problem(case).arrays)
    if case.kv_length is not None:
        for name in ("key", "value"):
            arrays[name] = arrays[name].copy()
            for row, length in enumerate(case.kv_length):
                arrays[name][row, length:] = np.nan
    if case.slots is not None:
        slot = np.arange(case.slots)
        length = depth_length if depth_length is not None else case.options.get("depth_length")
        length = case.slots if length is None else length
        hidden = slot >= length
        if "depth_window" in case.options:
            reserved = case.options.get("depth_reserved", 0)
            hidden |= (slot >= reserved) & (slot < length - case.options["depth_window"])
        for name in ("depth_key", "depth_value"):
            arrays[name] = arrays[name].copy()
            arrays[name][hidden] = np.nan
    return arrays


def differentiate(case: Case, implementation: str):
    """(arrays, cotangents, integers, depth_length) -> (o, lse, gradients by operand)."""

    def run(arrays, cotangents, integers, depth_length):
        kwargs = dict(case.options)
        if depth_length is not None:
            kwargs["depth_length"] = depth_length

        def attend(arrays):
            return moda_attention(
                **({"key": None, "value": None} | arrays),
                **kwargs,
                **integers,
                return_lse=True,
                implementation=implementation,
            )

        (out, lse), pullback = jax.vjp(attend, arrays)
        d_out, d_lse = cotangents
        return out, lse, pullback((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))[0]

    return run


LARGE_SCORES = Case(
    "large_scores",
    q_len=5,
    batch=1,
    heads=2,
    kv_heads=1,
    slots=3,
    depth_lengths=(0, 3),
    options={"scale": 1.0},
)
"""With length 0 the first query sees one key."""


def large_scores(offset: float, spread: int) -> Problem:
    """Inputs for LARGE_SCORES with scores offset + (0 … spread), exact in float32.

    offset: a power of 2 or its negative. Values are small integers: means of equal ones are exact.
    """
    problem, rng = make_problem(LARGE_SCORES), np.random.default_rng(0)

    def integers(x):
        return rng.integers(-2, 3, x.shape).astype(np.float32)

    arrays = {name: integers(x) for name, x in problem.arrays.items()}
    size = 2.0 ** (round(np.log2(abs(offset))) // 2)
    for name, first in (("query", size), ("key", offset / size), ("depth_key", offset / size)):
        x = arrays[name]
        x[...] = 0
        x[..., 0] = first
        x[..., 1] = 1 if name == "query" else rng.integers(0, spread + 1, x.shape[:-1])
    d_out, d_lse = map(integers, problem.cotangents)
    return Problem(arrays, {}, (d_out, d_lse))


def compile_quickly(function):
    """jax.jit, on the CPU without LLVM's optimisations: compiling is most of these tests' time."""
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(
        function, compiler_options={"xla_backend_optimization_level": 0} if on_cpu else None
    )


def to_float64(results: Any) -> Results:
    return Results(*jax.tree.map(lambda x: np.asarray(x, np.float64), tuple(results)))


@functools.cache
def expected_results(case: Case) -> dict[int | None, Results]:
    """The float64 reference, by depth length."""
    return expected_of(case, make_problem(case))


def expected_of(case: Case, problem: Problem) -> dict[int | None, Results]:
    """As `expected_results`, for other inputs of the case's shapes."""
    with jax.enable_x64(True):
        arrays, cotangents = jax.tree.map(np.float64, (problem.arrays, problem.cotangents))
        return {
            length: to_float64(_reference(case)(arrays, cotangents, problem.integers, length))
            for length in case.depth_lengths or (None,)
        }


@functools.cache
def _reference(case: Case):
    return compile_quickly(differentiate(case, "reference"))
