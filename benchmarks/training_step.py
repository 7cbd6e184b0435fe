"""Time and peak memory of a whole training step: BF16, torchao's float8 and ours, in one process and run.

    python benchmarks/training_step.py --out benchmarks/h200/training_step.csv
    python benchmarks/training_step.py --arms ours_fp8,ours_fp8_occ --sizes d4096      # or --arms all
    python benchmarks/training_step.py --arms bf16,quest_fp8,quest_plain --sizes d4096 # QuEST, and its math unfused
    python benchmarks/training_step.py --arms bf16,torchao_experts,torchao_experts_padded,ours --sizes mixtral,qwen3_moe
    python benchmarks/training_step.py --arms bf16,quartet2,nvfp4,mxfp8 --sizes d640 --cold    # what compiling takes

A step is forward, loss, backward, fused AdamW and ``zero_grad(set_to_none=True)`` of a Llama in BF16 (model.py):
transformers' own, by ``torch.compile(model.forward)``, or with ``--model plain`` one in plain torch. Arms run one after
the other on the same seed and data, BF16 first and once more at the end: the difference of the two is the drift of the
run, and ratios are against their mean. Compiling takes most of the time: ``compile_s`` is what the first forward and
backward took beyond a later step. By default it is no measurement, since arms find in Inductor's and Triton's caches
what others have compiled, and BF16's second time all of it; with ``--cold`` every arm begins with empty ones.
``host_ms`` is the time that Python takes to queue a step; no step takes less.

Nothing is timed before it is right. An arm's first loss must be within 2 % of BF16's, which says little: at
initialization it is close to the logarithm of the vocabulary whatever the model computes. Gradients say more. Those of
an FP8 backward must have a cosine of at least 0.97, for every parameter, with those of the same recipe with its
backward in BF16: the forward is the same, so that only the rounding of dY is between them. What has no such counterpart
is compared with BF16, where the noise of a quantized forward at initialization is large (worst at the queries and keys
of the last layer, whose gradients nearly cancel): the median over parameters must be at least 0.2, where a wrong
operand leaves 0.

A mixture's forward is the same only if its loss is so to the bit: Inductor may cut sums otherwise in two compilations,
and one bit decides which expert a token goes to. Where losses differ, the median must be 0.97 and the worst 0.2.

Writes the CSV file after every arm, a plot beside it (.png) and what a failing arm had to say (.log).
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._logging
from measure import environment, failure, fresh_log, milliseconds, quiet_stderr, write_rows
from model import MODELS, SIZES, Size, build, random_batch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torchao_experts import swap_weights, use_padded_experts

from qcompile import Monitor

__all__ = ["ARMS", "OURS", "Arm", "Result", "Run", "Trainer", "in_plain_quest", "main", "release", "run_size"]

LOSS_BOUND = 0.02
WORST_COSINE = 0.97
MEDIAN_COSINE = 0.2
BASELINE = "bf16"
AGAIN = f"{BASELINE}_again"

#: Inductor's options, the same for all arms of a run.
Options = Mapping[str, Any]


# --- the arms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to compile a model.

    Attributes:
        label: what plots and tables call it.
        compile: ``(model, Inductor options) -> compiled model``; may replace the model's linears.
        provider: ``"bf16"``, ``"torchao"`` or ``"ours"``.
        roles: the GEMMs of a linear that run in 8 bits, out of fprop, dgrad and wgrad.
        outliers: whether activations are clamped and compensated (OCC).
        counterpart: the arm with the same forward and an exact backward, "" if there is none.
        monitor: what gathers the arm's numerics, if anything does.
    """

    label: str
    compile: Callable[[nn.Module, Options], Callable[..., Tensor]]
    provider: str = "bf16"
    roles: frozenset[str] = frozenset()
    outliers: bool = False
    counterpart: str = ""
    monitor: Monitor | None = None


def inductor(model: nn.Module, options: Options) -> Callable[..., Tensor]:
    return torch.compile(model.forward, dynamic=False, options=dict(options) or None)


