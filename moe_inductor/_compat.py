"""Every private torch name that we touch, and nothing else.  One section per concern; a torch minor that moved a
name gets a branch here and nowhere else.  Kept by tests/test_layout.py."""

from __future__ import annotations

import os

import sympy
import torch


class UnsupportedTorch(ImportError):
    """This torch is older than what moe_inductor is written for."""


MINIMUM_TORCH = (2, 11)
# The minors that the test suite was run on; a newer one is tried, an older one is refused.
TESTED_TORCH = ("2.11", "2.13", "2.15")

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MINIMUM_TORCH:
    raise UnsupportedTorch(
        f"moe_inductor needs torch >= {'.'.join(map(str, MINIMUM_TORCH))} and found {torch.__version__}. "
        "Update torch, or compile with backend='inductor'."
    )

# --- capture/: Dynamo's frame tracing -------------------------------------------------------------
from torch import _TorchCompileWrapper as TorchCompileWrapper
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame as dynamo_convert_frame
from torch._dynamo import exc as dynamo_exc
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.output_graph import SubgraphTracer
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.utils import numpy_operator_wrapper
from torch._dynamo.symbolic_convert import (
    InstructionTranslator,
    InstructionTranslatorBase,
    TensorifyState,
)
from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.functions import UserMethodVariable
from torch._dynamo.variables.iter import IteratorVariable
from torch._dynamo.variables.builder import VariableBuilder, wrap_fx_proxy
from torch._dynamo.variables.lists import (
    BaseListVariable,
    ListVariable,
    SliceVariable,
    TupleVariable,
)
from torch._dynamo.variables.misc import GetAttrVariable
from torch._dynamo.variables.tensor import (
    NumpyNdarrayVariable,
    SymNodeVariable,
    TensorVariable,
)
from torch._guards import Source, TracingContext

# What a path of torch's own files begins with, and that of no torchvision: Dynamo traces some as Python.
TORCH_FOLDER = os.path.join(torch.__path__[0], "")

# The only restart that Dynamo lets a backend raise; on a torch without it capture/scope.py does not install.
try:
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis as StockRestart
except ImportError:
    from torch._dynamo.exc import RestartAnalysis as StockRestart

# --- operators, fake tensors, symbolic shapes, tracing (region/, match/, prove/) -----------------------------------
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.fx.experimental.symbolic_shapes import (
    ShapeEnv,
    constrain_range,
    free_unbacked_symbols,
    statically_known_true,
)

# --- Inductor's pattern matcher (match/) -------------------------------------------------------------------------
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    FailedMatch,
    KeywordArg,
    Match,
    MatchContext,
    PatternExpr,
    fx_to_pattern,
    register_graph_pattern,
)


# --- backend.py and debug/: Inductor as torch.compile calls it, logs and caches -----------------------
import contextlib
import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def inductor(mode: str | None, options: dict[str, Any] | None, name: str | None = None) -> Any:
    """What ``torch.compile(backend="inductor", mode=, options=)`` calls: modes, option checks, workarounds.

    ``dynamic`` is only compared with, never read, on every torch that we know, and custom backends are not told.
    """
    wrapper = torch._TorchCompileInductorWrapper
    if name is not None and "name" in inspect.signature(wrapper).parameters:
        return wrapper(mode, options, None, name)  # torch >= 2.13
    return wrapper(mode, options, None)


@contextlib.contextmanager
def cache_tag(tag: str) -> Iterator[None]:
    """Make the FX graph and AOTAutograd caches of the graphs compiled inside depend on ``tag``."""
    from torch.compiler import config

    with config.patch(cache_key_tag=f"{config.cache_key_tag}{tag}"):  # pyright: ignore[reportAttributeAccessIssue]
        yield


