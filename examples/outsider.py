"""A 4-bit grid, two estimators, a scale rule and a recipe of your own, without editing qcompile, and a training run.

Formulas are functions of float32 values; kernels for CPUs and GPUs are printed from them. The slope learns less from
elements far out, the mask from those that were rounded up, and the scale rule cuts the largest tenth off.
"""

import torch

import qcompile

curve = qcompile.Format("curve", bits=4, magnitudes=(0.0, 0.5, 1.0, 1.75, 2.5, 3.5, 5.0, 7.0))
soft = qcompile.Estimator("soft", slope=lambda y, fmt: 1 / (1 + (y / fmt.max).square()), continuous=True)
rising = qcompile.Estimator("rising", mask=lambda y, level, fmt: (y > level) | (y.abs() < fmt.max / 2))
tight = qcompile.ScaleRule("tight", scale=lambda amax, fmt: amax / fmt.max * 0.9)
recipe = qcompile.Recipe("outsider", activation="curve row tight; rising", weight="curve row tight; soft", min_side=8)

if __name__ == "__main__":
    model = torch.compile(torch.nn.Linear(48, 24), backend=qcompile.backend(recipe))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for x in torch.randn(20, 37, 48):
        loss = (model(x) - x[:, :24]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
