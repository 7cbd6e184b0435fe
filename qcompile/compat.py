"""The private torch API that the package touches. :data:`TRIED` says with which releases.

The kernels' loop bodies, lowerings and templates are written in private API, and keep theirs: `tests/test_structure.py`
lists these modules, and fails for any other.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch._dynamo.backends.registry
import torch._dynamo.compiled_autograd
import torch._dynamo.convert_frame
import torch._dynamo.eval_frame
import torch._dynamo.external_utils
import torch._dynamo.guards
import torch._dynamo.output_graph
import torch._dynamo.source
import torch._dynamo.utils
import torch._functorch.partitioners
import torch._guards
import torch._inductor.compile_fx
import torch._inductor.fx_passes.post_grad
import torch._inductor.pattern_matcher
import torch._logging._internal
import torch.distributed as dist
import torch.optim._muon
import torch.utils._python_dispatch
import torch.utils._pytree
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "TRIED",
    "CheckpointPolicy",
    "CompiledCall",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "HigherOrderOperator",
    "LazyGraphModule",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "all_gather_single",
    "backend_of",
    "backends_below",
    "before_next_call",
    "cache_counters",
    "captures_recurrent_layers",
    "card_name",
    "check_when_it_runs",
    "compile_fx",
    "compiled_call",
    "current_frame",
    "ddp_hook",
    "decided_by_data",
    "disabled_torch_function",
    "eager_inner_compile",
    "empty_strided",
    "enabled_torch_function",
    "enter_autocast",
    "erase_unread",
    "exit_autocast",
    "fake_mode_of",
    "fake_result",
    "fake_values_hold",
    "frame_compilations",
    "fsdp_axes",
    "fsdp_divide_factor",
    "fsdp_reduction",
    "functional_collective",
    "given_fake_tensors",
    "guard_identity",
    "guarded_bool",
    "guarded_int",
    "in_compiled_autograd",
    "inductor_option_names",
    "inductor_options",
    "is_argument",
    "is_current",
    "is_inductor_option",
    "is_parameter",
    "is_tracing",
    "is_wrapper_subclass",
    "keeps_float32",
    "local_variable",
    "log_artifact",
    "make_fx",
    "make_wrapper_subclass",
    "memory_of",
    "min_cut_partition",
    "nll_loss_nd",
    "no_fake_mode",
    "partitioner_knows",
    "placeholder_value",
    "plain_parts",
    "raw_stream",
    "recompile_limits",
    "reduction",
    "register_backend",
    "remember_fake_results",
    "set_grad_enabled",
    "source_line",
    "source_of",
    "stable_topological_sort",
    "tensor_core_capability",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "triton_kernel_name",
    "unlimited_recompiles",
    "use_torchs_ptxas",
    "user_hook",
    "warn_if_untried",
    "will_freeze",
]

#: Releases of torch that the quick tests have passed on. A patch release counts as the one that it patches.
TRIED = ("2.11.0", "2.13.0", "2.14.1", "2.15.0")

compile_fx = torch._inductor.compile_fx.compile_fx
min_cut_partition = torch._functorch.partitioners.min_cut_rematerialization_partition
stable_topological_sort = torch._inductor.pattern_matcher.stable_topological_sort

# What Dynamo's graphs call where the user's code has a context manager or a function of ``torch.nn.functional``.
set_grad_enabled = torch._C._set_grad_enabled
enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
nll_loss_nd = torch._C._nn.nll_loss_nd

#: The ``__torch_function__`` of a class that overrides nothing, which Dynamo then traces as a plain tensor's.
disabled_torch_function = torch._C._disabled_torch_function_impl

#: Within it, classes with a ``__torch_function__`` are asked, also where a subclass of tensors has turned that off.
enabled_torch_function = torch._C._EnableTorchFunction

#: Within it, tensors have data even where the user compiles under ``FakeTensorMode``.
no_fake_mode = torch._subclasses.fake_tensor.unset_fake_temporarily


@functools.cache
def warn_if_untried(version: str) -> None:
    """Warn, once per process, that ``version`` of torch is none of :data:`TRIED`; a build before a release never is."""
    release = re.match(r"(\d+\.\d+)\.\d+(\+|$)", version)
    if release is None or release[1] not in {tried.rpartition(".")[0] for tried in TRIED}:
        message = (
            f"qcompile: torch {version} is untried, and qcompile reaches into torch's private parts; "
            f"if something looks wrong, compare with one of {', '.join(TRIED)}"
        )
        warnings.warn(message, UserWarning, stacklevel=2)


def in_compiled_autograd() -> bool:
    """Whether compiled autograd is tracing: the graph at hand is then a backward, whose GEMMs are not the user's."""
    return bool(torch._dynamo.compiled_autograd.in_compiled_autograd_region)


