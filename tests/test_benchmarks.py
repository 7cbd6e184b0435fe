"""The harness of the benchmarks, on a CPU: what is compared with what, what is refused, what is written.

What would break: an arm that is timed although it computes something else, a failing arm that takes the others along,
ratios against the wrong row, kernels counted in the wrong class or twice.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.recipes import FP4, QUEST, RECIPES

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import grouped  # noqa: E402
import loss_curves  # noqa: E402
import measure  # noqa: E402
import prefill  # noqa: E402
import profile_step  # noqa: E402
import quantize_kernels  # noqa: E402
import stored_linears  # noqa: E402
import torchao_experts  # noqa: E402
import training_step  # noqa: E402
from model import SIZES, Size, build, random_batch  # noqa: E402
from profile_step import HEAD, Launch, class_of  # noqa: E402
from training_step import BASELINE, Arm, Reference, Result, Run  # noqa: E402

sys.path.remove(str(BENCHMARKS))

TINY = SIZES["tiny"]
CPU = Run(torch.device("cpu"), steps=2, warm_up=1)
EAGER = Arm("eager", lambda model, options: model)


def broken(model, options):
    msg = "first line of many\nand the rest of a long dump"
    raise RuntimeError(msg)


class OneWrongGradient(nn.Module):
    """The right loss; the gradient of one weight has the wrong sign."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        model.layers[0].up_proj.weight.register_hook(torch.neg)

    def forward(self, **batch):
        return self.model(**batch)


@pytest.fixture
def arms(monkeypatch):
    """Arms that compile nothing: a right one, one that raises, one with a wrong loss, one with a wrong gradient."""
    table = {
        BASELINE: EAGER,
        "right": replace(EAGER, provider="ours"),
        "raises": Arm("raises", broken),
        "wrong_loss": Arm("wrong loss", lambda model, options: lambda **batch: 1.5 * model(**batch)),
        "wrong_gradient": Arm("wrong gradient", lambda model, options: OneWrongGradient(model), counterpart=BASELINE),
    }
    monkeypatch.setattr(training_step, "ARMS", table)
    return table


# --- the model ------------------------------------------------------------------------------------------------------


