"""How a product's operand is encoded. What would break: a text that comes back as another one, tensors read under
each other's names.
"""

from __future__ import annotations

import pytest

from qcompile.ir.encoding import DENSE, Encoding, Parts
from qcompile.ir.formats import get_format

QUANTIZED = "e2m1 row absmax even; ste"
TWO_LEVELS = "e2m1 block16 e4m3 even; ste"
OUTLIERS = "e2m1 row absmax even; ste; occ(alpha=0.9,per=row,compensate=1)"


@pytest.mark.parametrize("text", ["dense", "levels e2m1", QUANTIZED, TWO_LEVELS, OUTLIERS])
def test_text_is_the_encoding(text: str) -> None:
    assert str(Encoding.parse(text)) == text
    assert (Encoding.parse(text) is DENSE) == (text == "dense")


def test_levels_and_scaled_codes_share_a_grid() -> None:
    assert Encoding.parse("levels e2m1").format is Encoding.parse(QUANTIZED).format is get_format("e2m1")
    assert Encoding.parse("levels e2m1").quantizer is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("levels e2m1", Parts("0")),
        (QUANTIZED, Parts("0", "1")),
        (TWO_LEVELS, Parts("0", "1", "2")),
        (OUTLIERS, Parts("0", "1", values="2", positions="3")),
    ],
)
def test_tensors_have_names(text: str, parts: Parts) -> None:
    tensors = [part for part in parts if part is not None]
    assert Encoding.parse(text).parts(tensors) == parts
    with pytest.raises(ValueError, match=rf"consists of codes.*, got {len(tensors) + 1} tensors"):
        Encoding.parse(text).parts([*tensors, "more"])


def test_a_dense_operand_has_neither_format_nor_parts() -> None:
    with pytest.raises(ValueError, match="a dense operand has no format"):
        _ = DENSE.format
    with pytest.raises(ValueError, match="consists of nothing that could be taken apart, got 1 tensors"):
        DENSE.parts(["x"])
