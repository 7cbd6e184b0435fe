"""Calls that are recorded once and replayed: what a replay must do anew, and what keeps a call from being replayed.

Stands in for Triton: a kernel that runs on addresses of the CPU, so that a stale address or size shows as a wrong
number or none.
"""

from __future__ import annotations

import ctypes
import inspect
from types import SimpleNamespace

import pytest
import torch

from qcompile.kernels.replay import note_constant, note_launch, replayed


class Kernel:
    """``out[i] = scale · x[i]`` of float32, by addresses; counts how it was launched."""

    def __init__(self):
        self.signature = inspect.signature(lambda x, out, n, scale: None)
        self.arg_names = list(self.signature.parameters)
        self.launches = self.replays = 0

    def __call__(self, x, out, n, scale):
        source, target = ((ctypes.c_float * n).from_address(address) for address in (x, out))
        for i in range(n):
            target[i] = scale * source[i]

    def replay(self, grid_0, grid_1, grid_2, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        self.replays += 1
        self(*(getattr(a, "base", a).data_ptr() if hasattr(a, "base") else a for a in arguments))

    def launch(self, x, out, n, scale):
        """As :func:`qcompile.kernels.triton.launch` does."""
        self.launches += 1
        self(*(getattr(a, "base", a).data_ptr() for a in (x, out)), n, scale)
        compiled = SimpleNamespace(run=self.replay, function=None, packed_metadata=None)
        note_launch(self, compiled, (1,), (x, out), {"n": n, "scale": scale, "num_warps": 4})


@pytest.fixture
def kernel():
    return Kernel()


def _scaled_by(kernel, factor=2.0):
    def scaled(x, *rest):
        out = torch.full_like(x, float("nan")) if rest == ("nan",) else torch.empty_like(x)
        kernel.launch(x, out, x.numel(), factor)
        return out

    return scaled


def test_a_call_of_a_known_kind_is_replayed_at_its_own_addresses(kernel):
    scaled = replayed(_scaled_by(kernel))
    for _ in range(3):
        x = torch.randn(7, 5)
        torch.testing.assert_close(scaled(x), 2 * x, rtol=0, atol=0)
    assert (kernel.launches, kernel.replays) == (1, 2)


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(5, 7),
        torch.randn(7, 5, dtype=torch.float64),
        torch.randn(5, 7).t(),
        torch.randn(36)[1:].view(7, 5),
    ],
    ids=["sizes", "dtype", "strides", "alignment"],
)
def test_another_kind_is_recorded_anew(kernel, other):
    """Triton compiles other code for other dtypes and for addresses that are no multiple of 16."""

    def scaled(x, factor):
        x = x.float().contiguous() if x.dtype != torch.float32 or not x.is_contiguous() else x
        return _scaled_by(kernel, factor)(x)

    scaled = replayed(scaled)
    scaled(torch.randn(7, 5), 2.0)
    torch.testing.assert_close(scaled(other, 2.0), 2 * other.float(), rtol=0, atol=0)
    assert kernel.replays == 0


def test_other_arguments_are_another_kind(kernel):
    scaled = replayed(lambda x, factor: _scaled_by(kernel, factor)(x))
    x = torch.randn(6)
    assert torch.equal(scaled(x, 2.0), 2 * x)
    assert torch.equal(scaled(x, 3.0), 3 * x)
    assert torch.equal(scaled(x, 3.0), 3 * x)
    assert (kernel.launches, kernel.replays) == (2, 1)


