"""The ``qcompile::`` ops: fake implementations against the real ones, gradients against closed forms, dtypes
and layouts.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from qcompile.ir.estimators import Estimator
from qcompile.ir.operand import Operand
from qcompile.ir.ops import global_scale_of, index_dtype
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.quantize.reference import group_statistic, spread

OPS = torch.ops.qcompile
ESTIMATORS = ["ste", "clip", "trust", "dge(k=5,cap=3)", "dge(k=3,cap=2)"]
QUANTIZERS = [
    "e2m1 row absmax even",
    "e2m1 row absmax_pow2 half_up",
    "midrise4 block16 absmax half_up",
    "e2m1 block16 e4m3 even",
]
QUANTIZERS += [
    "e2m1 block32 e8m0 even",
    "e1m2 block4x4 absmax even",
    "e4m3 tensor absmax even",
    "midrise1 row absmax even",
]
OCC = "occ(alpha=0.9,per=row,compensate=1)"


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values under the strides that graphs really produce."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return {
        "contiguous": x.contiguous(),
        "transposed": x.mT.contiguous().mT,
        "strided": wide[..., ::2],
        "offset": torch.cat([torch.full_like(x[:1], float("nan")), x])[1:],
    }


# --- gradients
# ------------------------------------------------------------------------------------------------------


def scaled(x: torch.Tensor, q: Quantizer, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x / s in float64 from the stored scales, and |y − q| from the dequantized tensor: independent of
    the kernels' γ.
    """
    global_scale = global_scale_of(x, q)
    codes, scales = OPS.quantize(x, str(q), axis, global_scale)
    back = OPS.dequantize(codes, scales, str(q), axis, x.shape[axis], torch.float32, global_scale).movedim(axis, -1)
    s = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    s = s if global_scale is None else s * global_scale
    rows = x.movedim(axis, -1).double()
    s = spread(s, rows.shape, q).double()
    return (rows / s).movedim(-1, axis), (back.double() / s).movedim(-1, axis)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_gradient_is_the_closed_form(quantizer, estimator, axis, generator):
    """dL/dx = dL/dx̂ ⊙ g(x/s), elementwise; values within 1e-5 of an edge of the mask are left out (float32
    against float64).
    """
    x = torch.randn(21, 35, generator=generator).requires_grad_()
    grad = torch.randn(21, 35, generator=generator)
    OPS.fake_quantize(x, f"{quantizer}; {estimator}", axis).backward(grad)
    q, e = Quantizer.parse(quantizer), Estimator.parse(estimator)
    y, level = scaled(x.detach(), q, axis)
    if e.kind.slope:
        factor, sure = e.slope(y, q.format), torch.ones_like(y, dtype=torch.bool)
        # Near a threshold the slope is steep: compare where float32's y and float64's y give nearly the same.
        sure = (e.slope(y * (1 + 1e-6), q.format) - factor).abs() < 1e-3
    elif e.kind.mask:
        factor = e.mask(y, level, q.format).double()
        sure = e.mask(y * (1 + 1e-5), level, q.format) == e.mask(y * (1 - 1e-5), level, q.format)
    else:
        factor, sure = torch.ones_like(y), torch.ones_like(y, dtype=torch.bool)
    assert x.grad is not None
    assert sure.double().mean() > 0.9
    torch.testing.assert_close(x.grad.double()[sure], (grad.double() * factor)[sure], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("estimator", ["ste", "clip", "trust"])
def test_gradient_through_outlier_clamping(estimator, generator):
    """The residual restores what the clamp took, so the gradient passes the clamp untouched (arXiv
    2501.17116, released code).
    """
    x = torch.randn(5, 40, generator=generator).requires_grad_()
    grad = torch.randn(5, 40, generator=generator)
    OPS.fake_quantize(x, f"e2m1 row absmax_pow2 even; {estimator}; {OCC}", 1).backward(grad)
    torch.testing.assert_close(x.grad, grad, rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["clip", "trust"])
@pytest.mark.parametrize("rule", ["absmax", "absmax_pow2"])
def test_a_scale_that_covers_the_row_masks_nothing(estimator, rule, generator):
    """Under absmax nothing lies outside the grid: the largest element of a row must not lose its gradient to
    rounding of x·γ.
    """
    x = torch.randn(300, 37, generator=generator).requires_grad_()
    OPS.fake_quantize(x, f"e2m1 row {rule} even; {estimator}", 1).sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).sum().item() == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("text", ["e2m1 row absmax stochastic", "int4 row absmax stochastic"])
