"""Random programs as data: leaves, then one line of Python a step.

A :class:`Program` is what hypothesis draws, shrinks and prints. :meth:`Program.source` is the text of a function of its
leaves; run by eager torch it is the model, and compiled it is the test. :class:`ProgramModule` is the same with
parameters and buffers in a module.

Programs are drawn by running them on the meta device, step by step: shapes, dtypes, strides, and whether autograd
allows an in-place op then need no rules of our own, and a step that torch refuses is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["PRODUCTS", "Leaf", "Program", "ProgramModule", "Step", "programs"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Sizes of free dimensions: empty, one, odd, around a byte of codes and a block of 16.
SIZES = (2, 3, 5, 7, 8, 16, 17, 33, 1, 0)
_NAMESPACE = {"torch": torch, "F": F}


# --- programs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A tensor the program is given. ``role``: parameter, buffer or input; ``layout`` and ``content``: tables below."""

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    layout: str = "contiguous"
    content: str = "plain"

    def make(self, generator: torch.Generator | None, exact: bool, device: str = "cpu") -> Tensor:
        """A fresh tensor. ``exact``: quarters of integers up to 3, of which float32 sums of products are exact."""

        def values(*shape: int) -> Tensor:
            if device == "meta":
                return torch.empty(shape, dtype=self.dtype, device="meta")
            if exact:
                numbers = torch.randint(-12, 13, shape, generator=generator) / 4
            else:
                numbers = torch.randn(shape, generator=generator)
            return CONTENTS[self.content](numbers).to(self.dtype)

        tensor = LAYOUTS[self.layout](self.shape, values)
        if self.role == "parameter":
            return nn.Parameter(tensor.detach(), requires_grad=self.requires_grad)
        return tensor.detach().requires_grad_(self.requires_grad)


def _spoil(value: float) -> Callable[[Tensor], Tensor]:
    def spoiled(x: Tensor) -> Tensor:
        x.view(-1)[x.numel() // 2 :][:1] = value
        return x

    return spoiled


def _zero_rows(x: Tensor) -> Tensor:
    if x.dim():
        x[::2] = 0
    return x


def _wide(x: Tensor) -> Tensor:
    """Rows of very different size, by powers of two."""
    return x * 2.0 ** (torch.arange(x.shape[0]) % 9 - 4).view(-1, *[1] * (x.dim() - 1)) if x.dim() else x


CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "zero rows": _zero_rows,
    "zero": torch.zeros_like,
    "wide": _wide,
    "nan": _spoil(float("nan")),
    "inf": _spoil(float("inf")),
    "-inf": _spoil(float("-inf")),
}

LAYOUTS: dict[str, Callable[[tuple[int, ...], Callable[..., Tensor]], Tensor]] = {
    "contiguous": lambda shape, values: values(*shape),
    "reversed": lambda shape, values: values(*reversed(shape)).permute(*reversed(range(len(shape)))),
    "every other": lambda shape, values: values(*shape[:-1], 2 * shape[-1])[..., ::2],
    "with an offset": lambda shape, values: values(1 + torch.Size(shape).numel())[1:].view(shape),
    "expanded": lambda shape, values: values(1, *shape[1:]).expand(shape),
}


@dataclass(frozen=True)
class Step:
    """One line: ``target = text``, or ``text`` alone where it changes its operand in place."""

    text: str
    target: str = ""
    product: bool = False
    addend: bool = False
    no_grad: bool = False

    def __str__(self) -> str:
        line = f"{self.target} = {self.text}" if self.target else self.text
        return f"with torch.no_grad(): {line}" if self.no_grad else line


