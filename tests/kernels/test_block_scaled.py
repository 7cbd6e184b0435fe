"""The product on FP4 tensor cores without a card: its definition, its numerics in the interpreter, its machine code,
and when `lower` chooses it.

Every product and sum is exact, so results are compared bit for bit. Triton's interpreter knows no ``dot_scaled``: the
tests give it one. It has to be chosen before Triton is imported: the tests named ``test_interpreted_…`` run in a
process of their own, which :func:`test_numerics_under_the_interpreter` starts. It truncates where it should round to
bfloat16, so outputs are float32 and float16 there.
"""

from __future__ import annotations

import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402
from triton.language.semantic import TritonSemantic  # noqa: E402
from triton.runtime.interpreter import TensorHandle  # noqa: E402

import qcompile.kernels  # noqa: E402, F401
from qcompile import compat  # noqa: E402
from qcompile.ir.ops import global_scale_of  # noqa: E402
from qcompile.kernels.matmul import block_scaled, providers, reference  # noqa: E402
from qcompile.recipes import RECIPES  # noqa: E402

from ..passes.harness import assert_same, compile_and_run, fp4  # noqa: E402
from .block_scaled_operands import MXFP4, NVFP4, arguments, exact, operand  # noqa: E402
from .harness import compiled, interpreted, run_interpreted  # noqa: E402

BOTH = pytest.mark.parametrize("quantizer", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
#: Tiles that the shapes below do not fill, with fewer elements for the interpreter to go through.
TILE = replace(block_scaled.config_for((9, 0)), block_k=128, group_m=2)
mm_block_scaled = torch.ops.qcompile.mm_block_scaled


# --- definition -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 33), (37, 3, 160), (4, 6, 0)])
def test_the_reference_multiplies_what_is_decoded(shape, quantizer):
    """Last blocks that are short, half bytes, nothing at all; both global scales and a bias."""
    m, n, k = shape
    a, b, bias = operand(m, k, quantizer), operand(n, k, quantizer), torch.randint(-3, 4, (n,)).half()
    for shift in (None, bias):
        got = mm_block_scaled(*arguments(a, b), FP32, shift)
        torch.testing.assert_close(got.double(), exact(a, b, k, quantizer, shift), rtol=0, atol=0)


@BOTH
def test_operands_of_quantize(quantizer):
    """Codes and scales as `quantize` stores them; a NaN spoils its own block's row, an infinity too."""
    x, w = torch.randn(9, 80), torch.randn(6, 80)
    if not quantizer.scale.two_level:  # there NaN reaches the global scale
        x[2, 70], x[4, 3] = float("nan"), float("inf")
    operands = []
    for matrix in (x, w):
        scale = global_scale_of(matrix, quantizer)
        operands.append([*torch.ops.qcompile.quantize(matrix, str(quantizer), -1, scale), scale])
    got = mm_block_scaled(*arguments(*operands), FP32)
    expected = exact(*operands, 80, quantizer).float()
    # 80 additions in another order; factors that are rounded before them, after them in float64.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert (got.isnan().sum(1) > 0).sum() == (0 if quantizer.scale.two_level else 2)


def test_scales_that_no_tensor_core_takes_are_refused():
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    e8m0, e4m3 = torch.ones(2, 1, dtype=torch.uint8), torch.ones(2, 2).to(torch.float8_e4m3fn)
    for scales in ((torch.ones(2, 1), torch.ones(2, 1)), (e8m0, e4m3)):
        with pytest.raises(ValueError, match=r"takes scales that are both uint8 \(E8M0\) or both float8_e4m3fn; got"):
            mm_block_scaled(codes, codes, *scales, None, None, FP32)


# --- numerics in the interpreter ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


@pytest.fixture
def dot_scaled(monkeypatch):
    """``dot_scaled`` of E2M1 by its definition, in NumPy; FP8 scales are their bits there."""

    def values(codes: np.ndarray, scales) -> np.ndarray:
        """[rows, K] float32 of bytes [rows, K / 2] and scales [rows, K / block]."""
        levels = LEVELS[np.stack([codes & 15, codes >> 4], -1)].reshape(len(codes), -1)
        quantizer = NVFP4 if scales.dtype == tl.float8e4nv else MXFP4
        stored = torch.from_numpy(scales.data.view(np.uint8))
        factors = stored.view(torch.float8_e4m3fn).float() if quantizer is NVFP4 else 2.0 ** (stored.float() - 127)
        return levels * factors.numpy().repeat(quantizer.granularity.size, 1)

    def multiply(self, left, left_scales, left_format, right, right_scales, right_format, sum_, *rest):
        assert left_format == right_format == "e2m1"
        product = values(left.handle.data, left_scales.handle) @ values(right.handle.data.T, right_scales.handle).T
        return tl.tensor(TensorHandle(sum_.handle.data + product, tl.float32), sum_.type)

    monkeypatch.setattr(TritonSemantic, "dot_scaled", multiply)


@interpreted
@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 33), (130, 129, 96), (131, 257, 464), (5, 130, 16)])
def test_interpreted_kernel(dot_scaled, shape, quantizer):
    """Tiles that hang over every edge, several along K and N, rows of any number of bytes and blocks."""
    m, n, k = shape
    a, b = operand(m, k, quantizer), operand(n, k, quantizer)
    wide, bias = replace(TILE, block_n=256, block_k=256), torch.randint(-3, 4, (n,)).half()
    for config, dtype, shift in ((TILE, FP32, None), (wide, FP16, bias)):
        got = block_scaled.mm_block_scaled(*arguments(a, b), dtype, shift, config=config)
        expected = exact(a, b, k, quantizer, shift).to(dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@interpreted
@BOTH
def test_interpreted_operands_with_strides(dot_scaled, quantizer):
    """Views, an address that TMA does not take, global scales on one side only."""
    a, b = operand(9, 128, quantizer), operand(12, 128, quantizer)
    shifted = torch.empty(9 * 64 + 1, dtype=torch.uint8)[1:].view(9, 64).copy_(a[0])
    strided = b[0].repeat_interleave(2, 1)[:, ::2]
    expected = exact(a, b, 128, quantizer)
    if quantizer.scale.two_level:
        expected, b[2] = expected / b[2], None
    got = block_scaled.mm_block_scaled(shifted, strided, *arguments(a, b)[2:], FP32, config=TILE)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0)


