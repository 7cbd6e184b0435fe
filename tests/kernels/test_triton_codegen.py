"""The Triton that Inductor generates for the ``qcompile::`` ops, checked without a GPU.

Inductor is told that it generates Triton for the CPU (``cpu_backend="triton"``) under a driver that only
claims to be an sm_90. Three things are then done with the kernels' source: counting them and reading them,
compiling one to PTX, and running them in Triton's interpreter. The interpreter has to be chosen before Triton
is imported, so the tests named ``test_interpreted_…`` run in a process of their own, which
:func:`test_numerics_under_the_interpreter` starts.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

import torch._inductor.config as inductor_config  # noqa: E402
from torch._inductor.codegen.triton import TritonOverrides  # noqa: E402
from torch._inductor.runtime import triton_heuristics  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import qcompile.kernels  # noqa: E402, F401
from qcompile.ir.columns import take_columns  # noqa: E402
from qcompile.ir.formats import Format  # noqa: E402
from qcompile.ir.outliers import OutlierColumns  # noqa: E402
from qcompile.ir.quantizer import Quantizer  # noqa: E402
from qcompile.kernels.estimate import reference as estimate_reference  # noqa: E402
from qcompile.kernels.lowerings import LOWERINGS, cuda_provider, register_lowerings  # noqa: E402
from qcompile.kernels.outliers import reference as outliers_reference  # noqa: E402
from qcompile.kernels.producer import INPUTS, OPERATIONS, Producer, device_producer  # noqa: E402
from qcompile.kernels.quantize import reference, triton_outliers  # noqa: E402
from qcompile.kernels.register import provider_of  # noqa: E402
from qcompile.stored import PackedWeight  # noqa: E402

from .harness import INTERPRETED, SM90, ClaimedDriver, compiled, interpreted, run_interpreted  # noqa: E402

E2M1 = "e2m1 row absmax even"
COMPENSATED_OPERAND = f"{E2M1}; ste; occ(alpha=0.9,residual=e4m3)"
quantize, dequantize = torch.ops.qcompile.quantize, torch.ops.qcompile.dequantize


class Kernel:
    """One generated kernel: its source, and its function run in the interpreter (or not at all)."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        self.name, self.source = name, source
        path = folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        recorder = mock.Mock(side_effect=self._record)
        heuristics = {"pointwise": recorder, "reduction": recorder, "persistent_reduction": recorder}
        with mock.patch.multiple(triton_heuristics, **heuristics):
            spec.loader.exec_module(module)
        if INTERPRETED:
            module.libdevice = InterpretedLibdevice
        self.function = getattr(module, name)

    def _record(self, *args, triton_meta, **kwargs):
        self.signature = triton_meta["signature"]
        return lambda function: function

    def run(self, *args, stream=None):
        if not INTERPRETED:
            return
        blocks = {name: 16 for name in self.signature if name.endswith("BLOCK")}
        values = dict(zip(self.signature, args, strict=False))
        grid = [triton.cdiv(values.get(f"{axis}numel", 1), 16) for axis in "xyz"]
        self.function[tuple(grid)](*args, **blocks)

    def ptx(self, target: GPUTarget = SM90) -> str:
        blocks = {name: 16 for name in self.signature if name.endswith("BLOCK")}
        return triton.compile(ASTSource(self.function, self.signature, blocks), target=target).asm["ptx"]


class InterpretedLibdevice:
    """The libdevice functions that the kernels here call, which the interpreter lacks."""

    @staticmethod
    def exp2(x):
        return triton.language.exp2(x)

    @staticmethod
    def log2(x):
        return triton.language.log2(x)

    @staticmethod
    def floor(x):
        return triton.language.floor(x)

    @staticmethod
    def exp(x):
        return triton.language.exp(x)

    @staticmethod
    def erf(x):
        return triton.language.erf(x)


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """``generate(fn, *inputs, dynamic=False) -> (outputs, kernels)``; outputs are real in the interpreter."""
    register_lowerings()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(ClaimedDriver())

    def run(fn, *inputs, dynamic: bool = False):
        kernels: dict[str, Kernel] = {}  # Inductor asks for each more than once

        def load(self, name: str, source: str, device_str: str = "cpu") -> Kernel:
            return kernels.setdefault(name, Kernel(name, source, tmp_path))

        torch._dynamo.reset()
        settings = {"cpu_backend": "triton", "fx_graph_cache": False, "autotune_remote_cache": False}
        with (
            mock.patch("torch._inductor.async_compile.AsyncCompile.triton", load),
            inductor_config.patch(settings),
        ):
            outputs = torch.compile(fn, backend="inductor", fullgraph=True, dynamic=dynamic)(*inputs)
        return outputs, list(kernels.values())

    yield run
    triton.runtime.driver._active = previous


