"""What every attention implementation must show, with the implementation injected.

A backend's test file subclasses `AttentionSuite` as a class whose name starts with `Test`:

    class TestXla(AttentionSuite):
        implementation = "xla"

and narrows `cases` or `dtypes` to what the backend takes.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    ALL_DTYPES,
    CASES,
    LARGE_SCORES,
    Case,
    compile_quickly,
    differentiate,
    expected_of,
    expected_results,
    large_scores,
    make_problem,
    poison,
    to_float64,
)
from jax import lax
from tolerances import LSE_RELATIVE, RELATIVE, lse_rounding

from moda_jax import moda_attention
from moda_jax.ops import backends
from pallas_kernels.operands import Operands, Options


def assert_close(name: str, got, expected, rtol: float, *, exact_zeros: bool = True) -> None:
    """Relative to the largest entry; infinities and exact zeros must be those of `expected`."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, name
    assert not np.isnan(got).any(), f"{name} has NaN"
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected), err_msg=name)
    finite = np.isfinite(expected)
    got, expected = got[finite], expected[finite]
    assert not (exact_zeros and got[expected == 0].any()), f"{name}: not 0 where nothing is seen"
    error = np.abs(got - expected).max(initial=0)
    scale = np.abs(expected).max(initial=0)
    assert error <= rtol * scale, f"{name}: relative error {error / scale:.1e} > {rtol:.1e}"


def assert_results_close(got, expected, dtype: str, *, exact_zeros: bool = True) -> None:
    got = to_float64(got)
    assert_close("lse", got.lse, expected.lse, LSE_RELATIVE)
    assert_close("o", got.out, expected.out, RELATIVE[dtype], exact_zeros=exact_zeros)
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in got.grads.items():
        wanted = expected.grads[name]
        name = f"gradient of {name}"
        assert_close(name, grad, wanted, RELATIVE[dtype], exact_zeros=exact_zeros)


def _cast(arrays, dtype: str):
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