def test_stochastic_rounding_has_a_backward(text, estimator, generator):
    """The estimator is a function of y (and of the level taken), so it needs no new draw."""
    x = torch.randn(4, 24, generator=generator).requires_grad_()
    OPS.fake_quantize(x, f"{text}; {estimator}", 1, torch.tensor([3])).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_masked_gradients_are_zero_even_where_they_are_not_finite():
    """0 · inf is NaN; a masked element gets exactly 0. E8M0 clips elements above 6/4 of the scale's power of
    two.
    """
    x = torch.tensor([[7.9, 1.0, -7.9, 0.5]], requires_grad=True)
    grad = torch.tensor([[float("inf"), 1.0, float("nan"), 2.0]])
    OPS.fake_quantize(x, "e2m1 row e8m0 even; clip", 1).backward(grad)
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 0.0, 2.0]]


def test_no_gradient_is_computed_when_none_is_asked_for(generator):
    """Inference keeps nothing for a backward."""
    x = torch.randn(3, 16, generator=generator)
    assert not OPS.fake_quantize(x, "e2m1; clip", 1).requires_grad
    with torch.no_grad():
        assert OPS.fake_quantize(x.requires_grad_(), "e2m1; clip", 1).grad_fn is None


# --- values
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*QUANTIZERS, f"e2m1 row absmax even; ste; {OCC}", "e2m1; ste; occ(per=tensor)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fake_quantize_is_quantize_then_dequantize(text, dtype, generator):
    """In x's dtype and shape; the codes are those of the same values in float32, so no dtype rounds
    differently.
    """
    x = torch.randn(19, 33, generator=generator).to(dtype)
    out = OPS.fake_quantize(x, text, 1)
    assert out.dtype == dtype
    assert out.shape == x.shape
    spec = Operand.parse(text)
    if spec.outliers:
        return
    global_scale = global_scale_of(x, spec.quantizer)
    codes, scales = OPS.quantize(x, text, 1, global_scale)
    codes32, scales32 = OPS.quantize(x.float(), text, 1, global_scale)
    assert torch.equal(codes, codes32)
    assert torch.equal(scales.float(), scales32.float())
    assert torch.equal(out, OPS.dequantize(codes, scales, text, 1, 33, dtype, global_scale))


@pytest.mark.parametrize("text", [*QUANTIZERS, f"e2m1 row absmax even; clip; {OCC}", "e2m1; dge"])
def test_strides_do_not_matter(text, generator):
    """Values and gradients under transposed, strided and offset inputs; NaN lies in the gaps, so reading
    there shows.
    """
    base = torch.randn(17, 34, generator=generator)
    grad = torch.randn(17, 34, generator=generator)
    results = []
    for x in layouts(base).values():
        x = x.detach().requires_grad_()
        out = OPS.fake_quantize(x, text, 1)
        results.append((out.detach(), torch.autograd.grad(out, x, layouts(grad)["transposed"])[0]))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("text", ["e2m1", "e2m1; clip", "e2m1; dge", f"e2m1; ste; {OCC}"])