def rows_of_everything(rows: int, columns: int, fmt: Format) -> torch.Tensor:
    """Float32 rows with ties, saturation, −0, tiny and huge scales, zeros only, NaN and infinity."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    ties = torch.tensor([*fmt.thresholds, *fmt.magnitudes, -0.0][: columns - 1])
    for row, factor in ((0, 1.0), (1, -1.0), (2, 2.0**-90), (3, -(2.0**60))):
        x[row] = 0.0
        x[row, : len(ties)] = ties * factor
        x[row, -1] = fmt.max * factor  # the scale is then a power of two, and ties stay ties
    x[4] = 0.0
    x[5] *= 1e-38
    x[6] *= 1e37
    x[7, 3] = float("nan")
    x[8, 2] = float("inf")
    return x


# --- structure ----------------------------------------------------------------------------------------------


@compiled
def test_one_kernel_for_gelu_and_quantize(generate):
    """The producer, the absolute maximum, the scale and the codes are one pass over memory; 37 rows, bf16."""
    _, kernels = generate(lambda x: quantize(F.gelu(x), E2M1, -1), torch.randn(37, 254, dtype=torch.bfloat16))
    assert len(kernels) == 1
    assert kernels[0].name.endswith("fused_gelu_quantize_0")


@compiled
def test_at_most_two_kernels_for_rmsnorm_and_quantize(generate):
    """The normalization's own reduction runs over K, the quantizer's over bytes: two passes."""

    def norm_and_quantize(x, weight):
        return quantize(F.rms_norm(x, (x.shape[-1],), weight), E2M1, -1)

    _, kernels = generate(norm_and_quantize, torch.randn(37, 256), torch.randn(256))
    assert len(kernels) <= 2


@compiled
@pytest.mark.parametrize(
    "text",
    [
        "midrise4 block16 e4m3 even",
        "midrise4 block16 e4m3_46 even",
        "midrise4 block32 absmax even",
        "e2m1 block32 e8m0 even",
        "e2m1 row absmax_pow2 half_up",
    ],
)
def test_one_kernel_for_other_scales(generate, text):
    """Scales of blocks share the kernel of the codes: its loop has to match theirs."""
    scale = torch.ones(()) if "e4m3" in text else None
    _, kernels = generate(lambda x: quantize(F.gelu(x), text, -1, scale), torch.randn(37, 256))
    assert len(kernels) == 1
    assert "quantize" in kernels[0].name


@compiled
@pytest.mark.parametrize(("text", "count"), [("e2m1 row stochastic", 1), ("midrise4 block16 e4m3_eden eden", 3)])
def test_rounding_by_chance_is_generated(generate, text, count):
    """The hash is part of the kernel of the codes. A correction needs sums over eight blocks: two kernels more."""
    seed, whole = torch.tensor([3]), torch.ones(()) if "e4m3" in text else None
    _, kernels = generate(lambda x: quantize(F.gelu(x), text, -1, whole, seed), torch.randn(37, 256))
    assert len(kernels) == count
    assert "mul.lo.s32" in kernels[-1].ptx()


@compiled
def test_codes_are_transposed_by_one_kernel_on_cards_with_fp4(generate):
    """Two bytes are read for each that is written, whose halves are put together; the machine code exists."""
    codes = torch.randint(0, 256, (37, 23), dtype=torch.uint8)
    _, (kernel,) = generate(lambda codes: torch.ops.qcompile.transpose_codes(codes, 45), codes)
    for capability in (100, 103, 120):
        ptx = kernel.ptx(GPUTarget("cuda", capability, 32))
        assert f".target sm_{capability}" in ptx
        assert re.search(r"ld\.global\S*\.b8", ptx)
        assert re.search(r"st\.global\S*\.b8", ptx)


BLOCKS = [
    "e2m1 block16 e4m3 stochastic",
    "e2m1 block16 e4m3_eden eden",
    "e2m1 block16 e4m3_46",
    "e2m1/int4 block16 e4m3 stochastic",
    "e2m1 block16x16 e4m3",
]


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_of_what_lies_in_memory_are_quantized_by_the_ops_own_kernel(generate, text):
    """A rotation writes x: no loop of ours is printed for maxima, codes, sums or scales."""

    def rotated(x, whole, seed):
        return quantize(torch.ops.qcompile.hadamard(x, 128, 0), text, 0, whole, seed)

    arguments = torch.randn(256, 40), torch.ones(()), torch.tensor([3])
    outputs, kernels = generate(rotated, *arguments)
    assert not kernels
    torch.testing.assert_close(outputs, rotated(*arguments), rtol=0, atol=0)


@compiled
@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_under_a_scale_of_the_tensor_are_never_printed(generate, text):
    """What computes x is one kernel, whose name says that it quantizes nothing: its maximum needs it written anyway."""
    whole, seed = torch.ones(()), torch.tensor([3])
    _, (kernel,) = generate(lambda x: quantize(F.gelu(x), text, 0, whole, seed), torch.randn(256, 40))
    assert "quantize" not in kernel.name
    assert provider_of("quantize", "cuda", text, torch.bfloat16) == ("triton", "")
    assert provider_of("quantize", "cuda", text, torch.float64)[0] == "triton (inductor)"


def test_blocks_without_one_are_printed_behind_what_makes_x():
    """The report's answer depends on where x lies."""
    text = "e2m1 block32 e8m0"
    assert provider_of("quantize", "cuda", text, torch.bfloat16) == ("triton (inductor)", "")
    assert provider_of("quantize", "cuda", text, torch.bfloat16, in_memory=True) == ("triton", "")
    assert provider_of("quantize", "cuda", E2M1, torch.bfloat16, in_memory=True) == ("triton (inductor)", "")