@dataclass(frozen=True)
class Program:
    """Leaves, steps and the names of the results.

    ``exact``: only arithmetic that float32 does without rounding, apart from casts. ``autocast``: dtype the whole
    forward runs under. ``as_module``: parameters and buffers belong to a module; else all leaves are arguments.
    ``dynamic``: it is compiled for sizes of inputs that are not known.
    """

    leaves: tuple[Leaf, ...]
    steps: tuple[Step, ...]
    results: tuple[str, ...]
    exact: bool
    as_module: bool = True
    autocast: torch.dtype | None = None
    dynamic: bool = False
    seed: int = 0

    def is_given_as(self, leaf: Leaf) -> str:
        """The role of a leaf for the compiled program: of a function, buffers are inputs like any other."""
        return "input" if leaf.role == "buffer" and not self.as_module else leaf.role

    @property
    def products(self) -> int:
        return sum(step.product for step in self.steps)

    @property
    def bitwise(self) -> bool:
        """Whether forward values have no choice. Where a product of 16 bits adds something, it may round once or
        twice.
        """
        narrow = self.dtypes != {torch.float32}
        return self.exact and not (narrow and any(step.addend for step in self.steps))

    @property
    def dtypes(self) -> set[torch.dtype]:
        casts = {d for d in DTYPES if any(str(d) in step.text for step in self.steps)}
        return casts | {leaf.dtype for leaf in self.leaves} | ({self.autocast} if self.autocast else set())

    def source(self) -> str:
        lines = [f"def program({', '.join(leaf.name for leaf in self.leaves)}):"]
        lines += [f"    {step}" for step in self.steps]
        return "\n".join([*lines, f"    return ({', '.join(self.results)},)", ""])

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        """The program in eager torch; takes the leaves in order."""
        scope = dict(_NAMESPACE)
        exec(self.source(), scope)
        return scope["program"]

    def make_leaves(self, draw: int = 0) -> dict[str, Tensor]:
        """Fresh leaves by name; ``draw`` counts how often values are drawn anew."""
        generator = torch.Generator().manual_seed(1000 * self.seed + draw)
        return {leaf.name: leaf.make(generator, self.exact) for leaf in self.leaves}


class ProgramModule(nn.Module):
    """A program whose parameters and buffers live in a module; ``forward`` takes the inputs in order."""

    def __init__(self, program: Program, leaves: dict[str, Tensor]) -> None:
        super().__init__()
        arguments = []
        for leaf in program.leaves:
            if leaf.role == "parameter":
                self.register_parameter(leaf.name, leaves[leaf.name])  # type: ignore[arg-type]
            elif leaf.role == "buffer":
                self.register_buffer(leaf.name, leaves[leaf.name])
            else:
                arguments.append(leaf.name)
        held = [leaf.name for leaf in program.leaves if leaf.role != "input"]
        lines = [f"def forward(self, {', '.join(arguments)}):", *(f"    {name} = self.{name}" for name in held)]
        scope = dict(_NAMESPACE)
        exec("\n".join([*lines, *program.source().splitlines()[1:]]), scope)
        self.run = scope["forward"].__get__(self)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.run(*inputs)


# --- spellings of products ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """How a product is written. ``a``, ``b``, ``c``: dimensions of its operands; equal letters are equal sizes."""

    text: str
    a: str
    b: str
    c: str | None = None
    fixed: dict[str, int] = field(default_factory=dict)


def _ranks(text: str, *shapes: str, fixed: dict[str, int] | None = None) -> list[Spelling]:
    """A spelling for several ranks, ``"mk nk"`` or ``"mk nk n"`` each."""
    return [Spelling(text, *shape.split(), fixed=fixed or {}) for shape in shapes]


def _einsum(equation: str, text: str = "torch.einsum({equation!r}, {{a}}, {{b}})") -> list[Spelling]:
    inputs = equation.replace("...", "pq").replace(" ", "").partition("->")[0].split(",")
    return [Spelling(text.format(equation=equation), *inputs)]


_MATMUL = ("mk kn", "bmk kn", "bmk bkn", "mk bkn", "abmk kn", "abmk bkn", "k kn", "mk k", "bmk k", "k k")
_CONV = ", stride={s}, padding={p})"

