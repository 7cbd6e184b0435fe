"""The product in Gluon, compiled for Hopper without a GPU: its instructions, registers and shared memory.

Gluon has no interpreter: what the kernel computes is tested on the card only (``tests/gpu/test_gluon_matmul.py``).
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from torch._inductor import config as inductor_config  # noqa: E402
from torch._inductor.lowering import lowerings, register_lowering  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from qcompile.kernels.matmul import gluon, inductor, providers, reference  # noqa: E402
from qcompile.kernels.matmul import triton as gemm  # noqa: E402
from qcompile.kernels.matmul.providers import Product, choose  # noqa: E402

from .harness import ClaimedDriver, compiled  # noqa: E402

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BITS = torch.uint8
NAMES = {E4M3: "e4m3", E5M2: "e5m2"}
#: What each type of operands is multiplied by, without its width.
INSTRUCTIONS = {E4M3: "k32.f32.e4m3.e4m3", INT8: "k32.s32.s8.s8", BITS: "k256.s32.b1.b1.and.popc"}
H200 = gemm.Card("NVIDIA H200", (9, 0), 132)


class CompilingDriver(ClaimedDriver):
    def get_current_stream(self, device):
        return 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Triton's, of this module: a kernel is compiled once, whichever tests look at it."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(autouse=True)
def _no_card(monkeypatch, cache):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(triton.runtime.driver, "_active", CompilingDriver())
    monkeypatch.setattr(gluon, "_INTEGER_PTX", {})
    gluon.mm_8bit_kernel.device_caches.clear()


def build(
    config: gluon.Config,
    dtypes,
    dtype=BF16,
    bias=None,
    n: int = 512,
    offsets: tuple[bool, bool] = (False, False),
    m: int = 300,
    groups: int = 0,
    of_rows: bool = False,
) -> CompiledKernel:
    """The kernel as it is launched; with ``groups``, for a contraction in as many, or for rows."""
    a, b = (torch.zeros(rows, 256, dtype=torch.uint8).view(t) for rows, t in zip((m, n), dtypes, strict=True))
    out, one = torch.empty(max(1, 0 if of_rows else groups), m, n, dtype=dtype), torch.ones(1, 1)
    if of_rows:
        b = b.view(torch.uint8).expand(groups, n, 256).contiguous().view(dtypes[1])
    shift = None if bias is None else torch.zeros(max(1, groups), n, dtype=bias)
    summands = [torch.zeros(rows, 1) if given else None for rows, given in zip((m, n), offsets, strict=True)]
    offs = torch.zeros(groups, dtype=torch.int32) if groups else None
    arguments, options = gluon.launch_arguments(config, a, b, out, one, one, shift, *summands, offs=offs)
    return gluon.mm_8bit_kernel.warmup(*arguments, grid=(1,), **options)


def assembler_log(kernel: CompiledKernel, folder) -> str:
    """What ptxas says of the registers, and of products that it had to put in sequence."""
    (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr


#: One in every run, the others by night.
CONFIGS = [
    pytest.param(config, marks=pytest.mark.nightly if i else (), id=str(config))
    for i, config in enumerate(gluon.CONFIGS)
]


@compiled
@pytest.mark.parametrize("dtype", INSTRUCTIONS, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_fits_and_keeps_its_products_in_flight(tmp_path, config, dtype):
    """One instruction as wide as the tile, nothing spilled, no product that waits for the one before."""
    kernel = build(config, (dtype, dtype))
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64\S+)", kernel.asm["ptx"])
    groups = gluon.CONSUMERS.value * (config.block_m // gluon.CONSUMERS.value // 64)
    assert products == [f"m64n{config.block_n}{INSTRUCTIONS[dtype]}"] * groups * 4
    log = assembler_log(kernel, tmp_path)
    assert "0 bytes spill stores" in log
    assert "wgmma" not in log
    assert kernel.metadata.shared <= config.shared_memory() <= gluon.SHARED_MEMORY


@compiled
@pytest.mark.parametrize("config", CONFIGS)
def test_offsets_fit_where_they_should_and_spill_nothing(tmp_path, config):
    """With and without a bias beside; a config that has no room for all takes the rows' offsets at least."""
    for bias, offsets in ((FP32, (True, True)), (None, (True, True)), (None, (True, False))):
        summands = (bias is not None) + offsets[1]
        if config.shared_memory(summands) > gluon.SHARED_MEMORY:
            continue
        kernel = build(config, (INT8, INT8), bias=bias, offsets=offsets)
        log = assembler_log(kernel, tmp_path)
        assert "0 bytes spill stores" in log
        assert "wgmma" not in log
        assert kernel.metadata.shared <= config.shared_memory(summands)
        loads = len(re.findall(r"ld\.global", kernel.asm["ptx"]))
        plain = len(re.findall(r"ld\.global", build(config, (INT8, INT8)).asm["ptx"]))
        assert loads > plain