def test_sizes_count_their_parameters():
    """The floors of the profile are computed from these counts."""
    model = build(TINY, torch.device("cpu"), torch.bfloat16, 0)
    assert sum(p.numel() for p in model.parameters()) == TINY.parameters
    linears = [m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert sum(linears) == TINY.block_weights


def test_attention_is_causal_and_positions_matter():
    model = build(replace(TINY, layers=1), torch.device("cpu"), torch.float32, 0)
    outputs = []
    model.norm.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    tokens, targets = random_batch(TINY, torch.device("cpu"), 0)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 4
    for given in (tokens, changed, tokens.flip(1)):
        model(given, targets)
    torch.testing.assert_close(outputs[0][:, :-1], outputs[1][:, :-1])
    assert not torch.allclose(outputs[0][:, -1], outputs[1][:, -1])
    assert not torch.allclose(outputs[0].flip(1), outputs[2])


def test_equal_seeds_give_equal_models():
    first, second = (build(TINY, torch.device("cpu"), torch.bfloat16, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# --- training_step: arms and gate -----------------------------------------------------------------------------------


def test_a_wrong_or_failing_arm_is_one_line_and_the_others_go_on(arms, tmp_path):
    rows = list(training_step.run_size(TINY, list(arms), CPU, tmp_path / "log"))
    status = {row.arm: row.status for row in rows}
    assert list(status) == [BASELINE, "right", "raises", "wrong_loss", "wrong_gradient", "bf16_again"]
    assert status[BASELINE] == status["right"] == status["bf16_again"] == "ok"
    assert status["raises"] == "FAILED: RuntimeError: first line of many"
    assert status["wrong_loss"].startswith("FAILED: GateError: first loss")
    assert "layers.0.up_proj.weight" in status["wrong_gradient"]
    assert all(math.isnan(row.median_ms) for row in rows if row.status != "ok"), "a wrong arm was timed"
    assert "and the rest of a long dump" in (tmp_path / "log").read_text()


def test_without_a_baseline_nothing_is_measured(arms, tmp_path):
    """There would be nothing to compare with."""
    arms[BASELINE] = arms["raises"]
    rows = list(training_step.run_size(TINY, ["right"], CPU, tmp_path / "log"))
    assert [row.arm for row in rows] == [BASELINE]


@pytest.mark.parametrize(
    ("loss", "gradient", "complaint"),
    [
        (2.05, [1.0, 0.0], "first loss"),
        (math.nan, [1.0, 0.0], "first loss"),
        (2.0, [0.0, 1.0], "gradient of w has a cosine of 0.000 with its reference"),
        (2.0, [math.nan, 1.0], "cosine of nan"),
        (2.0, None, "no gradient for w"),
    ],
)
def test_gate_refuses(loss, gradient, complaint):
    reference = Reference(2.0, {"v": torch.tensor([1.0, 2.0]), "w": torch.tensor([1.0, 0.0])})
    gradients = dict(reference.gradients)
    if gradient is None:
        del gradients["w"]
    else:
        gradients["w"] = torch.tensor(gradient)
    with pytest.raises(training_step.GateError, match=complaint):
        training_step.check(Reference(loss, gradients), reference, EXACT)


EXACT, OTHER = (training_step.bounds_of(exact, same_experts=True) for exact in (True, False))


def test_gate_judges_the_worst_cosine_or_the_median():
    """One bad parameter of three fails an arm whose forward is its reference's, and none other."""
    reference = Reference(2.0, {name: torch.tensor([1.0, 0.0]) for name in "uvw"})
    own = Reference(2.02, {"u": torch.tensor([1.0, 0.0]), "v": torch.tensor([1.0, 1.0]), "w": torch.tensor([0.0, 1.0])})
    assert training_step.check(own, reference, OTHER) == pytest.approx(2**-0.5)
    with pytest.raises(training_step.GateError, match="gradient of w"):
        training_step.check(own, reference, EXACT)


def test_where_tokens_go_to_other_experts_the_median_is_judged():
    """Some gradients then are of other tokens; one that has nothing to do with its reference's fails all the same."""
    bounds = training_step.bounds_of(exact_forward=True, same_experts=False)
    reference = Reference(2.0, {name: torch.tensor([1.0, 0.0]) for name in "uvw"})

    def judged(*gradients: list[float]) -> float:
        named = dict(zip("uvw", map(torch.tensor, gradients), strict=True))
        return training_step.check(Reference(2.0, named), reference, bounds)

    assert judged([1.0, 0.0], [1.0, 0.1], [1.0, 1.0]) == pytest.approx(1.01**-0.5)
    with pytest.raises(training_step.GateError, match=r"gradient of w has a cosine of 0\.100 with"):
        judged([1.0, 0.0], [1.0, 0.0], [0.1, (1 - 0.01) ** 0.5])
    with pytest.raises(training_step.GateError, match="the median"):
        judged([1.0, 0.0], [1.0, 1.0], [1.0, 1.0])


def test_a_counterpart_that_is_not_measured_is_run_for_its_gradients(arms, tmp_path):
    arms["exact"] = EAGER
    arms["right"] = replace(arms["right"], counterpart="exact")
    rows = list(training_step.run_size(TINY, ["right"], CPU, tmp_path / "log"))
    assert [(row.arm, row.status) for row in rows] == [(BASELINE, "ok"), ("right", "ok"), ("bf16_again", "ok")]


@pytest.mark.parametrize("cold", [False, True])
def test_cold_arms_find_nothing_in_caches(cold, arms, monkeypatch, tmp_path):
    """What one arm leaves there the next one finds, unless it is to begin with nothing."""
    found = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)

    def leaves_a_file(model, options):
        folders = [Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])]
        folders += [Path(folder)] if (folder := os.environ.get("TRITON_CACHE_DIR")) else []
        assert len(folders) == 1 + cold
        for folder in folders:
            folder.mkdir(exist_ok=True)
            found.append((folder / "code").exists())
            (folder / "code").touch()
        return model

    arms[BASELINE] = arms["right"] = Arm("leaves a file", leaves_a_file)
    rows = list(training_step.run_size(TINY, ["right"], replace(CPU, cold=cold), tmp_path / "log"))
    assert [(row.status, row.cold) for row in rows] == [("ok", cold)] * 3
    assert found == ([False] * 6 if cold else [False, True, True])


FULL_FP4 = ("quartet2", "quartet2_healed", "nvfp4", "tetrajet2", "uniform4", "if4", "mxfp4", "mxfp8")


def recipe_of(name):
    """What an arm hands to ``torch.compile``: its recipe and options."""
    with mock.patch.object(torch, "compile") as compiled:
        training_step.ARMS[name].compile(build(TINY, torch.device("cpu"), torch.bfloat16, 0), {})
    return RECIPES[compiled.call_args.kwargs["backend"]], compiled.call_args.kwargs["options"] or {}


