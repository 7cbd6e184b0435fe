"""Estimated times of a linear layer's backward, on 8-bit tensor cores or decoded (``backward="auto"``).

Per role, for X ``[M, K]``, W ``[N, K]`` and dY ``[M, N]``. What differs between the two ways is counted, and nothing
else: the product itself, and the passes over memory that prepare its operands.

======== ===================================== ==================================================================
role     product                               passes, bytes per element
======== ===================================== ==================================================================
dgrad    2·M·N·K operations, M·K results       8 bits: dY by rows, 2 read and 1 written
wgrad    the same, N·K results                 8 bits: dY by columns, 2 + 2 read and 1 written, and Xᵀ, 1 and 1;
                                               decoded: X, 1 read and 2 written
both                                           8 bits: dY by rows and columns, which share one read
======== ===================================== ==================================================================

Xᵀ and the decoded X serve every product that reads X. W takes as much either way. A product in 8 bits takes
operations / rate plus the time to write its results, since scales are applied there; in 16 bits the two overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["RATES", "Rates", "best_backward", "decodes_in_tile", "hides_summand", "rates_of"]


@dataclass(frozen=True)
class Rates:
    """What a card was seen to do, at shapes of linear layers (``benchmarks/h200``).

    Attributes:
        card: how torch names it.
        operations_8bit, operations_16bit, operations_32bit: of products, per microsecond.
        operations_in_tile: of 16-bit products that decode a 4-bit weight in the tile (:mod:`.stored`); an estimate that
            nothing has measured.
        bandwidth: of the passes that quantize, bytes per microsecond; less than that of a copy.
        instructions: of threads, per microsecond, in kernels that quantize: three quarters of what could be issued.
        launch: microseconds that a kernel takes at least.
    """

    card: str
    operations_8bit: float = 1650e6
    operations_16bit: float = 745e6
    operations_32bit: float = 50e6
    operations_in_tile: float = 400e6
    bandwidth: float = 3.2e6
    instructions: float = 22e6
    launch: float = 3.0

    def product_8bit(self, operations: float, results: float) -> float:
        """``results`` elements of 16 bits."""
        return self.launch + operations / self.operations_8bit + 2 * results / self.bandwidth

    def product_decoded(self, operations: float, dtype: torch.dtype) -> float:
        rate = self.operations_16bit if dtype.itemsize == 2 else self.operations_32bit
        return self.launch + operations / rate

    def passes(self, moved: float, launches: int) -> float:
        return launches * self.launch + moved / self.bandwidth


#: Measured ones; the H100 multiplies as fast as the H200 and has 0.7 of its bandwidth.
RATES = (Rates("NVIDIA H200"), Rates("NVIDIA H100", bandwidth=2.3e6))

Roles = tuple[str, ...]
#: dY's passes by the roles that read 8-bit codes of it: bytes per element, launches.
_OF_GRADIENT: dict[Roles, tuple[int, int]] = {
    (): (0, 0),
    ("dgrad",): (3, 1),
    ("wgrad",): (5, 3),
    ("dgrad", "wgrad"): (6, 3),
}


def rates_of(card: str) -> tuple[Rates, bool]:
    """The rates of the card of this name, and whether they were measured; an H100's if they were not."""
    for rates in RATES:
        if card.startswith(rates.card):
            return rates, rates is RATES[0]
    return RATES[-1], False


def best_backward(
    shape: tuple[int, int, int], roles: Roles, readers: int, dtype: torch.dtype, rates: Rates, groups: int = 1
) -> tuple[Roles, dict[Roles, float]]:
    """Which of ``roles`` run fastest in 8 bits, and the estimated microseconds of every choice.

    ``shape`` is (M, N, K); ``roles``, those that can; ``readers``, how many products share X; ``dtype`` that of dY;
    ``groups``, how many W and dW there are, each for a part of the rows.
    """
    m, n, k = shape
    operations, results = 2.0 * m * n * k, {"dgrad": m * k, "wgrad": groups * n * k}

    def microseconds(chosen: Roles) -> float:
        bytes_per_element, launches = _OF_GRADIENT[chosen]
        total = rates.passes(bytes_per_element * m * n, launches)
        for role in roles:
            if role == "wgrad":
                total += rates.passes((2 if role in chosen else 3) * m * k, 1) / readers
            if role in chosen:
                total += rates.product_8bit(operations, results[role])
            else:
                total += rates.product_decoded(operations, dtype)
        return total

    choices = [chosen for chosen in _OF_GRADIENT if set(chosen) <= set(roles)]
    estimates = {chosen: microseconds(chosen) for chosen in choices}
    return min(estimates, key=lambda chosen: estimates[chosen]), estimates


#: Bytes per element that decoding a 4-bit weight to 16 bits reads and writes.
_DECODED_BYTES = 2.5


def decodes_in_tile(shape: tuple[int, int, int], rates: Rates) -> bool:
    """Whether a product (M, N, K) with a stored weight takes longer if the weight is decoded first, for cuBLAS.

    In the tile a weight is decoded once for every tile of rows of x, at the expense of the product's rate; before it,
    the whole weight is written. Few rows never wait for the rate.
    """
    m, n, k = shape
    operations = 2.0 * m * n * k
    before = rates.passes(_DECODED_BYTES * n * k, 1) + rates.product_decoded(operations, torch.bfloat16)
    return rates.launch + operations / rates.operations_in_tile <= before


def hides_summand(length: int, dtype: torch.dtype, rates: Rates) -> bool:
    """Whether a product with a contraction of ``length`` takes longer than to read and write a matrix like its result,
    so that one it adds up with is read while it waits for tensor cores.
    """
    of_element = rates.product_decoded(2.0 * length, dtype) - rates.launch
    return of_element >= rates.passes(2 * dtype.itemsize, 0)