def torchao(recipe: str) -> Arm:
    """torchao's float8 training; ``lm_head`` stays in BF16, as in ours."""

    def compile_float8(model: nn.Module, options: Options) -> Callable[..., Tensor]:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(recipe)
        if not next(model.parameters()).is_cuda:
            config = replace(config, emulate=True)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "lm_head" not in name)
        return inductor(model, options)

    high_precision_wgrad = recipe.endswith("gw_hp")
    roles = frozenset(("fprop", "dgrad") if high_precision_wgrad else ("fprop", "dgrad", "wgrad"))
    return Arm(f"torchao {recipe}", compile_float8, "torchao", roles)


def torchao_experts(label: str, convert: Callable[[nn.Module], None]) -> Arm:
    """torchao's row-wise float8 with experts converted, too (torchao_experts.py says what either way is)."""
    linears = torchao("rowwise")

    def compile_all(model: nn.Module, options: Options) -> Callable[..., Tensor]:
        convert(model)
        return linears.compile(model, options)

    return replace(linears, label=label, compile=compile_all)


def compiled_by(backend: str, chosen: Options) -> Callable[[nn.Module, Options], Callable[..., Tensor]]:
    """How a backend of ours compiles a model with the options ``chosen``, before those of the run."""

    def compile_model(model: nn.Module, options: Options) -> Callable[..., Tensor]:
        return torch.compile(model.forward, dynamic=False, backend=backend, options={**chosen, **options} or None)

    return compile_model


def ours(label: str, recipe: Options) -> Arm:
    roles = frozenset(ROLES_OF_BACKWARD[recipe["backward"]])
    outliers = recipe["activation"]["outliers"] is not None
    exact = "ours_bf16_occ" if outliers else "ours_bf16"
    # With its backward in BF16 an arm is its own counterpart; "save" rounds what attention's backward reads too.
    alone = recipe["backward"] == "bf16" or "save" in recipe
    return Arm(
        label,
        compiled_by("qcompile_fp4", recipe),
        "ours",
        roles,
        outliers,
        "" if alone else exact,
    )


#: Attention stays what the model calls, as in BF16. Such an arm has no counterpart: where attention is computed
#: otherwise, gradients that nearly cancel are others.
MASKED = {"disable_passes": ["causal_masks"]}


def without_options(backend: str, label: str, counterpart: str, **chosen: Any) -> Arm:
    """A backend of ours as its name alone gives it, but for ``chosen``."""
    roles = frozenset(ROLES_OF_BACKWARD["fp8"])
    return Arm(label, compiled_by(backend, chosen), "ours", roles, counterpart=counterpart)


def full_fp4(backend: str, label: str, **chosen: Any) -> Arm:
    """A recipe of all three products, which cards of today decode: no product runs in 8 bits."""
    return Arm(label, compiled_by(backend, chosen), "ours")


def monitored(name: str) -> Arm:
    """An arm of :data:`OURS` with ``options={"monitor": …}``, whose every step is a row of the history."""
    monitor = Monitor()
    arm = ours(f"{_label(OURS[name])}, monitored", {**OURS[name], "monitor": monitor})
    return replace(arm, monitor=monitor)


def quest(variant: str, backward: str) -> Arm:
    """QuEST (arXiv 2502.05003), as ``backend="qcompile_quest"`` runs a variant of it."""
    label, options_of_variant = QUEST_VARIANTS[variant]
    compiled = compiled_by("qcompile_quest", {"backward": backward, **options_of_variant})
    roles = frozenset(ROLES_OF_BACKWARD[backward])
    counterpart = f"quest_bf16{variant}" if backward != "bf16" else ""
    return Arm(f"{label}, backward {backward}", compiled, "ours", roles, counterpart=counterpart)