#: Every spelling that `find_gemms` understands and a few it refuses, by name.
PRODUCTS: dict[str, list[Spelling]] = {
    "linear": _ranks("F.linear({a}, {b})", "mk nk", "bmk nk", "k nk", "abmk nk"),
    "linear bias": _ranks("F.linear({a}, {b}, {c})", "mk nk n", "bmk nk n"),
    "linear keywords": _ranks("F.linear(input={a}, weight={b}, bias={c})", "bmk nk n"),
    "@": _ranks("{a} @ {b}", *_MATMUL),
    "matmul": _ranks("torch.matmul({a}, {b})", *_MATMUL),
    "Tensor.matmul": _ranks("{a}.matmul({b})", *_MATMUL),
    "linalg.matmul": _ranks("torch.linalg.matmul({a}, {b})", "mk kn", "bmk bkn"),
    "__rmatmul__": _ranks("{a}.__rmatmul__({b})", "kn mk"),
    "mm": _ranks("torch.mm({a}, {b})", "mk kn"),
    "Tensor.mm": _ranks("{a}.mm({b})", "mk kn"),
    "aten.mm": _ranks("torch.ops.aten.mm.default({a}, {b})", "mk kn"),
    "mv": _ranks("torch.mv({a}, {b})", "mk k"),
    "addmv": _ranks("torch.addmv({c}, {a}, {b})", "mk k m"),
    "bmm": _ranks("torch.bmm({a}, {b})", "bmk bkn"),
    "Tensor.bmm": _ranks("{a}.bmm({b})", "bmk bkn"),
    "addmm": _ranks("torch.addmm({c}, {a}, {b})", "mk kn n", "mk kn mn"),
    "addmm alpha beta": _ranks("torch.addmm({c}, {a}, {b}, alpha=2, beta=0.5)", "mk kn n", "mk kn mn"),
    "Tensor.addmm": _ranks("{c}.addmm({a}, {b})", "mk kn n"),
    "baddbmm": _ranks("torch.baddbmm({c}, {a}, {b})", "bmk bkn bmn", "bmk bkn n"),
    "addbmm": _ranks("torch.addbmm({c}, {a}, {b})", "bmk bkn mn", "bmk bkn n"),
    "addmm_": _ranks("{c}.clone().addmm_({a}, {b})", "mk kn mn"),
    "baddbmm_": _ranks("{c}.clone().baddbmm_({a}, {b})", "bmk bkn bmn"),
    "inner": _ranks("torch.inner({a}, {b})", "mk nk", "bmk nk", "mk k", "k k", "k nk"),
    "einsum": [
        s
        for equation in (
            "bsk,nk->bsn", "mk,kn->mn", "mk,nk->nm", "mk,kn", "km,kn->mn", "bks,kn->nsb", "bhqd,bhkd->bhqk",
            "bhqk,bhkd->bhqd", "ebk,enk->ebn", "...k,kn->...n", "bsk,nk->n", "k,nk->n", "bmk, bkn -> bmn",
        )
        for s in _einsum(equation)
    ],
    "einsum refused": [
        s for equation in ("bhd,hdn->bn", "m,n->mn", "mk,mk->mk", "kk,kn->n", "mk,mk->") for s in _einsum(equation)
    ],
    "einsum of a list": _einsum("bsk,nk->bsn", "torch.einsum({equation!r}, [{{a}}, {{b}}])"),
    "tensordot": [
        *_ranks("torch.tensordot({a}, {b}, dims=1)", "mk kn", "bmk kn", "mk knb", "mk k"),
        *_ranks("torch.tensordot({a}, {b}, ([1], [0]))", "bkm kn", "mk kn"),
        *_ranks("torch.tensordot({a}, {b}, dims=([-1], [-1]))", "bmk nk"),
        *_ranks("torch.tensordot({a}, {b}, 2)", "mhk hkn"),
    ],
    "conv1d": [
        *_ranks("F.conv1d({a}, {b}, {c}, padding=1)", "bcl ocw o", fixed={"w": 3}),
        *_ranks("F.conv1d({a}, {b})", "bcl ocw", "cl ocw", fixed={"w": 1}),
        *_ranks("F.conv1d({a}, {b}, stride=2)", "bcl ocw", fixed={"w": 2}),
        *_ranks("F.conv1d({a}, {b}, None, 1, 'same', 2, 1)", "bcl ocw", fixed={"w": 3}),
    ],
    "conv2d": [
        *_ranks("F.conv2d({a}, {b}, {c})", "bchw ocij o", fixed={"i": 2, "j": 3}),
        *_ranks("F.conv2d({a}, {b}, stride=(2, 3))", "bchw ocij", "chw ocij", fixed={"i": 2, "j": 3}),
        *_ranks("F.conv2d({a}, {b}, padding='valid')", "bchw ocij", fixed={"i": 1, "j": 1}),
        *_ranks("F.conv2d({a}, {b}, groups={a}.shape[1], padding=1)", "bchw cuij", fixed={"u": 1, "i": 3, "j": 3}),
    ],
    "vectors": _ranks("torch.dot({a}, {b})", "k k"),
}  # fmt: skip

