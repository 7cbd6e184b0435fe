"""Quantizers: format × granularity × scale rule × rounding, as one value object with a readable name.

A quantizer is what an IR node carries. It travels through graphs as its text form, for example
``"e2m1 row absmax even"``: plain data, so equal quantizers make equal nodes (common-subexpression elimination shares
them) and a dumped graph can be read. :func:`Quantizer.parse` and ``str()`` are inverse to each other.

The *quantization axis* is not part of a quantizer: it belongs to the node (`axis`, always the contraction axis of the
GEMM that reads the result). Shapes below are given with that axis moved last: x is ``[..., R, K]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch

from .definitions import Registry, cached_by_text, short_name, short_names
from .formats import Format, get_format, is_format, resolve_format
from .formulas import Scalar, floor_log2, power_of_two
from .gaussian import clip_of

__all__ = [
    "DRAWING",
    "EDEN_CHUNK",
    "ROUNDINGS",
    "SCALE_RULES",
    "SCALE_STORES",
    "Candidate",
    "Granularity",
    "Quantizer",
    "ScaleRule",
    "get_scale_rule",
    "is_granularity",
]

#: The exponents that a byte of E8M0 can stand for begin here, and those of normal float32 numbers.
SMALLEST_E8M0_EXPONENT, SMALLEST_EXPONENT = -127, -126

#: Smallest float32 scale of a tensor under a two-level rule. The smallest E4M3 number, 2⁻⁹, times it is normal.
SMALLEST_GLOBAL_SCALE = 2.0 ** (SMALLEST_EXPONENT + 9)

#: Blocks of a smaller absolute maximum are divided by this one in bitsandbytes; times the largest level, above 1.
SMALLEST_BNB_AMAX = 1e-38

#: Candidates are compared by integers, whose sum is the same in any order: an error is counted in units of this many
#: bits below the power of two that a block's absolute maximum begins with, rounded to the nearest, ties to even. One of
#: more than MOST_ERROR units, NaN included, counts as that many.
ERROR_BITS, MOST_ERROR = 19, 2.0**21
#: Squares of as many errors may not fit int64.
MOST_COMPARED = int(2**63 / MOST_ERROR**2)

#: How many neighbours along K share the correction of their scales under ``eden``; a last chunk may be short.
EDEN_CHUNK = 128
#: What the absolute maximum of a block is divided by under ``e4m3_eden``, less than 1 times the largest level, so that
#: the few that are cut off cost less than finer steps gain (17/16 of .93).
EDEN_CLIP = 17 / 16 * 0.93

#: What the ``rms`` rule adds to its clip α · rms, for rows of zeros.
RMS_FLOOR = 1e-8


@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale.

    ``tensor``: all of them, scales ``[1, …, 1]``. ``row``: one token or output channel, scales ``[..., R, 1]``.
    ``block`` of n, written ``block<n>`` as in OCP MX: n neighbours along K, scales ``[..., R, ⌈K/n⌉]``. ``square`` of
    n, written ``block<n>x<n>``: n×n elements, scales ``[..., ⌈R/n⌉, ⌈K/n⌉]``. A last block may be short.
    """

    kind: str
    size: int = 0

    @property
    def elements(self) -> int:
        """How many share a scale in blocks and squares."""
        return self.size**2 if self.kind == "square" else self.size

    def __str__(self) -> str:
        return f"block{self.size}x{self.size}" if self.kind == "square" else f"{self.kind}{self.size or ''}"

    @staticmethod
    def parse(text: str) -> Granularity:
        """Inverse of ``str()``. Raises ``ValueError`` with the known spellings, or the new one of a former spelling."""
        if former := re.fullmatch(r"tile([1-9]\d*)", text):
            msg = f"unknown granularity {text!r}: {text} is now block{former[1]}x{former[1]}"
            raise ValueError(msg)
        match = re.fullmatch(r"(tensor|row)|block([1-9]\d*)(?:x([1-9]\d*))?", text)
        if match is None:
            msg = f"unknown granularity {text!r}; use tensor, row, block<n> or block<n>x<n>, for example block16"
            raise ValueError(msg)
        whole, rows, columns = match.groups()
        if whole:
            return Granularity(whole)
        if columns is None:
            return Granularity("block", int(rows))
        if rows != columns:
            msg = f"granularity {text!r} is not square; use block<n>x<n>, for example block{rows}x{rows}"
            raise ValueError(msg)
        return Granularity("square", int(rows))