class PlainQuestLinear(nn.Linear):
    """The same math in plain torch: rotate, scale, round, mask by the straight-through form, multiply rotated."""

    #: Bits → clip that N(0, 1) is rounded best with, and distance from a level, in steps, within which gradients pass.
    GRIDS: ClassVar = {1: (0.7978845608028654, 0.15), 4: (2.513930578568423, 0.5)}
    bits: int
    rotation: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self._quantized(x), self._quantized(self.weight), self.bias)

    def _quantized(self, x: Tensor) -> Tensor:
        rotated = (x.unflatten(-1, (-1, self.rotation.shape[0])) @ self.rotation).flatten(-2)
        wide = rotated.float()
        clip, distance = self.GRIDS[self.bits]
        half = 2 ** (self.bits - 1)
        step = (clip * wide.square().mean(-1, keepdim=True).sqrt() + 1e-8) / (half - 0.5)
        rounded = (torch.floor(wide / step).clamp(-half, half - 1) + 0.5) * step
        # One bit is masked beyond its outer levels only.
        error = rounded.abs() - wide.abs() if self.bits == 1 else rounded - wide
        trusted = rotated * ((-error if self.bits == 1 else error.abs()) <= distance * step)
        return trusted + (rounded.to(x.dtype) - trusted).detach()