@compiled
def test_codes_computed_again_fuse_with_swiglu_and_its_backward(generate):
    """One kernel reads gate, up and dY once, for the codes that the next layer's wgrad reads and for both gradients."""
    gate, up, dy = (torch.randn(37, 254, dtype=torch.bfloat16) for _ in range(3))

    def backward(gate, up, dy, bounds):
        codes = torch.ops.qcompile.encode_compensated(F.silu(gate) * up, bounds, COMPENSATED_OPERAND, -1)
        return codes, dy * F.silu(gate), torch.ops.aten.silu_backward(dy * up, gate)

    _, kernels = generate(backward, gate, up, dy, torch.ones(37, 3))
    assert len(kernels) == 1
    assert "encode_compensated" in kernels[0].name
    assert "e4m3x2" in kernels[0].ptx()


@compiled
@pytest.mark.parametrize("packed", [False, True])
def test_gelu_and_quantize_8bit(generate, packed):
    """8-bit codes and scales come out of the pass that computes x; with stored codes the op's own kernel is faster."""
    x = torch.randn(37, 254, dtype=torch.bfloat16)
    _, kernels = generate(lambda x: torch.ops.qcompile.quantize_8bit(F.gelu(x), E2M1, packed), x)
    assert len(kernels) == 1
    assert ("quantize" in kernels[0].name) != packed


@compiled
def test_quantize_8bit_of_an_input_is_the_ops_own_kernel(generate):
    """There is nothing to fuse with, and the hand-written kernel reads x once."""
    _, kernels = generate(lambda x: torch.ops.qcompile.quantize_8bit(x, E2M1, True), torch.randn(37, 254))
    assert not kernels


@compiled
def test_outliers_are_clamped_by_the_ops_own_kernel(generate):
    """Quantiles of rows and tensors are searched for, not sorted for; rows along other axes take top-k and loops."""
    x = torch.randn(37, 254)
    for clamp, axis, dynamic in (("row", -1, False), ("tensor", -1, False), ("tensor", 0, False), ("tensor", -1, True)):
        clamp = f"occ(alpha=0.97,per={clamp})"
        outputs, kernels = generate(
            lambda x, clamp=clamp, axis=axis: torch.ops.qcompile.clamp_outliers(x, clamp, axis), x, dynamic=dynamic
        )
        assert not kernels
        assert torch.equal(outputs[0], outliers_reference.clamp_outliers(x, clamp, axis)[0])
    _, kernels = generate(lambda x: torch.ops.qcompile.clamp_outliers(x, "occ(alpha=0.97)", 0), x)
    assert kernels


@compiled
def test_dequantize_fuses_with_its_reader(generate):
    """The dense tensor is never written: one kernel from codes to the result."""
    codes, scales = reference.quantize(torch.randn(37, 254), E2M1, -1)
    _, kernels = generate(lambda c, s: F.silu(dequantize(c, s, E2M1, -1, 254, torch.float32)) + 1, codes, scales)
    assert len(kernels) == 1


@compiled
def test_zeros_of_a_stored_weight_are_added_where_it_is_decoded(generate):
    """One kernel from codes, scales and zeros to what reads the narrow weight: no float32 one is written."""
    weight = PackedWeight.of(torch.randn(37, 96).bfloat16(), "uint4 block32; zeros")
    _, kernels = generate(lambda weight: weight.relu(), weight)
    (kernel,) = kernels
    assert [type_ for name, type_ in kernel.signature.items() if name.startswith("out_ptr")] == ["*bf16"]


@compiled
def test_a_product_is_added_in_place(generate):
    """cuBLAS adds to the memory that the first product was written to; ``addmm`` with another output would copy it."""
    x, a, y, b = (torch.randn(37, 41)[:m, :n] for m, n in ((37, 8), (8, 41), (37, 32), (32, 41)))
    mm_add = torch.ops.qcompile.mm_add

    def chain(x, a, y, b):
        return mm_add(mm_add(x @ a, y, b), 2 * y, b)  # generated kernels do not run here, so 2 y is not 2 y

    (_, kernels), (code,) = run_and_get_code(generate, chain, x, a, y, b)
    assert len(kernels) == 1
    calls = re.findall(r"extern_kernels.addmm\((\w+), \w+, \w+, out=(\w+)\)", code)
    assert len(calls) == 2
    assert len({name for call in calls for name in call}) == 1
    (output,), _ = generate(lambda x, a, y, b: (mm_add(x @ a, y, b),), x, a, y, b)
    torch.testing.assert_close(output, x @ a + y @ b)


@compiled
def test_what_measures_products_measures_those_that_add(generate):
    x, a, y, b = (torch.randn(m, n) for m, n in ((37, 8), (8, 41), (37, 32), (32, 41)))
    with inductor_config.patch(max_autotune_gemm=True, max_autotune_gemm_backends="ATEN"):
        (outputs, _), (code,) = run_and_get_code(
            generate, lambda x, a, y, b: (torch.ops.qcompile.mm_add(x @ a, y, b),), x, a, y, b
        )
    assert "alpha=1, beta=1, out=" in code
    torch.testing.assert_close(outputs[0], x @ a + y @ b)


