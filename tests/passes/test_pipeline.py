"""The table of the pipeline says what runs, in the order in which it runs."""

from __future__ import annotations

import torch
from torch import nn

from qcompile.passes.pipeline import PASS_NAMES, PIPELINE, table

from .harness import DISTINCT, compile_and_run


def test_programs_are_recorded_in_the_order_of_the_table():
    """One program after each pass that rewrites: a pass that ran elsewhere, or in another order, would show here."""
    listed = [f"{stage.name}_{p.name}" for stage in PIPELINE for p in stage.passes]
    result = compile_and_run(nn.Linear(32, 24), torch.randn(16, 32), recipe=DISTINCT, gradient="fp8")
    (observed,) = result.observations
    recorded = [name for name in observed.programs if not name.endswith(("_2", "captured"))]
    assert recorded == [name for name in listed if name in recorded]
    silent = {"dynamo_expand", "dynamo_find_gemms", "dynamo_plan", "dynamo_watch", "joint_account"}
    assert set(listed) - set(recorded) == silent | {"partition_narrow_saved"}


def test_the_table_has_a_line_for_every_pass():
    _, _, *lines = table().splitlines()
    names = [line.split(" | ")[2] for line in lines]
    assert names == [p.name for stage in PIPELINE for p in stage.passes]
    assert len(set(names)) == len(names)
    assert set(PASS_NAMES) < set(names)