@compiled
@pytest.mark.parametrize("n", [512, 515], ids=["TMA store", "pointer store"])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_every_output_leaves_without_spilling(tmp_path, dtype, n):
    """With bias; 515 columns of it are no multiple of 16 bytes."""
    (config,) = (c for c in gluon.CONFIGS if c.piece_bytes > 128)
    kernel = build(config, (INT8, INT8), dtype, FP32, n)
    log = assembler_log(kernel, tmp_path)
    assert "0 bytes spill stores" in log
    assert "wgmma" not in log
    assert ("cp.async.bulk.tensor.2d.global.shared::cta" in kernel.asm["ptx"]) == (n == 512)
    assert kernel.metadata.shared <= config.shared_memory(1)


@compiled
@pytest.mark.parametrize("groups", [1, 5, 64])
@pytest.mark.parametrize("config", CONFIGS)
def test_groups_of_rows_keep_their_products_in_flight(tmp_path, config, groups):
    """Nothing spilled, with a bias and without; whole parts of tiles leave by TMA, others by addresses."""
    for bias in (None, BF16):
        if config.shared_memory(bias is not None) > gluon.SHARED_MEMORY:
            continue
        kernel = build(config, (E4M3, E4M3), bias=bias, groups=groups, of_rows=True)
        log = assembler_log(kernel, tmp_path)
        assert "0 bytes spill stores" in log
        assert "wgmma" not in log
        assert "cp.async.bulk.tensor.2d.global.shared::cta" in kernel.asm["ptx"]
        assert "st.global" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= config.shared_memory(bias is not None)


@compiled
@pytest.mark.parametrize("m", [256, 300], ids=["TMA store", "pointer store"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_contraction_in_groups_keeps_its_products_in_flight(tmp_path, config, m):
    """Nothing spilled, though the warps look for each tile's group; a result of 300 rows leaves by addresses, since
    what hangs over its tile would be the next group's.
    """
    kernel = build(config, (E4M3, E4M3), m=m, groups=5)
    log = assembler_log(kernel, tmp_path)
    assert "0 bytes spill stores" in log
    assert "wgmma" not in log
    assert ("cp.async.bulk.tensor.2d.global.shared::cta" in kernel.asm["ptx"]) == (m == 256)
    assert kernel.metadata.shared <= config.shared_memory()


@compiled
@pytest.mark.parametrize("dtypes", [(E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2)], ids=str)
def test_fp8_types_mix(dtypes):
    products = re.findall(r"m64n256k32\.f32\.(\w+)\.(\w+)", build(gluon.CONFIGS[0], dtypes).asm["ptx"])
    assert set(products) == {tuple(NAMES[dtype] for dtype in dtypes)}


@compiled
def test_one_binary_serves_all_extents_and_addresses():
    """Integers are renamed once a type: nothing in the PTX may depend on what its key leaves out."""
    config = gluon.CONFIGS[1]
    for count, dtype in enumerate((INT8, BITS), start=1):
        whole = build(config, (dtype, dtype), n=512).asm["ptx"]
        assert build(config, (dtype, dtype), n=8).asm["ptx"] == whole
        assert len(gluon._INTEGER_PTX) == count


@pytest.mark.parametrize("dtype", [INT8, BITS], ids=str)
def test_renaming_refuses_what_it_does_not_know(dtype):
    product = "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {%r1, %r2}, %rd1, %rd2, p, 1, 1;"
    renamed = f"wgmma.mma_async.sync.aligned.m64n256{INSTRUCTIONS[dtype]} {{%r1, %r2}}, %rd1, %rd2, p;"
    assert gluon.as_integers(f"{product}\n{product}", dtype) == f"{renamed}\n{renamed}"
    for text in ("", product.replace("1, 1;", "1, -1;"), f"{product}\ncvt.rn.e4m3x2.f32"):
        with pytest.raises(ValueError, match="no known form"):
            gluon.as_integers(text, dtype)


def test_what_1bit_products_refuse():
    one, bits = torch.ones(1, 1), torch.zeros(8, 40, dtype=BITS)
    with pytest.raises(ValueError, match="multiple of 128, got 320"):
        gluon.mm_1bit(bits, bits, one, one, BF16)
    with pytest.raises(ValueError, match="eight codes per byte"):
        gluon.mm_1bit(bits.view(INT8), bits, one, one, BF16)


@compiled
def test_integers_are_assembled_by_the_assembler_that_inductor_chooses(monkeypatch):
    """Triton's cache holds PTX for it, which an older one refuses."""
    chosen = []
    monkeypatch.setattr(gluon.compat, "use_torchs_ptxas", lambda: chosen.append(True))
    build(gluon.CONFIGS[0], (INT8, INT8))
    assert chosen


@compiled
def test_an_override_that_triton_ignores_is_an_error(monkeypatch):
    """Products of e4m3 on integers would be wrong without a word."""
    monkeypatch.setattr(gluon, "as_integers", lambda ptx, stored: ptx + "// never assembled")
    monkeypatch.setenv("TRITON_KERNEL_OVERRIDE", "1")
    with pytest.raises(RuntimeError, match="did not assemble"):
        build(gluon.CONFIGS[0], (INT8, INT8))


def test_candidates_fit_and_fill_the_card():
    """A bias needs room of its own, as does an offset; few tiles are cut smaller."""
    large = gemm.Problem(16384, 4096, 4096, INT8, INT8, BF16, H200)
    assert gluon.candidates(large)[0] == gluon.CONFIGS[0]
    assert gluon.candidates(large, 1)[0] == gluon.CONFIGS[1]
    assert all(config.shared_memory(2) <= gluon.SHARED_MEMORY for config in gluon.candidates(large, 2))
    assert gluon.candidates(replace(large, m=512, n=2048))[0].block_n == 128
    bits = gluon.candidates(replace(large, k=512, a_dtype=torch.uint8, b_dtype=torch.uint8))[0]
    assert (bits.block_m, bits.block_n) == (256, 128)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtypes": (E4M3, E4M3), "dtype": FP32}, "gluon: it is used for INT8 only"),
        ({"shape": (7, 4096, 24)}, "gluon: K = 24 is no multiple of 16"),
        ({"capability": (10, 0)}, "gluon: it needs compute capability 9.0"),
        ({}, "gluon: its kernel cannot be imported: no Gluon"),
    ],
)
def test_why_another_provider_runs(monkeypatch, change, reason):
    product = Product((4096, 4096, 4096), (INT8, INT8), BF16, (9, 0))
    assert choose(product)[0].name == "gluon"
    monkeypatch.setattr(providers, "_gluon_error", lambda: "" if change else "no Gluon")
    provider, said = choose(replace(product, **change))
    assert provider.name == "triton"
    assert reason in said