def user_error(error: Exception) -> Exception:
    """``error`` so that it leaves torch.compile as itself, not as the cause of a BackendCompilerFailed.

    Dynamo lets exactly one family of exceptions out of a backend unwrapped.
    """
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)
    # RuntimeError is a base of the other already, and has to come after it.
    bases = (ShortenTraceback,) if kind is RuntimeError else (kind, ShortenTraceback)
    mixed = types.new_class(kind.__name__, bases)
    mixed.__module__, mixed.__doc__ = kind.__module__, kind.__doc__
    return mixed(*error.args, first_useful_frame=None)


def passes_through(error: BaseException) -> bool:
    """Is this Dynamo's own control flow (a restart of the trace), which nobody may swallow?"""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    return isinstance(error, (RestartAnalysis, SkipFrame))


def compile_id() -> str:
    """Dynamo's id of the graph being compiled, ``0/0``; "" outside a compile."""
    from torch._guards import CompileContext

    return str(CompileContext.current_compile_id() or "")


def debugging() -> bool:
    """Is TORCH_COMPILE_DEBUG=1 (or torch._inductor.config.trace.enabled) in force?"""
    from torch._inductor import config

    return config.trace.enabled


def debug_dir() -> Path:
    """This run's folder for debug output; TORCH_COMPILE_DEBUG makes Inductor write to the same one."""
    from torch._dynamo.utils import get_debug_dir

    return Path(get_debug_dir())


def tracing() -> bool:
    """Does anybody listen to the structured trace (TORCH_TRACE)?"""
    from torch._logging._internal import LazyTraceHandler, trace_log

    # Without TORCH_TRACE a handler stands there as well, until the first message makes it remove itself.
    return any(
        not isinstance(handler, LazyTraceHandler) or handler.root_dir is not None
        for handler in trace_log.handlers
    )


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """One artifact for tlparse; costs nothing when nobody listens."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload
    )


def graph_breaks() -> list[tuple[str, str]]:
    """(reason, ``file.py:line``) of every graph break of this process so far, in order."""
    from torch._dynamo.utils import graph_break_reasons

    breaks = []
    for each in graph_break_reasons:
        frame = each.user_stack[-1] if each.user_stack else None
        place = f"{Path(frame.filename).name}:{frame.lineno}" if frame else ""
        breaks.append((each.reason, place))
    return breaks


def graph_count() -> int:
    """How many graphs Dynamo has handed to any backend in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def isolated_dynamo() -> Iterator[None]:
    """Let what is compiled inside leave no trace in code that the user compiles.

    Code objects that were never compiled before are reset afterwards; those that were keep the user's entries (and
    gain ours: Dynamo cannot drop single ones).  What automatic dynamic shapes learnt is restored.
    """
    from torch._dynamo import pgo
    from torch._C._dynamo.eval_frame import reset_code

    codes = dynamo_convert_frame.input_codes
    known = {id(code) for ref in codes.seen if (code := ref()) is not None}
    shapes = pgo.get_code_state()
    learnt = copy.deepcopy(shapes)
    try:
        yield
    finally:
        for code in [code for ref in codes.seen if (code := ref()) is not None]:
            if id(code) not in known:
                reset_code(code)
        shapes.clear()
        shapes.update(learnt)


