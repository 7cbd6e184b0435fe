"""Random graphs of products: what is compiled equals the eager reference, and every product has a decision."""

from __future__ import annotations

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from .check import EXACT, ROUNDED, Setting, check
from .graphs import Program, programs

QUICK = settings(
    max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def cases(draw, exact: bool | None = None) -> tuple[Program, Setting]:
    program = draw(programs(exact))
    activation, weight = draw(st.sampled_from(EXACT if program.exact else ROUNDED))
    switches = draw(st.sampled_from(((), (("saved_weights", "codes"),), (("disable_passes", ["fuse"]),))))
    return program, Setting(activation, weight, draw(st.booleans()), switches)


@QUICK
@given(cases(exact=True))
def test_exact_programs(case):
    assume(case[0].products)
    check(*case)


@QUICK
@given(cases(exact=False))
def test_rounded_programs(case):
    assume(case[0].products)
    check(*case)