def test_it_refuses_other_dtypes_and_k():
    one, offs = torch.ones(1, 1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="needs a contraction of a multiple of 16, got 17"):
        gluon.mm_8bit_grouped(*torch.zeros(2, 2, 17, dtype=INT8), offs, one, one, BF16)
    with pytest.raises(ValueError, match=r"got torch\.int8 with torch\.float8_e4m3fn"):
        gluon.mm_8bit(torch.zeros(2, 16, dtype=INT8), torch.zeros(2, 16).to(E4M3), one, one, BF16)
    with pytest.raises(ValueError, match="multiple of 16, got 17"):
        gluon.mm_8bit(*torch.zeros(2, 2, 17, dtype=INT8), one, one, BF16)


@compiled
@pytest.mark.parametrize("names", [(), ("bias",), ("offset_b",), ("bias", "offset_a", "offset_b")], ids=str)
def test_generated_code_calls_it(monkeypatch, tmp_path, names):
    """On tensors of their own dtypes, also where a view changed it; M is symbolic."""
    op = torch.ops.qcompile.mm_8bit
    if op.default not in lowerings:
        register_lowering(op.default, type_promotion_kind=None)(inductor.lower_mm_8bit)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gemm, "card_of", lambda device: H200)
    calls = []

    def recorded(a, b, scale_a, scale_b, dtype, **summands):
        calls.append((a.dtype, b.dtype, dtype, tuple(summands)))
        return reference.mm_8bit(a, b, scale_a, scale_b, dtype, **summands)

    monkeypatch.setattr(gluon, "mm_8bit", recorded)

    @torch.compile(backend="inductor", fullgraph=True)
    def product(a, b, scale_a, scale_b, summands):
        return op(a.view(INT8), b, scale_a, scale_b, FP16, *(summands.get(n) for n in ("bias", "offset_a", "offset_b")))

    torch._dynamo.reset()
    b, one = torch.randint(-7, 8, (48, 64), dtype=INT8), torch.ones(1, 1)
    with inductor_config.patch({"cpu_backend": "triton", "fx_graph_cache": False}):
        for m in (5, 9):
            a = torch.randint(-7, 8, (m, 64), dtype=INT8)
            torch._dynamo.mark_dynamic(a, 0)
            every = {"bias": torch.randn(48), "offset_a": torch.randn(m, 1), "offset_b": torch.randn(48, 1)}
            torch._dynamo.mark_dynamic(every["offset_a"], 0)
            summands = {name: every[name] for name in names}
            got = product(a.view(torch.uint8), b, one, one, summands)
            assert torch.equal(got, reference.mm_8bit(a, b, one, one, FP16, **summands))
    assert calls == [(INT8, INT8, FP16, names)] * 2


@compiled
def test_the_ring_gives_back_one_stage_after_the_other():
    """The barrier that tells of a product's end is chosen within the loop: were it the same every time, the loads would
    wait for the others forever.
    """
    code = build(gluon.CONFIGS[0], (E4M3, E4M3)).asm["ttgir"]
    within = r"scf\.for %depth((?:(?!scf\.for).)*?)ttng\.arrive_barrier (%\d+), 1, (?!%true)"
    loops = re.findall(within, code, re.DOTALL)
    assert len(loops) == gluon.CONSUMERS.value
    for body, barrier in loops:
        stage = re.search(rf"{barrier} = ttg\.memdesc_index \S+\[(%\d+)\]", body)
        assert stage
        assert f"{stage[1]} = arith.select" in body
