"""AdamW with 8-bit states against torch's in float64.

What would break: an update that is not AdamW's, second moments that vanish, rounding that drifts, a step that asks the
device or compiles again, states that do not come back as they were, input that fails somewhere else.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompile
from qcompile.ir.formats import get_format
from qcompile.kernels.formula.scales import stored_format
from qcompile.kernels.formula.torch_target import torch_function
from qcompile.optim import AdamW, blocks, formulas
from qcompile.optim.states import STATES, decoded, encoded, kind_of

SHAPES = ((40, 128), (64, 125), (16, 32, 3, 3), (70,), ())
LR, WEIGHT_DECAY = 0.02, 0.1


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(parameters, step: int, scale: float = 1.0) -> None:
    """Gradients whose sizes lie orders of magnitude apart within a block."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        spread = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)).mul(2).exp()
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * spread * scale).to(parameter.dtype)


def trained(optimizer: AdamW, steps: range = range(3)) -> AdamW:
    own = optimizer.param_groups[0]["params"]
    for step in steps:
        give_gradients(own, step)
        optimizer.step()
    return optimizer


def tensors(optimizer: AdamW) -> list[Tensor]:
    """Parameters and everything that is kept of them."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    return [*own, *(value for p in own for value in optimizer.state[p].values())]


def assert_same(one: AdamW, other: AdamW) -> None:
    pairs = zip(tensors(one), tensors(other), strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if a.dtype != b.dtype or not torch.equal(a, b)] == []


# --- numbers --------------------------------------------------------------------------------------------------------


def rounding_of(values: Tensor, name: str, block: int) -> Tensor:
    """The distance between the neighbours of each value, of which stochastic rounding takes one."""
    fmt = stored_format(name)
    ratio = fmt.max / values.abs().reshape(-1, block).amax(1, keepdim=True)
    levels = torch.tensor((*fmt.magnitudes, 2 * fmt.max), dtype=torch.float64)
    index = torch.bucketize((values.abs().reshape(-1, block) * ratio).clamp(max=fmt.max), levels, right=True)
    return ((levels[index] - levels[index - 1]) / ratio).view(values.shape)


@pytest.mark.parametrize("states", STATES)
def test_a_step_is_that_of_torch_from_the_same_states(states):
    """Parameters to float32's rounding, states to that of their summands and a step of their grid."""
    own = parameters()
    optimizer = trained(AdamW(own, LR, weight_decay=WEIGHT_DECAY, states=states))
    before = optimizer.decoded_state_dict()["state"]
    exact = [nn.Parameter(p.detach().double()) for p in own]
    reference = torch.optim.AdamW(exact, LR, weight_decay=WEIGHT_DECAY)
    reference.load_state_dict(optimizer.decoded_state_dict())
    give_gradients(own, 3)
    for parameter, wide in zip(own, exact, strict=True):
        wide.grad = parameter.grad.double()
    optimizer.step()
    reference.step()
    for number, (parameter, wide) in enumerate(zip(own, exact, strict=True)):
        torch.testing.assert_close(parameter.double(), wide, rtol=2**-22, atol=LR * 2**-18)
        summands = {"exp_avg": before[number]["exp_avg"].abs() + parameter.grad.abs(), "exp_avg_sq": 0.0}
        kind = kind_of(parameter, STATES[states], "none", 128)
        for name, numbers in kind.entries():
            expected = reference.state[wide][name]
            grid = rounding_of(expected, numbers.name, kind.block) if numbers.scaled else 0.0
            limit = grid + 2**-22 * (expected.abs() + summands[name])
            assert ((decoded(optimizer.state[parameter], name, kind) - expected).abs() <= limit).all(), name