#: What a scale is stored as: name -> torch dtype. Numbers are rounded to the nearest there, ties to even, and saturate;
#: e8m0 keeps the power of two that is not larger.
SCALE_STORES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "ue5m3": "uint8",
    "e8m0": "uint8",
}
#: The largest number of those that torch has no type for, which have no sign.
_LARGEST_UNSIGNED = {"ue5m3": 61440.0, "e8m0": 2.0**127}


@dataclass(frozen=True)
class ScaleRule:
    """How a scale s (x̂ = s · level) follows from the elements that share it.

    Attributes:
        name: what texts call it, a key of :data:`SCALE_RULES`.
        statistic: what a scale is derived from: ``"amax"``, their absolute maximum, float32 and never below
            :attr:`Quantizer.amax_floor`, or ``"rms"``, their root mean square, float64.
        scale: the formula, ``(statistic, format) → scale`` before it is stored.
        reciprocal: the formula of γ, the factor from x to grid units, ``(statistic, format) → γ``. ``None``: 1 over the
            scale that is stored, and 0 where that is 0.
        store: what the scale is stored as, a key of :data:`SCALE_STORES`.
        two_level: whether the stored scale is relative to a float32 scale of the whole tensor.
        covers: whether no element leaves the grid by more than rounding takes back, as long as γ is a normal number.
            Kernels then clamp only where it is not.
        floor: smallest absolute maximum that the formulas are given; ``None``: one that suits any format
            (:attr:`Quantizer.amax_floor`).
        candidates: factors on the scale, of which every block keeps the one whose codes, rounded to the nearest, have
            the least error (:data:`ERROR_BITS`); of equal errors the first.
        error: what is added up for that: the ``"squared"`` differences or the ``"absolute"`` ones.
        largest: under a two-level rule the tensor's scale is its absolute maximum over this and the largest level.
        source: where it is defined.
    """

    name: str
    scale: Callable[[Scalar, Format], Scalar] = field(repr=False)
    reciprocal: Callable[[Scalar, Format], Scalar] | None = field(default=None, repr=False)
    store: str = "fp32"
    statistic: str = "amax"
    two_level: bool = False
    covers: bool = False
    floor: float | None = None
    candidates: tuple[float, ...] = (1.0,)
    error: str = "squared"
    largest: float = 448.0
    source: str = ""

    @property
    def storage(self) -> str:
        """Name of the torch dtype of stored scales."""
        return SCALE_STORES[self.store]

    @property
    def largest_stored(self) -> float:
        """The largest finite scale that is stored."""
        return _LARGEST_UNSIGNED.get(self.store) or torch.finfo(getattr(torch, self.storage)).max


def _absmax(amax: Scalar, fmt: Format) -> Scalar:
    return amax / fmt.max


def _inverse_absmax(amax: Scalar, fmt: Format) -> Scalar:
    return fmt.max / amax


def _pow2_exponent(amax: Scalar, fmt: Format) -> Scalar:
    """⌊log2(max / amax)⌋; frexp's −1 where the group is not finite."""
    return torch.where(amax.isfinite(), floor_log2(fmt.max / amax), -1)


def _absmax_pow2(amax: Scalar, fmt: Format) -> Scalar:
    return torch.where(amax.isfinite(), power_of_two(-_pow2_exponent(amax, fmt)), float("nan"))


def _inverse_absmax_pow2(amax: Scalar, fmt: Format) -> Scalar:
    return power_of_two(_pow2_exponent(amax, fmt))


def _e8m0_exponent(amax: Scalar, fmt: Format) -> Scalar:
    # One bit of half-integers has a maximum below 1: its amax may be subnormal, and twice it is not.
    shift = max(-fmt.max_exponent, 0)
    exponent = torch.where(amax.isfinite(), floor_log2(amax * 2.0**shift) - shift, -1)  # −1 is frexp's
    return (exponent - fmt.max_exponent).clamp(-127, 127)


