"""``qcompile_fp4``: *Optimizing Large Language Model Training Using FP4 Quantization*, arXiv 2501.17116 (ICML 2025).

Activations are E2M1 with one scale per token, after clamping the outliers beyond the 1 % and 99 % quantiles of the
token and compensating them; weights E2M1 with one scale per output channel and the differentiable gradient estimator
(k = 5, factor capped at 3); exact 6/amax scales. Head, embeddings, norms and attention stay as they are.

Two things are ours, for speed. The residual of the outliers is added to their codes, rounded to E4M3 (relative error
2⁻⁴ at most), where the paper multiplies it apart. And dY is quantized to E4M3 for the products that the card runs
faster so (``backward="auto"``), where the paper keeps it in high precision. ``options={"variant": "paper"}`` is what
the paper prints: exact residual, wide dY (``"gradient": "fp8"`` for its per-tensor E5M2).

Where the authors' released code departs from their text, the difference is one option:

=================================== ===============================================================================
departure                           options
=================================== ===============================================================================
power-of-two scales                 ``{"activation": {"scale": "absmax_pow2"}, "weight": {"scale": "absmax_pow2"}}``
no compensation of the residual     ``{"activation": {"outliers": "occ(compensate=0)"}}``
exact residual, as printed          ``{"activation": {"outliers": "occ(compensate=1)"}}``
quantile over the whole tensor      ``{"activation": {"outliers": "occ(per=tensor)"}}``
E1M2 activations (fork ``pai``)     ``{"activation": {"format": "e1m2", "outliers": "occ(alpha=0.97)"}}``
ties toward +∞ (look-up kernel)     ``{"activation": {"rounding": "half_up"}, "weight": {"rounding": "half_up"}}``
tensor-wise scales (ablations)      ``{"activation": {"granularity": "tensor"}, "weight": {"granularity": "tensor"}}``
DGE off                             ``{"weight": {"estimator": "ste"}}``
OCC off                             ``{"activation": {"outliers": None}}``
gradient as shipped                 ``{"gradient": "e5m2 tensor absmax_pow2"}``: FP8 scales are powers of two there too
=================================== ===============================================================================

One departure of theirs is no option. Their code takes the scales of a weight ``[out, in]`` over its first axis: one per
input channel, which changes along the contraction and no kernel could apply afterwards. The paper's are one per output
channel, and so are ours.

Stochastic rounding of gradients is unbiased only where the scale keeps the largest element of a group on the grid, as
``absmax`` does. A rounded scale may cut it off: the mean result is .9964 of a normal gradient for NVFP4
(``"e2m1 block16 e4m3 stochastic"``) and .990 for MXFP4 (``"e2m1 block32 e8m0 stochastic"``).
"""

from ..ir.operand import Operand
from ..ir.recipe import Recipe

FP4 = Recipe(
    name="qcompile_fp4",
    source="arXiv 2501.17116",
    activation=Operand.parse("e2m1 row absmax even; ste; occ(alpha=0.99,per=row,compensate=1,residual=e4m3)"),
    weight=Operand.parse("e2m1 row absmax even; dge(k=5,cap=3)"),
    gradient=None,
    backward="auto",
    variants={
        "paper": {
            "activation": "e2m1 row absmax even; ste; occ(alpha=0.99,per=row,compensate=1)",
            "backward": "bf16",
        }
    },
)