def test_arms_of_full_fp4_quantize_all_products():
    found = [recipe.override(options) for recipe, options in map(recipe_of, FULL_FP4)]
    assert len(set(found)) == len(FULL_FP4)
    assert all(each.gradient is not None and each.activation and each.weight for each in found)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FULL_FP4)
def test_arms_of_full_fp4_pass_the_gate(name):
    """All passes, eager inner compile: the loss and the gradients of every recipe of all three products are BF16's but
    for rounding, and not BF16's.
    """
    recipe, options = recipe_of(name)

    def compile_arm(model, _):
        def backend(graph, inputs):
            return compile_with(recipe, graph, inputs, options=options, inner_compile=compat.eager_inner_compile)

        return torch.compile(model, dynamic=False, backend=backend)

    _, reference = training_step.measure(EAGER, TINY, CPU, None)
    figures, _ = training_step.measure(replace(EAGER, compile=compile_arm), TINY, CPU, reference)
    assert training_step.MEDIAN_COSINE < figures["gradient_cosine"] < 0.99999
    assert figures["last_loss"] < figures["first_loss"]
    torch.compiler.reset()


def test_the_step_trains():
    trainer = training_step.Trainer(EAGER, TINY, CPU)
    first = trainer.step().item()
    _, last = trainer.milliseconds(20)
    assert last < 0.8 * first
    assert all(p.grad is None for p in trainer.model.parameters())


def test_quest_in_plain_torch_is_the_recipes_math():
    """The peer of the QuEST arms: same product, same gradients, head left alone."""
    model = nn.ModuleDict({"layer": nn.Linear(256, 24, bias=False), "lm_head": nn.Linear(24, 5)})
    x = torch.randn(9, 256, requires_grad=True)
    operand = str(QUEST.activation)

    def step(call):
        x.grad = model.layer.weight.grad = None
        y = call(x)
        (y * torch.linspace(-1, 1, 24)).sum().backward()
        return y.detach(), x.grad, model.layer.weight.grad

    def quantized(x):
        fake_quantize = torch.ops.qcompile.fake_quantize
        return nn.functional.linear(fake_quantize(x, operand, -1), fake_quantize(model.layer.weight, operand, -1))

    expected = step(quantized)
    with mock.patch.object(training_step, "inductor", lambda model, options: model):
        plain = training_step.plain_quest(model, {})
    for actual, wanted in zip(step(plain["layer"]), expected, strict=True):
        assert (actual - wanted).norm() < 1e-5 * wanted.norm()
    assert type(plain["lm_head"]) is nn.Linear
    assert list(model.state_dict()) == ["layer.weight", "lm_head.weight", "lm_head.bias"]


@pytest.mark.parametrize("name", list(training_step.OURS))
def test_our_options_are_options_of_the_backend(name):
    """A renamed option would make every one of our arms fail on the device."""
    recipe = FP4.override(training_step.OURS[name])
    assert training_step.ARMS[name].outliers == (recipe.activation.outliers is not None)


def test_our_arms_pass_the_gate():
    """All passes, eager inner compile: FP4 with the backward in FP8 stays within the bounds that are stated."""
    exact = replace(EAGER, compile=partial(compile_ours, training_step.OURS["ours_bf16"]))
    arm = replace(EAGER, compile=partial(compile_ours, training_step.OURS["ours_fp8"]), counterpart="ours_bf16")
    _, reference = training_step.measure(EAGER, TINY, CPU, None)
    figures, reference = training_step.measure(exact, TINY, CPU, reference)
    assert 0.4 < figures["gradient_cosine"] < 0.999
    figures, _ = training_step.measure(arm, TINY, CPU, reference)
    assert 0.97 < figures["gradient_cosine"] < 0.99999, "the gradient was not quantized"
    torch.compiler.reset()


def compile_ours(recipe, model, options):
    def backend(graph, inputs):
        return compile_with(FP4, graph, inputs, options=recipe, inner_compile=compat.eager_inner_compile)

    return torch.compile(model, dynamic=False, backend=backend)


def test_torchao_arms_leave_the_head_alone():
    pytest.importorskip("torchao.float8")
    from torchao.float8.float8_linear import Float8Linear

    for name in ("torchao_tensorwise", "torchao_rowwise", "torchao_rowwise_gw_hp"):
        model = build(TINY, torch.device("cpu"), torch.bfloat16, 0)
        training_step.ARMS[name].compile(model, {})
        swapped = {key for key, module in model.named_modules() if isinstance(module, Float8Linear)}
        assert len(swapped) == 7 * TINY.layers
        assert "lm_head" not in swapped