@compiled
def test_the_slope_fuses_with_the_gradients_producer(generate):
    """The gradient's producer, the scales of x and the multiplication are one kernel."""

    def backward(grad, gate, x, scales):
        return torch.ops.qcompile.scale_gradient(grad * gate, x, scales, E2M1, "dge(k=5,cap=3)", -1)

    x = torch.randn(37, 256)
    _, kernels = generate(backward, torch.randn(37, 256), torch.randn(37, 256), x, torch.ones(37, 1))
    assert len(kernels) == 1


@compiled
def test_a_power_is_two_instructions_on_cuda(generate, monkeypatch):
    """Triton's own logarithm is a polynomial, which made DGE wait for arithmetic."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def backward(grad, x, scales):
        return torch.ops.qcompile.scale_gradient(grad, x, scales, E2M1, "dge(k=5,cap=3)", -1)

    x = torch.randn(37, 256, dtype=torch.bfloat16)
    _, (kernel,) = generate(backward, torch.randn(37, 256, dtype=torch.bfloat16), x, torch.ones(37, 1))
    ptx = kernel.ptx()
    assert (ptx.count("lg2.approx.f32"), ptx.count("ex2.approx.f32")) == (1, 1)


@compiled
def test_a_dynamic_size_is_one_kernel(generate):
    """Sizes known only at run time keep the fusion."""
    x = torch.randn(37, 254)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    _, kernels = generate(lambda x: quantize(F.gelu(x), E2M1, -1), x, dynamic=None)
    assert len(kernels) == 1


@compiled
def test_unsupported_arguments_call_the_ops_own_kernel(generate):
    """What has no lowering still compiles and still is right: no kernel is generated."""
    text, seed, x = "nf4 row absmax stochastic", torch.tensor([3]), torch.randn(5, 7)
    outputs, kernels = generate(lambda x: quantize(x, text, -1, None, seed), x)
    assert not kernels
    torch.testing.assert_close(outputs, reference.quantize(x, text, -1, None, seed), rtol=0, atol=0)
    reason = "stochastic rounding to nf4, which is neither uniform nor a minifloat, is not generated"
    assert cuda_provider("quantize", text) == ("reference", reason)


def test_the_cpu_calls_the_ops_own_kernel():
    """With Inductor's C++ backend nothing of ours is expanded into loops."""
    register_lowerings()
    x = torch.randn(5, 7)
    with mock.patch.object(torch._inductor.ir.Pointwise, "create", side_effect=AssertionError("a loop was made")):
        outputs = torch.compile(lambda x: quantize(x, E2M1, -1), backend="inductor")(x)
    torch.testing.assert_close(outputs, reference.quantize(x, E2M1, -1), rtol=0, atol=0)


def test_every_op_with_a_lowering_is_reported():
    """The report's question has an answer for each op, and an unknown one is not claimed."""
    arguments = {"estimator_mask": ("midrise4", "trust"), "scale_gradient": ("e2m1", "dge")}
    for name in LOWERINGS:
        default = (None,) if "outliers" in name or name in ("mask_gradient", "mm_8bit") else ("e2m1",)
        assert cuda_provider(name, *arguments.get(name, default)) == ("triton (inductor)", "")
    assert cuda_provider("quantized_mm")[0] == "reference"
    assert cuda_provider("scale_gradient", "midrise8", "dge") == (
        "reference",
        "its slope takes 265 operations, more than 128",
    )


@compiled
def test_division_is_exact_in_ptx(generate):
    """An approximate division changes scales in the last place; nothing flushes subnormal numbers."""
    _, (kernel,) = generate(lambda x: quantize(x, E2M1, -1), torch.randn(37, 254))
    ptx = kernel.ptx()
    assert "div.rn.f32" in ptx or "div.rn.f64" in ptx  # torch 2.11 has no float32 one to ask for
    assert "div.full" not in ptx
    assert "div.approx" not in ptx
    assert ".ftz" not in ptx


@compiled
def test_nested_scales_are_decoded_once(generate):
    """Not once per element, nor by the op's own kernel, which waits for the card; codes are looked up in a table."""
    codes, nested = (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((37, 128), (148,)))

    def decode(codes, nested, scales, mean):
        row = dequantize(nested, scales, "dynamic8 block64 absmax_bnb", -1, 148, torch.float32) + mean
        return dequantize(codes, row.view(37, 4), "nf4 block64 absmax_bnb", -1, 256, torch.bfloat16)

    _, kernels = generate(decode, codes, nested, torch.ones(3), torch.ones(()))
    assert len(kernels) == 2
    assert all("tl.where" not in kernel.source for kernel in kernels)


@compiled
def test_decoding_keeps_subnormal_numbers_in_ptx(generate):
    """Small floats are decoded through float32's subnormal numbers, which flushing would lose."""
    codes, scales = reference.quantize(torch.randn(37, 254), E2M1, -1)
    _, (kernel,) = generate(lambda c, s: dequantize(c, s, E2M1, -1, 254, torch.float32), codes, scales)
    assert ".ftz" not in kernel.ptx()


