"""Muon with an 8-bit momentum on a GPU against torch's: the compiled programs around torch's orthogonalization."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.optim import Muon

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_muon_is_torchs(dtype):
    """The first one, whose momentum is exact: parameters to rounding, by chance where they have 16 bits."""
    torch.manual_seed(0)
    own = [nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in ((256, 512), (640, 384), (8, 16))]
    copies = [nn.Parameter(p.detach().float()) for p in own]
    ours, theirs = Muon(own, lr=0.02), torch.optim.Muon(copies, lr=0.02)
    for parameter, copy in zip(own, copies, strict=True):
        parameter.grad = torch.randn_like(parameter)
        copy.grad = parameter.grad.float()
    ours.step()
    theirs.step()
    for parameter, copy in zip(own, copies, strict=True):
        rounding = 2**-7 if dtype == torch.bfloat16 else 2**-20
        # cuBLAS may sum a product up in another order, and bfloat16 rounds it: 1/64 of an update.
        torch.testing.assert_close(parameter.float(), copy, rtol=rounding, atol=0.02 / 64)


def test_muon_goes_on():
    """Thirty steps of a regression come to the loss of torch's, within 3 %; the device is asked for nothing."""

    def loss_after(make):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.zeros(64, 128, device="cuda"))
        x, target = torch.randn(256, 128, device="cuda"), torch.randn(64, 128, device="cuda") / 8
        optimizer = make([weight], lr=0.02)
        for step in range(30):
            torch.cuda.set_sync_debug_mode("error" if step > 5 and make is Muon else "default")
            loss = (x @ (weight - target).t()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
        return loss.item()

    assert loss_after(Muon) == pytest.approx(loss_after(torch.optim.Muon), rel=0.03)