# --- torchao's experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_padded_experts_are_transformers_experts(family):
    """The same losses and gradients by another forward; groups are multiples of 16, and none is empty."""
    pytest.importorskip("transformers.integrations.moe")
    size, seen = replace(SIZES["tiny_moe"], family=family, experts=16, layers=1), []

    def product(x, weight, offs):
        seen.append(offs.diff(prepend=offs.new_zeros(1)))
        assert offs[-1] <= len(x)
        return torch.nn.functional.grouped_mm(x, weight, offs=offs)

    results = []
    for padded in (False, True):
        model = build(size, torch.device("cpu"), torch.bfloat16, 0, "transformers")
        if padded:
            torchao_experts.use_padded_experts(model, product)
        ids, labels = random_batch(replace(size, batch=1), torch.device("cpu"), 0)  # 64 rows: some experts get none
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(((sizes % 16 == 0) & (sizes > 0)).all() for sizes in seen)
    assert len(seen) == 2
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=0.02, atol=0.01 * float(plain.abs().max()))


def test_torchao_says_why_it_takes_no_groups_of_a_router():
    pytest.importorskip("torchao.prototype.moe_training")
    model = build(SIZES["tiny_moe"], torch.device("cpu"), torch.bfloat16, 0, "transformers")
    with pytest.raises(NotImplementedError, match="multiples of 16 rows, and torchao says: pad_token_groups"):
        torchao_experts.swap_weights(model)


def scaled_grouped_mm(a, b, scale_a, scale_b, offs, out_dtype, use_fast_accum):
    """What `torch._scaled_grouped_mm` computes: rows of groups times matrices, or groups of what is contracted."""
    bounds = [0, *offs.tolist()]
    a, b, parts = a.float(), b.float(), []
    for group, rows in enumerate(slice(*of) for of in itertools.pairwise(bounds)):
        if b.dim() == 3:
            parts.append((a[rows] @ b[group]) * scale_a[rows, None] * scale_b[group])
        else:
            scales = (scale.view(len(offs), -1)[group] for scale in (scale_a, scale_b))
            left, right = scales
            parts.append((a[:, rows] @ b[rows]) * left[:, None] * right)
    return (torch.cat(parts) if b.dim() == 3 else torch.stack(parts)).to(out_dtype)


def test_grouped_hands_torchaos_kernel_what_ours_reads(monkeypatch, tmp_path):
    """Operands and scales in its order, checked against ours by the arm itself; groups that it refuses are no call."""
    calls = []

    def counted(*given, **named):
        calls.append(given)
        return scaled_grouped_mm(*given, **named)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", counted)
    given = ["--device", "cpu", "--rows", "256", "--shapes", "48,32", "--groups", "2", "--repeats", "1"]
    out = tmp_path / "grouped.csv"
    assert grouped.main([*given, "--out", str(out)]) == 1, "ragged groups are left out"
    with out.open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "torchao"]
    assert {(row["product"], row["sizes"]): row["status"] == "ok" for row in rows} == {
        (product, sizes): sizes == "equal" for product in grouped.PRODUCTS for sizes in ("equal", "ragged")
    }
    assert all("multiples of 16" in row["status"] for row in rows if row["sizes"] == "ragged")
    assert {tuple(len(t.shape) for t in call[:2]) for call in calls} == {(2, 3), (2, 2)}
    monkeypatch.setattr(torch, "_scaled_grouped_mm", lambda *given, **named: counted(*given, **named) * 1.1)
    tensors = grouped.Tensors(grouped.Problem(256, 2, 48, 32, False, "cpu"))
    with pytest.raises(ValueError, match=r"differs from ours by 0\.1"):
        tensors.scaled("wgrad")


# --- training_step: results -----------------------------------------------------------------------------------------


def test_ratios_are_against_the_mean_of_both_baselines_of_the_size():
    rows = [
        Result("a", BASELINE, median_ms=100.0),
        Result("a", "ours", median_ms=80.0),
        Result("a", "bf16_again", median_ms=140.0),
        Result("b", BASELINE, median_ms=10.0),
        Result("b", "ours", status="FAILED: x"),
    ]
    speedups = [row.speedup for row in training_step.with_speedups(rows)]
    assert speedups[:4] == pytest.approx([1.2, 1.5, 120 / 140, 1.0])
    assert math.isnan(speedups[4])