class AttentionSuite:
    """Subclass with `implementation`; see the module's docstring."""

    implementation: str
    cases: tuple[Case, ...] = CASES
    dtypes: tuple[str, ...] = ALL_DTYPES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if {"case", "dtype"} <= set(metafunc.fixturenames):
            pairs = [(c, d) for c in self.cases for d in c.dtypes if d in self.dtypes]
            ids = [f"{case.name}-{dtype}" for case, dtype in pairs]
            metafunc.parametrize(("case", "dtype"), pairs, ids=ids)

    @staticmethod
    def sized(case: Case) -> Case:
        """What a test that is no case runs: less of it where an interpreter is slow."""
        return case

    def attend(self, *arrays, **kwargs):
        return moda_attention(*arrays, implementation=self.implementation, **kwargs)

    def compiled(self, case: Case):
        return compile_quickly(differentiate(case, self.implementation))

    def test_equals_reference(self, case: Case, dtype: str):
        """o, lse and every gradient, with NaN in all that was not written."""
        problem = make_problem(case)
        run = self.compiled(case)
        for length, expected in expected_results(case).items():
            arrays = _cast(poison(case, length), dtype)
            got = run(arrays, problem.cotangents, problem.integers, length)
            assert got[0].dtype == dtype
            assert got[1].dtype == jnp.float32
            chex.assert_trees_all_equal_shapes_and_dtypes(got[2], arrays)
            assert_results_close(got, expected, dtype)

    def test_large_scores(self):
        """One key, keys of equal and of different scores, up to -1e25.

        Up to 2^14 all is as exact as `contract.Backward` says. Beyond, nothing is NaN, and o is
        right, but for the shares of parts that kernels merge by their lse.
        """
        run, dtype = self.compiled(LARGE_SCORES), self.dtypes[0]
        for offset, spread in ((2.0**14, 3), (-(2.0**14), 0), (2.0**35, 0), (-(2.0**83), 0)):
            problem = large_scores(offset, spread)
            arrays = _cast(problem.arrays, dtype)
            for length, expected in expected_of(LARGE_SCORES, problem).items():
                got = to_float64(run(arrays, problem.cotangents, {}, length))
                assert_close("lse", got.lse, expected.lse, LSE_RELATIVE)
                if abs(offset) <= 2**14:
                    rtol = RELATIVE[dtype] + lse_rounding(offset)
                    assert_close("o", got.out, expected.out, rtol, exact_zeros=False)
                    for name, grad in got.grads.items():
                        assert_close(name, grad, expected.grads[name], rtol, exact_zeros=False)
                    continue
                assert all(np.isfinite(x).all() for x in (got.out, *got.grads.values()))
                if length == 0 or self.implementation == "xla":
                    assert_close("o", got.out, expected.out, RELATIVE[dtype], exact_zeros=False)

    def test_two_runs_are_bitwise_equal(self):
        case = Case("deterministic", q_len=65, segments="packed")
        problem = make_problem(case)
        run = self.compiled(case)
        args = _cast(problem.arrays, self.dtypes[0]), problem.cotangents, problem.integers, None
        chex.assert_trees_all_equal(run(*args), run(*args))

    def test_traced_length_beyond_the_cache_is_clipped(self):
        for options in ({}, {"depth_chunk": 4}):
            case = self.sized(Case("clipped", q_len=7, slots=3, options=options))
            problem = make_problem(case)
            run = self.compiled(case)
            arrays = _cast(problem.arrays, self.dtypes[0])
            got = run(arrays, problem.cotangents, problem.integers, 1000)
            assert_results_close(got, expected_results(case)[None], self.dtypes[0])

    def test_parts_merged_by_lse_have_the_gradients_of_the_whole(self):
        """Keys split in two, merged with weights e^(lse_i - lse): needs a correct dlse."""
        dtype = "float32" if "float32" in self.dtypes else self.dtypes[0]
        case = self.sized(Case("merge", q_len=33, k_len=48, slots=3, options={"is_causal": False}))
        problem, expected = make_problem(case), expected_results(case)[None]

        def attend(arrays):
            query, key, value = (arrays[name] for name in ("query", "key", "value"))
            depth = arrays["depth_key"], arrays["depth_value"]
            parts = [
                self.attend(query, key[:, :20], value[:, :20], is_causal=False, return_lse=True),
                self.attend(
                    query, key[:, 20:], value[:, 20:], *depth, is_causal=False, return_lse=True
                ),
            ]
            lse = jnp.logaddexp(parts[0][1], parts[1][1])
            whole = sum(o * jnp.exp(part - lse)[..., None] for o, part in parts)
            return whole.astype(dtype), lse

        @compile_quickly
        def run(arrays):
            (out, lse), pullback = jax.vjp(attend, arrays)
            d_out, d_lse = problem.cotangents
            return out, lse, pullback((d_out.astype(out.dtype), d_lse))[0]

        assert_results_close(run(_cast(problem.arrays, dtype)), expected, dtype)

    @pytest.mark.parametrize("chunk", [None, 8])
    def test_gradients_are_causal(self, chunk):
        """Token t's output depends on the tokens up to t, on each of them, and on no later one."""
        case = self.sized(
            Case("causal", q_len=20, batch=1, slots=2, options={"depth_chunk": chunk})
        )
        problem, t = make_problem(case), 13
        d_out, d_lse = (np.zeros_like(x) for x in problem.cotangents)
        d_out[:, t], d_lse[:, t] = (x[:, t] for x in problem.cotangents)
        run = self.compiled(case)
        _, _, grads = run(_cast(problem.arrays, self.dtypes[0]), (d_out, d_lse), {}, None)
        first = {"query": t, "key": 0, "value": 0} | dict.fromkeys(
            ("depth_key", "depth_value"), t if chunk is None else t // chunk * chunk
        )
        for name, grad in grads.items():
            axis = 2 if name.startswith("depth") else 1
            others = tuple(i for i in range(grad.ndim) if i != axis)
            reached = np.abs(np.asarray(grad, np.float32)).max(axis=others) > 0
            np.testing.assert_array_equal(
                reached, (np.arange(20) >= first[name]) & (np.arange(20) <= t), err_msg=name
            )

    @pytest.mark.parametrize("chunk", [None, 16])
    def test_packed_documents_are_as_if_alone(self, chunk):
        """Two documents in a row: each has the values and gradients that it has by itself."""
        case = self.sized(
            Case("two_documents", q_len=40, batch=1, slots=2, options={"depth_chunk": chunk})
        )
        problem, border = make_problem(case), 16  # a chunk begins here: alone it begins at 0
        segments = np.where(np.arange(40) < border, 1, 2).astype(np.int32)[None]
        run = self.compiled(case)
        dtype = self.dtypes[0]
        packed = run(
            _cast(problem.arrays, dtype), problem.cotangents, {"segment_ids": segments}, None
        )
        for part in (slice(0, border), slice(border, 40)):
            arrays = {
                name: x[:, :, part] if name.startswith("depth") else x[:, part]
                for name, x in problem.arrays.items()
            }
            alone = run(_cast(arrays, dtype), [x[:, part] for x in problem.cotangents], {}, None)
            grads = {
                name: x[:, :, part] if name.startswith("depth") else x[:, part]
                for name, x in packed[2].items()
            }
            got = packed[0][:, part], packed[1][:, part], grads
            assert_results_close(got, to_float64(alone), dtype)

    @pytest.mark.parametrize("chunk", [None, 8])
    def test_other_documents_do_not_matter_at_all(self, chunk):
        """Documents share a chunk here; the first one's results do not change by a bit."""
        case = self.sized(
            Case("border", q_len=20, batch=1, slots=2, options={"depth_chunk": chunk})
        )
        problem = make_problem(case)
        first = np.arange(20) < 11
        segments = np.where(first, 1, 2).astype(np.int32)[None]
        run = self.compiled(case)
        arrays = _cast(problem.arrays, self.dtypes[0])
        d_out, d_lse = problem.cotangents
        cotangents = d_out * first[:, None, None], d_lse * first[:, None]
        changed = {
            name: jnp.where(first.reshape(-1, 1, 1), x, 3 * x + 1) for name, x in arrays.items()
        }
        one, other = (
            run(x, cotangents, {"segment_ids": segments}, None) for x in (arrays, changed)
        )
        chex.assert_trees_all_equal(*([x[:, first] for x in got[:2]] for got in (one, other)))
        for name, grad in one[2].items():
            axis = 2 if name.startswith("depth") else 1
            mine, others = (np.compress(m, np.asarray(grad), axis) for m in (first, ~first))
            np.testing.assert_array_equal(
                mine, np.compress(first, np.asarray(other[2][name]), axis), err_msg=name
            )
            assert mine.any(), name
            assert not others.any(), name

    @pytest.mark.parametrize("chunk", [None, 8])
    def test_padding_may_hold_anything(self, chunk):
        """NaN at tokens of segment 0 changes no bit of any other token's results."""
        case = self.sized(
            Case("padding", q_len=20, batch=1, slots=2, options={"depth_chunk": chunk})
        )
        problem, real = make_problem(case), np.arange(20) % 7 != 3
        segments = {"segment_ids": real.astype(np.int32)[None]}
        d_out, d_lse = problem.cotangents
        mask, run = real[:, None, None], self.compiled(case)
        # GPU kernels multiply tiles of several tokens' slots.
        slots_too = chunk is not None or self.implementation in ("xla", "mosaic_tpu")

        def results(padding):
            arrays = {
                name: np.where(mask, x, padding if slots_too or "depth" not in name else 0)
                for name, x in problem.arrays.items()
            }
            cotangents = np.where(mask, d_out, padding), d_lse
            out, lse, grads = run(_cast(arrays, self.dtypes[0]), cotangents, segments, None)
            assert not np.asarray(out)[:, ~real].any()
            np.testing.assert_array_equal(np.asarray(lse)[:, ~real], -np.inf)
            for name, grad in grads.items():
                axis = 2 if name.startswith("depth") else 1
                if axis == 1 or chunk is not None or self.implementation == "xla":
                    assert not np.compress(~real, grad, axis).any(), name
                grads[name] = np.compress(real, grad, axis)
            return np.asarray(out)[:, real], np.asarray(lse)[:, real], grads

        chex.assert_trees_all_equal(results(np.nan), results(0.0))

    @pytest.mark.parametrize(
        ("chunk", "grads_dtype"), [(None, "float32"), (None, "bfloat16"), (4, "bfloat16")]
    )
    def test_backward_adds_into_running_gradients(self, chunk, grads_dtype):
        """Visible slots get their gradient added; the others keep their bits, -0.0 included.

        Without gradients of slots the others are the same: only the stack's gathering asks for
        that, and it has no chunks.
        """
        backend = backends.BACKENDS[self.implementation]
        # Two chunks, of which the last is not whole: an interpreter takes a minute for three.
        case = self.sized(Case("running", q_len=9 if chunk is None else 5, slots=11))
        problem, dtype = make_problem(case), self.dtypes[0]
        arrays = _cast(problem.arrays, dtype)
        options = Options(0.25, depth_chunk=chunk, depth_window=3, depth_reserved=1)
        rng = np.random.default_rng(0)
        shape = problem.arrays["depth_key"].shape
        start = [jnp.asarray(rng.normal(size=shape), grads_dtype).at[:, 0].set(-0.0) for _ in "kv"]

        @compile_quickly
        def run(arrays, length, start):
            operands = Operands(**arrays, depth_length=length)
            out, lse = backend.forward(operands, options)
            d_out, d_lse = problem.cotangents
            args = operands, options, out, lse, d_out.astype(out.dtype), d_lse
            alone, added = backend.gradients(*args), backend.gradients(*args, tuple(start))
            without = None if chunk else backend.gradients(*args, depth=False)
            return alone, added, without

        visible = np.isin(np.arange(11), [0, 5, 6, 7])
        alone, added, without = run(arrays, jnp.int32(8), start)
        if without is not None:
            assert without[3:] == (None, None)
            for x, y in zip(without[:3], alone[:3], strict=True):
                assert_close("without gradients of slots", x, y, RELATIVE[dtype])
        np.testing.assert_array_equal(alone.query, added.query)
        for before, gradient, after in zip(start, alone[3:], added[3:], strict=True):
            assert after.dtype == grads_dtype
            kept, hidden = (np.asarray(x[~visible]) for x in (after, before))
            assert kept.tobytes() == hidden.tobytes()
            wanted = np.float64(before[visible]) + np.float64(gradient[visible])
            # `gradient` was rounded to the operands' dtype, what was added was not.
            assert_close(
                "running gradient",
                after[visible],
                wanted,
                max(RELATIVE[grads_dtype], RELATIVE[dtype]),
            )
            assert np.abs(np.float64(gradient[visible])).max() > 0.1

    @pytest.mark.parametrize(
        ("rows", "group", "head_dim", "count", "layers", "dtypes"),
        [
            (2, 2, 64, 2, 5, ("bfloat16", "float32")),
            (1, 2, 64, 8, 5, ("float32", "float32")),
            (2, 3, 64, 2, 2, ("bfloat16", "bfloat16")),
            *(
                pytest.param(*values, marks=pytest.mark.slow)
                for values in (
                    (1, 1, 64, 2, 3, ("bfloat16", "bfloat16")),
                    (1, 2, 64, 4, 5, ("float32", "bfloat16")),
                    (1, 2, 128, 16, 7, ("bfloat16", "float32")),
                    (1, 4, 64, 12, 1, ("float32", "float32")),
                    (1, 3, 128, 5, 2, ("float16", "float32")),
                    (1, 3, 128, 1, 2, ("float16", "float32")),
                )
            ),
        ],
    )
    def test_gathered_depth_gradients_are_those_of_the_backward(
        self, rows, group, head_dim, count, layers, dtypes
    ):
        """Of `count` slots from some of the layers; what is not to be read holds NaN.

        rows: and key heads. dtypes: of the results, and of the sums that they are added to.
        """
        backend = backends.BACKENDS[self.implementation]
        if backend.gathering is None:
            pytest.skip(f"{self.implementation} cannot gather")
        dtype = "float16" if "float16" in dtypes else self.dtypes[0]
        case = Case(
            "gathered",
            q_len=19 if count <= 4 else 11,  # mosaic_gpu's tiles have 16 tokens or more, or 8
            batch=rows,
            heads=rows * group,
            kv_heads=rows,
            head_dim=head_dim,
            slots=count + 3,
            segments="packed",
        )
        problem = make_problem(case)
        arrays, segments = _cast(problem.arrays, dtype), problem.integers["segment_ids"]
        first, offset, options = 2, 1, Options(head_dim**-0.5)
        factors = np.array([np.nan, *np.linspace(-1, 1.5, layers), np.nan], np.float32)
        sums = np.random.default_rng(0).normal(size=(2, count + 2, *arrays["key"].shape))
        xla = backends.BACKENDS["xla"]

        def only(x, start):
            where = np.isin(np.arange(len(x)), np.arange(start, start + count))
            return jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan).astype(x.dtype)

        @compile_quickly
        def run(arrays, factors, layers, first, offset, sums):
            def layer(factor):
                operands = Operands(
                    **arrays | {"query": (factor * arrays["query"]).astype(dtype)},
                    query_segments=segments,
                    key_segments=segments,
                )
                d_out, d_lse = problem.cotangents
                out, lse = xla.forward(operands, options)
                args = operands, options, out, lse, (d_out + factor).astype(out.dtype), d_lse
                zero = jnp.zeros(arrays["depth_key"].shape, jnp.float32)
                slots = xla.gradients(*args, (zero, zero))[3:]
                return slots, backend.gathering.keep(operands, out, lse, *args[4:])

            wanted, kept = lax.map(layer, factors)
            slots = [only(arrays[x], 2) for x in ("depth_key", "depth_value")]
            settings = {"scale": options.scale, "dtype": dtypes[0]}
            gather = backend.gathering.gather
            got = gather(kept, *slots, layers, first, count, **settings)
            more = gather(
                kept, *slots, layers, first, count, so_far=sums, offset=offset, **settings
            )
            stop = layers[1]
            nothing = gather(kept, *slots, (stop, stop), first, count, **settings)
            return got, more, nothing, wanted

        sums = jnp.asarray(sums, dtypes[1])
        so_far = tuple(only(x, offset) for x in sums)
        scalars = (jnp.int32(1), jnp.int32(1 + layers)), jnp.int32(first), jnp.int32(offset)
        results = run(arrays, factors, *scalars, so_far)
        for got, more, nothing, wanted, old in zip(*results, sums, strict=True):
            assert got.dtype == more.dtype == jnp.dtype(dtypes[0])
            assert not np.asarray(nothing).any()
            rtol = max(RELATIVE[str(got.dtype)], RELATIVE[dtype])
            total = np.asarray(wanted, np.float64)[1:-1, first : first + count].sum(0)
            assert_close("gathered", got, total, rtol, exact_zeros=False)
            total += np.asarray(old, np.float64)[offset : offset + count]
            assert_close("added to what was there", more, total, rtol, exact_zeros=False)

    def test_under_vmap_and_scan_with_a_traced_length(self):
        case = self.sized(Case("transformed", q_len=7, slots=5, depth_lengths=(0, 2, 5)))
        problem, dtype = make_problem(case), self.dtypes[0]
        run = differentiate(case, self.implementation)
        arrays, lengths = _cast(problem.arrays, dtype), jnp.asarray(case.depth_lengths)

        def at(length):
            return run(arrays, problem.cotangents, {}, length)

        mapped = compile_quickly(jax.vmap(at))(lengths)
        scanned = compile_quickly(lambda x: jax.lax.scan(lambda _, n: (None, at(n)), None, x)[1])(
            lengths
        )
        for i, length in enumerate(case.depth_lengths):
            for stacked in (mapped, scanned):
                got = jax.tree.map(lambda x, i=i: x[i], stacked)
                assert_results_close(got, expected_results(case)[length], dtype)