@pytest.mark.parametrize("options", [{}, {"master": "fp16"}, {"master": "fp32"}, {"states": "fp8-lm"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_follow_float32_ones(dtype, options):
    """Every update is below half a step of the parameter's grid, where rounding to nearest would stand still."""
    own = nn.Parameter(torch.full((64, 128), 1.0, dtype=dtype))
    optimizer = AdamW([own], lr=2e-4, weight_decay=0.0, **options)
    for _ in range(40):
        own.grad = torch.ones_like(own)
        optimizer.step()
    # Sums of 40 roundings of at most 2^-8 (BF16, below 1), 8192 of them.
    assert own.float().mean().sub(1 - 40 * 2e-4).abs() < 5 * 2**-8 * math.sqrt(40 / 4 / own.numel()) + 2**-16


def test_training_goes_as_with_float32_states():
    """A regression with badly scaled inputs: the loss after 80 steps is within 3 % of float32 states'."""

    def loss_after(make, dtype=torch.float32, steps=80) -> float:
        torch.manual_seed(1)
        scales = torch.randn(64).mul(1.5).exp()
        x, teacher = torch.randn(256, 64) * scales, nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).to(dtype)
        y = teacher(x).detach()
        optimizer = make(model.parameters(), lr=3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x.to(dtype)).float(), y).backward()
            optimizer.step()
        return float(nn.functional.mse_loss(model(x.to(dtype)).float(), y).detach())

    exact = loss_after(torch.optim.AdamW)
    assert loss_after(torch.optim.AdamW, steps=1) > 4 * exact
    assert loss_after(AdamW) == pytest.approx(exact, rel=0.03)
    assert loss_after(AdamW, torch.bfloat16) == pytest.approx(exact, rel=0.06)
    assert loss_after(partial(AdamW, states="fp8-lm"), torch.bfloat16) == pytest.approx(exact, rel=0.06)


def heavy_tailed_moments(roundtrip, steps: int = 2000) -> Tensor:
    """Second moments after ``steps`` of gradients whose scales are lognormal within each block of 128."""
    generator = torch.Generator().manual_seed(5)
    scales = torch.randn(32, 128, generator=generator).mul(1.5).exp()
    v = torch.zeros(32, 128)
    for step in range(steps):
        g = torch.randn(32, 128, generator=generator) * scales
        v = roundtrip(0.999 * v + 0.001 * g * g, step)
    return v


def stored_by_us(v: Tensor, step: int) -> Tensor:
    scale, gamma = torch_function(formulas.scale("ue5m3"))(v.amax(1, keepdim=True))
    bits = torch.arange(v.numel(), dtype=torch.int32).view(v.shape) + step * v.numel()
    *_, random = torch_function(formulas.draw())(bits)
    return torch_function(formulas.decode("ue5m3"))(
        torch_function(formulas.encode("ue5m3", True))(v, gamma, random), scale
    )


def test_no_second_moment_vanishes():
    """Over 2,000 steps; and √v stays within a third of float32's (1st to 99th percentile) and true on average."""
    exact = heavy_tailed_moments(lambda v, step: v)
    ours = heavy_tailed_moments(stored_by_us)
    assert (ours > 0).all()
    ratio = (ours / exact).sqrt()
    assert 0.95 < ratio.median() < 1.05
    assert ratio.quantile(0.01) > 0.7
    assert ratio.quantile(0.99) < 1.4


def test_torchaos_second_moments_do():
    """What UE5M3 prevents: AdamWFp8 of torchao 0.18 stores E4M3, and 8 % of the moments above become 0."""
    quantize_fp8 = pytest.importorskip("torchao.optim.subclass_fp8").quantize_fp8

    def stored(v: Tensor, step: int) -> Tensor:
        codes, scale = quantize_fp8(v, 128)
        return codes.float() * scale.view(-1, 1)

    lost = (heavy_tailed_moments(stored) == 0).float().mean()
    assert 0.05 < lost < 0.12


def test_the_smallest_second_moments_are_kept():
    """2^−40 of the block's largest, and less than any block's scale, are stored as the smallest number there is."""
    for name in ("ue5m3", "fp16"):
        for largest in (1.0, 2.0**-100, 2.0**100):
            v = torch.tensor([[largest, largest * 2.0**-40, 0.0, 1e-38]])
            scale, gamma = torch_function(formulas.scale(name))(v.amax(1, keepdim=True))
            codes = torch_function(formulas.encode(name, True))(v, gamma, torch.zeros(1, 4, dtype=torch.int32))
            back = torch_function(formulas.decode(name))(codes, scale)
            assert (back > 0).tolist() == [[True, True, False, True]]
            assert back[0, 0] == pytest.approx(largest, rel=2**-3)


# --- rounding by chance ---------------------------------------------------------------------------------------------

ALL_BITS = torch.arange(2**16, dtype=torch.int32)
NUMBERS = (3.0e-3, 0.77, 1.9999, 100.3, -5.01)


@pytest.mark.parametrize("x", NUMBERS)
@pytest.mark.parametrize("name", ["e4m3", "ue5m3", "fp16"])
def test_states_are_rounded_without_bias(name, x):
    """The mean over all random numbers is the number, to the 2^-17 of a step that 16 bits leave."""
    fmt = stored_format(name)
    x = abs(x) if name == "ue5m3" else x
    one = torch.full((2**16,), x)
    codes = torch_function(formulas.encode(name, name == "ue5m3"))(one, torch.ones(()), ALL_BITS)
    back = torch_function(formulas.decode(name))(codes, torch.ones(())).double()
    low, high = (
        m for m in (max(m for m in fmt.magnitudes if m <= abs(x)), min(m for m in fmt.magnitudes if m > abs(x)))
    )
    assert set(back.abs().tolist()) == {low, high}
    assert abs(float(back.mean()) - float(one[0])) <= (high - low) * 2**-16


@pytest.mark.parametrize("x", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_rounded_without_bias(dtype, x):
    one = torch.full((2**16,), x)
    rounded = torch_function(formulas.round_parameter(dtype))(one, ALL_BITS)
    assert torch.equal(rounded, rounded.to(dtype).float())
    assert len(set(rounded.tolist())) == 2
    assert abs(float(rounded.double().mean()) - float(one[0])) <= float(rounded.max() - rounded.min()) * 2**-16


def test_non_finite_parameters_stay_so():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = torch_function(formulas.round_parameter(dtype))(x, torch.full((3,), 2**16 - 1, dtype=torch.int32))
        torch.testing.assert_close(rounded, x, equal_nan=True)


def test_random_numbers_are_even_and_of_their_own():
    """Of 2^16 elements: 16 parts of equal size within five standard deviations, no two draws correlated."""
    drawn = torch.stack(torch_function(formulas.draw())(torch.arange(2**16, dtype=torch.int32))).float()
    for bits in drawn:
        counts = torch.histc(bits, 16, 0, 2**16)
        assert (counts - 2**12).abs().max() < 5 * math.sqrt(2**12)
    lagged = torch.cat([drawn[:, :-1], drawn[:, 1:]])
    assert (lagged.corrcoef() - torch.eye(6)).abs().max() < 5 * 2**-8


def test_steps_parameters_and_seeds_draw_other_numbers():
    def after(seed: int, steps: int = 1) -> list[Tensor]:
        own = [nn.Parameter(torch.ones(32, 128, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = AdamW(own, lr=1e-3, seed=seed)
        for _ in range(steps):
            for parameter in own:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return [p.detach() for p in own]

    one, other = after(0)
    assert not torch.equal(one, other)
    assert not torch.equal(one, after(1)[0])
    assert torch.equal(one, after(0)[0])
    moved, more = one != 1, after(0, steps=2)[0] != one
    # What moves next would be what has moved before if the step did not count.
    assert 0.3 < moved[more].float().mean() / moved.float().mean() < 3


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "most"), [({}, 2.1), ({"states": "fp8-lm", "master": "none"}, 3.1), ({"states": "fp8-lm"}, 5.15)]
)
def test_bytes_per_parameter(options, most):
    own = nn.Parameter(torch.randn(256, 1024, dtype=torch.bfloat16))
    optimizer = trained(AdamW([own], **options), range(1))
    held = sum(value.untyped_storage().nbytes() for value in optimizer.state[own].values())
    assert held / own.numel() <= most


def test_small_and_indivisible_parameters_have_float32_states():
    own = parameters(shapes=((31, 128), (5000,), (100, 67), (64, 128)))
    with pytest.warns(UserWarning, match="of 23860 parameters keep float32 states"):
        optimizer = trained(AdamW(own))
    codes = [optimizer.state[p]["exp_avg"].dtype for p in own]
    assert codes == [torch.float32, torch.float32, torch.uint8, torch.uint8]
    assert optimizer.state[own[2]]["exp_avg_scale"].shape == (100, 1)


# --- how a step runs ------------------------------------------------------------------------------------------------


def test_nothing_is_asked_of_the_device():
    """Fake tensors have no numbers: whatever waited for one would fail."""
    with FakeTensorMode():
        own = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for shape in SHAPES]
        optimizer = AdamW(own, lr=torch.tensor(1e-3))
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        for _ in range(2):
            for parameter in own:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
        del optimizer.found_inf
        optimizer.step()


@pytest.mark.inductor
@pytest.mark.usefixtures("fresh_dynamo")
def test_one_program_for_all_sizes_learning_rates_and_blocks():
    programs = 0

    def backend(gm, inputs):
        nonlocal programs
        programs += 1
        return gm.forward

    blocks._compiled.cache_clear()
    with mock.patch.object(blocks.torch, "compile", partial(torch.compile, backend=backend)):
        own = parameters(shapes=((40, 128), (64, 125), (96, 128)))
        optimizer = AdamW(own, lr=LR)
        for step in range(4):
            give_gradients(own, step)
            optimizer.param_groups[0].update(lr=LR / (step + 1), weight_decay=0.1 * step)
            optimizer.step()
    blocks._compiled.cache_clear()
    assert programs == 1


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_is_eager_bit_for_bit():
    eager, compiled = (AdamW(parameters(torch.bfloat16, ((40, 128),)), LR) for _ in range(2))
    blocks._compiled.cache_clear()
    trained(compiled)
    with torch.compiler.set_stance("force_eager"):
        trained(eager)
    assert_same(compiled, eager)


def test_layouts():
    """Parameters and gradients with strides of their own are updated like dense ones."""
    dense, strided = (
        parameters(shapes=((64, 128),)),
        [nn.Parameter(parameters(shapes=((64, 128),))[0].detach().t().contiguous().t())],
    )
    one, other = AdamW(dense), AdamW(strided)
    for step in range(2):
        give_gradients(dense, step)
        strided[0].grad = dense[0].grad.t().contiguous().t()
        one.step()
        other.step()
    assert not strided[0].is_contiguous()
    assert torch.equal(dense[0], strided[0])


def test_parameters_without_gradients_do_not_step():
    own = parameters()
    optimizer = trained(AdamW(own))
    before = copy.deepcopy(optimizer)
    give_gradients(own, 3)
    own[0].grad = own[3].grad = None
    optimizer.step()
    give_gradients(own, 4)
    own[1].grad = own[2].grad = None  # as many others as before
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in own] == [4, 4, 4, 4, 5]
    assert [float(before.state[p]["step"]) for p in before.param_groups[0]["params"]] == [3] * 5


def test_closure():
    own = parameters(shapes=((64, 128),))

    def closure() -> Tensor:
        loss = own[0].square().sum()
        loss.backward()
        return loss

    optimizer = AdamW(own)
    first = optimizer.step(closure)
    own[0].grad = None
    assert optimizer.step(closure) < first


# --- gradients that are no good ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20])
@pytest.mark.parametrize("states", STATES)
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(states, bad):
    """1e20 is finite; its square is not."""
    optimizer = trained(AdamW(parameters(), states=states))
    before = [tensor.clone() for tensor in tensors(optimizer)]
    give_gradients(own := optimizer.param_groups[0]["params"], 3)
    own[3].grad[7] = bad
    optimizer.step()
    assert all(map(torch.equal, before, tensors(optimizer)))
    trained(optimizer, range(4, 5))
    assert not any(map(torch.equal, before[:4], tensors(optimizer)[:4]))


def test_grad_scaler():
    """Scaled gradients give the step of the others, and infinite ones none; the scaler learns of it."""
    scaled, plain = (AdamW(parameters(shapes=((64, 128),))) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, infinite in enumerate((False, True, False)):
        give_gradients(plain.param_groups[0]["params"], step)
        give_gradients(scaled.param_groups[0]["params"], step, scale=float(scaler.scale(torch.ones(()))))
        if infinite:
            scaled.param_groups[0]["params"][0].grad[3, 5] = math.inf
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
        assert scaler.get_scale() == (2.0**10 if step == 0 else 2.0**9)
    assert_same(scaled, plain)


def test_sparse_gradients():
    embedding = nn.Embedding(64, 128, sparse=True)
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"^AdamW: the gradient of parameter 0 in group 0, \(64, 128\), is sparse; .*$"
    ):
        AdamW(embedding.parameters()).step()


def test_parameters_without_elements():
    own = parameters(shapes=((0, 128), (64, 0), (40, 128)))
    optimizer = trained(AdamW(own))
    resumed = AdamW(parameters(shapes=((0, 128), (64, 0), (40, 128))))
    resumed.load_state_dict(optimizer.state_dict())
    assert float(optimizer.state[own[0]]["step"]) == 3
    optimizer.decoded_state_dict()


def test_nothing_to_do():
    own = parameters()
    AdamW(own).step()
    assert all(map(torch.equal, own, parameters()))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -1}, "lr=-1; a number of at least 0"),
        ({"lr": torch.ones(2)}, r"lr=tensor\(\[1., 1.\]\); a number"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\); two numbers, at least 0 and below 1"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\); two numbers"),
        ({"betas": 0.9}, "betas=0.9; two numbers"),
        ({"eps": math.nan}, "eps=nan; a number"),
        ({"weight_decay": "no"}, "weight_decay='no'; a number"),
        ({"states": "4bit"}, "states='4bit'; known are '8bit', 'fp8-lm', 'fp32'"),
        ({"states": ["8bit"]}, r"states=\['8bit'\]; known are"),
        ({"master": "bf16"}, "master='bf16'; known are 'none', 'fp16', 'fp32'"),
        ({"block": 8}, "block=8; an integer of at least 16"),
        ({"seed": 0.5}, "seed=0.5; an integer"),
    ],
)
def test_wrong_options(options, error):
    with pytest.raises(ValueError, match=f"^AdamW: {error}"):
        AdamW(parameters(), **options)