def _e8m0(amax: Scalar, fmt: Format) -> Scalar:
    return torch.where(amax.isfinite(), power_of_two(_e8m0_exponent(amax, fmt)), float("nan"))


def _inverse_e8m0(amax: Scalar, fmt: Format) -> Scalar:
    return power_of_two(-_e8m0_exponent(amax, fmt))


def _e8m0_ceil_exponent(amax: Scalar, fmt: Format) -> Scalar:
    return (-_pow2_exponent(amax, fmt)).clamp(-127, 127)


def _e8m0_ceil(amax: Scalar, fmt: Format) -> Scalar:
    return torch.where(amax.isfinite(), power_of_two(_e8m0_ceil_exponent(amax, fmt)), float("nan"))


def _inverse_e8m0_ceil(amax: Scalar, fmt: Format) -> Scalar:
    return power_of_two(-_e8m0_ceil_exponent(amax, fmt))


def _rms_clip(rms: Scalar, fmt: Format) -> Scalar:
    return rms * clip_of(fmt.name) + RMS_FLOOR


def _rms(rms: Scalar, fmt: Format) -> Scalar:
    return (_rms_clip(rms, fmt) / fmt.max).to(torch.float32)


def _inverse_rms(rms: Scalar, fmt: Format) -> Scalar:
    return (fmt.max / _rms_clip(rms, fmt)).to(torch.float32)


def _absmax_guard(amax: Scalar, fmt: Format) -> Scalar:
    return amax / (fmt.max * (16 / 17))


def _absmax_eden(amax: Scalar, fmt: Format) -> Scalar:
    return amax / (fmt.max / EDEN_CLIP)


def _inverse_absmax_bnb(amax: Scalar, fmt: Format) -> Scalar:
    return fmt.max / amax.clamp(min=SMALLEST_BNB_AMAX * max(fmt.max, 1.0))


SCALE_RULES: Registry[ScaleRule] = Registry(
    "scale rule",
    (
        ScaleRule("absmax", _absmax, _inverse_absmax, covers=True, source="s = amax / max; arXiv 2501.17116 eq. 1"),
        ScaleRule(
            "absmax_pow2",
            _absmax_pow2,
            _inverse_absmax_pow2,
            covers=True,
            source="1/s = 2^⌊log2(max / amax)⌋; the released code of arXiv 2501.17116",
        ),
        ScaleRule(
            "e8m0",
            _e8m0,
            _inverse_e8m0,
            store="e8m0",
            source="s = 2^(⌊log2 amax⌋ − emax), byte = exponent + 127; OCP MX v1.0 §5.2.1, §6.3",
        ),
        ScaleRule(
            "e8m0_ceil",
            _e8m0_ceil,
            _inverse_e8m0_ceil,
            store="e8m0",
            covers=True,
            source="the smallest s = 2^n with amax ≤ s · max, so that nothing is cut off; arXiv 2506.08027",
        ),
        ScaleRule(
            "rms",
            _rms,
            _inverse_rms,
            statistic="rms",
            source="s = (α · rms + 10⁻⁸) / max, α of gaussian.py; arXiv 2502.05003 §3.1",
        ),
        ScaleRule("e4m3", _absmax, store="e4m3", two_level=True, source="NVFP4: E4M3 × FP32; arXiv 2509.25149 App. B"),
        ScaleRule(
            "e4m3_46",
            _absmax,
            store="e4m3",
            two_level=True,
            candidates=(1.0, 1.5),
            largest=256.0,
            source="NVFP4 whose blocks end at 6 or at 4 (s · 1.5), whichever errs less; arXiv 2512.02010",
        ),
        ScaleRule(
            "e4m3_46_mae",
            _absmax,
            store="e4m3",
            two_level=True,
            candidates=(1.0, 1.5),
            error="absolute",
            largest=256.0,
            source="e4m3_46 by the sum of absolute errors; TransformerEngine's nvfp4_4over6, err_mode MAE",
        ),
        ScaleRule(
            "e4m3_46_448",
            _absmax,
            store="e4m3",
            two_level=True,
            candidates=(1.0, 1.5),
            source="e4m3_46 with all of E4M3's range, where s · 1.5 of the largest blocks is 448; TransformerEngine",
        ),
        ScaleRule(
            "e4m3_46_mae_448",
            _absmax,
            store="e4m3",
            two_level=True,
            candidates=(1.0, 1.5),
            error="absolute",
            source="e4m3_46_448 by the sum of absolute errors; TransformerEngine's nvfp4_4over6, err_mode MAE",
        ),
        ScaleRule(
            "e5m3",
            _absmax,
            store="ue5m3",
            two_level=True,
            source="NVFP4 with scales of 5 exponent bits and no sign, 137 times the range above; arXiv 2609.02846",
        ),
        ScaleRule(
            "e4m3_guard",
            _absmax_guard,
            store="e4m3",
            two_level=True,
            largest=448.0 * 16 / 17,
            source="NVFP4 whose E4M3 scales cut nothing off when they are rounded down; arXiv 2601.22813",
        ),
        ScaleRule(
            "e4m3_eden",
            _absmax_eden,
            store="e4m3",
            two_level=True,
            largest=255.99 / EDEN_CLIP,
            source="NVFP4 whose scales leave room to be corrected upwards; arXiv 2601.22813, released code",
        ),
        ScaleRule(
            "absmax_bnb",
            _absmax,
            _inverse_absmax_bnb,
            covers=True,
            floor=0.0,
            source="s = amax / max, 0 of zero blocks; γ of tiny ones is that of 10⁻³⁸; bitsandbytes",
        ),
    ),
)