# --- numerics in the interpreter ----------------------------------------------------------------------------

#: One of each way to encode and pack: thresholds (4, 3 bits), uniform grids with and without zero, code books (sorted,
#: and unsorted with two zeros); 1, 2, 4 and 8 bits a code.
FORMATS = ["e2m1", "e3m0", "midrise4", "int8", "midrise2", "midrise1", "int3", "nf4", "fp4bnb"]
GRANULARITIES = ["tensor", "block16", "block5", "block3x3"]


@pytest.mark.slow
def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


def assert_quantizes_as_the_reference(generate, texts: list[str], xs: list[torch.Tensor], axis: int, **options):
    """Codes and scales of all ``texts`` from one compiled graph, bit for bit."""
    outputs, kernels = generate(
        lambda *xs: [quantize(x, t, axis) for x, t in zip(xs, texts, strict=True)], *xs, **options
    )
    assert kernels
    for text, x, (codes, scales) in zip(texts, xs, outputs, strict=True):
        expected_codes, expected_scales = reference.quantize(x, text, axis)
        torch.testing.assert_close(
            scales, expected_scales, rtol=0, atol=0, equal_nan=True, msg=lambda m, t=text: f"{t}: {m}"
        )
        torch.testing.assert_close(codes, expected_codes, rtol=0, atol=0, msg=lambda m, t=text: f"{t}: {m}")


@interpreted
def test_interpreted_8bit_codes(generate):
    """Every way to round to a level: arithmetic with and without subnormals, uniform grids, by code; sign of zero."""
    texts = [
        "e2m1",
        "midrise4",
        "int4",
        "e3m0",
        "e1m2",
        "e2m1 row absmax half_up",
        "midrise2",
        "midrise7",
        "midrise8",
        "midrise8 row absmax half_up",
    ]
    xs = [rows_of_everything(19, 40, Quantizer.parse(text).format) for text in texts]
    quantize_8bit = torch.ops.qcompile.quantize_8bit
    # Something to fuse with that no release of torch folds away, as 2.14 does with x * 1.
    outputs, kernels = generate(
        lambda *xs: [quantize_8bit(x.clamp(max=float("inf")), t, False) for x, t in zip(xs, texts, strict=True)], *xs
    )
    assert kernels
    for text, x, (codes, scales, stored) in zip(texts, xs, outputs, strict=True):
        expected = reference.quantize_8bit(x, text, False)
        assert torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8)), text
        torch.testing.assert_close(scales, expected[1], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(stored, expected[2]), text


@interpreted
@pytest.mark.parametrize("size", [1, 16, 144])
def test_interpreted_counts_of_bits(generate, size):
    """All bytes there are, a row of ones and one of zeros, in one kernel with what makes an offset of the counts."""
    codes = torch.arange(37 * size).view(37, size).to(torch.uint8)
    codes[0], codes[1] = 255, 0
    got, kernels = generate(lambda codes: torch.ops.qcompile.count_bits(codes) * -0.5 + 4.0, codes)
    assert len(kernels) == 1
    bits = codes[..., None] >> torch.arange(8) & 1
    assert torch.equal(got, bits.sum((1, 2))[:, None] * -0.5 + 4.0)


@interpreted
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (37, 45), (16, 64)])
def test_interpreted_codes_of_the_transpose(generate, rows, size):
    """Rows and columns that leave half a byte, in one kernel; what lies beyond the last row is 0."""
    codes = torch.randint(0, 256, (rows, (size + 1) // 2), dtype=torch.uint8)
    got, kernels = generate(lambda codes: torch.ops.qcompile.transpose_codes(codes, size) + 0, codes)
    assert len(kernels) == 1
    assert torch.equal(got, reference.transpose_codes(codes, size))


@interpreted
@pytest.mark.parametrize("rounding", ["even", "half_up"])
def test_interpreted_formats(generate, rounding):
    """Threshold, tie, sign, saturation or padding arithmetic that is off by one bit in any grid; odd K."""
    texts = [f"{name} row absmax {rounding}" for name in FORMATS]
    xs = [rows_of_everything(19, 37, Quantizer.parse(text).format) for text in texts]
    assert_quantizes_as_the_reference(generate, texts, xs, -1)


@interpreted
@pytest.mark.parametrize("axis", [0, 1])
def test_interpreted_granularities_and_scale_rules(generate, axis):
    """Group indices, short last blocks and tiles, and the integer arithmetic of power-of-two scales."""
    texts = [f"{name} {kind} absmax" for kind in GRANULARITIES for name in ("e2m1",)]
    texts += ["e2m1 row absmax_pow2", "midrise4 block4 absmax_pow2 half_up", "e2m1 block16 e8m0", "e3m0 block5x5 e8m0"]
    xs = [rows_of_everything(19, 38, Quantizer.parse(text).format) for text in texts]
    assert_quantizes_as_the_reference(generate, texts, xs, axis)


@interpreted
@pytest.mark.parametrize("axis", [-1, 0])
def test_interpreted_codes_computed_again(generate, axis):
    """Equal to those of the search, outliers and cast included. (Their residuals are exact here: the interpreter does
    not round to E4M3.)
    """
    x = torch.randint(-6, 7, (19, 40)).float()
    x[:, :4], x[:, 4:8], x[3], x[5] = 6.0, -6.0, 0.0, x[5] * 2.0**-20
    x[7, 8:11], x[9, 11:14] = torch.tensor([8.0, 12.0, -20.0]), torch.tensor([-10.0, 64.0, 14.0])
    x = x.movedim(-1, axis).contiguous()
    codes, _, bounds = reference.quantize_compensated(x, COMPENSATED_OPERAND, axis)
    encode = torch.ops.qcompile.encode_compensated
    again, kernels = generate(lambda x: encode(x.half() * 1, bounds, COMPENSATED_OPERAND, axis), x)
    assert kernels
    assert torch.equal(again, codes)


SWIGLU = "neg(a); exp(%0); add(%1, 1.0); div(a, %2); round(%3) float16; mul(%4, b) float16"
GELU = "mul(a, 0.5); mul(a, 0.7071067811865476); erf(%1); add(%2, 1.0); mul(%0, %3) float16"


@interpreted
@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda a, b, c, d: F.silu(a) * b, SWIGLU),
        (lambda a, b, c, d: F.gelu(a), GELU),
        (lambda a, b, c, d: torch.sigmoid(a) / c, "sigmoid(a); div(%0, c) float16"),
        (lambda a, b, c, d: (a * d).half() - b, "mul(a, d) float16; sub(%0, b) float16"),
    ],
    ids=["swiglu", "gelu", "a weight", "a factor of each row"],
)
def test_interpreted_producers_compute_what_inductor_does(generate, monkeypatch, function, text):
    """Codes, scales and bounds are those of what Inductor's kernel would have written; and each program quantizes
    several groups of rows, by way of one slot. (The interpreter truncates to bfloat16 in Inductor's kernel.)
    """
    a, b = (rows_of_everything(21, 150, Quantizer.parse(E2M1).format).half() for _ in range(2))
    a, c, d = a[:, 1:140], (torch.rand(139) + 0.5).half(), torch.rand(21, 1) + 0.5
    inputs = [a, b[:, :139] * 2.0**-8, c, d]
    x, kernels = generate(function, *inputs)
    assert kernels
    for name, value in (("RESIDENT_WARPS", 1), ("processors", lambda device: 1)):
        monkeypatch.setattr(triton_outliers, name, value)
    read = [x if f"{name}," in text or f"{name})" in text else None for name, x in zip(INPUTS, inputs, strict=True)]
    actual = triton_outliers.quantize_produced(*read, text, COMPENSATED_OPERAND)
    expected = triton_outliers.quantize_compensated(x, COMPENSATED_OPERAND, -1)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1:], expected[1:], rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("size", [112, 139])