def test_views_temporaries_and_copies_are_repeated(kernel):
    """A launch reads a slice, by its offset; the second one reads what the first wrote, through another view."""

    def twice(x):
        rows = x.t().contiguous()
        first, result = torch.empty_like(rows), rows.new_empty(rows.numel())
        kernel.launch(rows, first, rows.numel(), 2.0)
        kernel.launch(first.view(-1)[3:], result[3:], rows.numel() - 3, 5.0)
        result[:3].copy_(first.view(-1)[:3])
        return result.view(rows.shape), first.view(torch.int32)

    call = replayed(twice)
    for _ in range(2):
        x = torch.randn(4, 5)
        result, first = call(x)
        expected = (2 * x.t()).reshape(-1)
        torch.testing.assert_close(first.view(torch.float32).reshape(-1), expected, rtol=0, atol=0)
        expected = torch.cat([expected[:3], 5 * expected[3:]])
        torch.testing.assert_close(result.reshape(-1), expected, rtol=0, atol=0)
        assert result.shape == (5, 4)
    assert (kernel.launches, kernel.replays) == (2, 2)


def test_arguments_that_share_memory_keep_their_places(kernel):
    """Two slices of one tensor: each is found by itself, not as an offset from the other."""

    def second(x, y):
        out = torch.empty_like(y)
        kernel.launch(y.view(-1), out, y.numel(), 2.0)
        return out

    call, base = replayed(second), torch.randn(32)
    call(base[:4], base[16:20])
    assert torch.equal(call(base[:4], base[8:12]), 2 * base[8:12])
    assert kernel.replays == 1


def test_descriptors_move_with_their_tensors(kernel):
    def described(x):
        out = torch.empty_like(x)
        kernel.launch(SimpleNamespace(base=x, shape=list(x.shape)), SimpleNamespace(base=out), x.numel(), 2.0)
        return out

    call = replayed(described)
    for _ in range(2):
        x = torch.randn(6)
        assert torch.equal(call(x), 2 * x)
    assert kernel.replays == 1


def test_constants_that_the_first_call_works_out_are_no_step(kernel):
    """As the constants of a format are, with tensors of their own, when a kernel first asks for them."""
    known = {}

    def scaled(x):
        if not known:
            known["factor"] = (torch.tensor([1.0, 2.0]).cumsum(0) - 1)[-1].item()
        return _scaled_by(kernel, known["factor"])(x)

    call = replayed(scaled)
    for _ in range(2):
        x = torch.randn(5)
        assert torch.equal(call(x), 2 * x)
    assert kernel.replays == 1


CONSTANT = torch.ones(4)


@pytest.mark.parametrize(
    "function",
    [
        lambda kernel, x: _scaled_by(kernel)(x + 1),
        lambda kernel, x: _scaled_by(kernel)(x, "nan"),
        lambda kernel, x: kernel.launch(CONSTANT, torch.empty_like(x), 4, 2.0) or x + 1,
        lambda kernel, x: note_launch(kernel, None, (1,), (x, torch.empty_like(x)), {"n": 4, "scale": 1.0}) or x + 1,
    ],
    ids=["a sum", "a fill", "a tensor from elsewhere", "no kernel"],
)
def test_what_cannot_be_repeated_runs_each_time(kernel, function):
    """Another operation would be left out of a replay, and a tensor from elsewhere may have moved."""
    call = replayed(lambda x: function(kernel, x))
    for _ in range(2):
        x = torch.randn(4)
        torch.testing.assert_close(call(x), function(kernel, x), rtol=0, atol=0)
    assert kernel.replays == 0
    assert list(call.plans.values()) == [None]


def test_a_constant_is_read_again_and_stays_alive(kernel):
    """A table that a function makes once, for all its calls."""
    table = torch.arange(4.0)

    def function(x):
        note_constant(table)
        out = torch.empty_like(x)
        kernel.launch(table, out, 4, 2.0)
        return out

    call = replayed(function)
    for _ in range(3):
        assert torch.equal(call(torch.randn(4)), 2 * table)
    assert (kernel.launches, kernel.replays) == (1, 2)


def test_replayed_calls_do_not_record_gradients(kernel):
    scaled, x = replayed(_scaled_by(kernel)), torch.randn(4, requires_grad=True)
    assert not any(scaled(x).requires_grad for _ in range(2))