def get_scale_rule(name: str) -> ScaleRule:
    """Look a scale rule up by name. Raises ``ValueError`` listing the known names."""
    rule = SCALE_RULES.get(SCALE_RULES.resolve(name))
    if rule is None:
        msg = f"unknown scale rule {name!r}; known: {', '.join(SCALE_RULES.known)}"
        raise ValueError(msg)
    return rule


ROUNDINGS: dict[str, str] = {
    "even": "nearest; ties go to the even code (IEEE, ml_dtypes), of code books to the lower level (bitsandbytes)",
    "half_up": "nearest; ties go toward +∞ (the look-up kernel of arXiv 2501.17116; QuEST's floor on mid-rise grids)",
    "stochastic": "to either neighbour with probability by distance, from a seed tensor on the device",
    "eden": "even; then the scales of 128 neighbours times ⟨y, y⟩ / ⟨y, level⟩, stochastically (MS-EDEN, Quartet II)",
}
#: What a correction is rounded to stochastically: stores of scales that are small floats.
_CORRECTED_STORES = ("e4m3", "e5m2")
#: Those that draw random numbers.
DRAWING = ("stochastic", "eden")
#: Former name -> what it is now.
_RENAMED_ROUNDINGS = {"up": "half_up"}

#: The sets that the words of a quantizer's text are taken from, in the order of ``str()``, and what stands for a word
#: that is left out.
_DEFAULTS = {"format": "", "granularity": "row", "scale rule": "absmax", "rounding": "even"}


_FORM = "quantizer {!r} is not '<format> [<granularity>] [<scale rule>] [<rounding>]', in any order"


def is_granularity(word: str) -> bool:
    """Whether ``word`` can only be meant as one."""
    return re.fullmatch(r"tensor|row|(block|tile)\d.*", word) is not None


def _sets_of(word: str) -> list[str]:
    """The sets that ``word`` belongs to, or did under a former name. Only ``e4m3`` is in two, format and scale rule."""
    belongs = {
        "format": is_format(word),
        "granularity": is_granularity(word),
        "scale rule": word in SCALE_RULES,
        "rounding": word in ROUNDINGS or word in _RENAMED_ROUNDINGS,
    }
    return [name for name, is_member in belongs.items() if is_member]