def test_interpreted_producers_read_halves_of_one_product(generate, size):
    """Gate and up of experts, as Inductor hands them over: rows of twice the width, NaN and junk in some of them."""
    both = torch.cat([rows_of_everything(21, size, Quantizer.parse(E2M1).format) for _ in range(2)], 1).half()
    both[-3:] = torch.full((3, 2 * size), torch.nan)  # beyond the last group
    x, kernels = generate(lambda both: F.silu(both[:, :size]) * both[:, size:], both)
    assert kernels
    actual = triton_outliers.quantize_produced(*both.chunk(2, -1), None, None, SWIGLU, COMPENSATED_OPERAND)
    expected = triton_outliers.quantize_compensated(x, COMPENSATED_OPERAND, -1)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1:], expected[1:], rtol=0, atol=0, equal_nan=True)
    assert actual[1][-3:].isnan().all()


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"round"}))
def test_producers_are_printed_as_inductor_prints_them(name):
    """Another function of the same meaning would differ in the last bit."""
    names = {"div": "truediv"}
    operation, given = getattr(TritonOverrides, names.get(name, name)), ("x", "y")
    printed = OPERATIONS[name].triton
    assert operation(*given[: printed.count("{")]) == printed.format(*given)


def test_what_producers_say():
    producer = Producer.parse(SWIGLU)
    assert str(producer) == SWIGLU
    assert producer.dtype == torch.float16
    assert not producer.contracted
    assert Producer.parse("mul(a, b) float16; round(%0); neg(%1); add(2.0, %2)").contracted
    assert not Producer.parse("mul(a, b); div(%0, 2.0); add(%1, 1.0)").contracted
    gate, up = torch.randn(2, 5, 7).half()
    assert torch.equal(producer.produced((gate, up)), F.silu(gate) * up)
    for text in ("tan(a)", "mul(a, b", ""):
        with pytest.raises(ValueError, match="is no step of a producer; operations are neg, add, "):
            Producer.parse(text)


def test_producers_have_kernels_of_their_own():
    """Triton tells constants of kernels apart by their keys, in memory and on disk."""
    first, second = device_producer(SWIGLU), device_producer(GELU)
    assert first is device_producer(SWIGLU)
    assert first.cache_key != second.cache_key


