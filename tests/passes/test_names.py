"""Layers are called what ``named_modules()`` of the compiled model calls them, however Dynamo comes to them.

Graphs are rewritten and then run as they are, so a compilation takes milliseconds. ``skip=[real name]`` must leave
exactly that layer alone and the default must find ``lm_head``: a lost name trains a head in FP4, silently.
"""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from qcompile import compat, session
from qcompile.backends import compile_with
from qcompile.ir.rules import Rule, matches_name
from qcompile.passes import pipeline
from qcompile.passes.find_gemms import COMPUTES_A_WEIGHT
from qcompile.passes.names import Names
from qcompile.passes.record import Decision
from qcompile.report.explain import with_own_code
from qcompile.session import UnmatchedRuleError

from .harness import SMALL_FP4 as FP4

WIDTH = 40


def backend_into(decisions: list[Decision], **options: Any) -> Callable[..., Any]:
    """A backend that rewrites each graph and runs it as it is. With ``skip``, the names in it alone decide."""
    if "skip" in options:
        options = {"defaults": False, **options}

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        decisions.extend(pipeline.rewrite(gm, FP4.override(options)).plan.decisions)
        return gm.forward

    return backend


def decisions_of(compile_it: Callable[[Any], Callable[..., Any]], *inputs: Any, **options: Any) -> list[Decision]:
    """What is decided in one call of ``compile_it(backend)``, over all its graphs."""
    torch._dynamo.reset()
    decisions: list[Decision] = []
    compile_it(backend_into(decisions, **options))(*inputs)
    return decisions


def compiled(model: Callable[..., Any]) -> Callable[[Any], Callable[..., Any]]:
    return lambda backend: torch.compile(model, backend=backend)


def names(decisions: list[Decision]) -> list[str]:
    """Each reported name once, in order."""
    return list(dict.fromkeys(d.site.name for d in decisions))


def wide(decisions: list[Decision]) -> list[str]:
    return names([d for d in decisions if not d.quantized])


def rows() -> Tensor:
    return torch.randn(5, WIDTH)