def test_wrong_parameters():
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match=r"^AdamW: a parameter \(4,\) is float64; convert it to float32 or bfloat16$"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(4).double())})
    assert len(optimizer.param_groups) == 1


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy"])
def test_resuming_is_bitwise(states, how, tmp_path):
    dtype = torch.bfloat16
    optimizer = trained(AdamW(parameters(dtype), LR, states=states, seed=4))
    if how == "deepcopy":
        resumed = copy.deepcopy(optimizer)
    else:
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        own = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
        resumed = AdamW(own)  # options come with the state
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(resumed, optimizer)
    assert_same(trained(resumed, range(3, 5)), trained(optimizer, range(3, 5)))


def test_torchs_state_is_loaded():
    """Training that began with float32 states goes on with 8 bits."""
    own = parameters()
    reference = torch.optim.AdamW(own, LR)
    for step in range(2):
        give_gradients(own, step)
        reference.step()
    optimizer = AdamW(own)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["lr"] == LR
    assert optimizer.state[own[0]]["exp_avg"].dtype == torch.uint8
    for parameter in own:
        kind = kind_of(parameter, STATES["8bit"], "none", 128)
        for name, numbers in kind.entries():
            expected = reference.state[parameter][name].double()
            limit = rounding_of(expected, numbers.name, kind.block) if numbers.scaled else 0
            assert ((decoded(optimizer.state[parameter], name, kind) - expected).abs() <= limit).all()
    trained(optimizer, range(2, 3))


def test_a_state_of_other_blocks_is_refused():
    saved = trained(AdamW(parameters(), block=64)).state_dict()
    for group in saved["param_groups"]:
        del group["block"]
    message = r"^AdamW: exp_avg_scale of a parameter \(40, 128\) is \(40, 2\) torch.float32, .* calls for \(40, 1\)"
    with pytest.raises(ValueError, match=message):
        AdamW(parameters()).load_state_dict(saved)


def test_encoding_what_was_decoded_changes_nothing():
    """Codes are a fixed point, so that decoding for another optimizer and coming back loses nothing."""
    own = parameters(shapes=((40, 128),))
    optimizer = trained(AdamW(own))
    kind = kind_of(own[0], STATES["8bit"], "none", 128)
    for name, _ in kind.entries():
        numbers = decoded(optimizer.state[own[0]], name, kind)
        again = decoded(encoded(own[0], numbers, name, kind), name, kind)
        torch.testing.assert_close(again, numbers, rtol=2**-22, atol=0)


def test_it_is_found_without_an_import():
    assert qcompile.optim.AdamW is AdamW
    assert get_format("e4m3") is stored_format("e4m3")