# --- machine code ---------------------------------------------------------------------------------------------------


def compile_kernel(quantizer, capability: int, aligned: bool = True) -> CompiledKernel:
    """The kernel for a card that is not there; ``aligned``: the number of scales is a multiple of 64."""
    config = block_scaled.config_for(divmod(capability, 10))
    scales = "*fp8e4nv" if quantizer.scale.two_level else "*u8"
    types = {name: f"tensordesc<u8[{block},{config.block_k // 2}]>" for name, block in _blocks(config)}
    types |= {"out": "*bf16", "scale_a": scales, "scale_b": scales}
    types |= {"bias": "*bf16", **dict.fromkeys(("m", "n", "row_bytes", "chunks"), "i32")}
    constants = {name: getattr(config, name) for name in ("block_m", "block_n", "block_k", "group_m")}
    constants |= {"block": quantizer.granularity.size}
    both = dict.fromkeys(("global_a", "global_b"))
    if quantizer.scale.two_level:
        types |= dict.fromkeys(both, "*fp32")
    else:
        constants |= both
    signature = {name: types.get(name, "constexpr") for name in block_scaled.kernel.arg_names}
    multiples = [i for i, (name, kind) in enumerate(signature.items()) if re.match(r"\*|i32", kind)]
    if not aligned:
        multiples.remove(list(signature).index("chunks"))
    source = ASTSource(block_scaled.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in multiples})
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _blocks(config) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("a", config.block_m), ("b", config.block_n)