@interpreted
def test_interpreted_casts_are_rounded_before_they_are_quantized(generate):
    """Inductor drops the rounding of a cast inside a kernel; a weight under autocast would have other codes in the
    backward, whose kernel reads the cast from memory, than in the forward. (The interpreter truncates to bfloat16.)
    """
    x, dtype = torch.randn(5, 64), torch.float16
    outputs, kernels = generate(
        lambda x: (quantize(x.to(dtype), E2M1, -1), torch.ops.qcompile.quantize_8bit(x.to(dtype) * 1, E2M1, False)), x
    )
    (codes, scales), (codes_8bit, scales_8bit, _) = outputs
    expected = reference.quantize(x.to(dtype), E2M1, -1)
    assert kernels
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
    expected = reference.quantize_8bit(x.to(dtype), E2M1, False)
    assert torch.equal(codes_8bit.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scales_8bit, expected[1])


@interpreted
def test_interpreted_dynamic_sizes(generate):
    """The guard at the end of a row when it is unknown whether the last byte is full."""
    x = rows_of_everything(19, 37, Quantizer.parse(E2M1).format)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    assert_quantizes_as_the_reference(generate, [E2M1], [x], -1, dynamic=None)


@interpreted
def test_interpreted_dequantize(generate):
    """Every code of every format, −0 and NaN scales included, every granularity, and the axis put back."""
    cases = [(f"{name} row absmax", -1) for name in FORMATS]
    cases += [(f"e2m1 {kind} absmax", axis) for kind in GRANULARITIES for axis in (0, -1)]
    cases += [("midrise4 block4 absmax_pow2", 0), ("e2m1 block16 e8m0", -1), ("dynamic8 block16 absmax_bnb", -1)]
    shape, stored = (19, 37), []
    for text, axis in cases:
        x = rows_of_everything(*shape, Quantizer.parse(text).format)
        stored.extend(reference.quantize(x, text, axis))

    def decode_all(*stored):
        pairs = zip(stored[::2], stored[1::2], cases, strict=True)
        return [dequantize(c, s, text, axis, shape[axis], torch.float32) for c, s, (text, axis) in pairs]

    outputs, _ = generate(decode_all, *stored)
    for got, codes, scales, (text, axis) in zip(outputs, stored[::2], stored[1::2], cases, strict=True):
        expected = reference.dequantize(codes, scales, text, axis, shape[axis], torch.float32)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m, t=text: f"{t}: {m}")
        assert torch.equal(got.signbit() | got.isnan(), expected.signbit() | expected.isnan()), text


@interpreted
def test_interpreted_estimators(generate):
    """Masks bit for bit (E8M0 scales leave elements outside the grid), slopes to float32 accuracy."""
    ops = torch.ops.qcompile
    cases = [
        (f"{name} row {rule}", mask)
        for name in ("e2m1", "midrise4", "e3m0")
        for rule in ("absmax", "e8m0")
        for mask in ("clip", "trust")
    ]
    slopes = ["e2m1 row absmax", "midrise4 tensor absmax", "e1m2 row e8m0"]
    x = torch.randn(19, 37) * torch.logspace(-3, 3, 19)[:, None]
    finite = x.clone()
    x[3, 5] = float("nan")
    grad, dummy = torch.randn(19, 37), torch.ones(19, 1)
    scales = [reference.quantize(finite, text, -1)[1] for text in slopes]  # a slope is taken at x over its scale

    def all_of_them(x, finite, grad, scales):
        masks = [ops.estimator_mask(x, dummy, text, mask, -1) for text, mask in cases]
        masked = [ops.mask_gradient(grad, mask, -1) for mask in masks]
        scaled = [ops.scale_gradient(grad, finite, s, t, "dge", 1) for t, s in zip(slopes, scales, strict=True)]
        return masks, masked, scaled

    (masks, masked, scaled), _ = generate(all_of_them, x, finite, grad, scales)
    for (text, name), mask, kept in zip(cases, masks, masked, strict=True):
        expected = estimate_reference.estimator_mask(x, dummy, text, name, -1)
        assert torch.equal(mask, expected), (text, name)
        assert torch.equal(kept, estimate_reference.mask_gradient(grad, expected, -1))
    for text, got in zip(slopes, scaled, strict=True):
        expected = estimate_reference.scale_gradient(grad, finite, dummy, text, "dge", 1)
        # y is off by two units in the last place, relative to a bin up to 12 times as much, and the slope |v|^-0.8 is
        # steepest where the cap takes over, at |v| = 0.034: 0.8 · 2 · 2^-23 · 12 / 0.034.
        torch.testing.assert_close(got, expected, rtol=7e-5, atol=0)


CHOOSING = {
    "scales": ["e2m1 block12 e4m3_46", "e2m1 block5 e4m3_46_mae half_up", "e2m1 block3x3 e4m3_46"],
    "grids": ["e2m1/int4 block12 e4m3", "int4/e3m0 block5 absmax half_up"],
}