#: Views and copies, as text of ``x``; those that torch refuses for a shape are left out.
VIEWS = (
    "{x}.transpose(-1, -2)", "{x}.mT", "{x}.T", "{x}.t()", "{x}.permute(2, 0, 1)", "{x}.movedim(0, -1)",
    "{x}.unsqueeze(0)", "{x}.squeeze()", "{x}.flatten(0, 1)", "{x}.flatten(-2)", "{x}[1:]", "{x}[..., ::2]", "{x}[0]",
    "{x}.reshape(-1, {x}.shape[-1])", "{x}.reshape(-1)", "{x}.view(-1, {x}.shape[-1])", "{x}.unflatten(-1, (2, -1))",
    "{x}.unsqueeze(0).expand(3, *{x}.shape)", "{x}.contiguous()", "{x}.clone()", "{x}.detach()",
    "{x}.narrow(-1, 0, 2)", "{x}.chunk(2, -1)[0]", "{x}.flip(-1)", "torch.cat([{x}, {x}], -1)", "{x}.diagonal()",
    "{x}.swapdims(0, -1)", "{x}.swapaxes(0, 1)", "{x}.adjoint()", "{x}.moveaxis(0, -1)", "{x}.ravel()", "{x}.mH",
    "{x}.tensor_split(2)[0]", "{x}.hsplit(1)[0]", "torch.vsplit({x}, 1)[0]", "{x}.select(0, 0)", "{x}.unbind(0)[-1]",
    "{x}.split_with_sizes([1, {x}.shape[0] - 1])[1]", "{x}.index_select(-1, torch.tensor([0, 0]))", "{x}.roll(1, 0)",
    "{x}.repeat(2, *[1] * ({x}.dim() - 1))", "{x}.tile(2)", "{x}.unfold(-1, 2, 2)", "{x}.view_as({x})", "{x}.data",
    "{x}.expand_as({x})", "{x}.reshape_as({x})", "{x}[[-1, 0]]", "torch.transpose({x}, 0, 1)",
    "torch.movedim({x}, 0, 1)", "torch.ops.aten.transpose.int({x}, 0, 1)", "{x}.repeat_interleave(2, 0)",
    "torch.ops.aten.slice.Tensor({x}, 0, 0, 2)",
)  # fmt: skip
#: Whether these alias their operand depends on its strides; nothing that they touch is changed in place.
_MAYBE_ALIAS = (".reshape", ".contiguous", ".flatten", ".to(", ".ravel", ".swap", ".data")
#: What is computed from parameters (x, y of one shape) and a mask m, and stays a weight. Exact where x and y are.
EXACT_WEIGHTS = (
    "{x} * 0.5", "{x} + {y}", "torch.cat([{x}, {y}], -1)", "torch.cat([{x}, {y}])", "torch.stack([{x}, {y}])[1]",
    "torch.where({m} > 0, {x}, 0)", "{x} * ({m} > 0)", "{x}.masked_fill({m} > 0, 0)", "{x}.tril()",
    "torch.maximum({x}, {y})", "{x}.clone().mul_(2)", "{x} - {y}.detach()", "torch.addcmul({x}, {y}, {y}.sign())",
    "{x} + torch.ones_like({x})",
)  # fmt: skip
ROUNDED_WEIGHTS = (
    "{x} * 0.1", "{x} / {x}.norm(dim=-1, keepdim=True)", "{x}.softmax(-1)",
    "torch._weight_norm({x}, {y}.flatten(1)[:, 0].view(-1, *[1] * ({y}.dim() - 1)), 0)",
    "F.layer_norm({x}, {x}.shape[-1:])", "({x} - {x}.mean(-1, keepdim=True)) * 0.3", "{x} * {m}", "torch.tanh({x})",
)  # fmt: skip
#: Of float16, plain ``aot_eager_decomp_partition`` fails on a CPU: its backward wants float32 norms.
_NOT_IN_FLOAT16 = "torch._weight_norm"
EXACT_POINTWISE = (
    "torch.relu({x})", "{x} * 2", "{x} * 0.5", "{x}.abs()", "{x} + {x}", "torch.maximum({x}, {x} * 0.5)",
    "torch.where({x} > 0, {x}, {x} * 0.25)", "{x}.clamp(-2, 2)", "{x} + 1", "torch.ones_like({x})",
)  # fmt: skip
ROUNDED_POINTWISE = (
    "F.gelu({x})", "torch.tanh({x})", "torch.softmax({x}, -1)", "{x}.sigmoid() * {x}", "F.silu({x})",
    "{x} * torch.rsqrt({x}.square().mean(-1, keepdim=True) + 1e-6)", "F.layer_norm({x}, {x}.shape[-1:])", "{x} * 0.3",
)  # fmt: skip
SUM = "{x} + {y}"
BINARY = (SUM, "{x} * {y}", "torch.maximum({x}, {y})", "torch.cat([{x}, {y}], -1)")
IN_PLACE = (
    "{x}.add_(1)", "{x}.mul_(2)", "{x}.relu_()", "{x}.zero_()", "{x} += 1", "{x}[0] = 0.5", "{x}.copy_({y})",
    "{x}.add_({y})", "torch.relu_({x})", "F.relu({x}, inplace=True)", "{x}.fill_(0.25)", "{x}[..., :1].mul_(4)",
    "{x}.masked_fill_({x} > 1, 0)", "{x}.t().add_(1)",
)  # fmt: skip
#: In 16 bits eager torch rounds a product, and again what is added to it. Inductor makes an ``addmm`` of the two,
#: which rounds once, but not where the product has another use. That half unit turns codes over and is steep in
#: DGE's slope.
SUMS = (SUM, "{x}.add_({y})")


