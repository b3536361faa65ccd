"""The account of compiled programs: against the compiler's own, and on text written by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo_cost, hlo_text

N = 32
PRODUCT = 2 * N**3


def compiled(function, *shapes):
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*specs).compile()


def chain(count):
    """`count` products of N x N, one after the other."""
    return lambda x, w: jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=count)[0]


def test_loops_count_as_often_as_they_run():
    program = compiled(chain(7), (N, N), (N, N))
    cost = hlo_cost.count(program.as_text())
    assert cost.flops == 7 * PRODUCT
    assert not cost.unknown_loops
    once = hlo_cost.count(program.as_text(), loops=False)
    assert once.flops == PRODUCT
    # Sines and the loop's counter are not products.
    assert once.flops == pytest.approx(program.cost_analysis()["flops"], rel=0.05)
    assert cost.largest(1, "flops")[0][0] == 7


def test_loops_in_loops():
    def twice(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: chain(5)(x, w), x)

    cost = hlo_cost.count(compiled(twice, (N, N), (N, N)).as_text())
    assert cost.flops == 15 * PRODUCT


def test_a_loop_of_unknown_length_is_reported_and_counts_as_told():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: jnp.sin(x @ w), x)

    text = compiled(until, (N, N), (N, N)).as_text()
    cost = hlo_cost.count(text, unknown_trips=2.5)
    assert len(cost.unknown_loops) == 1
    assert cost.flops == 2.5 * PRODUCT


@pytest.mark.parametrize(
    ("shape", "nbytes", "in_hbm"),
    [
        ("f32[16,128]{1,0}", 16 * 128 * 4, True),
        ("bf16[4096,64]{1,0:T(8,128)(2,1)}", 4096 * 128 * 2, True),  # 64 lanes of 128
        ("bf16[4096,64]{0,1:T(8,128)(2,1)S(1)}", 4096 * 64 * 2, False),  # tokens in the lanes
        ("f32[2,3,5]{0,2,1:T(4,128)}", 3 * 8 * 128 * 4, True),
        ("pred[]{:T(512)}", 1, True),
    ],
)
def test_bytes_as_laid_out(shape, nbytes, in_hbm):
    (array,) = hlo_text.arrays(shape)
    assert (array.nbytes, array.in_hbm) == (nbytes, in_hbm)


TPU_PROGRAM = """\
HloModule jit_f, is_scheduled=true

%read (param_0.1: f32[8,128,128], param_1.1: s32[]) -> f32[128,128] {
  %param_0.1 = f32[8,128,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,128,128]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1.1, %zero, %zero), dynamic_slice_sizes={1,128,128}
  ROOT %cast = f32[128,128]{1,0:T(8,128)} bitcast(%slice)
}

%write (param_0.2: f32[8,128,128], param_1.2: f32[128,128], param_2.2: s32[]) -> f32[8,128,128] {
  %param_0.2 = f32[8,128,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.2 = f32[128,128]{1,0:T(8,128)} parameter(1)
  %param_2.2 = s32[]{:T(128)} parameter(2)
  %zero.2 = s32[]{:T(128)} constant(0)
  %row = f32[1,128,128]{2,1,0:T(8,128)} bitcast(%param_1.2)
  ROOT %update = f32[8,128,128]{2,1,0:T(8,128)} dynamic-update-slice(%param_0.2, %row, %param_2.2, %zero.2, %zero.2)
}

ENTRY %main (a: f32[8,128,128], i: s32[]) -> f32[8,128,128] {
  %a = f32[8,128,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %in_vmem = f32[128,128]{1,0:T(8,128)S(1)} fusion(%a, %i), kind=kLoop, calls=%read
  %product = f32[2,64,128]{2,1,0:T(8,128)S(1)} convolution(%in_vmem, %in_vmem), window={size=2 stride=1 pad=1_1 lhs_dilate=2}, dim_labels=0bf_0io->0bf
  %kernel.3 = f32[128,128]{1,0:T(8,128)} custom-call(%in_vmem), custom_call_target="tpu_custom_call", frontend_attributes={note="{
"quoted": 1
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %result = f32[8,128,128]{2,1,0:T(8,128)} fusion(%a, %kernel.3, %i), kind=kLoop, calls=%write
}
"""  # noqa: E501
ROW = 128 * 128 * 4


def test_hbm_traffic_of_slices_and_updates_in_place():
    """Read one row into VMEM; the kernel writes one; the update reads that and writes one."""
    cost = hlo_cost.count(
        TPU_PROGRAM.replace("  %product", "  %product_off").replace(
            " convolution(", " opt-barrier("
        )
    )
    assert cost.hbm_bytes == 4 * ROW + 4 * 2  # and the index, twice
    assert cost.kernel_calls == {"kernel": 1.0}


def test_a_kernel_costs_what_its_caller_says():
    costs = {"kernel": hlo_cost.Kernel(flops=11.0, hbm_bytes=7.0)}
    plain = hlo_cost.count(TPU_PROGRAM)
    told = hlo_cost.count(
        TPU_PROGRAM, kernel=lambda call: costs.get(str(hlo_cost.kernel_name(call)))
    )
    assert told.flops == plain.flops + 11
    assert told.hbm_bytes == plain.hbm_bytes - ROW + 7


def test_products_written_as_convolutions():
    """A batch of products is a convolution over holes: only half of the positions multiply."""
    assert hlo_cost._valid_positions(4, 4, 4, 1, 0, 1, 1) == 10
    # size 4, stride 3, dilation 4: TPU's batch of 4, each output meets its own kernel position
    assert hlo_cost._valid_positions(4, 4, 4, 3, 0, 4, 1) == 4


def test_text_without_a_program():
    with pytest.raises(ValueError, match="text: expected HLO with an ENTRY computation"):
        hlo_text.parse("HloModule empty")