def number_slices_once(wanted: Callable[[], bool]) -> None:
    """While ``wanted()``, slices with equal bounds of equal sizes have one size, not a new unknown each.

    For torch 2.11, where ``out[start:end] = f(x[start:end])`` with bounds that depend on the data asks whether the two
    sizes agree, and fails for want of an answer.  (From 2.13 on, it goes on and leaves the question to run time.)
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13):
        return
    from torch._subclasses.fake_impls import op_implementations_dict

    target = torch.ops.aten.slice.Tensor
    original = op_implementations_dict[target]
    known: weakref.WeakKeyDictionary[ShapeEnv, dict[Any, torch.SymInt]] = (
        weakref.WeakKeyDictionary()
    )

    @functools.wraps(original)
    def slice_once(
        mode: FakeTensorMode,
        func: OpOverload,
        tensor: FakeTensor,
        dim: int = 0,
        start: Any = None,
        end: Any = None,
        step: Any = 1,
    ) -> Any:
        bounds = (start, end)
        if mode.shape_env is None or not wanted() or not free_unbacked_symbols(bounds):
            return original(mode, func, tensor, dim, start, end, step)
        sizes: list[Any] = list(tensor.shape)
        strides = list(tensor.stride())
        parts = (sizes[dim], *bounds, step)
        key = tuple(p.node.expr if isinstance(p, torch.SymInt) else p for p in parts)
        sizes_of = known.setdefault(mode.shape_env, {})
        if key not in sizes_of:
            result = original(mode, func, tensor, dim, start, end, step)
            if isinstance(result.shape[dim], torch.SymInt):
                sizes_of[key] = result.shape[dim]
            return result
        sizes[dim], strides[dim] = sizes_of[key], strides[dim] * step
        offset = mode.shape_env.create_unbacked_symint()
        torch._check(offset >= 0)
        return tensor.as_strided(sizes, strides, offset)

    op_implementations_dict[target] = slice_once


class Optional(PatternExpr):
    """``outer(inner)`` or ``inner`` alone: a view of a pattern's argument is absent where the shapes agree already."""

    def __init__(self, outer: CallFunction, inner: PatternExpr) -> None:
        self.outer, self.inner = outer, inner

    def _match(self, node: torch.fx.Node, ctx: MatchContext) -> Match | FailedMatch:
        wrapped = isinstance(node, torch.fx.Node) and node.target in self.outer.fns_set
        return ctx.match(self.inner, node.args[0] if wrapped else node)


def make_optional(pattern: PatternExpr, target: object) -> None:
    """Every ``target(argument, ..)`` inside ``pattern`` becomes optional."""
    for part in pattern_children(pattern):
        values, spec = part.flat_args_kwargs
        part.flat_args_kwargs = (
            tuple(
                Optional(v, v.args[0])
                if isinstance(v, CallFunction)
                and target in v.fns_set
                and isinstance(v.args[0], KeywordArg)
                else v
                for v in values
            ),
            spec,
        )


def pattern_children(pattern: PatternExpr) -> list[CallFunction]:
    """Every operator of ``pattern``, itself included, each once."""
    found, todo = {}, [pattern]
    while todo:
        part = todo.pop()
        if isinstance(part, PatternExpr) and part not in found:
            found[part] = None
            todo.extend(getattr(part, "flat_args_kwargs", ((),))[0])
    return [part for part in found if isinstance(part, CallFunction)]


def bound_nodes(match: Match) -> dict[PatternExpr, torch.fx.Node]:
    """Which graph node each operator of a matched pattern stands on; arguments of the pattern are left out."""
    found = match.ctx.pattern_to_node
    return {
        part: node
        for part, node in found.items()
        if isinstance(part, CallFunction) and isinstance(node, torch.fx.Node)
    }


# --- backend.py: how Inductor's generated code calls our ops ---------------------------------------------------------


def call_directly(op: OpOverload, functions: Mapping[str, str]) -> None:
    """Inductor's Python calls the function of the device (dotted, same arguments) for ``op``, not the dispatcher.

    The graph below AOTAutograd needs none of what the dispatcher adds, and a Python op with an autograd formula and
    lists of tensors costs 30 us through it: more than the kernels at one token.  Does nothing on a torch without the
    registry, where the call stays right and slower.
    """
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import (
            CUSTOM_EXTERN_KERNEL_CODEGEN,
            CustomCodegen,
        )
        from torch._inductor.codegen.wrapper import ExternKernelAllocLine
        from torch._inductor.virtualized import V
    except ImportError:
        return

    def write(node: Any, writeline: Callable[[Any], None]) -> None:
        wrapper = V.graph.wrapper_code
        where = node.get_device()
        function = functions.get(where.type) if where is not None else None
        if function is not None:
            wrapper.add_import_once(f"import {function.rpartition('.')[0]}")
            node.python_kernel_name = function
        writeline(ExternKernelAllocLine(wrapper, node))  # what happens without an entry

    CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = CustomCodegen(python=write)