def test_main_writes_table_csv_and_plot(arms, tmp_path, capsys):
    out = tmp_path / "results" / "step.csv"
    given = ["--device", "cpu", "--sizes", "tiny", "--arms", "right,raises", "--steps", "2", "--warm-up", "1"]
    assert training_step.main([*given, "--out", str(out)]) == 1, "one arm failed"
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == [BASELINE, "right", "raises", "bf16_again"]
    assert {"date", "card", "torch", "triton", "torchao", "peak_gib", "compile_s", "gradient_cosine"} <= rows[0].keys()
    assert rows[0]["first_loss"] == rows[1]["first_loss"], "arms start from the same seed and data"
    assert out.with_suffix(".png").stat().st_size > 0
    printed = capsys.readouterr()
    assert "rest of a long dump" not in printed.out + printed.err
    assert training_step.HEAD in printed.out


def test_unknown_arms_are_refused(capsys):
    with pytest.raises(SystemExit):
        training_step.main(["--arms", "bf16,nonsense"])
    assert "nonsense" in capsys.readouterr().err


# --- profile_step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "kernel", "expected"),
    [
        ("aten::mm", "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "BF16 GEMM"),
        ("", "nvjet_sm90_tst_64x64_64x13_1x2_h_bz_splitK_NTT", "BF16 GEMM"),
        ("aten::_scaled_mm", "nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_coopA_TNT", "8-bit GEMM"),
        ("", "nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT", "8-bit GEMM"),
        ("qcompile::mm_8bit", "_persistent_product", "8-bit GEMM"),
        ("aten::_int_mm", "cutlass_80_tensorop_i16832gemm_s8_256x128_128x3_tn_align16", "8-bit GEMM"),
        ("", "triton_tem_fused_mm_8bit_add_3", "8-bit GEMM"),
        ("qcompile::quantize_8bit", "_row_kernel", "casts"),
        ("qcompile::quantize_8bit_pair", "_transposing_kernel", "casts"),
        ("", "triton_red_fused__unsafe_view_clamp_outliers_mul_quantize_silu_18", "casts"),
        ("", "triton_poi_fused__scaled_mm__to_copy_clamp_mul_3", "casts"),
        ("qcompile::recode", "_recode_transposed", "casts"),
        ("aten::topk", "void at::native::mbtopk::gatherTopK<c10::BFloat16, unsigned int, 2>(...)", "casts"),
        ("", "triton_per_fused_scale_gradient_12", "DGE slope"),
        ("", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64", "attention"),
        ("", "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)", "attention"),
        ("", "triton_red_fused__log_softmax__to_copy__unsafe_view_prepare_softmax_online_view_12", "loss"),
        ("aten::_fused_adamw_", "void at::native::(anonymous)::multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("", "triton_poi_fused__unsafe_view_mul_silu_silu_backward_view_2", "norms, RoPE, SwiGLU, other elementwise"),
        ("", "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_7", "norms, RoPE, SwiGLU, other elementwise"),
        ("", "Memset (Device)", "memory copies"),
        ("", "something_new", "other"),
    ],
)
def test_kernels_are_counted_in_their_class(operator, kernel, expected):
    assert class_of(Launch(kernel, operator, "", 1.0), TINY) == expected


def test_products_over_the_vocabulary_are_the_heads():
    size = SIZES["d4096"]
    assert class_of(Launch("nvjet_tst", "aten::mm", "[[16384, 4096], [4096, 32000]]", 1.0), size) == HEAD
    assert class_of(Launch("nvjet_tst", "aten::mm", "[[16384, 4096], [4096, 14336]]", 1.0), size) == "BF16 GEMM"


def cuda_event(name, us, annotation=False):
    span = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(device_type=DeviceType.CUDA, name=name, time_range=span, is_user_annotation=annotation)


def cpu_event(name, shapes, kernels):
    found = [SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels]
    return SimpleNamespace(device_type=DeviceType.CPU, name=name, input_shapes=shapes, kernels=found)


def test_every_kernel_is_counted_once():
    """A profile lists a kernel on the device and again under its operator; spans over kernels are no kernels."""
    events = [
        cuda_event("gemm", 5.0),
        cuda_event("gemm", 7.0),
        cuda_event("lonely", 2.0),
        cuda_event("Optimizer.step#AdamW.step", 50.0, annotation=True),
        cpu_event("aten::mm", [[8, 4], [4, 8]], [("gemm", 5.0)]),
        cpu_event("aten::add", [], []),
    ]
    launches = profile_step.launches_of(events)
    assert sorted((x.kernel, x.operator, x.microseconds, x.count) for x in launches) == [
        ("gemm", "", 7.0, 1),
        ("gemm", "aten::mm", 5.0, 1),
        ("lonely", "", 2.0, 1),
    ]


def test_floors_move_products_from_bf16_to_eight_bits():
    size, ceilings = SIZES["d4096"], profile_step.Ceilings(copy=4e12, bf16=700e12, fp8=1400e12)
    floors = {arm: profile_step.floors(training_step.ARMS[arm], size, ceilings) for arm in training_step.ARMS}
    whole = floors[BASELINE]["BF16 GEMM"].seconds
    assert whole == pytest.approx(6 * size.tokens * size.block_weights / 700e12)
    assert floors[BASELINE]["casts"].seconds == floors[BASELINE]["8-bit GEMM"].seconds == 0
    assert floors["ours_fp8"]["8-bit GEMM"].seconds == pytest.approx(whole / 2)
    assert floors["ours_bf16"]["BF16 GEMM"].seconds == pytest.approx(2 * whole / 3)
    assert floors["ours_dgrad_fp8"]["8-bit GEMM"].seconds == pytest.approx(whole / 3)


def test_floors_of_a_mixture_count_the_experts_of_a_token():
    """Mixtral's shape: 2 of 8 experts multiply a token, and all 8 are read, cast and updated."""
    size, ceilings = SIZES["mixtral"], profile_step.Ceilings(copy=4e12, bf16=700e12, fp8=1400e12)
    floors = profile_step.floors(training_step.ARMS[BASELINE], size, ceilings)
    attention, expert = (2 * 2048 + 2 * 1024) * 2048, 3 * 2048 * 7168
    assert floors["BF16 GEMM"].seconds == pytest.approx(6 * 16384 * 4 * (attention + 2 * expert) / 700e12)
    assert floors["optimizer"].seconds == pytest.approx(14 * size.parameters / 4e12)
    assert size.parameters > 4 * (attention + 8 * expert)


@pytest.mark.parametrize("kernel", ["_rows_kernel", "_contraction_kernel", "mm_8bit_kernel"])
def test_products_of_groups_are_8_bit_products(kernel):
    launch = Launch(kernel, "CompiledFunctionBackward", "", 1.0, 1)
    assert profile_step.class_of(launch, SIZES["mixtral"]) == "8-bit GEMM"


def test_report_states_the_casts_share_of_the_linears():
    launches = [
        Launch("nvjet_qqtst", "aten::_scaled_mm", "", 6000.0, 3),
        Launch("k", "qcompile::quantize_8bit", "", 2000.0, 3),
        Launch("k | pipe", "", "", 10.0),
    ]
    ceilings = profile_step.Ceilings(4e12, 700e12, 1400e12)
    text = profile_step.report("ours_fp8", TINY, launches, 2, 5.0, ceilings)
    assert "Casts are 25.0 % of the linear layers' time" in text
    assert "| 8-bit GEMM | 3.00 | 74.9 % |" in text
    assert "k \\| pipe" in text


# --- quantize_kernels -----------------------------------------------------------------------------------------------


def test_kernels_match_their_references_before_they_are_timed(tmp_path):
    """On a CPU the ops are the references or C++; a kernel that is off by one bit is not timed."""
    good = quantize_kernels.CASES["quantize_8bit e2m1 packed"]

    def off_by_one(kernels, x):
        codes, scales, packed = good.call(kernels, x)
        if kernels is quantize_kernels.OPS:
            packed[0, 0] ^= 1
        return codes, scales, packed

    cases = {
        "good": replace(good, shapes=[(64, 128)]),
        "bad": replace(good, call=off_by_one, shapes=[(64, 128)]),
        "raises": replace(good, call=lambda kernels, x: kernels.nonsense(x), shapes=[(64, 128)]),
    }
    rows = {row.kernel: row for row in quantize_kernels.measure_all(cases, 4, "cpu", tmp_path / "log")}
    assert rows["good"].status == "ok"
    assert (rows["good"].rows, rows["good"].columns) == (16, 32)
    assert rows["good"].bytes == 16 * (2 * 32 + 32 + 4 + 16)
    assert rows["bad"].status == "FAILED: output 2 differs in 1 of 256 elements"
    assert math.isnan(rows["bad"].us)
    assert rows["raises"].status.startswith("FAILED: ")


@pytest.mark.parametrize("name", [name for name, case in quantize_kernels.CASES.items() if not case.compiled])
def test_cases_call_what_exists(name):
    """Signatures of ops and references, on a shape that no tile divides."""
    case = quantize_kernels.CASES[name]
    tensors = case.inputs(37, 130, "cpu")
    assert case.differs(case.runner()(*tensors), case.call(quantize_kernels.DEFINED, *tensors)) == ""


def test_the_residual_may_come_in_any_order():
    clamped, values, positions = (
        torch.zeros(2, 5),
        torch.tensor([[1.0, 0, 2.0], [0, 0, 3.0]]),
        torch.tensor([[0, 1, 4]] * 2),
    )
    expected = clamped, values, positions
    other = clamped, values.flip(1), positions.flip(1)
    assert quantize_kernels.clamps_differently(other, expected) == ""
    assert quantize_kernels.clamps_differently((clamped, values, positions.flip(1)), expected)


def test_fused_producers_may_differ_in_few_codes_only():
    codes = torch.arange(200, dtype=torch.uint8)
    few, many = codes.clone(), codes.clone()
    few[:3] += 1
    many[:9] += 1
    result = codes, None, codes
    assert quantize_kernels.mostly_bitwise((few, None, codes), result) == ""
    assert quantize_kernels.mostly_bitwise((many, None, codes), result) == "output 0 differs in 4.5 % of its elements"


def test_cost_of_outliers_is_relative_to_quantize_and_product(monkeypatch):
    monkeypatch.setattr(quantize_kernels, "product_microseconds", lambda *shape: 80.0)
    row = quantize_kernels.Row
    rows = [
        row("quantize_8bit e2m1", 16384, 4096, us=20.0),
        row("quantize_compensated e2m1", 16384, 4096, us=30.0),
        row("quantize_8bit e2m1", 16384, 14336, us=20.0),
        row("quantize_compensated e2m1", 16384, 14336, status="FAILED: x"),
    ]
    costs = list(quantize_kernels.occ_costs(rows))
    assert [(cost.features_in, cost.features_out, cost.added) for cost in costs] == [
        (4096, 4096, pytest.approx(0.1)),
        (4096, 14336, pytest.approx(0.1)),
    ]


# --- loss_curves ----------------------------------------------------------------------------------------------------

BYTES = Size("bytes", 64, 3, 128, heads=2, kv_heads=1, sequence=16, batch=4, vocabulary=256)


@pytest.fixture
def text():
    return loss_curves.Text.read(None, torch.device("cpu"))


def test_all_layers_share_one_compilation(text):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    curve = loss_curves.train("x", loss_curves.Arm("x", "black", count), BYTES, text, 6, 1e-2)
    torch.compiler.reset()
    assert len(graphs) == 1
    assert len(curve.losses) == 6
    assert curve.losses[-1] < curve.losses[0]


def test_arms_read_the_same_batches_and_seeds_other_ones(text):
    first, same, other = (next(text.batches(BYTES, seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    inputs, targets = next(text.validation_batches(BYTES))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_main_writes_json_plot_and_gaps(monkeypatch, tmp_path, capsys):
    table = {
        BASELINE: loss_curves.Arm("BF16", "black", "eager"),
        "same": loss_curves.Arm("the same", "blue", "eager"),
        "raises": loss_curves.Arm("raises", "red", "no_such_backend"),
    }
    monkeypatch.setattr(loss_curves, "ARMS", table)
    monkeypatch.setitem(SIZES, "bytes", BYTES)
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "bytes", "--steps", "4", "--arms", ",".join(table), "--out", str(out)]
    assert loss_curves.main(given) == 1
    data = json.loads(out.read_text())
    assert [row["arm"] for row in data["final"]] == [BASELINE, "same"]
    assert data["final"][1]["validation_gap"] == data["final"][1]["train_gap"] == 0
    assert "no_such_backend" in data["arms"]["raises"]["failure"]
    assert data["settings"]["parameters"] == BYTES.parameters
    assert out.with_suffix(".png").stat().st_size > 0
    assert "| the same " in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, arm in loss_curves.ARMS.items() if arm.options])
def test_recipes_of_the_curves_are_options_of_the_backend(name):
    assert FP4.override(loss_curves.ARMS[name].options).enabled


# --- measure --------------------------------------------------------------------------------------------------------


def test_errors_are_reported_by_their_origin(tmp_path):
    with pytest.raises(RuntimeError) as origin:
        broken(None, None)
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = origin.value
    assert measure.failure(wrapped, tmp_path / "log", "an arm") == "FAILED: RuntimeError: first line of many"
    assert "=== an arm" in (tmp_path / "log").read_text()


def test_what_compilers_print_goes_to_the_log(tmp_path):
    with measure.quiet_stderr(tmp_path / "log"):
        os.write(2, b"pages of MLIR")
    assert (tmp_path / "log").read_text() == "pages of MLIR"


def test_buffers_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for size in (2**20, 10**8, 10**9):
        count = measure.rotations(size)
        assert count >= 3
        assert (count - 1) * size >= 4 * measure.L2_BYTES


# --- prefill --------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_prefill(monkeypatch):
    """Arms compile to their plain math, the one called "wrong" to the model in high precision."""

    def compiled(arm, model, cudagraphs):
        return model if arm is wrong or arm.plain is None else prefill.Prefill(arm.plain(model.model))

    wrong = prefill.Arm("inductor", {}, prefill.ARMS["w4a4"].plain)
    monkeypatch.setitem(prefill.ARMS, "wrong", wrong)
    monkeypatch.setattr(prefill, "compiled", compiled)


def test_prefill_times_what_is_right_only(eager_prefill, tmp_path, capsys):
    out = tmp_path / "prefill.csv"
    given = ["--device", "cpu", "--size", "tiny", "--batches", "1,2", "--repeats", "2", "--out", str(out)]
    assert prefill.main([*given, "--arms", "bf16,wrong,w4a4"]) == 1
    rows = list(csv.DictReader(out.open()))
    assert [(row["arm"], row["batch"]) for row in rows] == [(a, b) for b in "12" for a in ("bf16", "wrong", "w4a4")]
    for row in rows:
        if row["arm"] == "wrong":
            assert "with those of the plain math" in row["status"]
            assert row["median_ms"] == "nan"
        else:
            assert row["status"] == "ok"
            assert float(row["median_ms"]) >= float(row["min_ms"]) > 0
    assert float(rows[0]["speedup"]) == 1
    assert out.with_suffix(".png").stat().st_size > 1000


def test_without_rotation_the_plain_math_rotates_nothing():
    model = prefill.model_of(TINY, torch.device("cpu"))
    layer = prefill.ARMS["w4a4_unrotated"].plain(model).layers[0].q_proj
    x = torch.randn(5, TINY.hidden, dtype=torch.bfloat16)
    assert torch.equal(x.unflatten(-1, (-1, 1)) @ layer.rotation, x.unflatten(-1, (-1, 1)))


def test_dense_rotations_are_the_blocks_of_the_others():
    models = [training_step.in_plain_quest(prefill.model_of(TINY, torch.device("cpu")), dense=d) for d in (False, True)]
    x = torch.randn(3, TINY.intermediate, dtype=torch.bfloat16)
    small, dense = (model.layers[1].down_proj.rotation for model in models)
    assert dense.shape == (TINY.intermediate, TINY.intermediate)
    assert torch.allclose((x.unflatten(-1, (-1, 128)) @ small).flatten(-2), x @ dense, atol=0.05)


# --- linear layers with stored weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
def test_stored_linears_write_a_row_for_every_arm(tmp_path, monkeypatch, gradient):
    """On the CPU the op's reference runs. An arm that computes something else has a row that says so, and no other is
    lost for it.
    """
    arms = stored_linears.arms_of(["nf4", "nvfp4"], gradient, decoded=False)
    arms = {name: make for name, make in arms.items() if name in ("bf16", "nf4", "nvfp4")}

    def twice(weight):
        arm = arms["nf4"](weight)
        return replace(arm, name="twice", run=lambda x, parts: 2 * arm.run(x, parts))

    monkeypatch.setattr(stored_linears, "arms_of", lambda *_: {"twice": twice, **arms})
    out = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--shapes", "48,128", "--batches", "1", "3", "--repeats", "1"]
    assert stored_linears.main([*options, "--out", str(out), *["--gradient"] * gradient]) == 1
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch"], row["arm"]) for row in rows] == [(batch, arm) for batch in "13" for arm in ("twice", *arms)]
    for row in rows:
        wrong = row["arm"] == "twice"
        assert ("elements are wrong" in row["error"], math.isnan(float(row["microseconds"]))) == (wrong, wrong)


def test_an_arm_has_its_time():
    with pytest.raises(TimeoutError, match=r"took longer than 0\.05 s"), stored_linears.limited(0.05):
        time.sleep(5)


def test_a_sweep_of_stored_linears_begins_with_the_table():
    """And has no cut twice."""
    pytest.importorskip("triton")
    from qcompile.kernels.matmul.stored import CONFIGS

    for batch, gradient in ((1, False), (64, False), (300, True)):
        found = list(stored_linears.variations(batch, gradient))
        assert found[0] in CONFIGS[gradient]
        assert len(set(map(str, found))) == len(found) > 50
