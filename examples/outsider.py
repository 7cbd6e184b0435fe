"""A 4-bit grid, two estimators, a scale rule and a recipe of your own, without editing qcompile: ``python outsider.py``.

Formulas are functions of float32 values. Kernels for CPUs and GPUs are printed from them.
"""

import torch

import qcompile

quad = qcompile.Format("quad", bits=4, magnitudes=(0.0, 0.25, 1.0, 2.25, 4.0, 6.25, 9.0, 12.25))
soft = qcompile.Estimator("soft", slope=lambda y, fmt: 1 / (1 + (y / fmt.max).square()))
rising = qcompile.Estimator("rising", mask=lambda y, level, fmt: (y > level) | (y.abs() < fmt.max / 2))
tight = qcompile.ScaleRule("tight", scale=lambda amax, fmt: amax / fmt.max * 0.9)
recipe = qcompile.Recipe("outsider", activation="quad row tight; rising", weight="quad row tight; soft", min_side=8)

if __name__ == "__main__":
    model = torch.nn.Sequential(torch.nn.Linear(48, 40), torch.nn.GELU(), torch.nn.Linear(40, 24))
    step, optimizer = torch.compile(model, backend=qcompile.backend(recipe)), torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(37, 48)
    print(qcompile.explain(model, x, backend=recipe))
    for _ in range(10):
        loss = (step(x) - x[:, :24]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{loss.item():.4f}")