@compiled
@BOTH
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("capability", [100, 103])
def test_fp4_tensor_cores_read_codes_and_scales(capability, aligned, quantizer):
    """Codes by TMA, scales by asynchronous copies and then on to tensor memory, none of them through registers. For all
    three products: what dgrad and wgrad read is stored along the axis that they contract, or was transposed before.
    """
    built = compile_kernel(quantizer, capability, aligned)
    ptx = built.asm["ptx"]
    # PTX has two names for the block size, of which Triton 3.8 writes the second.
    kind = r"mxf4nvf4\.block_scale\.(scale_vec::4X|block16)"
    if quantizer is MXFP4:
        kind = r"mxf4\.block_scale\.(scale_vec::2X|block32)"
    (instruction,) = set(re.findall(r"tcgen05\.mma\.cta_group::1\.kind::(\S+)", ptx))
    assert re.fullmatch(kind, instruction)
    assert "cp.async.bulk.tensor.2d" in ptx
    assert "cp.async.ca.shared.global" in ptx
    assert "tcgen05.cp" in ptx
    assert not re.search(r"tcgen05\.st\S*\.x(4|8|16|32)\.", ptx)  # scales out of registers; the zeroed sum is wider
    assert built.metadata.shared <= 227 * 1024
    assert built.metadata.tmem_size <= 512


@compiled
@BOTH
def test_fp4_tensor_cores_of_compute_capability_12(quantizer):
    """Which have no tensor memory and 99 KiB of shared memory for a program."""
    built = compile_kernel(quantizer, 120)
    kind = "4X.f32.e2m1.e2m1.f32.ue4m3" if quantizer is NVFP4 else "2X.f32.e2m1.e2m1.f32.ue8m0"
    assert f"kind::mxf4nvf4.block_scale.scale_vec::{kind}" in built.asm["ptx"]
    assert built.metadata.shared <= 99 * 1024


@compiled
def test_hopper_widens_mxfp4_to_bf16():
    """So that the kernel can be checked there (tests/gpu)."""
    built = compile_kernel(MXFP4, 90)
    assert re.search(r"wgmma\.mma_async\S*\.bf16\.bf16", built.asm["ptx"])
    assert built.metadata.shared <= 227 * 1024


# --- choice ---------------------------------------------------------------------------------------------------------


PRODUCT = providers.Product((4096, 4096, 4096), (providers.FP4, providers.FP4), BF16, (10, 0))


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({}, "dot_scaled", "dot_scaled is untested on compute capability 10.0"),
        ({"capability": (12, 0), "shape": (7, 5, 3)}, "dot_scaled", "dot_scaled is untested on compute capability 12"),
        (
            {"capability": (12, 1)},
            "reference",
            "dot_scaled: Triton reaches FP4 tensor cores of compute capability 10.0",
        ),
        ({"capability": (9, 0)}, "reference", "dot_scaled: no FP4 tensor cores, which take scales of blocks, before"),
        ({"dtype": torch.float64}, "reference", "dot_scaled: it writes bfloat16, float16 and float32, not float64"),
        ({"shape": (0, 16, 32)}, "reference", "dot_scaled: there is nothing to multiply"),
    ],
)
def test_the_provider_and_why_no_better_one(change, name, reason):
    provider, said = providers.choose(replace(PRODUCT, **change))
    assert provider.name == name
    assert said.startswith(reason)


