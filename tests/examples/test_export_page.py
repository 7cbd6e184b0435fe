"""The export example on two of its layouts: what would break is a folder that does not load, or loads other numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))
import export  # noqa: E402

sys.path.remove(str(EXAMPLES))


def test_what_is_loaded_is_what_was_meant(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "EXPORTS", {name: export.EXPORTS[name] for name in ("int4", "nf4")})
    assert export.main(["--out", str(tmp_path)]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "block64" in line]
    assert [row[1].strip() for row in rows] == ["int4", "nf4"]
    assert [float(row[5]) for row in rows] == [0, 0]
    assert all(0.01 < float(row[6]) < 2 for row in rows)
    # A model of transformers', and a folder that holds none.
    assert export.main(["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert "export: " in capsys.readouterr().err
