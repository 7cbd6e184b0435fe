"""Runs PTX of kernels without a card, all threads of a program at once in NumPy: for Gluon, which has no interpreter.

It knows the instructions that the kernels under test have, and raises ``NotImplementedError`` at any other. Branches
must be taken by all threads of a program alike. Every access to memory must lie in a tensor that the kernel was given,
or in shared memory. Threads run in step, so a barrier that is missing does not show. ``mma`` sums in float64 and rounds
to float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

__all__ = ["emulate"]

_SHARED = 1 << 40
_STATIC = 1024  # where variables in shared memory begin, which is nowhere round
_SPACING = 1 << 24
_VECTOR = re.compile(r"\{([^}]*)\}")


class _Memory:
    """Tensors at addresses far from each other, and shared memory."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.spaces: list[tuple[int, np.ndarray]] = []
        self.address: dict[int, int] = {}
        for tensor in tensors:
            if id(tensor) not in self.address:
                address = (len(self.spaces) + 1) * _SPACING
                self.address[id(tensor)] = address
                self.spaces.append((address, tensor.view(-1).view(torch.uint8).numpy()))
        self.shared = np.full(1 << 18, 0xFF, np.uint8)

    def bytes_of(self, space: str, address: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if space == "shared":
            return self.shared, address
        start, data = self.spaces[int(address[0]) // _SPACING - 1]
        return data, address - np.uint64(start)

    def load(self, space: str, address: np.ndarray, size: int) -> np.ndarray:
        assert (address % size == 0).all(), "misaligned"
        data, at = self.bytes_of(space, address)
        assert (at + size <= data.size).all(), f"{space} memory beyond its end"
        parts = data[at[:, None].astype(np.int64) + np.arange(size)].astype(np.uint64)
        return (parts << (8 * np.arange(size, dtype=np.uint64))).sum(1, dtype=np.uint64)

    def store(self, space: str, address: np.ndarray, size: int, value: np.ndarray) -> None:
        assert (address % size == 0).all(), "misaligned"
        data, at = self.bytes_of(space, address)
        assert (at + size <= data.size).all(), f"{space} memory beyond its end"
        parts = (value[:, None] >> (8 * np.arange(size, dtype=np.uint64))).astype(np.uint8)
        data[at[:, None].astype(np.int64) + np.arange(size)] = parts


def _bits(value: np.ndarray) -> np.ndarray:
    width = value.dtype.itemsize
    return value.view(f"u{width}").astype(np.uint64)


def _as(bits: np.ndarray, kind: str) -> np.ndarray:
    """Registers as numbers of a PTX type."""
    if kind == "pred":
        return bits != 0
    size = int(kind[1:] if kind != "bf16" else 16) // 8
    whole = bits.astype(f"u{size}")
    if kind == "bf16":
        return (whole.astype(np.uint32) << 16).view(np.float32)
    return whole.view({"s": "i", "f": "f"}.get(kind[0], "u") + str(size))


def _rounded(value: np.ndarray, kind: str) -> np.ndarray:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[kind]
    return _bits(
        torch.from_numpy(value.copy()).to(dtype).view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy()
    )


_COMPARE: dict[str, Callable] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # not of NaN
    "neu": lambda a, b: ~(a == b), "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b), "equ": lambda a, b: ~(a < b) & ~(a > b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_BINARY: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "min": np.minimum, "max": np.maximum, "div": np.true_divide,
}  # fmt: skip


class _Program:
    def __init__(self, statements, labels, memory, parameters, threads: int, place: tuple[int, int]) -> None:
        self.statements, self.labels, self.memory, self.parameters = statements, labels, memory, parameters
        self.threads = threads
        lane = np.arange(threads, dtype=np.uint64)
        self.registers = {"%tid.x": lane, "%laneid": lane % np.uint64(32), "%ctaid.x": self.all(place[0]),
                          "%ctaid.y": self.all(place[1]), "global_smem": self.all(1 << 17)}  # fmt: skip

    def all(self, value: int) -> np.ndarray:
        return np.full(self.threads, value % (1 << 64), np.uint64)

    def get(self, name: str, kind: str = "b64") -> np.ndarray:
        name = name.strip()
        if name in self.registers:
            bits = self.registers[name]
        elif name.startswith("0f"):
            bits = self.all(int(name[2:], 16))
        else:
            bits = self.all(int(name.rstrip("U"), 0))
        return _as(bits, kind)

    def set(self, name: str, value: np.ndarray, where: np.ndarray) -> None:
        bits = value.astype(np.uint64) if value.dtype == bool else _bits(value)
        old = self.registers.get(name, self.all(0xDEAD))
        self.registers[name] = np.where(where, bits, old)

    def run(self) -> None:
        at = 0
        with np.errstate(all="ignore"):
            while at < len(self.statements):
                guard, op, operands = self.statements[at]
                at += 1
                where = np.ones(self.threads, bool)
                if guard:
                    where = self.get(guard.lstrip("@!"), "pred") ^ guard.startswith("@!")
                base, *modifiers = op.split(".")
                if base == "ret":
                    return
                if base == "bra":
                    assert where.all() or not where.any(), "threads part"
                    at = self.labels[operands[0]] if where.all() else at
                else:
                    self.step(base, modifiers, operands, where, op)

    def address(self, operand: str) -> np.ndarray:
        name, _, shift = operand.strip("[] ").partition("+")
        return self.get(name) + self.all(int(shift or 0))

    def step(self, base: str, modifiers: list[str], operands: list[str], where: np.ndarray, op: str) -> None:
        kind = modifiers[-1] if modifiers else ""
        if base in ("bar", "createpolicy", "griddepcontrol"):
            return
        get, target = self.get, operands[0]
        if base == "ld" and modifiers[0] == "param":
            self.registers[target] = self.all(self.parameters[operands[1].strip("[] ")])
        elif base in ("ld", "st"):
            space = next(
                m for m in (m.partition("_")[0] for m in modifiers) if m in ("global", "shared")
            )  # of ::cta too
            size = int(kind[1:]) // 8
            values, place = operands[:2] if base == "ld" else operands[1::-1]
            names = _VECTOR.sub(r"\1", values).replace(" ", "").split(",")
            if where.any():
                address = self.address(place)[where]
                assert (address % (size * len(names)) == 0).all(), "misaligned"
                for i, name in enumerate(names):
                    at = address + np.uint64(i * size)
                    if base == "ld":
                        result = self.registers.get(name, self.all(0)).copy()
                        result[where] = self.memory.load(space, at, size)
                        self.registers[name] = result
                    else:
                        self.memory.store(space, at, size, get(name)[where])
        elif base == "mov" and "{" in operands[0]:
            low, high = _VECTOR.sub(r"\1", operands[0]).split(",")
            half = int(kind[1:]) // 2
            self.set(low.strip(), get(operands[1]) & self.all((1 << half) - 1), where)
            self.set(high.strip(), get(operands[1]) >> np.uint64(half), where)
        elif base == "mov" and "{" in operands[1]:
            low, high = _VECTOR.sub(r"\1", operands[1]).split(",")
            half = int(kind[1:]) // 2
            self.set(target, _as(get(low), f"b{half}").astype(np.uint64) | get(high) << np.uint64(half), where)
        elif base in ("mov", "cvta"):
            self.set(target, get(operands[1], kind), where)
        elif base == "shfl":
            self.shuffle(modifiers[1], operands, where)
        elif base == "mma":
            self.mma(operands, modifiers[-2])
        elif base == "stmatrix":
            self.store_matrices(operands)
        elif base == "setp":
            self.set(target, _COMPARE[modifiers[0]](get(operands[1], kind), get(operands[2], kind)), where)
        elif base == "selp":
            chosen = np.where(get(operands[3], "pred"), get(operands[1], kind), get(operands[2], kind))
            self.set(target, chosen, where)
        elif base == "dp4a":
            a, b = (get(name, "b32").view(np.uint8).reshape(-1, 4).astype(np.uint32) for name in operands[1:3])
            self.set(target, (a * b).sum(1, dtype=np.uint32) + get(operands[3], "u32"), where)
        elif base == "prmt":
            both = np.stack([get(name, "b32") for name in operands[1:3]], 1).view(np.uint8)
            selector = get(operands[3], "b32")
            assert (selector & 0x8888 == 0).all()
            places = np.stack([selector >> (4 * i) & 7 for i in range(4)], 1).astype(np.int64)
            self.set(target, np.take_along_axis(both, places, 1).copy().view(np.uint32)[:, 0], where)
        elif base == "bfe":
            position, length = get(operands[2], "u32"), get(operands[3], "u32")
            above = np.uint32(32) - length  # of fields that end within the register
            field = get(operands[1], "u32") << (above - position)
            self.set(target, (field.view(np.int32) >> above.view(np.int32) if kind == "s32" else field >> above), where)
        elif base in ("shl", "shr"):
            bits = int(kind[1:])
            by = get(operands[2], "u32")
            value = get(operands[1], kind)
            shifted = np.left_shift if base == "shl" else np.right_shift
            by = np.minimum(by, bits - 1) if kind[0] == "s" else by
            result = shifted(value, by.astype(value.dtype))
            self.set(target, np.where(by < bits, result, value * 0), where)
        elif base in ("div", "rem") and kind[0] in "su":
            quotient, rest = np.divmod(get(operands[1], kind), get(operands[2], kind))
            assert (_as(_bits(get(operands[1], kind)), kind) >= 0).all()  # where both kinds of division agree
            self.set(target, quotient if base == "div" else rest, where)
        elif base == "not":
            self.set(target, ~get(operands[1], kind), where)
        elif base == "copysign":
            self.set(target, np.copysign(get(operands[2], kind), get(operands[1], kind)), where)
        elif base in ("neg", "abs"):
            value = get(operands[1], kind)
            self.set(target, -value if base == "neg" else np.abs(value), where)
        elif base == "cvt" and kind == "f32" and modifiers[-2].endswith("x2"):
            low, high = (_rounded(get(name, "f32"), modifiers[-2][:-2]) for name in (operands[2], operands[1]))
            self.set(target, low | high << np.uint64(16), where)
        elif base == "cvt":
            to, source = modifiers[-2:]
            value = get(operands[1], source)
            if to in ("bf16", "f16") or (to == "f32" and source in ("f16", "bf16", "f32")):
                self.registers[target] = np.where(where, _rounded(value, to), self.registers.get(target, self.all(0)))
            elif to[0] == "f":
                self.set(target, value.astype(f"f{int(to[1:]) // 8}"), where)
            else:
                self.set(target, value.astype({"s": "i"}.get(to[0], "u") + str(int(to[1:]) // 8)), where)
        elif base in ("mad", "mul") and modifiers[0] == "wide":
            wide = kind[0] + str(2 * int(kind[1:]))
            factors = [_as(_bits(get(n, kind).astype({"s": "i8", "u": "u8"}[kind[0]])), wide) for n in operands[1:3]]
            result = factors[0] * factors[1]
            self.set(target, result if base == "mul" else result + get(operands[3], wide), where)
        elif base == "mul" and modifiers[0] == "hi":
            wide = [get(name, kind).astype({"s": "i8", "u": "u8"}[kind[0]]) for name in operands[1:3]]
            self.set(target, (wide[0] * wide[1] >> 32).astype(wide[0].dtype), where)
        elif base in ("mad", "fma"):
            a, b, c = (get(name, kind) for name in operands[1:4])
            exact = (a.astype(float) * b + c).astype(a.dtype) if kind[0] == "f" else a * b + c
            self.set(target, exact, where)
        elif base in _BINARY and kind.endswith("16x2"):
            halves = (get(name, "b32").view(kind.replace("16x2", "2").replace("s", "i")) for name in operands[1:3])
            self.set(target, _BINARY[base](*halves).view(np.uint32), where)
        elif base in _BINARY:
            a, b = get(operands[1], kind), get(operands[2], kind)
            if kind == "f32" and base in ("min", "max") and "NaN" not in modifiers:
                function = np.fmin if base == "min" else np.fmax
            else:
                function = _BINARY[base]
            self.set(target, function(a, b), where)
        else:
            msg = f"{op} {operands}"
            raise NotImplementedError(msg)

    def shuffle(self, mode: str, operands: list[str], where: np.ndarray) -> None:
        lane = np.arange(self.threads)
        by, control = self.get(operands[2]).astype(np.int64), int(operands[3], 0)
        segment = control >> 8 & 31
        if mode == "bfly":
            source = (lane & 31) ^ by
        else:
            assert mode == "idx"
            source = (lane & 31 & segment) | (by & ~segment & 31)
        self.set(operands[0], self.get(operands[1])[lane // 32 * 32 + source], where)

    def store_matrices(self, operands: list[str]) -> None:
        """Of 8 × 8 elements of 16 bits each; lane 8 i + r has the address of row r of the one in register i."""
        lane, addresses = np.arange(32), self.address(operands[0]).reshape(-1, 32)
        for i, name in enumerate(_VECTOR.sub(r"\1", operands[1]).replace(" ", "").split(",")):
            of_rows = addresses[:, 8 * i : 8 * i + 8][:, lane // 4]
            self.memory.store("shared", (of_rows + (4 * (lane % 4)).astype(np.uint64)).reshape(-1), 4, self.get(name))

    def mma(self, operands: list[str], kind: str) -> None:
        d, a, b, c = (_VECTOR.sub(r"\1", text).replace(" ", "").split(",") for text in operands)
        warps = self.threads // 32
        group, place = np.arange(32) // 4, np.arange(32) % 4

        def halves(name: str) -> np.ndarray:
            pair = self.get(name, "b32").reshape(warps, 32)
            return np.stack(
                [_as((pair >> shift & 0xFFFF).astype(np.uint64), kind).astype(float) for shift in (0, 16)], -1
            )

        left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
        total = np.zeros((warps, 16, 8))
        for which in range(2):
            for i in range(4):
                left[:, group + 8 * (i % 2), 2 * place + which + 8 * (i // 2)] = halves(a[i])[..., which]
            for i in range(2):
                right[:, 2 * place + which + 8 * i, group] = halves(b[i])[..., which]
        for i in range(4):
            total[:, group + 8 * (i // 2), 2 * place + i % 2] = self.get(c[i], "f32").reshape(warps, 32)
        total = (total + left @ right).astype(np.float32)
        for i in range(4):
            self.registers[d[i]] = _bits(total[:, group + 8 * (i // 2), 2 * place + i % 2].reshape(-1))


def _parsed(ptx: str):
    body = ptx[ptx.index(".entry") :]
    body = body[body.index("{") : body.index("// -- End function") if "// -- End function" in body else None]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(loc|file|pragma|section)[^\n]*$", "", body, flags=re.M)
    statements, labels, variables = [], {}, {}
    for text in body.split(";"):
        text = text.strip().lstrip("{} \n\t")
        while label := re.match(r"([$\w]+):", text):
            labels[label[1]] = len(statements)
            text = text[label.end() :].strip().lstrip("{} \n\t")
        if variable := re.match(r"\.shared .*\.b8 (\w+)\[", text):
            variables[variable[1]] = _STATIC
        elif text and not text.startswith("."):
            guard, op, rest = re.match(r"(@!?%?\w+)?\s*([\w.:]+)\s*(.*)", text, re.S).groups()
            op = op.replace("::", "_")
            operands = [part.strip() for part in re.split(r",(?![^{]*\})", rest)] if rest else []
            statements.append((guard, op, operands))
    return statements, labels, variables


def emulate(ptx: str, arguments: Sequence[torch.Tensor | int], grid: tuple[int, ...], warps: int) -> None:
    """Runs every program of ``grid``; ``arguments`` are those that the kernel was not specialized by."""
    memory = _Memory([a for a in arguments if isinstance(a, torch.Tensor)])
    values = [memory.address[id(a)] if isinstance(a, torch.Tensor) else a for a in arguments]
    name = re.search(r"\.entry (\w+)", ptx)[1]
    parameters = {f"{name}_param_{i}": value for i, value in enumerate([*values, 0, 0])}
    statements, labels, variables = _parsed(ptx)
    for x in range(grid[0]):
        for y in range(grid[1] if len(grid) > 1 else 1):
            memory.shared.fill(0xFF)
            program = _Program(statements, labels, memory, parameters, 32 * warps, (x, y))
            program.registers |= {name: program.all(at) for name, at in variables.items()}
            program.run()