def in_plain_quest(model: nn.Module, block: int = 128, dense: bool = False, bits: int = 4) -> nn.Module:
    """The model with such linears, of 1 or 4 bits; block 1 rotates nothing.

    ``dense``: a layer multiplies by a K × K matrix with the rotation in its diagonal, as the released code does.
    """
    rotation = torch.ones(1, 1)
    while len(rotation) < block:
        rotation = torch.cat((torch.cat((rotation, rotation), 1), torch.cat((rotation, -rotation), 1)))
    matrices: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            width = module.in_features if dense else block
            if width not in matrices:
                matrices[width] = torch.block_diag(*[rotation.to(module.weight) * block**-0.5] * (width // block))
            module.__class__ = PlainQuestLinear
            module.bits = bits
            module.register_buffer("rotation", matrices[width], persistent=False)
    return model


def plain_quest(model: nn.Module, options: Options, dense: bool = False) -> Callable[..., Tensor]:
    return inductor(in_plain_quest(model, dense=dense), options)


ROLES_OF_BACKWARD = {"bf16": ("fprop",), "dgrad_fp8": ("fprop", "dgrad"), "fp8": ("fprop", "dgrad", "wgrad")}

NO_OUTLIERS = {"activation": {"outliers": None}}
OUTLIERS = {"activation": {"outliers": "occ(alpha=0.99,residual=e4m3)"}}

#: Options of ``backend="qcompile_fp4"`` by arm.
OURS: dict[str, dict[str, Any]] = {
    "ours_bf16": {"backward": "bf16", **NO_OUTLIERS},
    "ours_bf16_occ": {"backward": "bf16", **OUTLIERS},
    "ours_dgrad_fp8": {"backward": "dgrad_fp8", **NO_OUTLIERS},
    "ours_dgrad_fp8_occ": {"backward": "dgrad_fp8", **OUTLIERS},
    "ours_fp8": {"backward": "fp8", **NO_OUTLIERS},
    "ours_fp8_occ": {"backward": "fp8", **OUTLIERS},
    "ours_fp8_save8": {"backward": "fp8", "save": "8bit", **NO_OUTLIERS},
    "ours_fp8_occ_save8": {"backward": "fp8", "save": "8bit", **OUTLIERS},
}

#: What the names of QuEST's arms end in: label, options of ``backend="qcompile_quest"``.
QUEST_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "": ("QuEST W4A4", {}),
    "_unrotated": ("QuEST W4A4, no rotation", {"activation": {"rotation": None}, "weight": {"rotation": None}}),
    "_1bit": ("QuEST W1A1", {"bits": 1}),
}


def _label(recipe: Options) -> str:
    parts = [f"FP4, backward {recipe['backward']}"]
    parts += ["OCC"] if recipe["activation"]["outliers"] else []
    parts += ["save 8bit"] if "save" in recipe else []
    return ", ".join(parts)


ARMS: dict[str, Arm] = {
    BASELINE: Arm("BF16", inductor),
    "torchao_tensorwise": torchao("tensorwise"),
    "torchao_rowwise": torchao("rowwise"),
    "torchao_rowwise_gw_hp": torchao("rowwise_with_gw_hp"),
    "torchao_experts": torchao_experts("torchao rowwise, experts as they are", swap_weights),
    "torchao_experts_padded": torchao_experts("torchao rowwise, experts rewritten to pad groups", use_padded_experts),
    "ours": without_options("qcompile_fp4", "FP4, no options", "ours_bf16_occ"),
    "quest": without_options("qcompile_quest", "QuEST, no options", "quest_bf16"),
    "ours_produced": without_options("qcompile_fp4", "FP4, fuse_producers", "", enable_passes=["fuse_producers"]),
    "ours_masked": without_options("qcompile_fp4", "FP4, no causal_masks", "", **MASKED),
    "ours_produced_masked": without_options(
        "qcompile_fp4", "FP4, fuse_producers, no causal_masks", "", **MASKED, enable_passes=["fuse_producers"]
    ),
    "quest_masked": without_options("qcompile_quest", "QuEST, no causal_masks", "", **MASKED),
    "ours_no_occ_masked": without_options(
        "qcompile_fp4", "FP4 without OCC, no causal_masks", "", **NO_OUTLIERS, **MASKED
    ),
    "ours_paper": without_options("qcompile_fp4", "FP4, as printed", "", variant="paper"),
    "quartet2": full_fp4("qcompile_quartet2", "Quartet II, emulated"),
    "quartet2_healed": full_fp4("qcompile_quartet2", "Quartet II, wide forward, emulated", forward="bf16"),
    "nvfp4": full_fp4("qcompile_nvfp4", "NVIDIA, emulated"),
    "tetrajet2": full_fp4("qcompile_tetrajet2", "TetraJet-v2's core, emulated"),
    "uniform4": full_fp4("qcompile_uniform4", "uniform, emulated"),
    "if4": full_fp4("qcompile_if4", "IF4, emulated"),
    "mxfp4": full_fp4("qcompile_mxfp4", "MXFP4, forward too, emulated", variant="full"),
    "mxfp8": full_fp4("qcompile_mxfp8", "MXFP8, emulated"),
    **{name: ours(_label(recipe), recipe) for name, recipe in OURS.items()},
    **{f"{name}_monitored": monitored(name) for name in ("ours_fp8", "ours_fp8_occ")},
    **{
        f"quest_{backward}{variant}": quest(variant, backward)
        for variant in QUEST_VARIANTS
        for backward in ("bf16", "fp8")
    },
    "quest_plain": Arm("QuEST W4A4 in plain torch", plain_quest),
    "quest_plain_dense": Arm(
        "QuEST W4A4 in plain torch, rotations as K × K matrices", partial(plain_quest, dense=True)
    ),
}

#: Measured unless ``--arms`` says otherwise: what fits into five minutes with two sizes.
DEFAULT_ARMS = (
    BASELINE, "torchao_tensorwise", "torchao_rowwise", "ours_bf16", "ours_bf16_occ", "ours_dgrad_fp8", "ours_fp8",
    "ours_fp8_occ", "ours_fp8_save8",
)  # fmt: skip


# --- one arm --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """A row of the CSV file. ``speedup`` is BF16's median time over this arm's; figures of a failed arm stay NaN."""

    size: str
    arm: str
    status: str = "ok"
    median_ms: float = math.nan
    min_ms: float = math.nan
    speedup: float = math.nan
    peak_gib: float = math.nan
    host_ms: float = math.nan
    tokens_per_second: float = math.nan
    compile_s: float = math.nan
    cold: bool = False
    first_loss: float = math.nan
    last_loss: float = math.nan
    gradient_cosine: float = math.nan


@dataclass(frozen=True)
class Run:
    """What all arms share."""

    device: torch.device
    steps: int = 15
    warm_up: int = 5
    seed: int = 0
    cudagraphs: bool = False
    model: str = "plain"
    cold: bool = False

    @property
    def options(self) -> Options:
        return {"triton.cudagraphs": True} if self.cudagraphs else {}


class Trainer:
    """A compiled model with its optimizer and batch."""

    def __init__(self, arm: Arm, size: Size, run: Run) -> None:
        self.run, self.monitor = run, arm.monitor
        self.model = build(size, run.device, torch.bfloat16, run.seed, run.model)
        self.compiled = arm.compile(self.model, run.options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.batch = dict(zip(("input_ids", "labels"), random_batch(size, run.device, run.seed), strict=True))

    def forward_backward(self) -> Tensor:
        """The loss, detached; gradients in the parameters."""
        if self.run.cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()
        output = self.compiled(**self.batch)
        loss: Tensor = getattr(output, "loss", output)
        loss.backward()
        return loss.detach().clone()  # a CUDA graph writes the next one to the same place

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.monitor is not None:
            self.monitor.step()

    def step(self) -> Tensor:
        loss = self.forward_backward()
        self.update()
        return loss

    def milliseconds(self, steps: int) -> tuple[list[float], float]:
        """Times of ``steps`` steps, and the loss of the last one."""
        losses = deque[Tensor](maxlen=1)
        times = milliseconds(lambda: losses.append(self.step()), steps, self.run.device.type == "cuda")
        return times, losses[0].item()

    def host_milliseconds(self, steps: int = 5) -> float:
        """Median time until the host has queued a step for an idle card."""
        times = []
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.step()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def gradients(self) -> dict[str, Tensor]:
        """About 16,384 evenly spread elements of every parameter's gradient, float32 on the CPU."""
        return {
            name: p.grad.flatten()[:: max(1, p.numel() // 16384)].float().cpu()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }


@dataclass(frozen=True)
class Reference:
    """What the gate compares with: loss and gradients of an arm's first step."""

    loss: float
    gradients: dict[str, Tensor]


class GateError(Exception):
    """An arm whose first step differs from its reference's by more than quantization explains."""


def first_step(arm: Arm, size: Size, run: Run) -> Reference:
    """Loss and gradients of an arm that is not measured."""
    trainer = Trainer(arm, size, run)
    return Reference(trainer.forward_backward().item(), trainer.gradients())


def measure(arm: Arm, size: Size, run: Run, reference: Reference | None) -> tuple[dict[str, float], Reference]:
    """Figures of one arm, and its first step. Raises :class:`GateError` before anything is timed."""
    cuda = run.device.type == "cuda"
    held_before = torch.cuda.memory_allocated() if cuda else 0
    trainer = Trainer(arm, size, run)
    start = time.perf_counter()
    own = Reference(trainer.forward_backward().item(), trainer.gradients())
    first_seconds = time.perf_counter() - start
    reference = reference or own
    same = not size.experts or own.loss == reference.loss
    cosine = check(own, reference, bounds_of(exact_forward=bool(arm.counterpart), same_experts=same))
    trainer.update()
    for _ in range(run.warm_up):
        trainer.step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times, last_loss = trainer.milliseconds(run.steps)
    median = statistics.median(times)
    figures = {
        "median_ms": median,
        "min_ms": min(times),
        "peak_gib": (torch.cuda.max_memory_allocated() - held_before) / 2**30 if cuda else math.nan,
        "host_ms": trainer.host_milliseconds() if cuda else math.nan,
        "tokens_per_second": 1e3 * size.tokens / median,
        "compile_s": first_seconds - median / 1e3,
        "first_loss": own.loss,
        "last_loss": last_loss,
        "gradient_cosine": cosine,
    }
    return figures, own


@dataclass(frozen=True)
class Bounds:
    """The least cosines between gradients of one parameter that pass: the worst one, and the median."""

    worst: float
    median: float


def bounds_of(exact_forward: bool, same_experts: bool) -> Bounds:
    """``exact_forward``: the reference differs in its backward alone. ``same_experts``: its tokens go where ours do."""
    if not exact_forward:
        return Bounds(-1.0, MEDIAN_COSINE)
    return Bounds(WORST_COSINE, WORST_COSINE) if same_experts else Bounds(MEDIAN_COSINE, WORST_COSINE)


def check(own: Reference, reference: Reference, bounds: Bounds) -> float:
    """The worst cosine between gradients of one parameter if that is what is bounded most, else the median.

    Raises :class:`GateError` naming what is out of bounds.
    """
    if not abs(own.loss - reference.loss) <= LOSS_BOUND * reference.loss:
        msg = f"first loss {own.loss:.4f}, the reference's is {reference.loss:.4f}"
        raise GateError(msg)
    if missing := reference.gradients.keys() - own.gradients.keys():
        msg = f"no gradient for {', '.join(sorted(missing)[:3])}"
        raise GateError(msg)
    cosines = {
        name: torch.cosine_similarity(own.gradients[name], expected, 0).item()
        for name, expected in reference.gradients.items()
    }
    ordered = sorted(cosines, key=lambda name: cosines[name] if math.isfinite(cosines[name]) else -math.inf)
    worst, median = ordered[0], ordered[len(ordered) // 2]
    if not math.isfinite(cosines[worst]):
        msg = f"gradient of {worst} has a cosine of {cosines[worst]}"
        raise GateError(msg)
    for name, bound, which in ((worst, bounds.worst, ""), (median, bounds.median, ", the median,")):
        if not cosines[name] >= bound:
            msg = f"gradient of {name} has a cosine of {cosines[name]:.3f}{which} with its reference"
            raise GateError(msg)
    return cosines[worst if bounds.worst == bounds.median else median]


def release() -> None:
    """Forget compiled code and give cached memory back, so that the next arm starts as the first did."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- all arms -------------------------------------------------------------------------------------------------------


def run_size(size: Size, arms: list[str], run: Run, log: Path) -> Iterator[Result]:
    """Measure BF16, the arms, and BF16 again; a failing arm is one line, and the others go on."""
    references: dict[str, Reference] = {}
    for name in [BASELINE, *(arm for arm in arms if arm != BASELINE), AGAIN]:
        result = Result(size.name, name, cold=run.cold)
        try:
            arm = ARMS[BASELINE if name == AGAIN else name]
            with quiet_stderr(log):
                if arm.counterpart and arm.counterpart not in references:
                    references[arm.counterpart] = first_step(ARMS[arm.counterpart], size, run)
                    release()
                reference = references.get(arm.counterpart or BASELINE)
                with fresh_cache() if run.cold else nullcontext():
                    figures, references[name] = measure(arm, size, run, reference)
            result = replace(result, **figures)
        except Exception as error:
            result.status = failure(error, log, f"{size.name} {name}")
        release()
        yield result
        if BASELINE not in references:
            return


def with_speedups(results: list[Result]) -> list[Result]:
    """The results with ``speedup`` against the mean of the BF16 medians of their size."""
    base: dict[str, float] = {}
    for size in {r.size for r in results}:
        medians = [r.median_ms for r in results if r.size == size and r.arm in (BASELINE, AGAIN) and r.status == "ok"]
        base[size] = statistics.fmean(medians) if medians else math.nan
    return [replace(r, speedup=base[r.size] / r.median_ms) for r in results]


def label_of(arm: str) -> str:
    return f"{ARMS[BASELINE].label} again" if arm == AGAIN else ARMS[arm].label


def plot(path: Path, results: list[Result]) -> None:
    """Bars of time and peak memory, a row of the figure per size."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(r.size for r in results))
    longest = max(sum(r.size == size for r in results) for size in sizes)
    figure = Figure(figsize=(11, 0.8 + len(sizes) * (0.9 + 0.3 * longest)), layout="constrained")
    grid = figure.subplots(len(sizes), 2, squeeze=False)
    colors = {"bf16": "0.55", "torchao": "tab:orange", "ours": "tab:blue"}
    for size, (times, memory) in zip(sizes, grid, strict=True):
        rows = [r for r in results if r.size == size]
        names = [label_of(r.arm) for r in rows]
        shades = [colors[ARMS.get(r.arm, ARMS[BASELINE]).provider] for r in rows]
        panels = (
            (times, [r.median_ms for r in rows], [f" {r.median_ms:.1f} ms  {r.speedup:.2f}×" for r in rows]),
            (memory, [r.peak_gib for r in rows], [f" {r.peak_gib:.2f} GiB" for r in rows]),
        )
        for axes, values, texts in panels:
            finite = [v if math.isfinite(v) else 0.0 for v in values]
            bars = axes.barh(names, finite, color=shades)
            shown = [t if math.isfinite(v) else " failed" for t, v in zip(texts, values, strict=True)]
            axes.bar_label(bars, labels=shown, fontsize=8)
            axes.margins(x=0.3, y=0.01)
            axes.invert_yaxis()
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        memory.set_yticklabels([])
        times.set_title(f"{size}: milliseconds per step (median)", fontsize=9, loc="left")
        memory.set_title("peak memory", fontsize=9, loc="left")
    where = environment()
    figure.suptitle(f"{where['card']}, torch {where['torch']}, {where['date']}", fontsize=9)
    figure.savefig(path, dpi=150)


def line(result: Result) -> str:
    """One row of the printed table."""
    head = f"{result.size:6} {result.arm:22}"
    if result.status != "ok":
        return f"{head} {result.status}"
    return (
        f"{head} {result.median_ms:8.1f} {result.min_ms:8.1f} {result.speedup:8.3f} {result.peak_gib:8.2f}"
        f" {result.host_ms:7.1f}"
        f" {result.tokens_per_second:9.0f} {result.compile_s:8.1f} {result.first_loss:7.3f} {result.last_loss:7.3f}"
        f" {result.gradient_cosine:7.3f}"
    )


HEAD = (
    f"{'size':6} {'arm':22} {'ms':>8} {'min ms':>8} {'× BF16':>8} {'GiB':>8} {'host':>7} {'tokens/s':>9} {'compile':>8}"
    f" {'loss 1':>7} {'last':>7} {'cosine':>7}"
)


def names_from(known: Mapping[str, object], given: str) -> list[str]:
    """Comma-separated names, each known, or "all"; for argparse."""
    names = list(known) if given == "all" else given.split(",")
    for name in names:
        if name not in known:
            msg = f"unknown {name!r}; known: {', '.join(known)}"
            raise argparse.ArgumentTypeError(msg)
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", type=lambda s: names_from(ARMS, s), default=list(DEFAULT_ARMS), help=", ".join(ARMS))
    parser.add_argument("--sizes", type=lambda s: names_from(SIZES, s), default=["d4096", "d2048"])
    parser.add_argument("--steps", type=int, default=15, help="measured steps per arm")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them, the first one not counted")
    parser.add_argument("--model", choices=MODELS, default="transformers")
    parser.add_argument("--cudagraphs", action="store_true")
    parser.add_argument("--cold", action="store_true", help="every arm compiles with empty caches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("training_step.csv"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("training_step: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    torch._logging.set_logs(all=logging.CRITICAL)
    run = Run(
        torch.device(given.device),
        given.steps,
        given.warm_up,
        cudagraphs=given.cudagraphs,
        model=given.model,
        cold=given.cold,
    )
    log = fresh_log(given.out)
    results: list[Result] = []
    for size in given.sizes:
        for result in run_size(SIZES[size], given.arms, run, log):
            results = with_speedups([*results, result])
            write_rows(given.out, results)
            print(line(results[-1]), flush=True)
        plot(given.out.with_suffix(".png"), results)
    print(f"\n{HEAD}", *map(line, results), sep="\n")
    caches = "empty" if given.cold else "as earlier arms and runs left them"
    print(f"compile: seconds of the first step beyond a later one, with caches {caches}")
    return 0 if all(r.status == "ok" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