def inductor_options(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Expand ``mode=`` and check Inductor's own ``options=``. Raises ``RuntimeError`` for unknown or ill-typed ones."""
    return dict(torch._TorchCompileInductorWrapper(mode, dict(options) if options else None, None).config)


def inductor_option_names() -> list[str]:
    return list(torch._inductor.config.get_config_copy())


def is_inductor_option(name: str) -> bool:
    """Whether Inductor's config has this entry (dashes allowed, as torch allows them)."""
    return name.replace("-", "_") in inductor_option_names()


def unlimited_recompiles() -> AbstractContextManager[Any]:
    """Within it, Dynamo compiles a code object however many compiled versions it has already."""
    return torch._dynamo.config.patch(dict.fromkeys(recompile_limits(), sys.maxsize))


def register_backend(name: str, function: Callable[..., Any]) -> None:
    """Make ``name`` a name for ``torch.compile(backend=…)``; in place of the function it stood for, if any."""
    torch._dynamo.backends.registry._COMPILER_FNS.pop(name, None)
    torch._dynamo.backends.registry.register_backend(function, name)


def recompile_limits() -> dict[str, int]:
    """Names and values of the limits that :func:`unlimited_recompiles` lifts."""
    names = ("recompile_limit", "accumulated_recompile_limit")
    return {name: getattr(torch._dynamo.config, name) for name in names}


def frame_compilations() -> dict[Any, int]:
    """How often Dynamo has compiled each code object, by its number."""
    return dict(torch._dynamo.convert_frame.FRAME_COMPILE_COUNTER)


def cache_counters() -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Inductor's and AOTAutograd's counters, among them the hits and misses of their caches."""
    counters = torch._dynamo.utils.counters
    return counters["inductor"], counters["aot_autograd"]


def use_torchs_ptxas() -> None:
    """Make Triton assemble with the ``ptxas`` that came with torch, as Inductor makes it from its first kernel on."""
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

    _set_triton_ptxas_path()


def current_frame() -> tuple[Any, int]:
    """Of the frame that Dynamo is compiling: its code object's number, and how often that was compiled before."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    return (None, 0) if compile_id is None else (compile_id.frame_id, compile_id.frame_compile_id or 0)


def is_tracing() -> bool:
    """Whether Dynamo or AOTAutograd is at work: what runs then is no step of the model's."""
    return torch._guards.CompileContext.try_get() is not None


def captures_recurrent_layers() -> bool:
    """Whether Dynamo traces ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``; else any frame that calls one runs in Python."""
    return bool(torch._dynamo.config.allow_rnn)


def user_hook(name: str, patches: Mapping[str, Any]) -> Any:
    """What the user's Inductor config has in a hook already; ours is chained behind it."""
    return patches[name] if name in patches else getattr(torch._inductor.config, name, None)


def fake_mode_of(graph: Graph) -> Any:
    """The FakeTensorMode of a graph's values, or ``None`` for a graph without tensors."""
    for node in graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        if mode := torch._subclasses.fake_tensor.maybe_get_fake_mode(value):
            return mode
    return None


class _Made(NamedTuple):
    """How a fake result is made: of new memory, or if ``is_view`` of that of the only tensor that the call reads."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    is_view: bool


#: By mode, calls that have been made before, by what decides what they return.
_FAKE_RESULTS: WeakKeyDictionary[Any, dict[Any, _Made | tuple[_Made, ...] | None]] = WeakKeyDictionary()


def fake_result(mode: Any, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
    """What ``op`` returns for fake tensors of ``mode``; ``run`` finds it, if the call is the first of its kind.

    A model's layers make the same calls, and the tensors that two of them return differ in memory alone. Making those
    takes a seventh of the time of a dispatch, and a fourth of the time that torch takes for ops of its own, of which
    it remembers calls likewise.
    """
    known = _FAKE_RESULTS.setdefault(mode, {})
    tensors: list[torch.Tensor] = []
    try:
        key = (op, _key(args, tensors), _key(tuple(kwargs.items()), tensors))
    except _UnknownKindError:
        return run()
    if key not in known:
        result = run()
        known[key] = _made(result, tensors)
        return result
    made = known[key]
    if made is None:
        return run()
    if isinstance(made, _Made):
        return _fake_tensor(mode, made, tensors)
    return tuple(_fake_tensor(mode, one, tensors) for one in made)


class _UnknownKindError(Exception):
    """What a call returns depends on more than a key can tell."""


def _key(value: Any, tensors: list[torch.Tensor]) -> Any:
    """What decides of an argument which shapes, strides and dtypes a call returns; its tensors are added to the list.

    Raises :class:`_UnknownKindError` for symbolic sizes and for tensors that are not plain fake ones.
    """
    kind = type(value)
    if kind is torch._subclasses.FakeTensor:
        is_plain = value.layout is torch.strided and value.constant is None and value.real_tensor is None
        if not is_plain or value._has_symbolic_sizes_strides:
            raise _UnknownKindError
        tensors.append(value)
        layout = *value.size(), None, *value.stride(), value.storage_offset()
        return layout, value.dtype, value.device, value.requires_grad
    if issubclass(kind, tuple | list):
        return kind, *[_key(item, tensors) for item in value]
    if kind in _PLAIN:
        return kind, value  # 1, 1.0 and True are equal
    raise _UnknownKindError


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


def _made(result: Any, tensors: list[torch.Tensor]) -> _Made | tuple[_Made, ...] | None:
    """How to make another such result; ``None`` if that is more than plain tensors, or changes one that is given."""
    if isinstance(result, tuple):
        parts = [_made(part, tensors) for part in result]
        return tuple(parts) if all(isinstance(part, _Made) for part in parts) else None  # type: ignore[arg-type]
    try:
        _key(result, [])
    except _UnknownKindError:
        return None
    is_view = memory_of(result) in map(memory_of, tensors)
    if result.requires_grad or (is_view and (len(tensors) > 1 or result is tensors[0])):
        return None
    size, stride = tuple(result.size()), result.stride()
    return _Made(size, stride, int(result.storage_offset()), result.dtype, result.device, is_view)


def _fake_tensor(mode: Any, made: _Made, tensors: list[torch.Tensor]) -> torch.Tensor:
    storage = tensors[0].untyped_storage() if made.is_view else None
    with torch._subclasses.fake_tensor.in_kernel_invocation_manager(mode):
        value = torch.empty_strided(made.size, made.stride, dtype=made.dtype, device="meta")
        if storage is not None:
            value.set_(storage, made.offset, made.size, made.stride)
    return torch._subclasses.FakeTensor(mode, value, made.device)


def remember_fake_results(library: torch.library.Library, ops: Iterable[str]) -> None:
    """Let fake tensors remember calls of ``ops`` as :func:`fake_result` does; torch remembers those of its own ops
    only. To be called once.
    """

    def rule(mode: Any, op: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
        kwargs = kwargs or {}
        return fake_result(mode, op, args, kwargs, lambda: mode.__torch_dispatch__(op, types, args, kwargs))

    for op in ops:
        torch.library.register_torch_dispatch(op, torch._subclasses.FakeTensorMode, rule, lib=library)


def fake_values_hold(graph: Graph, nodes: Set[Node]) -> None:
    """Tell Inductor, which is running a post-grad pass, that the fake values of ``nodes`` are right, and no others.

    It would find anew the value of each node that a pass has added or changed, and then, since a value found anew never
    shares memory with the old one, those of all that depend on it: of the whole graph. Does nothing outside of such a
    pass.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not torch._inductor.fx_passes.post_grad.post_grad_passes.__code__:
        frame = frame.f_back
    updater = None if frame is None else frame.f_locals.get("fake_tensor_updater")
    if updater is not None:
        for node in graph.nodes:
            state = updater.hash_node(node)
            (updater.processed_hashes.add if node in nodes else updater.processed_hashes.discard)(state)


def erase_unread(graph: Graph) -> None:
    """``graph.eliminate_dead_code()``, which also checks the order of nodes; but only those that nobody reads are asked
    whether they have side effects, which takes longer than all the rest.
    """
    random_has_effects = bool(torch._inductor.config.fallback_random)
    graph.eliminate_dead_code(lambda node: bool(node.users) or node.is_impure(random_has_effects))


def given_fake_tensors(example_inputs: list[Any]) -> bool:
    """Whether a model is compiled for the user's own fake tensors (``FakeTensorMode``), not for the tracer's."""
    context = torch._guards.TracingContext.try_get()
    fakes = [x for x in example_inputs if isinstance(x, torch._subclasses.FakeTensor)]
    return context is not None and any(x.fake_mode is not context.fake_mode for x in fakes)


def log_artifact(name: str, text: Callable[[], str]) -> None:
    """Write a program as a tlparse artifact (``TORCH_TRACE``)."""
    torch._logging._internal.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"qcompile_{name}", "encoding": "string"},
        payload_fn=text,
    )


