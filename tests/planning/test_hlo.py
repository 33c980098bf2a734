"""Reading the compiler's text, on programs whose traffic can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fjft.planning import hlo

LOOP = """\
HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} add(%x, %x)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %y)
}

%cond (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] constant(5)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

%slice (a: f32[5,8], b: s32[]) -> f32[1,8] {
  %a = f32[5,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%a, %b, %zero), dynamic_slice_sizes={1,8}
}

%nested (c: f32[5,8], d: s32[]) -> f32[1,8] {
  %c = f32[5,8]{1,0} parameter(0)
  %d = s32[] parameter(1)
  %cast = f32[5,8]{1,0} bitcast(%c)
  %inner = f32[1,8]{1,0} fusion(%cast, %d), kind=kLoop, calls=%slice
  ROOT %twice = f32[1,8]{1,0} add(%inner, %inner)
}

%update (e: f32[5,8], g: f32[1,8], h: s32[]) -> f32[5,8] {
  %e = f32[5,8]{1,0} parameter(0)
  %g = f32[1,8]{1,0} parameter(1)
  %h = s32[] parameter(2)
  %zero3 = s32[] constant(0)
  %u = f32[5,8]{1,0} dynamic-update-slice(%e, %g, %h, %zero3)
  ROOT %ub = f32[5,8]{1,0} bitcast(%u)
}

ENTRY %main (x0: f32[8], stack: f32[5,8], k: s32[]) -> f32[8] {
  %x0 = f32[8]{0} parameter(0)
  %stack = f32[5,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %f = f32[1,8]{1,0} fusion(%stack, %k), kind=kLoop, calls=%slice
  %n2 = f32[1,8]{1,0} fusion(%stack, %k), kind=kLoop, calls=%nested
  %up = f32[5,8]{1,0} fusion(%stack, %n2, %k), kind=kLoop, calls=%update
  %on_chip = f32[8]{0:T(128)S(1)} copy(%x0)
  %zero2 = s32[] constant(0)
  %t0 = (s32[], f32[8]{0}) tuple(%zero2, %x0)
  %w = (s32[], f32[8]{0}) while(%t0), condition=%cond, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_a_loop_counts_every_turn_and_a_slice_only_itself():
    in_loop = 5 * 3 * 32
    sliced = 32 + 32 + 4  # what is read of the stack, what is written, the index
    updated = 32 + 32 + 4  # of the stack nothing is read and one row written
    copied = 32  # what lies on the chip is free
    measured = hlo.Text(LOOP).measure()
    assert measured.memory_bytes == in_loop + 2 * sliced + updated + copied
    assert measured.collective_bytes == {}
    assert measured.repeats == 0


def test_what_the_compiler_works_out_again_is_counted():
    again = "%y.remat2 = f32[8]{0} add(%x, %x)\n  %y = f32[8]{0} add(%x, %x)"
    text = LOOP.replace("%y = f32[8]{0} add(%x, %x)", again)
    assert hlo.Text(text).measure().repeats == 5


def spread(f, *specs_and_arrays):
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))
    arrays = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for spec, a in specs_and_arrays
    ]
    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(f, out_shardings=everywhere).lower(*arrays).compile()
    text = compiled.as_text()
    assert text is not None
    return hlo.Text(text).measure()


def test_collectives_of_a_real_program():
    rows = PartitionSpec("x"), jnp.ones((8, 16))
    gathered = spread(lambda x: x * 2, rows)
    assert gathered.collective_counts == {"all-gather": 1}
    # Of 512 bytes each device has a quarter already.
    assert gathered.collective_bytes == {"all-gather": 384}
    summed = spread(lambda x: x.sum(0), rows)
    assert summed.collective_counts == {"all-reduce": 1}
    assert summed.collective_bytes == {"all-reduce": 2 * 16 * 4}


def test_collectives_in_a_loop():
    def f(x):
        def turn(total, row):
            return total + row.sum(), None

        return jax.lax.scan(turn, jnp.float32(0), x)[0]

    found = spread(f, (PartitionSpec(None, "x"), jnp.ones((7, 16))))
    assert sum(found.collective_counts.values()) in (1, 7)  # XLA may sum once, after


@pytest.mark.parametrize(
    ("groups", "counts"),
    [
        ("{{0,1},{2,3}}", {"all-reduce": 5}),
        ("[2,2]<=[4]", {"all-reduce": 5}),
        ("{{0},{1},{2},{3}}", {}),
        ("[4,1]<=[4]", {}),
    ],
)
def test_a_group_of_one_device_sends_nothing(groups, counts):
    reduced = f"all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%sum"
    text = LOOP.replace("add(%x, %x)", reduced)
    assert hlo.Text(text).measure().collective_counts == counts


def test_the_largest_buffers():
    assignment = """\
allocation 0: size 64, parameter 0, shape |f32[16]| at ShapeIndex {}:
 value: <1 x0 @0> (size=64,offset=0): f32[16]{0}
allocation 1: size 96, preallocated-temp:
 value: <2 y @0> (size=32,offset=0): f32[8]{0:T(128)}
 value: <3 other @0> (size=32,offset=0): f32[8]{0}
 value: <4 f{0} @0> (size=64,offset=32): f32[2,8]{1,0}
"""
    text = LOOP.replace(
        "add(%x, %x)",
        'add(%x, %x), metadata={op_name="jit(train_step)/while/body/add"}',
    )
    found = hlo.largest_buffers(assignment, hlo.Text(text))
    assert found == [
        hlo.Buffer(64, "f32[2,8]", "fusion"),
        hlo.Buffer(32, "f32[8]", "add"),
    ]


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [
        ("(f32[2,3]{1,0}, bf16[8]{0:T(8)S(1)})", 24),
        ("pred[7]", 7),
        ("s4[8]{0}", 4),
        ("f8e4m3fn[16]", 16),
        ("f32[]", 4),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, nbytes):
    assert hlo._nbytes(shape) == nbytes
