"""Formulas of quantization, each written once over scalar values, and the targets that print them.

:mod:`.expression` is the language, :mod:`.rounding`, :mod:`.scales` and :mod:`.estimators` are the formulas; a target
(:mod:`.torch_target`, :mod:`.cpp_target`, :mod:`.inductor_target`, :mod:`.triton_target`) turns them into code.
"""