# --- strategies -----------------------------------------------------------------------------------------------------


class _Builder:
    """Grows a program, running every step on the meta device."""

    def __init__(
        self, draw: Any, exact: bool, dtype: torch.dtype, training: bool, autocast: torch.dtype | None
    ) -> None:
        self.draw, self.exact, self.dtype, self.training, self.autocast = draw, exact, dtype, training, autocast
        self.leaves: list[Leaf] = []
        self.steps: list[Step] = []
        self.values: dict[str, Tensor] = {}
        self.read: set[str] = set()
        self.multiplied: dict[str, None] = {}  # operands of products, in order
        self.products: set[str] = set()
        self.roots: dict[str, str] = {}
        self.pinned: set[str] = set()
        self.weights: list[str] = []  # computed from parameters
        self.varying: set[str] = set()  # that depend on an input

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def leaf(self, shape: tuple[int, ...], dtype: torch.dtype, role: str = "") -> str:
        role = role or self.pick(("parameter", "input", "parameter", "input", "buffer"))
        requires_grad = self.training and role != "buffer" and self.chance(75)
        layouts = [k for k in LAYOUTS if shape or k == "contiguous"]
        if role == "parameter":
            layouts.remove("expanded") if "expanded" in layouts else None
        elif shape and shape[0] == 0:
            layouts.remove("expanded")
        layout = self.pick(layouts) if self.chance(35) else "contiguous"
        content = self.pick(CONTENTS) if self.chance(20) else "plain"
        leaf = Leaf(f"{role[0]}{len(self.values)}", role, shape, dtype, requires_grad, layout, content)
        self.leaves.append(leaf)
        self.values[leaf.name] = leaf.make(None, self.exact, "meta")
        self.roots[leaf.name] = leaf.name
        if role == "input":
            self.varying.add(leaf.name)
        return leaf.name

    def step(
        self, template: str, product: bool = False, in_place: bool = False, no_grad: bool = False, **operands: str
    ) -> str | None:
        """Run a step and keep it; ``None`` where torch refuses it."""
        if template in SUMS:
            for name in operands.values():
                self._use_again(name)
        text = template.format(**operands)
        try:
            scope = {**_NAMESPACE, **self.values}
            with torch.device("meta"), torch.set_grad_enabled(not no_grad):
                if in_place:
                    exec(text, scope)
                    value = scope[operands["x"]]
                else:
                    value = eval(text, scope)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            return None
        if not isinstance(value, Tensor) or value.numel() > 4096 or value.dim() > 5:
            return None
        self.read.update(name for side, name in operands.items() if not (in_place and side == "x"))
        if product:
            self.multiplied.update(dict.fromkeys(operands.values()))
        if in_place:
            self.steps.append(Step(text))
            return operands["x"]
        target = f"v{len(self.values)}"
        self.steps.append(Step(text, target, product, addend="c" in operands, no_grad=no_grad))
        self.values[target] = value
        if product:
            self.products.add(target)
        if self.varying & set(operands.values()):
            self.varying.add(target)
        # A cat or an arithmetic step makes memory of its own; anything else may look at its first operand's.
        first = next(iter(operands.values()))
        own = product or not (template in VIEWS or ".to(" in template)
        self.roots[target] = target if own else self.roots[first]
        if any(mark in template for mark in _MAYBE_ALIAS):
            self.pinned.add(self.roots[first])
        return target

    def _use_again(self, name: str) -> None:
        """A copy, for the results, of a product in 16 bits that something is about to be added to; see ``SUMS``."""
        narrow = self.autocast or self.values[name].dtype != torch.float32
        if narrow and self.roots[name] in self.products:
            self.step("{x}.clone()", x=name)

    def memory(self, name: str) -> int:
        return self.values[name].untyped_storage()._cdata

    def product(self) -> None:
        spelling = self.pick(PRODUCTS[self.pick(PRODUCTS)])
        sizes: dict[str, int] = dict(spelling.fixed)
        names: dict[str, str] = {}
        order = ["a", "b", "c"] if self.chance(60) else ["b", "a", "c"]
        dtype = None
        for side in order:
            letters = getattr(spelling, side)
            if letters is None:
                continue
            candidates = [name for name, value in self.values.items() if self._fits(value, letters, sizes, dtype)]
            # Most products have an input somewhere in them.
            role = "input" if names and not self.varying & set(names.values()) and self.chance(80) else ""
            if role:
                candidates = [name for name in candidates if name in self.varying]
            if candidates and self.chance(80):
                computed = [name for name in candidates if name in self.weights]
                again = [name for name in candidates if name in self.multiplied]
                preferred = computed if computed and self.chance(50) else again if again and self.chance(40) else ()
                names[side] = self.pick(preferred or candidates)
            else:
                shape = tuple(sizes[c] if c in sizes else self._size() for c in letters)
                names[side] = self._operand(shape, dtype or self.dtype, role)
            value = self.values[names[side]]
            dtype = value.dtype
            sizes.update(zip(letters, value.shape, strict=True))
        self.step(spelling.text, product=True, no_grad=self.training and self.chance(7), **names)

    def computed_weight(self) -> None:
        """A weight that is computed from parameters: from two and a mask, or as W + B·A."""
        rows, columns = (self.pick(SIZES[:-2]) for _ in range(2))
        shape = (rows, columns) if self.chance(75) else (self.pick((2, 3)), rows, columns)
        x = self.leaf(shape, self.dtype, "parameter")
        if self.chance(25):
            a, b = (self.leaf(s, self.dtype, "parameter") for s in ((rows, 2), (2, columns)))
            update = self.step("{a} @ {b}", product=True, a=a, b=b)
            made = update and self.step(SUM, x=x, y=update)
        else:
            rounded = () if self.exact else ROUNDED_WEIGHTS
            if self.dtype == torch.float16:
                rounded = tuple(t for t in rounded if not t.startswith(_NOT_IN_FLOAT16))
            template = self.pick((*EXACT_WEIGHTS, *rounded))
            roles = {"y": "parameter", "m": "buffer"}
            others = {n: self.leaf(shape, self.dtype, role) for n, role in roles.items() if f"{{{n}}}" in template}
            made = self.step(template, x=x, **others)
        if made:
            self.weights.append(made)

    def _size(self) -> int:
        return self.pick(SIZES[:-2]) if self.chance(90) else self.pick(SIZES)

    def _fits(self, value: Tensor, letters: str, sizes: dict[str, int], dtype: torch.dtype | None) -> bool:
        if value.dim() != len(letters) or (dtype is not None and value.dtype != dtype):
            return False
        bound = dict(sizes)
        return all(bound.setdefault(c, n) == n for c, n in zip(letters, value.shape, strict=True))

    def _operand(self, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> str:
        """A new leaf, or a view or cast of one that has this shape."""
        if len(shape) >= 2 and self.chance(25):
            stored = self.leaf((*shape[:-2], shape[-1], shape[-2]), dtype, role)
            return self.step("{x}.transpose(-1, -2)", x=stored) or self.leaf(shape, dtype, role)
        if self.chance(15):
            stored = self.leaf(shape, self.pick(DTYPES), role)
            return self.step(f"{{x}}.to({dtype})", x=stored) or stored
        return self.leaf(shape, dtype, role)

    def other(self) -> None:
        """A view, cast, pointwise op or in-place op on something that exists."""
        floating = list(self.values)
        if not floating:
            return
        x = self.pick(floating)
        kind = self.pick(("view", "in place", "pointwise", "view", "binary", "in place", "cast"))
        if kind == "view":
            self.step(self.pick(VIEWS), x=x)
        elif kind == "pointwise":
            self.step(self.pick(EXACT_POINTWISE if self.exact else (*EXACT_POINTWISE, *ROUNDED_POINTWISE)), x=x)
        elif kind == "cast":
            self.step(f"{{x}}.to({self.pick(DTYPES)})", x=x)
        elif kind == "binary":
            same = [n for n in floating if self.values[n].dtype == self.values[x].dtype]
            # Products of two values grow beyond what float32 holds exactly.
            self.step(self.pick([t for t in BINARY if not (self.exact and " * " in t)]), x=x, y=self.pick(same))
        else:
            # What has been an operand and may become one again: a quantized copy must not outlive the change.
            self._in_place(self.pick(self.multiplied) if self.multiplied and self.chance(70) else x, floating)

    def _in_place(self, x: str, names: list[str]) -> None:
        value = self.values[x]
        if self.roots[x] in self.pinned or any(
            s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True)
        ):
            return
        template = self.pick(IN_PLACE)
        # An input that becomes part of the graph of gradients would carry it out of the call.
        plain = [n for n in names if not self.values[n].requires_grad and self.roots[n] != self.roots[x]]
        operands = {"x": x}
        if "{y}" in template:
            if not plain:
                return
            operands["y"] = self.pick(plain)
        self.step(template, in_place=True, **operands)