class Block(nn.Module):
    """A layer and a parameter used by itself, with a graph break between two uses of them."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.q_proj, self.down = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.q_proj(x).relu() @ self.down
        if self.broken:
            torch._dynamo.graph_break()
        return F.linear(x, self.down) + self.q_proj(x)


class Model(nn.Module):
    def __init__(self, blocks: int = 2, broken: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(broken) for _ in range(blocks))
        self.lm_head = nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


LAYERS = ["layers.0.q_proj", "layers.0.down", "layers.1.q_proj", "layers.1.down", "lm_head"]


# --- ways to compile ------------------------------------------------------------------------------------------------


class Trainer:
    """Not a module; holds one."""

    def __init__(self, model: nn.Module) -> None:
        self.models = {"student": model}

    def step(self, x: Tensor) -> Tensor:
        return self.models["student"](x)


@dataclass
class Slotted:
    __slots__ = ("model",)
    model: nn.Module


def apply(model: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
    return model(x) * scale


def in_place(model: nn.Module) -> Callable[[Any], nn.Module]:
    def compile_it(backend: Any) -> nn.Module:
        model.compile(backend=backend)
        return model

    return compile_it


GLOBAL_MODEL = Model()
WAYS: dict[str, Callable[[Model], Any]] = {
    "module": compiled,
    "model.compile()": in_place,
    "forward": lambda model: compiled(model.forward),
    "closure": lambda model: compiled(lambda x: model(x)),
    "partial": lambda model: compiled(functools.partial(apply, model, scale=2.0)),
    "default argument": lambda model: compiled(lambda x, m=model: m(x)),
    "method of another object": lambda model: compiled(Trainer(model).step),
    "nested function": lambda model: compiled(lambda x: (lambda y: apply(model, y))(x)),
    "explain's wrapper": lambda model: compiled(with_own_code(model)),
    "another compiled module": lambda model: compiled(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("way", WAYS)
def test_names_however_it_is_compiled(way: str) -> None:
    """Each way hands Dynamo other sources; what the layers are called does not depend on them."""
    decisions = decisions_of(WAYS[way](Model()), rows(), skip=["layers.1.down", "lm_head"])
    assert names(decisions) == LAYERS
    assert wide(decisions) == ["layers.1.down", "lm_head"]


@pytest.mark.parametrize(
    ("given", "get"),
    [
        (lambda model: [model], lambda given: given[0]),
        (lambda model: {"a": (0, model)}, lambda given: given["a"][1]),
        (Slotted, lambda given: given.model),
        (lambda model: SimpleNamespace(inner=Trainer(model)), lambda given: given.inner.models["student"]),
    ],
    ids=["list", "dict of tuples", "slots", "object in object"],
)
def test_names_of_arguments(given: Callable[[nn.Module], Any], get: Callable[[Any], nn.Module]) -> None:
    assert names(decisions_of(compiled(lambda g, x: get(g)(x)), given(Model()), rows())) == LAYERS


def test_a_module_of_the_globals() -> None:
    assert names(decisions_of(compiled(lambda x: GLOBAL_MODEL(x)), rows())) == LAYERS


def test_equal_names_of_two_modules_have_the_variable_in_front() -> None:
    """Else a rule for one would be a rule for both."""
    student, teacher, extra = Model(1), Model(1), nn.Sequential(nn.Linear(64, 3))

    def step(x: Tensor) -> Tensor:
        return extra(student(x) - teacher(x))

    decisions = decisions_of(compiled(step), rows(), skip=["teacher.layers", "student.lm_head"])
    own = ["layers.0.q_proj", "layers.0.down", "lm_head"]
    assert names(decisions) == [f"student.{n}" for n in own] + [f"teacher.{n}" for n in own] + ["0"]
    assert wide(decisions) == ["student.lm_head", "teacher.layers.0.q_proj", "teacher.layers.0.down"]


def test_layers_and_tensors_of_a_function_are_called_by_their_variables() -> None:
    """A head that is a variable is a head, too."""
    body, lm_head = Model(1).layers[0], nn.Linear(WIDTH, 64)
    weights = {"up": nn.Parameter(torch.randn(WIDTH, 8)), "lm_head": nn.Parameter(torch.randn(8, WIDTH))}
    decisions = decisions_of(compiled(lambda x, w: lm_head(body(x) @ w["up"] @ w["lm_head"])), rows(), weights)
    assert names(decisions) == ["q_proj", "down", "w.up", "w.lm_head", "lm_head"]
    assert wide(decisions) == ["w.lm_head", "lm_head"]


def test_a_function_of_tensors_has_no_layer_and_is_quantized() -> None:
    """``skip=["lm_head"]`` is the default: that nothing is called so must not leave everything wide."""
    (decision,) = decisions_of(
        compiled(lambda x, weight: F.linear(x, weight)), rows(), nn.Parameter(torch.randn(7, WIDTH))
    )
    assert (decision.site.name, decision.quantized) == ("linear_0", True)


def test_functional_call() -> None:
    """Parameters are other tensors then; modules are what they are."""
    model = Model()
    tensors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    decisions = decisions_of(compiled(lambda p, x: torch.func.functional_call(model, p, (x,))), tensors, rows())
    assert {"layers.0.q_proj", "layers.1.q_proj", "lm_head"} <= set(names(decisions))
    assert "lm_head" in wide(decisions)


# --- graph breaks ---------------------------------------------------------------------------------------------------


class Broken(Model):
    """Three breaks of its own, the products of a layer on both sides, and the head after all of them."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        x = first(x)
        torch._dynamo.graph_break()
        x = first(x) @ second.down
        torch._dynamo.graph_break()
        x = second(x)
        torch._dynamo.graph_break()
        return self.lm_head(x)


@pytest.mark.parametrize("skipped", LAYERS)
def test_three_graph_breaks(skipped: str) -> None:
    decisions = decisions_of(compiled(Broken()), rows(), skip=[skipped])
    assert set(names(decisions)) == set(LAYERS)
    assert wide(decisions) == [skipped]
    assert wide(decisions_of(compiled(Broken()), rows())) == ["lm_head"]


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x @ x.t() @ x


def test_products_without_weight_after_a_break_belong_to_the_module_that_runs() -> None:
    """A resumed frame has no module stack; that of Python knows whose forward it is."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention())
    assert names(decisions_of(compiled(model), rows(), attention=True))[-1:] == ["1"]


BLOCKS = torch._dynamo.config.recompile_limit + 2


@pytest.mark.parametrize("skipped", ["layers.3", "layers.9.q_proj", "layers.0.down"])
def test_blocks_that_a_rule_tells_apart_do_not_share_code(skipped: str) -> None:
    """After a break the frame of each block is the same code. Dynamo would run what it compiled for the first, and
    under its limit of recompilations the last ones in Python.
    """
    decisions = decisions_of(compiled(Model(BLOCKS, broken=True)), rows(), skip=[skipped])
    blocks = [f"layers.{i}.{part}" for i in range(BLOCKS) for part in ("q_proj", "down")]
    assert [n for n in names(decisions) if n != "lm_head"] == blocks
    assert wide(decisions) == [n for n in blocks if f"{n}.".startswith(f"{skipped}.")]


class Captured(nn.Module):
    """The frame comes to the layer through a cell of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        call = lambda y: self.fc(y)  # noqa: E731
        torch._dynamo.graph_break()
        return call(x)