@interpreted
@pytest.mark.parametrize(("kind", "dtype"), [("scales", torch.float32), ("grids", torch.bfloat16)])
def test_interpreted_choices_of_blocks(generate, kind, dtype):
    """Codes and scales, decoding, masks and slopes; short last blocks, values that are not finite."""
    ops, texts = torch.ops.qcompile, CHOOSING[kind]
    wholes = [torch.tensor(0.011) if Quantizer.parse(text).scale.two_level else None for text in texts]
    xs = [rows_of_everything(11, 22, Quantizer.parse(text).candidates[0].grid) for text in texts]
    for x in xs:
        x[5] *= 1e3  # the interpreter reads subnormal bfloat16 numbers wrongly
    xs = [x.to(dtype) for x in xs]
    finite = [x[9:].clone() for x in xs]
    coded, decoded = (
        [reference.quantize(x, text, -1, whole) for x, text, whole in zip(of, texts, wholes, strict=True)]
        for of in (xs, finite)
    )
    grad = torch.randn(2, 22)

    def all_of_them(xs, finite, coded, decoded):
        out = []
        for i, (text, whole) in enumerate(zip(texts, wholes, strict=True)):
            out += [*quantize(xs[i], text, -1, whole), dequantize(*decoded[i], text, -1, 22, torch.float32, whole)]
        mask = ops.estimator_mask(xs[0], coded[0][1], texts[0], "trust(t=0.3)", -1, wholes[0])
        slope = ops.scale_gradient(grad, finite[0], decoded[0][1], texts[0], "dge", -1, wholes[0])
        return out, mask, slope

    (outputs, mask, slope), kernels = generate(all_of_them, xs, finite, coded, decoded)
    assert kernels
    for i, (text, whole) in enumerate(zip(texts, wholes, strict=True)):
        codes, scales, dense = outputs[3 * i : 3 * i + 3]
        torch.testing.assert_close(scales.float(), coded[i][1].float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes, coded[i][0]), text
        # The interpreter converts the NaN of E4M3 to a number.
        assert torch.equal(dense, reference.dequantize(*decoded[i], text, -1, 22, torch.float32, whole)), text
    arguments = coded[0][1], texts[0], "trust(t=0.3)", -1, wholes[0]
    assert torch.equal(mask, estimate_reference.estimator_mask(xs[0], *arguments))
    expected = estimate_reference.scale_gradient(grad, finite[0], decoded[0][1], texts[0], "dge", -1, wholes[0])
    torch.testing.assert_close(slope, expected, rtol=7e-5, atol=0)  # as in test_interpreted_estimators


DRAWN = [
    "e2m1/int4 block12 e4m3 stochastic",
    "e3m0 row stochastic",
    "int4 row stochastic",
    "midrise4 block16 e4m3_eden eden",
]


@interpreted
@pytest.mark.parametrize("axis", [0, -1])
def test_interpreted_rounding_by_chance(generate, axis):
    """The same draws as everywhere, from a seed whose hash overflows int32; scales corrected by chunks, the last of
    which is short.
    """
    x, seed, whole = torch.randn(4, 149), torch.tensor([2**31 - 2]), torch.tensor(0.003)
    x = x if axis else x.T.contiguous()
    wholes = [whole if Quantizer.parse(text).scale.two_level else None for text in DRAWN]

    def all_of_them(x, seed):
        return [quantize(x, text, axis, of, seed) for text, of in zip(DRAWN, wholes, strict=True)]

    outputs, kernels = generate(all_of_them, x, seed)
    assert kernels
    for text, of, (codes, scales) in zip(DRAWN, wholes, outputs, strict=True):
        expected, expected_scales = reference.quantize(x, text, axis, of, seed)
        assert torch.equal(codes, expected), text
        assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8)), text


@interpreted
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_interpreted_outliers(generate, per):
    """Clamped tensor, residual and positions, and the tensor they restore; axis 0."""
    clamp = f"occ(alpha=0.9,per={per})"
    x = torch.randn(29, 17)
    ops = torch.ops.qcompile

    def there_and_back(x, clamp_outliers, restore_outliers):
        clamped, values, positions = clamp_outliers(x, clamp, 0)
        return clamped, values, positions, restore_outliers(clamped * 2, values, positions, clamp, 0)

    outputs, _ = generate(lambda x: there_and_back(x, ops.clamp_outliers, ops.restore_outliers), x)
    expected = there_and_back(x, outliers_reference.clamp_outliers, outliers_reference.restore_outliers)
    # The op's own kernel, which takes whole tensors, lists the residual in another order.
    for i in range(4) if per == "row" else (0, 3):
        assert torch.equal(outputs[i], expected[i])


@interpreted
def test_interpreted_outlier_columns(generate):
    """The rest, the columns and the tensor they restore; the split is torch's own operations, restoring is ours."""
    spec = OutlierColumns(threshold=2.0, most=5)
    x = torch.randn(29, 17)

    def there_and_back(x, restore_outliers):
        taken = take_columns(x, spec, 0)
        return *taken[:3], restore_outliers(taken.rest * 2, taken.values, taken.positions, str(spec), 0)

    outputs, _ = generate(lambda x: there_and_back(x, torch.ops.qcompile.restore_outliers), x)
    expected = there_and_back(x, outliers_reference.restore_outliers)
    assert 0 < (expected[1] != 0).any(0).sum() <= 5
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(outputs, expected, strict=True))