@st.composite
def programs(draw: Any, exact: bool | None = None) -> Program:
    """Programs of one to five products with views, casts, pointwise and in-place ops between them."""
    exact = draw(st.booleans()) if exact is None else exact
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    training = draw(st.integers(0, 9)) > 0
    autocast = draw(st.sampled_from((None,) * 9 + (torch.bfloat16,))) if dtype == torch.float32 else None
    builder = _Builder(draw, exact, dtype, training, autocast)
    for _ in range(draw(st.sampled_from((2, 3, 4, 1, 5)))):
        if builder.chance(30):
            builder.computed_weight()
        builder.product()
        for _ in range(draw(st.integers(0, 3))):
            builder.other()
    targets = [step.target for step in builder.steps if step.target]
    # Whatever nobody reads, so that nothing is dead code.
    results = [t for t in targets if t not in builder.read]
    attached = {builder.memory(t) for t in results if builder.values[t].requires_grad}
    # Of outputs that share memory, one attached to autograd and one not, torch's own backends get the gradient wrong.
    results = [t for t in results if builder.values[t].requires_grad or builder.memory(t) not in attached]
    used = [leaf for leaf in builder.leaves if any(re.search(rf"\b{leaf.name}\b", s.text) for s in builder.steps)]
    return Program(
        tuple(used),
        tuple(builder.steps),
        tuple(results),
        exact,
        as_module=draw(st.booleans()),
        autocast=autocast,
        dynamic=draw(st.integers(0, 9)) >= 8,
        seed=draw(st.integers(0, 999)),
    )