class ThroughArgument(Captured):
    """The frame is a function, and the layer its argument or in an object that is."""

    def forward(self, x: Tensor) -> Tensor:
        return broken_linear(self.fc, broken_call(Trainer(self.fc), x))


def broken_call(holder: Trainer, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return holder.step(x)


def broken_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return F.linear(x, layer.weight)


@pytest.mark.parametrize("block", [Captured, ThroughArgument])
def test_code_is_not_shared_however_a_frame_comes_to_its_layer(block: type[nn.Module]) -> None:
    model = nn.Sequential(*(block() for _ in range(4)))
    decisions = decisions_of(compiled(model), rows(), skip=["2"])
    assert names(decisions) == [f"{i}.fc" for i in range(4)]
    assert wide(decisions) == ["2.fc"]


def test_blocks_share_code_where_no_rule_tells_them_apart() -> None:
    """Else a model of a hundred layers compiles a hundred times."""
    decisions = decisions_of(compiled(Model(BLOCKS, broken=True)), rows(), skip=["lm_head", "q_proj", "layers.*.down"])
    assert not {n for n in names(decisions) if n.startswith("layers.2")}


def test_blocks_compiled_one_by_one_have_names_of_their_own() -> None:
    def regional(backend: Any) -> nn.Module:
        model = Model(4)
        for layer in model.layers:
            layer.compile(backend=backend)
        return model

    decisions = decisions_of(regional, rows(), skip=["down"])
    assert names(decisions) == ["q_proj", "down"]
    assert wide(decisions) == ["down"]


# --- wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpointed() -> nn.Module:
    model = Model()
    model.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in model.layers)
    return model


def compiled_inside() -> nn.Module:
    model = Model()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    return model