def test_the_op_chooses_by_its_operands(monkeypatch):
    """What runs on a card follows from the card and the extents, not from what the graph was lowered for."""
    ran = []
    tried = providers.Provider("dot_scaled", lambda *args: ran.append(args), providers.BLOCK_SCALED[0].obstacle)
    monkeypatch.setitem(providers._AS_STORED, providers.FP4, (tried, providers.BLOCK_SCALED[1]))
    a, b, bias = operand(5, 32, MXFP4), operand(7, 32, MXFP4), torch.ones(7)
    for capability, times in (((9, 0), 0), ((10, 0), 1)):
        monkeypatch.setattr(providers, "_capability", lambda device, capability=capability: capability)
        providers._chosen.cache_clear()
        got = providers.mm_block_scaled(*arguments(a, b), FP32, bias)
        assert len(ran) == times
        assert got is None or torch.equal(got, reference.mm_block_scaled(*arguments(a, b), FP32, bias))
    providers._chosen.cache_clear()


def on_card(capability: tuple[int, int], recipe=None, shape=(9, 80, 48), dynamic=None, **options):
    """Results and report rows of a layer of ``shape`` (tokens, inputs, outputs)."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    tokens, inputs, outputs = shape
    model, x = nn.Linear(inputs, outputs), torch.randn(tokens, inputs, requires_grad=True)
    recipe = fp4(**options) if recipe is None else recipe.override(options)
    with mock.patch.object(compat, "tensor_core_capability", return_value=capability):
        result = compile_and_run(model, x, recipe=recipe, dynamic=dynamic)
    return result, {row["role"]: (row["provider"], row["reason"]) for row in result.gemms}


UNTESTED = ("dot_scaled", "dot_scaled is untested on compute capability 10.0")
#: Recipes whose products are all of E2M1 with scales that FP4 tensor cores read.
IN_FP4 = {
    "qcompile_quartet2": {},
    "qcompile_nvfp4": {},
    "qcompile_tetrajet2": {},
    "qcompile_mxfp4": {"variant": "full"},
}


@pytest.mark.parametrize("shape", [(32, 80, 48), (8, 37, 45)], ids=str)
@pytest.mark.parametrize("name", IN_FP4)
def test_all_three_products_of_a_recipe(name, shape):
    """Scales by whichever rule, along the axis of each product; those of squares for every row, and squares that are
    read transposed. Extents that fill neither blocks nor bytes. The report says what has never run.
    """
    result, rows = on_card((10, 0), RECIPES[name], shape, **IN_FP4[name])
    assert rows == dict.fromkeys(("fprop", "dgrad", "wgrad"), UNTESTED)
    assert result.count("transpose_codes", "post_grad_merge_quantize") == (1 if name == "qcompile_nvfp4" else 0)
    decoded, rows = on_card((9, 0), RECIPES[name], shape, **IN_FP4[name])
    assert {provider for provider, _ in rows.values()} == {"dequantize + aten"}
    assert all("no FP4 tensor cores, which take scales of blocks" in reason for _, reason in rows.values())
    assert_same(result.outputs, decoded.outputs)
    assert_same(result.gradients, decoded.gradients)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("text", ["e2m1 block16x16 e4m3", "e2m1 block32x32 e8m0"])
def test_squares_are_read_along_either_axis(text, dynamic):
    """Of every operand, so that wgrad transposes X, whose number of tokens may not be fixed."""
    options = {"activation": text, "weight": text, "gradient": text}
    result, rows = on_card((10, 0), shape=(19, 37, 45), dynamic=dynamic, **options)
    assert rows == dict.fromkeys(("fprop", "dgrad", "wgrad"), UNTESTED)
    assert result.count("transpose_codes", "post_grad_merge_quantize") == 2
    decoded, _ = on_card((9, 0), shape=(19, 37, 45), dynamic=dynamic, **options)
    assert_same(result.outputs, decoded.outputs)
    assert_same(result.gradients, decoded.gradients)


@pytest.mark.parametrize("text", ["e2m1 block32 e8m0", "e2m1 block16 e4m3"])
def test_block_scaled_operands_are_multiplied_as_they_are_stored(text):
    """On compute capability 10.0; the gradients, which contract along another axis, and older cards decode."""
    result, rows = on_card((10, 0), activation=text, weight=text)
    assert rows["fprop"] == ("dot_scaled", "dot_scaled is untested on compute capability 10.0")
    assert rows["wgrad"][0] == "dequantize + aten"
    assert result.program("post_grad_merge_quantize").count("qcompile.mm_block_scaled.default(") == 1
    decoded, rows = on_card((9, 0), activation=text, weight=text)
    no_fp4 = "dot_scaled: no FP4 tensor cores, which take scales of blocks, before compute capability 10.0"
    assert rows["fprop"] == ("dequantize + aten", no_fp4)
    assert_same(result.outputs, decoded.outputs)
    assert_same(result.gradients, decoded.gradients)


@pytest.mark.parametrize("text", ["e2m1 block32 e8m0", "e2m1 block16 e4m3"])
def test_operands_that_would_have_to_be_transposed_decode(text):
    """Gradients with such scales too: blocks of the weight and of the activations lie across the contraction."""
    result, rows = on_card((10, 0), activation=text, weight=text, gradient=text)
    for role in ("dgrad", "wgrad"):
        assert rows[role] == ("dequantize + aten", f"scales {text.removeprefix('e2m1 ')} change along the contraction")
    decoded, _ = on_card((9, 0), activation=text, weight=text, gradient=text)
    assert_same(result.gradients, decoded.gradients)


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ({"activation": "e2m1 block32 e8m0", "weight": "e2m1 block16 e4m3"}, "scales block32 e8m0 change along"),
        ({"activation": "e2m1 block16 e8m0", "weight": "e2m1 block16 e8m0"}, "scales block16 e8m0 change along"),
        ({"activation": "e2m1 block16 e5m3", "weight": "e2m1 block16 e5m3"}, "scales block16 e5m3 change along"),
        ({"activation": "e2m1 block32 e5m3", "weight": "e2m1 block32 e5m3"}, "scales block32 e5m3 change along"),
        ({"activation": "e2m1 block16 e4m3", "weight": "e2m1 block32x32 e4m3"}, "scales block16 e4m3 change along"),
        ({"activation": "e2m1 block32 e8m0"}, "scales block32 e8m0 change along the contraction"),
        ({"activation": "e1m2 block32 e8m0", "weight": "e1m2 block32 e8m0"}, "scales block32 e8m0 change along"),
        ({"activation": "e2m1 block32 e8m0; ste; occ(alpha=0.9)", "weight": "e2m1 block32 e8m0"}, "scales block32"),
    ],
    ids=str,
)
def test_what_fp4_tensor_cores_do_not_take_decodes(operands, reason):
    """Different scales, blocks of another size, bytes that are no E8M0, other grids, an exact residual of outliers."""
    _, rows = on_card((10, 0), **operands)
    assert rows["fprop"][0] == "dequantize + aten"
    assert rows["fprop"][1].startswith(reason)


def test_rows_stay_on_8bit_tensor_cores():
    """The kernel that is known to run is preferred to one that is not."""
    _, rows = on_card((10, 0), activation="e2m1 row", weight="e2m1 row")
    assert rows["fprop"][0] in ("cublaslt", "triton")
    assert "native FP4 would need a scale for every 16 or 32 elements" in rows["fprop"][1]


@pytest.mark.inductor
def test_inductor_calls_the_ops_own_kernel(fresh_dynamo):
    """Codes and scales of both kinds pass through a compiled graph, with a number of rows that is not fixed."""
    compiled_product = torch.compile(lambda *x: torch.relu(mm_block_scaled(*x, FP32)), dynamic=True, fullgraph=True)
    for m in (5, 9):
        a, b = operand(m, 64, NVFP4), operand(7, 64, NVFP4)
        expected = torch.relu(exact(a, b, 64, NVFP4)).float()
        torch.testing.assert_close(compiled_product(*arguments(a, b)), expected, rtol=0, atol=0)