def decompose(op: OpOverload, function: Callable[..., Any], device: str) -> None:
    """Under Inductor, ``op`` on ``device`` is the ATen calls that ``function`` makes, which it then fuses.

    On other devices it is called as it is.
    """
    from torch._inductor import decomposition, lowering

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if args[0].device.type == device else NotImplemented

    decomposition.decompositions[op] = decomposed
    # Otherwise Inductor refuses to call an op that is in the table.
    lowering.FALLBACK_ALLOW_LIST.add(op.name().split(".")[0])
    # A copy of the table is kept from the first compile on, which may have been before this.
    decomposition.fast_random_decomps.cache_clear()


try:
    from torch._C._dynamo.guards import (
        _empty_strided_cuda,  # pyright: ignore[reportAttributeAccessIssue]
    )
except ImportError:
    _empty_strided_cuda = None


def empty_on(device: torch.device) -> Callable[..., torch.Tensor]:
    """``empty(sizes, strides, dtype)`` on the current device, which ``device`` is: what Inductor's own code calls for
    CUDA, at half the price of ``torch.empty_strided``."""
    if device.type == "cuda" and _empty_strided_cuda is not None:
        return _empty_strided_cuda

    def empty(sizes: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(sizes, strides, dtype=dtype, device=device)

    return empty


def in_inference(op: OpOverload, rewrite: Callable[[torch.fx.Node], None]) -> None:
    """Inductor hands every call of ``op`` in its graphs to ``rewrite``, but for those that have a backward graph."""
    from torch._inductor.fx_passes.post_grad import pass_patterns
    from torch._inductor.pattern_matcher import CallFunctionVarArgs

    def found(match: Match, *args: Any, **kwargs: Any) -> None:
        context = TracingContext.try_get()
        if context is not None and context.fw_metadata and not context.fw_metadata.traced_tangents:
            rewrite(match.output_node())

    register_graph_pattern(CallFunctionVarArgs(op), pass_dict=pass_patterns[-1])(found)  # type: ignore[arg-type]


# --- region/: symbolic sizes ----------------------------------------------------------------------------------------


def size_expr(size: torch.SymInt) -> sympy.Expr:
    """The expression of ``size``.  Products that the frame's guards say are equal are written in one way.

    Two inputs may have a symbol each for the number of tokens, and the model a view that needs them to be equal:
    Dynamo then guards on it and keeps both.  Asks nothing, so adds no guard.
    """
    expr = size.node.expr
    if expr.is_number or expr.is_symbol:  # of equal symbols, ShapeEnv itself leaves one
        return expr
    env = size.node.shape_env
    for one, other in _equal_sizes(env, len(env.guards)):
        expr = expr.subs(one, other)
    return expr


@functools.lru_cache(maxsize=1)  # one frame at a time; more would keep its ShapeEnv alive
def _equal_sizes(env: ShapeEnv, guards: int) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """What the first so many guards of ``env`` say is equal: the longer expression before the shorter."""
    found = []
    for fact in (guard.expr for guard in env.guards[:guards]):
        if isinstance(fact, sympy.Equality):
            sides: Any = fact.args
            (times, a), (others, b) = (side.as_coeff_Mul() for side in sides)
            if times == others and a.free_symbols and b.free_symbols:
                a, b = sorted((a, b), key=lambda e: (e.count_ops(), str(e)))
                found.append((b, a))
    return found


# --- ops/: oneDNN's linear, which Inductor itself lowers to --------------------------------------------------------


def onednn_linear() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """``(x [M, in], weight [out, in]) -> [M, out]`` through oneDNN, or None where torch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
    except (AttributeError, RuntimeError):
        return None
    return lambda x, weight: linear(x, weight, None, "none", [], "")