def adapted(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(Model(), LoraConfig(r=4, target_modules=["q_proj"], **options))


def buckets() -> nn.Module:
    return DistributedDataParallel(Model(), bucket_cap_mb=0.02)


def sharded() -> nn.Module:
    model, mesh = Model(), init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return model


#: Model, a layer's real name, and the name without what the wrapper adds.
WRAPPED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "checkpoint_wrapper": (checkpointed, "layers.0._checkpoint_wrapped_module.q_proj", "layers.0.q_proj"),
    "_orig_mod": (compiled_inside, "layers.0._orig_mod.q_proj", "layers.0.q_proj"),
    "LoRA": (adapted, "base_model.model.layers.0.q_proj.base_layer", "layers.0.q_proj.base_layer"),
    "DoRA": (
        lambda: adapted(use_dora=True),
        "base_model.model.layers.0.q_proj.lora_A.default",
        "layers.0.q_proj.lora_A.default",
    ),
    "DDP": (buckets, "module.layers.0.q_proj", "layers.0.q_proj"),
    "FSDP2": (sharded, "layers.0.q_proj", "layers.0.q_proj"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_under_wrappers(wrapper: str, one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both spellings of the name leave exactly that layer wide, and every name is one of ``named_modules()`` or a
    parameter's.
    """
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)  # several buckets, so several graphs
    make, real, plain = WRAPPED[wrapper]
    for skipped in (real, plain):
        torch.manual_seed(0)
        model = make()
        known = {*dict(model.named_modules()), *dict(model.named_parameters())}
        decisions = decisions_of(compiled(model), rows(), skip=[skipped])
        assert set(names(decisions)) <= known
        assert real in names(decisions)
        # DoRA multiplies its adapters with each other, too, to know the norm of what they add to the weight.
        assert wide([d for d in decisions if COMPUTES_A_WEIGHT not in d.reason]) == [real]


@pytest.mark.parametrize("wrapper", ["checkpoint_wrapper", "_orig_mod", "LoRA", "DDP"])
def test_the_head_stays_wide_under_wrappers(wrapper: str, one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    left = wide(decisions_of(compiled(WRAPPED[wrapper][0]()), rows()))
    assert [name.split(".")[-1] for name in left if "lora_" not in name] == ["lm_head"]


def test_blocks_sharded_and_compiled_one_by_one(one_process: None) -> None:
    def regional(backend: Any) -> nn.Module:
        model = sharded()
        for layer in model.layers:
            layer.compile(backend=backend)
        return model

    decisions = decisions_of(regional, rows(), skip=["down"])
    assert names(decisions) == ["q_proj", "down"]
    assert wide(decisions) == ["down"]


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("layers.0._checkpoint_wrapped_module.q_proj", "layers.0.q_proj", True),
        ("layers.0._orig_mod.q_proj", "layers.*.q_proj", True),
        ("module.lm_head", "lm_head", True),
        ("layers.0.q_proj", "_orig_mod.layers.0.q_proj", True),
        ("generator.module.fc", "generator.fc", True),
        ("layers.10.q_proj", "layers.1", False),
        ("odd[key]", "odd[key]", True),
        ("a.odd[key].b", "odd[key]", True),
        ("oddk", "odd[key]", True),
        ("", "module", False),
        ("layers.0", "module", False),
    ],
)
def test_what_a_pattern_matches(name: str, pattern: str, matches: bool) -> None:
    assert matches_name(name, pattern) is matches
    assert Rule(name=pattern).matches(name, "linear", None) is matches


# --- keys, shared and tied --------------------------------------------------------------------------------------------

KEYS = ["a[0]", "b c", "quote'\"", "<script>", "*", "[bold]x[/bold]", "L['self']"]


@pytest.mark.parametrize("key", KEYS)
def test_keys_with_any_characters(key: str) -> None:
    """A key is a name as it is, and as a pattern it means itself."""
    model = nn.Sequential()
    for name in KEYS:
        model.add_module(name, nn.Linear(WIDTH, WIDTH))
    decisions = decisions_of(compiled(model), rows(), skip=[key])
    assert names(decisions) == KEYS
    assert wide(decisions) == (KEYS if key == "*" else [key])
    assert f"skip={key!r}" in {d.reason for d in decisions}


class Shared(nn.Module):
    """A module under two names, called twice, and a weight tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first
        self.embedding = nn.Embedding(64, WIDTH)
        self.decoder = nn.Linear(WIDTH, 64, bias=False)
        self.decoder.weight = self.embedding.weight
        self.loop = self  # not registered: `named_modules(remove_duplicate=False)` would walk it forever
        self.parent = [self]

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return self.decoder(x) + F.linear(x, self.embedding.weight)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value) if name == "loop" else super().__setattr__(name, value)


def test_shared_and_tied() -> None:
    """The report says the first name; rules may say any. A tied weight is called after the layer that reads it, and by
    all its names where none does.
    """
    assert names(decisions_of(compiled(Shared()), rows())) == ["first", "decoder", "embedding"]
    for skipped, left in (
        ("first", ["first"]),
        ("second", ["first"]),
        ("embedding", ["embedding"]),
        ("decoder", ["decoder", "embedding"]),
    ):
        assert wide(decisions_of(compiled(Shared()), rows(), skip=[skipped])) == left


def test_modules_that_hold_each_other() -> None:
    """Such a pair has infinitely many names."""
    model = Model(1)
    model.layers[0].add_module("parent", model)
    assert names(decisions_of(compiled(model), rows()))[0] == "layers.0.q_proj"


class Unlisted(nn.Module):
    """Layers that ``named_modules()`` does not list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [Block(), {"deep": nn.Linear(WIDTH, WIDTH)}]

    def forward(self, x: Tensor) -> Tensor:
        return GLOBAL_MODEL.lm_head(self.blocks[1]["deep"](self.blocks[0](x)))


def test_layers_in_plain_attributes_are_called_by_the_way_to_them() -> None:
    decisions = decisions_of(compiled(Unlisted()), rows(), skip=["deep", "lm_head"])
    assert names(decisions) == ["blocks.0.q_proj", "blocks.0.down", "blocks.1.deep", "GLOBAL_MODEL.lm_head"]
    assert wide(decisions) == ["blocks.1.deep", "GLOBAL_MODEL.lm_head"]


# --- bodies of higher-order ops ---------------------------------------------------------------------------------------


@torch.compiler.nested_compile_region
def region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


class Bodies(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.call = Block(), Block(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.last, self.call(self.first, x))


@pytest.mark.parametrize(
    "call", [functools.partial(checkpoint, use_reentrant=False), region], ids=["checkpoint", "region"]
)
def test_parameters_in_bodies_of_higher_order_ops(call: Any) -> None:
    """A body's placeholder says nothing; its callers' arguments do."""
    decisions = decisions_of(compiled(Bodies(call)), rows(), skip=["first.down", "last.q_proj"])
    assert [d.site.name.split(".")[0] for d in decisions] == ["first"] * 4 + ["last"] * 4
    assert names(decisions) == ["first.q_proj", "first.down", "last.q_proj", "last.down"]
    assert wide(decisions) == ["first.down", "last.q_proj"]


def test_a_body_that_serves_several_layers_has_all_their_names() -> None:
    """One body, called twice: a rule for either layer is a rule for it."""
    x = rows().requires_grad_()
    decisions = decisions_of(compiled(Bodies(region)), x)
    assert {d.site.names for d in decisions} == {("first.q_proj", "last.q_proj"), ("first.down", "last.down")}
    assert len(decisions) == 4
    assert len(wide(decisions_of(compiled(Bodies(region)), x, skip=["last"]))) == 2


def test_parameters_in_branches() -> None:
    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.layer = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x @ self.w, lambda x: self.layer(x), (x,))

    assert names(decisions_of(compiled(Cond()), rows())) == ["w", "layer"]


def test_attention_is_opened_under_its_names() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    decisions = decisions_of(compiled(nn.ModuleList([layer])[0].forward), rows()[None], skip=["out_proj"])
    assert names(decisions) == ["self_attn.in_proj_weight", "self_attn", "self_attn.out_proj", "linear1", "linear2"]
    assert "self_attn.out_proj" in wide(decisions)


# --- no name --------------------------------------------------------------------------------------------------------


class Registry:
    """Reached by a subscript of a class, which no search follows."""

    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def __class_getitem__(cls, key: str) -> nn.Module:
        return cls.layer


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = Registry["layer"](x)
        torch._dynamo.graph_break()
        return self.seen(Registry["layer"](x))


def test_a_layer_without_a_name_stays_wide_while_rules_name_layers() -> None:
    """It may be the one that a rule means. The reason says what to do."""
    decisions = decisions_of(compiled(Hidden()), rows())
    assert [d.quantized for d in decisions] == [False, False, False, False, True]
    assert decisions[0].reason == (
        "its layer (Linear) has no name that skip=… or rules=… could match: it is reached from nothing that was "
        "compiled; make it a submodule or an argument"
    )
    decisions = decisions_of(
        compiled(Hidden()), rows(), skip=[], rules=[{"name": "*", "max_size": 10, "quantize": False}]
    )
    assert all(d.quantized for d in decisions)
    assert decisions[0].site.name == "linear_0"


def through_backend(model: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_with(FP4, gm, inputs, options=options, inner_compile=compat.eager_inner_compile)

    return torch.compile(model, backend=backend)


def test_one_warning_per_compile_call_for_layers_without_a_name() -> None:
    torch._dynamo.reset()
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            through_backend(Hidden(), {})(rows())
        assert ["has no name" in str(w.message) for w in caught].count(True) == 1


def test_outside_of_a_compiled_call_nothing_has_a_name() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    node = next(iter(gm.graph.nodes))
    assert compat.compiled_call() is None
    assert Names(gm, None).of(node).names == ()


# --- sessions -------------------------------------------------------------------------------------------------------


def test_a_session_is_freed_with_the_compiled_callable() -> None:
    torch._dynamo.reset()
    before = len(session._sessions)
    call = through_backend(Block(), {"skip": ["q_proj"]})
    call(rows())
    (mine,) = [weakref.ref(s) for s in list(session._sessions.values())[before:]]
    assert mine() is not None
    del call
    torch._dynamo.reset()
    gc.collect()
    assert mine() is None
    assert len(session._sessions) == before


UNMATCHED = {"rules": [{"name": "q_proj", "weight": "midrise8 row"}], "strict": True}


def test_strict_is_judged_for_each_model_that_shares_the_options() -> None:
    torch._dynamo.reset()
    good, bad = through_backend(Block(), UNMATCHED), through_backend(nn.Sequential(nn.Linear(WIDTH, WIDTH)), UNMATCHED)
    for _ in range(3):
        good(rows())
    bad(rows())
    with pytest.raises(UnmatchedRuleError, match="matched no GEMM of the model; its layers: 0"):
        bad(rows())


def test_rules_are_judged_when_the_first_call_is_over() -> None:
    """Code of a block that runs twice in one call is no second step: what the rule means may be compiled later."""
    torch._dynamo.reset()
    call = through_backend(Broken(), {"skip": ["lm_head"], "strict": True})
    for _ in range(3):
        call(rows())


def test_rules_are_judged_once() -> None:
    torch._dynamo.reset()
    call = through_backend(Block(), {"skip": ["nothing"]})
    call(rows())
    with pytest.warns(UserWarning, match="skip='nothing' matched no GEMM"):
        call(rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(rows())