def test_expanded_inputs_and_gradients(text, generator):
    """Stride 0: a bias-like input broadcast along rows, and the gradient that `sum().backward()` sends."""
    row = torch.randn(1, 24, generator=generator)
    expanded = row.expand(6, 24).requires_grad_()
    full = row.repeat(6, 1).requires_grad_()
    out, expected = OPS.fake_quantize(expanded, text, 1), OPS.fake_quantize(full, text, 1)
    assert torch.equal(out, expected)
    (a,), (b,) = (
        torch.autograd.grad(out.sum(), expanded),
        torch.autograd.grad(expected, full, torch.ones(6, 24)),
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("text", [*QUANTIZERS, f"e2m1 row absmax even; clip; {OCC}"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axis_is_a_transposition(text, axis, generator):
    """Quantizing along an axis is moving it last, quantizing, and moving it back; negative axes count from
    the end.
    """
    x = torch.randn(5, 18, 7, generator=generator)
    out = OPS.fake_quantize(x, text, axis)
    assert torch.equal(out, OPS.fake_quantize(x.movedim(axis, -1).contiguous(), text, -1).movedim(-1, axis))


@pytest.mark.parametrize("text", ["e2m1 row absmax even; dge", "e2m1 block16 e4m3 even; clip", f"e2m1; ste; {OCC}"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_codes(text, dtype, generator):
    """Forward and gradient under autocast are bitwise what they are without."""
    x = torch.randn(9, 48, generator=generator).requires_grad_()
    plain = OPS.fake_quantize(x, text, 1)
    with torch.autocast("cpu", dtype):
        cast = OPS.fake_quantize(x, text, 1)
        (gradient,) = torch.autograd.grad(cast.square().sum(), x)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain.square().sum(), x)[0])


def test_integer_quantizers_are_idempotent(generator):
    """A dequantized tensor quantizes to itself: its largest element is on the grid, so the scale is found
    again.
    """
    x = torch.randn(30, 50, generator=generator)
    for text in ("e2m1 row absmax_pow2 even", "e2m1 block32 e8m0 even"):
        once = OPS.fake_quantize(x, text, 1)
        assert torch.equal(OPS.fake_quantize(once, text, 1), once), text


# --- fake implementations
# -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def samples() -> dict[str, list[tuple]]:
    """Arguments of every op under odd shapes, several axes and layouts."""
    generator = torch.Generator().manual_seed(4)
    cases: dict[str, list[tuple]] = {op: [] for op in TABLE}
    for shape, axis in (
        ((5, 19), 1),
        ((19, 5), 0),
        ((3, 7, 18), -2),
        ((1, 1), 1),
        ((33,), 0),
        ((2, 3, 1, 17), 3),
    ):
        base = torch.randn(shape, generator=generator)
        for x in layouts(base).values() if len(shape) == 2 else [base]:
            size = x.shape[axis]
            for text in QUANTIZERS if len(shape) > 1 else QUANTIZERS[:5]:
                q = Quantizer.parse(text)
                global_scale = global_scale_of(x, q)
                codes, scales = OPS.quantize(x, text, axis, global_scale)
                cases["quantize"].append((x, text, axis, global_scale))
                for dtype in (torch.bfloat16, torch.float32):
                    cases["dequantize"].append((codes, scales, text, axis, size, dtype, global_scale))
                mask = OPS.estimator_mask(x, scales, text, "clip", axis, global_scale)
                cases["estimator_mask"].append((x, scales, text, "clip", axis, global_scale))
                grad = torch.ones(()).expand(shape)
                for g in (x, grad):
                    cases["mask_gradient"].append((g, mask, axis))
                    cases["scale_gradient"].append((g, x, scales, text, "dge", axis, global_scale))
            for clamp in ("occ(alpha=0.9)", "occ(alpha=0.99)", "occ(alpha=0.9,per=tensor)"):
                cases["clamp_outliers"].append((x, clamp, axis))
                cases["restore_outliers"].append((x, *OPS.clamp_outliers(x, clamp, axis)[1:], clamp, axis))
    for batch in ((), (2,)):
        x, w = (
            torch.randn(*batch, 5, 16, generator=generator),
            torch.randn(*batch, 7, 16, generator=generator),
        )
        a, b = (list(OPS.quantize(t, "e2m1 row absmax even", -1)) for t in (x, w))
        for dtype in (torch.float32, torch.bfloat16):
            cases["quantized_mm"].append((a, "e2m1", 16, False, b, "e2m1", 16, True, dtype))
        cases["quantized_mm"].append(([x], "dense", 16, False, b, "e2m1", 16, True, torch.float32))
        cases["quantized_mm"].append((a, "e2m1", 16, True, [x], "dense", 16, False, torch.float32))
    return cases


TABLE = ["quantize", "dequantize", "clamp_outliers", "restore_outliers", "estimator_mask", "mask_gradient"]
TABLE += ["scale_gradient", "quantized_mm"]


@pytest.mark.parametrize("op", TABLE)
def test_fake_agrees_with_real(op):
    """Shape, dtype and strides, for every sample: Inductor asserts the strides that the fake implementation
    promised.
    """
    for args in samples()[op]:
        real = getattr(OPS, op)(*args)
        with FakeTensorMode() as mode:
            fake = getattr(OPS, op)(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
        for r, f in zip(*(out if isinstance(out, tuple) else (out,) for out in (real, fake)), strict=True):
            described = [(tuple(t.shape), t.dtype, strides_that_count(t)) for t in (r, f)]
            assert described[0] == described[1], f"{op}{[describe(a) for a in args]}: real, fake = {described}"


def strides_that_count(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of the dimensions longer than one; of the others they address nothing."""
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)


def describe(value):
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("op", TABLE)
def test_outputs_do_not_alias_inputs(op):
    """The schemas promise fresh outputs; a view of the input would let an in-place write reach it."""
    for args in samples()[op]:
        inputs = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
        for out in torch.utils._pytree.tree_leaves(getattr(OPS, op)(*args)):
            assert out.numel() == 0 or out.untyped_storage().data_ptr() not in inputs


CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("op", TABLE)
def test_opcheck_static(op):
    """Schema (no mutation, no aliasing) and fake implementation, with opcheck, on a few samples of each op.

    opcheck compares outputs with `allclose`, which 8-bit floats do not have: two-level scales are
    left to the tests above.
    """
    cases = [c for c in samples()[op] if not any("e4m3 even" in a for a in c if isinstance(a, str))]
    for args in cases[:: max(1, len(cases) // 6)]:
        opcheck(getattr(OPS, op).default, args, test_utils=CHECKS)


@pytest.mark.parametrize("op", [op for op in TABLE if op != "quantized_mm"])
def test_opcheck_dynamic_shapes(op):
    """Traced with symbolic sizes and run with real ones: the results must have the dtype and shape the trace
    said.
    """
    kept = [c for c in samples()[op] if not any("e4m3 even" in a for a in c if isinstance(a, str))]
    for args in [c for c in kept if c[0].dim() == 2 and min(c[0].shape) > 1][:2]:
        opcheck(getattr(OPS, op).default, args, test_utils="test_aot_dispatch_dynamic")


def test_positions_have_one_dtype_whether_sizes_are_symbolic_or_not():
    """A compiled graph allocates what the fake implementation says and the kernel fills it: int32 against
    uint8 reads past the end.
    """
    x = torch.randn(5, 200)
    real = OPS.clamp_outliers(x, "occ(alpha=0.9)", 1)[2]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        symbolic = mode.from_tensor(x, static_shapes=False)
        assert not isinstance(symbolic.shape[1], int), "the sizes have to be symbolic for this to test anything"
        fake = OPS.clamp_outliers(symbolic, "occ(alpha=0.9)", 1)[2]
    assert fake.dtype == real.dtype


@pytest.mark.parametrize("extent", [1, 255, 256, 257, 2**15, 2**15 + 1, 2**31 - 1, 2**31, 2**40])
def test_index_dtype_holds_every_position(extent):
    assert torch.iinfo(index_dtype(extent)).max >= extent - 1


@pytest.mark.parametrize("text", ["e2m1 row absmax even; ste", "e2m1; clip", "e2m1; dge", f"e2m1; trust; {OCC}"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fake_quantize_through_aot_autograd(text, dynamic, generator):
    """Forward and gradient of the traced joint graph are bitwise those of eager."""
    x = torch.randn(6, 40, generator=generator).requires_grad_()

    def loss(x):
        return OPS.fake_quantize(x, text, 1).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    expected, result = loss(x), compiled(x)
    assert torch.equal(result, expected)
    assert torch.equal(torch.autograd.grad(result, x)[0], torch.autograd.grad(expected, x)[0])


def test_equal_nodes_are_shared(generator):
    """q, k and v read one input: its quantization must appear once in the forward graph."""
    seen = []

    def forward_compiler(graph, inputs):
        seen.append(sum(node.target is OPS.quantize.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def three(x):
        return sum(OPS.fake_quantize(x, "e2m1 row absmax even; clip", 1) * factor for factor in (1, 2, 3))

    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    torch.compile(three, backend=backend)(torch.randn(4, 8, generator=generator).requires_grad_())
    assert seen == [1]


def test_group_amax_sees_nan_beside_larger_values():
    """max must propagate NaN in every granularity: a maximum that drops it would hide an overflow."""
    x = torch.ones(8, 8)
    x[3, 5] = float("nan")
    for text in ("e2m1 tensor", "e2m1 row", "e2m1 block4", "e2m1 block4x4"):
        assert group_statistic(x, x, Quantizer.parse(text)).isnan().sum() == 1, text