def _assigned(text: str) -> dict[str, str]:
    """The words of a quantizer's text by the set each is of. A word of no set takes the first place that is left, where
    reading it says what is wrong with it.
    """
    words, found = text.split(), dict[str, str]()
    sets = {word: _sets_of(word) for word in words}
    for word in sorted(words, key=lambda word: len(sets[word]) or len(_DEFAULTS)):  # stable: the certain ones first
        candidates = sets[word] or list(_DEFAULTS)
        free = [name for name in candidates if name not in found]
        if not free and sets[word]:
            taken = candidates[0]
            msg = f"quantizer {text!r}: {found[taken]!r} and {word!r} each name a {taken}; give one"
            raise ValueError(short_names(msg))
        if not free:
            raise ValueError(_FORM.format(short_names(text)))
        found[free[0]] = word
    return found


@dataclass(frozen=True)
class Candidate:
    """What a block may take: a ``factor`` on its scale and a ``grid`` to round to. A scale is ``marked`` by its sign
    where the grid is the second of a pair.
    """

    factor: float
    grid: Format
    marked: bool


@dataclass(frozen=True)
class Quantizer:
    """Format, granularity, scale rule and rounding of one quantized operand."""

    format: Format
    granularity: Granularity = Granularity("row")
    scale: ScaleRule = SCALE_RULES["absmax"]
    rounding: str = "even"

    def __post_init__(self) -> None:
        if self.rounding in _RENAMED_ROUNDINGS:
            msg = f"unknown rounding {self.rounding!r}: {self.rounding} is now {_RENAMED_ROUNDINGS[self.rounding]}"
            raise ValueError(msg)
        if self.rounding not in ROUNDINGS:
            msg = f"unknown rounding {self.rounding!r}; known: {', '.join(ROUNDINGS)}"
            raise ValueError(msg)
        if any(grid.torch_dtype for grid in self.format.choices) and self.rounding == "half_up":
            name = short_name(self.format.name)
            msg = f"{name} rounds to even or stochastically; ties toward +∞ exist for other grids only"
            raise ValueError(msg)
        if self.rounding == "eden":
            self._check_correction()
        if self.rounding == "stochastic" and not all(grid.has_zero or grid.codebook for grid in self.format.choices):
            name = short_name(self.format.name)
            msg = f"stochastic rounding on {name}: its codes keep the sign, which biases values around zero"
            raise ValueError(msg)
        if len(self.candidates) > 1:
            self._check_choice()
        if self.scale.two_level and self.granularity.kind not in ("block", "square"):
            msg = f"scale rule {short_name(self.scale.name)} needs blocks, for example block16; got {self.granularity}"
            raise ValueError(msg)

    def _check_correction(self) -> None:
        """Raises ``ValueError`` where scales cannot be corrected after rounding."""
        divides = self.granularity.kind == "block" and EDEN_CHUNK % self.granularity.size == 0
        if not divides:
            msg = f"eden corrects the blocks of {EDEN_CHUNK} elements, for example block16; got {self.granularity}"
            raise ValueError(msg)
        if self.scale.store not in _CORRECTED_STORES:
            stores, name = ", ".join(_CORRECTED_STORES), short_name(self.scale.name)
            msg = f"eden rounds scales stochastically: it takes a rule with {stores}, for example e4m3_eden; got {name}"
            raise ValueError(msg)
        if len(self.candidates) > 1:
            msg = f"eden corrects the scale that a block has, and {self} lets blocks choose; use e4m3_eden"
            raise ValueError(short_names(msg))

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers, for which it needs a seed."""
        return self.rounding in DRAWING

    @property
    def of_codes(self) -> str:
        """The rounding of codes alone."""
        return "even" if self.rounding == "eden" else self.rounding

    @property
    def nearest(self) -> str:
        """How codes are rounded where nothing is drawn: by estimators, and where candidates are compared."""
        return "even" if self.draws else self.rounding

    def _check_choice(self) -> None:
        """Raises ``ValueError`` where blocks cannot choose among candidates."""
        pair = self.format.grids
        who = f"format {short_names(self.format.name)}" if pair else f"scale rule {short_name(self.scale.name)}"
        if self.granularity.kind not in ("block", "square"):
            msg = f"{who} chooses by blocks, for example block16; got {self.granularity}"
            raise ValueError(msg)
        if self.granularity.elements >= MOST_COMPARED:
            msg = f"{who} adds up errors of at most {MOST_COMPARED - 1} elements; got {self.granularity}"
            raise ValueError(msg)
        if pair and self.scale.statistic != "amax":
            msg = f"{who} is chosen by errors relative to the absolute maximum, which {self.scale.name} does not find"
            raise ValueError(msg)
        if pair and self.scale.store in _LARGEST_UNSIGNED:
            signed = ", ".join(store for store in SCALE_STORES if store not in _LARGEST_UNSIGNED)
            msg = (
                f"{who} is marked by the sign of its scale, which {self.scale.store} has not; use a rule with {signed}"
            )
            raise ValueError(msg)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """What every block may take; of candidates that err alike the first."""
        grids = self.format.choices
        return tuple(
            Candidate(factor, grid, grid is not grids[0]) for grid in grids for factor in self.scale.candidates
        )

    @property
    def amax_floor(self) -> float:
        """Smallest absolute maximum that a scale is derived from; groups below it, all-zero ones above all, get its
        scale.

        It and a float32 scale are then normal numbers, and the scale's reciprocal is finite. For E8M0 that scale is the
        smallest there is: 2⁻¹²⁷, byte 0 (OCP MX v1.0 §5.4.1).
        """
        if self.scale.floor is not None:
            return self.scale.floor
        if self.scale.name == "e8m0":
            return 2.0 ** (self.format.max_exponent + SMALLEST_E8M0_EXPONENT)
        return max(*(grid.max for grid in self.format.choices), 1.0) * 2.0**SMALLEST_EXPONENT

    def __str__(self) -> str:
        return f"{self.format.name} {self.granularity} {self.scale.name} {self.rounding}"

    @staticmethod
    def resolve(text: str) -> str:
        """``text`` with the full names of users' formats and scale rules."""
        return " ".join(SCALE_RULES.resolve(resolve_format(word)) for word in text.split())

    @staticmethod
    @cached_by_text
    def parse(text: str) -> Quantizer:
        """Inverse of ``str()``. Words may come in any order, and all but the format be left out.

        Raises ``ValueError`` naming the word that is not understood, or two that say the same.
        """
        return Quantizer._parsed(Quantizer.resolve(text))

    @staticmethod
    @cache
    def _parsed(text: str) -> Quantizer:
        if not text:
            raise ValueError(_FORM.format(text))
        words = _DEFAULTS | _assigned(text)
        if not words["format"]:
            msg = f"quantizer {short_names(text)!r} names no format; for example 'e2m1 {short_names(text)}'"
            raise ValueError(msg)
        granularity = Granularity.parse(words["granularity"])
        return Quantizer(
            get_format(words["format"]), granularity, get_scale_rule(words["scale rule"]), words["rounding"]
        )

    def check_global_scale(self, global_scale: object) -> None:
        """Raises ``ValueError`` if the scale rule has two levels and there is no global scale."""
        if self.scale.two_level and global_scale is None:
            msg = f"scale rule {self.scale.name} needs the global scale of the tensor"
            raise ValueError(msg)

    def packed_size(self, size: int) -> int:
        """Bytes that hold ``size`` codes of one row."""
        per_byte = self.format.codes_per_byte
        return (size + per_byte - 1) // per_byte

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales for a tensor of ``shape`` (quantization axis last)."""
        n = self.granularity.size
        match self.granularity.kind:
            case "tensor":
                return (1,) * len(shape)
            case "row":
                return (*shape[:-1], 1)
            case "block":
                return (*shape[:-1], (shape[-1] + n - 1) // n)
        if len(shape) < 2:
            msg = f"granularity {self.granularity} needs a matrix, got shape {tuple(shape)}"
            raise ValueError(msg)
        return (*shape[:-2], (shape[-2] + n - 1) // n, (shape[-1] + n - 1) // n)