def eager_inner_compile(gm: GraphModule, example_inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
    """An ``inner_compile`` for :data:`compile_fx` that runs every graph pass of Inductor and then executes the graph
    eagerly.

    Same rewriting, partitioning and saved tensors as a real compilation, in seconds. ``explain()`` and most tests use
    it.
    """
    mode = torch._guards.detect_fake_mode(example_inputs) or fake_mode_of(gm.graph)
    inference = bool(kwargs.get("is_inference", False))
    with torch._inductor.virtualized.V.set_fake_mode(mode):
        torch._inductor.compile_fx.view_to_reshape(gm)
        torch._inductor.compile_fx._recursive_post_grad_passes(gm, inference)

    def run(args: list[Any]) -> Any:
        with next((x.fake_mode for x in args if isinstance(x, torch._subclasses.FakeTensor)), nullcontext()):
            return torch.fx.Interpreter(gm).boxed_run(args) if isinstance(args, list) else gm(*args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextmanager
def partitioner_knows(elementwise: Iterable[OpOverload], products: Iterable[OpOverload]) -> Iterator[None]:
    """Within it, torch's min-cut treats these ops as its own of the kind: what is elementwise fuses and may be computed
    again, products are compute-intensive. There is no way to register them.
    """
    module = torch._functorch.partitioners
    torchs_own = module.get_default_op_list
    cheap, dear = ({op.overloadpacket for op in ops} for ops in (elementwise, products))

    def op_list() -> Any:
        types = torchs_own()
        return replace(
            types,
            fusible_ops=types.fusible_ops | cheap,
            recomputable_ops=types.recomputable_ops | cheap,
            compute_intensive_ops=types.compute_intensive_ops | dear,
        )

    module.get_default_op_list = op_list
    try:
        yield
    finally:
        module.get_default_op_list = torchs_own


def tensor_core_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, ``None`` for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


def keeps_float32() -> bool:
    """Whether Inductor keeps float32 from one operation of a kernel to the next, and calls the functions of its default
    config.
    """
    config = torch._inductor.config
    return not (config.emulate_precision_casts or config.use_fast_math or config.eager_numerics.division_rounding)


def card_name(device: torch.device) -> str:
    """What torch calls a CUDA device; the type of others."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type


def will_freeze(graph: Graph) -> bool:
    """Whether Inductor will turn the parameters of this joint graph into constants and fold what depends on them alone.

    Its global setting (``TORCHINDUCTOR_FREEZING=1``); as an option of one compilation it comes too late for Dynamo.
    """
    backward = any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder"))
    return torch._inductor.config.freezing and not backward


def is_parameter(value: Any) -> bool:
    """Whether a placeholder's example value stands for a parameter; Dynamo's fake copies keep the class."""
    return isinstance(value, torch.nn.Parameter)


def is_wrapper_subclass(value: Any) -> bool:
    """Whether a tensor is a subclass around other tensors that ``torch.compile`` takes apart.

    Not the result of a collective that is under way: whatever reads it waits for it and gets a plain tensor.
    """
    module = sys.modules.get("torch.distributed._functional_collectives")
    pending = module is not None and isinstance(value, module.AsyncCollectiveTensor)
    return not pending and torch.utils._python_dispatch.is_traceable_wrapper_subclass(value)


def plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors without parts of their own that a wrapper subclass is made of; any other tensor itself."""
    if not is_wrapper_subclass(tensor):
        yield tensor
        return
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    for part in parts:
        if isinstance(part, torch.Tensor):  # a DTensor has its mesh among them
            yield from plain_parts(part)


def make_wrapper_subclass(cls: Any, shape: Any, dtype: torch.dtype, device: torch.device, swapped: bool) -> Any:
    """A tensor of a class without memory of its own; ``swapped``: its last two axes lie the other way round."""
    lying = [*shape[:-2], shape[-1], shape[-2]] if swapped else list(shape)
    strides: list[Any] = [1]
    for extent in reversed(lying[1:]):
        strides.insert(0, strides[0] * extent)
    if swapped:
        strides[-2:] = reversed(strides[-2:])
    return torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)


def functional_collective(name: str) -> Any:
    """An op of torch's functional collectives; ``None`` if this torch has none of that name."""
    return getattr(getattr(torch.ops._c10d_functional, name, None), "default", None)


def check_when_it_runs(condition: bool | torch.SymBool) -> None:
    """Let a graph that is being traced take ``condition`` for granted, and check what of it depends on data."""
    torch._check(condition)


def is_argument(node: Node) -> bool:
    """Whether a Dynamo placeholder is an argument of the compiled code: no tensor that a module, a closure or a global
    variable keeps.
    """
    source = source_of(node)
    if source is None:
        return (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is None
    *attributes, base = _bases(source)
    of_module = any(isinstance(step, torch._dynamo.source.NNModuleSource) for step in (*attributes, base))
    return getattr(base, "is_input", False) and not of_module


def guarded_int(size: Any) -> int | None:
    """A SymInt's value under the inputs at hand, which a guard makes a condition of the compiled code.

    ``None`` if it is computed from data, or if the user has marked it dynamic, which makes such a guard an error.
    """
    if _is_marked_dynamic(size):
        return None
    try:
        return int(size)
    except GuardOnDataDependentSymNode:
        return None


def decided_by_data(size: Any) -> bool:
    """Whether a size is computed from data, so that nothing can be guarded on."""
    return bool(free_unbacked_symbols(size))


def guarded_bool(condition: Any) -> bool:
    """A condition on sizes, which holds for the compiled code by a guard if it holds now; false if data decides it."""
    try:
        return bool(condition)
    except GuardOnDataDependentSymNode:
        return False


def _is_marked_dynamic(size: Any) -> bool:
    """Whether ``mark_dynamic`` names a dimension that this size depends on."""
    symbols = size.node.expr.free_symbols
    for tracked in size.node.shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for extent, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            strict = constraint is not None and not constraint.warn_only
            if strict and isinstance(extent, torch.SymInt) and extent.node.expr.free_symbols & symbols:
                return True
    return False


def all_gather_single(output: torch.Tensor, input: torch.Tensor, **options: Any) -> Any:
    """What ``all_gather_into_tensor`` is called from 2.13 on. Looked up here, as torch may be built without either."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, input, **options)


def _fsdp_groups(module: Any) -> list[Any]:
    """The parameter groups of an FSDP2 module."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # 2.11 has one at most
    return list(filter(None, [state._fsdp_param_group])) if groups is None else groups


def fsdp_axes(module: Any) -> list[tuple[bool, bool]]:
    """Of every parameter group of an FSDP2 module, whether its mesh has an axis that shards and one that replicates."""
    return [
        (hasattr(group.mesh_info, "shard_mesh_size"), hasattr(group.mesh_info, "replicate_mesh_size"))
        for group in _fsdp_groups(module)
    ]


def fsdp_divide_factor(module: Any) -> float | None:
    """What ``set_gradient_divide_factor`` was given, for an FSDP2 module with one parameter group."""
    (group,) = _fsdp_groups(module)
    return group.gradient_divide_factor


def fsdp_reduction(module: Any) -> tuple[str | None, bool]:
    """Of an FSDP2 module with one parameter group: the class of a reduce-scatter other than FSDP2's, and whether a hook
    follows it.
    """
    (group,) = _fsdp_groups(module)
    name = type(group._reduce_scatter_comm).__name__
    return None if name == "DefaultReduceScatter" else name, group._all_reduce_hook is not None


def fsdp_weights(module: Any) -> list[tuple[Any, str, torch.Size, int, bool]]:
    """Of every parameter of an FSDP2 module, in the order in which they are gathered: the module that has it and its
    name there, the shape of a shard with its padding, the axis that is sharded, and whether other modules have it too.
    """
    return [
        (
            parameter._module_info.module,
            parameter._module_info.param_name,
            parameter.padded_sharded_param_size,
            parameter.fsdp_placement.dim,
            bool(parameter._module_info.shared_modules),
        )
        for group in _fsdp_groups(module)
        for parameter in group.fsdp_params
    ]


def fsdp_all_gather(module: Any) -> str | None:
    """The class of an FSDP2 module's all-gather if it is another than FSDP2's."""
    names = {type(group._all_gather_comm).__name__ for group in _fsdp_groups(module)} - {"DefaultAllGather"}
    return names.pop() if names else None


def ddp_hook(module: Any) -> str | None:
    """The name of a DistributedDataParallel's communication hook, one of torch's own included."""
    return module._get_ddp_logging_data().get("comm_hook")


def reduction(op: Any) -> tuple[Any, Any]:
    """The kind of a ``dist.ReduceOp``, and the factor of a ``PREMUL_SUM``, which nothing public tells."""
    state = op.__getstate__()
    return state if isinstance(state, tuple) else (op, None)


def orthogonalized(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Any:
    """What ``torch.optim.Muon`` makes of a matrix: bfloat16, by a Newton-Schulz iteration. It writes to ``matrix``."""
    return torch.optim._muon._zeropower_via_newtonschulz(matrix, coefficients, steps, eps)


def muon_rate(lr: Any, adjust: str | None, shape: torch.Size) -> Any:
    """What ``torch.optim.Muon`` multiplies the orthogonalized matrix with."""
    return torch.optim._muon._adjust_lr(lr, adjust, shape)


def memory_of(value: Any) -> Any:
    """What tells whether two (fake) tensors share memory; ``None`` for what has none of its own to compare."""
    if not isinstance(value, torch.Tensor) or torch.utils._python_dispatch.is_traceable_wrapper_subclass(value):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(value) or value.layout is not torch.strided or value.is_nested:
        return None
    return value.untyped_storage()._cdata


def placeholder_value(node: Node) -> torch.Tensor | None:
    """The real tensor behind a Dynamo placeholder, ``None`` for any other node or value."""
    argument = node.meta.get("grapharg") if node.op == "placeholder" else None
    if argument is None or getattr(argument, "_example", None) is None:  # erased when Dynamo is done with the graph
        return None
    return argument.example if isinstance(argument.example, torch.Tensor) else None


@dataclass(frozen=True)
class CompiledCall:
    """The call of something compiled that a backend is serving.

    Attributes:
        context: what one ``torch.compile`` call made; lives as long as the callable it returned.
        target: the module or function that was compiled: the model for ``model.compile()`` and
            ``torch.compile(model.forward)``.
        args, kwargs: arguments of the call.
        enclosing: modules whose forward was running when Dynamo came to the frame it compiles, innermost first.
        callers: modules whose forward called what was compiled, outermost first.
        variables: local variables of that frame.
    """

    context: Any
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    enclosing: tuple[torch.nn.Module, ...]
    callers: tuple[torch.nn.Module, ...]
    variables: Mapping[str, Any]


def compiled_call() -> CompiledCall | None:
    """The innermost call of a compiled callable on the Python stack, ``None`` outside of any.

    Graph breaks, resumed frames and buckets of DDP all run below the function that ``torch.compile`` puts around its
    callable.
    """
    enclosing = []
    variables: Mapping[str, Any] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "self" in code.co_freevars and code.co_filename == torch._dynamo.eval_frame.__file__:
            found = frame.f_locals
            if isinstance(found["self"], torch._dynamo.eval_frame.OptimizeContext) and "fn" in found:
                target = _compiled_target(found["fn"])
                if isinstance(target, torch.nn.Module):
                    enclosing.append(target)
                arguments = found.get("args", ()), found.get("kwargs", {})
                return CompiledCall(found["self"], target, *arguments, tuple(enclosing), _callers(frame), variables)
        owner = _owner(frame)
        if isinstance(owner, torch.nn.Module):
            enclosing.append(owner)
        elif isinstance(owner, torch._dynamo.output_graph.OutputGraph):
            variables = owner.local_scope
        frame = frame.f_back
    return None


def _owner(frame: FrameType) -> Any:
    """The object whose method a frame runs; ``None`` of a function."""
    code = frame.f_code
    named = "self" in code.co_varnames or "self" in code.co_cellvars
    return frame.f_locals.get("self") if named else None


def _callers(frame: FrameType) -> tuple[torch.nn.Module, ...]:
    """The modules whose methods are running outside of ``frame``, outermost first."""
    found: list[torch.nn.Module] = []
    outer = frame.f_back
    while outer is not None:
        owner = _owner(outer)
        if isinstance(owner, torch.nn.Module) and all(owner is not module for module in found):
            found.append(owner)
        outer = outer.f_back
    return tuple(reversed(found))


def backend_of(context: Any) -> Any:
    """What one ``torch.compile`` call (:attr:`CompiledCall.context`) compiles with; equal where its options are."""
    return torch._dynamo.eval_frame.innermost_backend(context.callback)


def backends_below(module: torch.nn.Module) -> list[Any]:
    """:func:`backend_of` the modules in ``module``, itself among them, that are compiled, in place or not."""
    contexts: list[Any] = []
    for inner in module.modules():
        if isinstance(inner, torch._dynamo.eval_frame.OptimizedModule):
            contexts.append(inner.dynamo_ctx)
        elif inspect.isfunction(call := inner._compiled_call_impl):
            contexts.append(inspect.getclosurevars(call).nonlocals.get("self"))
    return [backend_of(c) for c in contexts if isinstance(c, torch._dynamo.eval_frame.OptimizeContext)]


def _compiled_target(function: Any) -> Any:
    """What the user compiled, without what torch puts around it."""
    while getattr(getattr(function, "__code__", None), "co_filename", "") == torch._dynamo.external_utils.__file__:
        function = function.__wrapped__
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, torch.nn.Module) else function


def source_of(placeholder: Node) -> Any:
    """Dynamo's source of a placeholder, ``None`` if unknown."""
    return getattr(placeholder.meta.get("grapharg"), "source", None)


def local_variable(placeholder: Node) -> tuple[str, Any]:
    """The local variable of the frame that a placeholder is reached from, by name and source; "" if it is none."""
    *_, base = _bases(source_of(placeholder))
    return getattr(base, "local_name", ""), base


def _bases(source: Any) -> Iterator[Any]:
    """Dynamo's source of a value, what that is an attribute or item of, and so on to the variable it begins with."""
    yield source
    while (source := getattr(source, "base", None)) is not None:
        yield source


def guard_identity(source: Any) -> None:
    """Let the code that Dynamo is compiling run only where ``source`` is the very object it is now."""
    guard = source.make_guard(torch._dynamo.guards.GuardBuilder.ID_MATCH)
    torch._guards.TracingContext.get().guards_context.dynamo_guards.add(guard)


def before_next_call(call: CompiledCall, act: Callable[[], None]) -> None:
    """Run ``act`` once, when the compiled callable is called the next time. What it raises reaches the caller.

    It does so after the call: torch would not undo what it has set by then if a hook raised. On 2.11 no code behind a
    graph break would be compiled any more, in the whole process.
    """
    context = call.context

    def enter() -> Callable[[], None]:
        context.enter_exit_hooks = [hook for hook in context.enter_exit_hooks if hook is not enter]
        try:
            act()
        except Exception as error:
            return functools.partial(_raise, error)
        return lambda: None

    context.enter_exit_hooks.append(enter)


def _raise(error: Exception) -> None:
    raise error


def triton_kernel_name(index: int) -> str:
    """What a Triton kernel is called that a graph launches (``triton_kernel_wrapper_mutation(kernel_idx=index)``)."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(index)
    return str(getattr(getattr(kernel, "fn", kernel), "__name__", type(kernel).__name__))


def raw_stream(device: torch.device) -> int:
    """Address of the current stream of a CUDA device, as kernel launches take it; 0 of a CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def is_current(device: torch.device) -> bool:
    """Whether launches go to the device now."""
    return device.type != "cuda" or torch._C._cuda_getDevice() == device.index


def empty_strided(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``torch.empty_strided``; on the current CUDA device as generated code does it, in half the time."""
    if device.type == "cuda":
        return torch._C._dynamo.guards._empty_strided_cuda(size, stride, dtype)  # type: ignore[attr-defined]
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def size_hint(size: Any) -> int:
    """A size as a number: of a symbolic one what it was in the call being compiled; 1 if that is not known either."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 1 if hint is None else int(hint)


def source_line(node: Node) -> str:
    """``file:line`` of the code a node comes from; "" if it is not known."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(places[-1]) if places else ""
