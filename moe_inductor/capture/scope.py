"""Capture settings that hold for one backend only.

Dynamo breaks the graph at ``torch.where(mask[e])`` unless two global flags are set, and nothing in
the public interface of ``torch.compile`` lets a backend set them for its own frames.  So
``install`` wraps the one function that Dynamo calls for every attempt at a frame,
``convert_frame.trace_frame``.  The wrapper does nothing unless the frame is being compiled for an
installed backend; then it patches the flags (thread-local, for the duration of that attempt).

A capture that turns out to be of no use can be undone: ``decline`` makes Dynamo trace the same
frame once more with our settings off, and what the backend then sees is what ``backend="inductor"``
would have seen.  The same happens by itself when anything fails while our settings are on.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_inductor import _compat
from moe_inductor.reasons import Code, NotFused, Reason

log = logging.getLogger(__name__)

_FLAGS = ("capture_dynamic_output_shape_ops", "capture_scalar_outputs")

# What trace_frame looked like in every torch minor that was tried (2.11 to 2.15).
_KNOWN_PARAMETERS = (
    "code",
    "globals",
    "locals",
    "builtins",
    "closure",
    "compiler_fn",
    "tf_mode_stack",
    "one_graph",
    "speculation_log",
)

# Where one frame's state is kept: on the object that Dynamo itself shares between the attempts at
# that frame.
_ATTRIBUTE = "_moe_inductor_frame"


class _RestartAsStock(_compat.StockRestart):
    """Dynamo traces the frame again.  Of all restarts only this base class passes through a backend
    unwrapped.
    """


@dataclasses.dataclass(frozen=True)
class _Settings:
    """How one backend was installed."""

    backend: object
    speculate: bool


@dataclasses.dataclass
class _Frame:
    """One frame being compiled for an installed backend: shared by all of Dynamo's attempts at it."""

    settings: _Settings
    where: str
    tensorify_state: frozenset[str]
    stock: bool = False  # our settings stay off from here on


@dataclasses.dataclass
class Attempt:
    """One attempt at a frame, while it runs."""

    frame: _Frame
    speculation_log: Any
    on: bool  # are our settings on, and do they differ from the user's
    outer_flags: dict[str, bool]  # what the flags were before we touched them
    read_a_number: bool = False  # Tensor.item() was traced, which need not leave a node behind


class _State(threading.local):
    attempt: Attempt | None = None

    def __init__(self) -> None:
        # Why our settings were given up, until somebody asks.  Bounded: nobody may ever ask.
        self.reasons: collections.deque[Reason] = collections.deque(maxlen=64)


_state = _State()
_lock = threading.Lock()
_installed: dict[int, _Settings] = {}


def install(backend: object, *, speculate: bool = False) -> bool:
    """Turn scoped capture on for ``backend``, recognised by identity.  Idempotent.

    False, with one warning, if this torch is not one that we know how to wrap; the backend then
    works with what stock capture gives.

    speculate: also capture data-dependent loops by assuming things about the data
    (``capture.speculate``).  Only for a backend that proves or declines every one of
    ``scope.assumptions()``.
    """
    with _lock:
        if not _wrap_trace_frame():
            return False
        _installed[id(backend)] = _Settings(backend, speculate)
    return True


def uninstall(backend: object) -> None:
    """Back to stock capture for ``backend``.  The wrapper itself stays, and does nothing."""
    with _lock:
        _installed.pop(id(backend), None)


def active() -> bool:
    """Is this thread inside an attempt at a frame whose capture our settings may have changed?

    For the backend, in its compile call.  False also where the user set the flags or asked for ``fullgraph=True``:
    our settings changed nothing there, and a decline would only trace the same graph twice.
    """
    attempt = _state.attempt
    return attempt is not None and attempt.on


def changed_capture(gm: torch.fx.GraphModule) -> bool:
    """Might stock capture have given another graph than ``gm``?  For the backend, in its compile
    call.

    A backend that finds nothing to rewrite and sees True here should decline, so that a model
    without MoE gets the graphs of ``backend="inductor"``.  May be True for an identical graph (it
    costs one more trace), never the reverse.
    """
    attempt = current()
    if attempt is None:
        return False
    context = _compat.TracingContext.try_get()
    fake_mode = context.fake_mode if context is not None else None
    return _flags_mattered(attempt, fake_mode.shape_env if fake_mode is not None else None)


def decline(reason: Reason) -> None:
    """What was captured is of no use: trace this frame again as stock.  For the backend, in its
    compile call.

    Does not return while ``active()``; otherwise there is nothing to undo, and the reason is only
    noted.
    """
    attempt = _state.attempt
    _note(reason, attempt.frame.where if attempt is not None else "")
    if attempt is not None and attempt.on:
        raise _restart_as_stock(attempt)


def take_decline_reasons() -> list[Reason]:
    """Why our settings were given up in this thread since the last call; each reason is handed out
    once.

    The backend asks in its compile call: what it gets is about the frame being compiled, and about
    earlier frames that were given up and then did not reach the backend as stock either.
    """
    taken = list(_state.reasons)
    _state.reasons.clear()
    return taken


def current() -> Attempt | None:
    """The attempt under our settings that this thread is inside of.  For the hooks of this package."""
    attempt = _state.attempt
    return attempt if attempt is not None and attempt.on else None


def _wrap_trace_frame() -> bool:
    """Put the wrapper in place.  Called under the lock."""
    original = getattr(_compat.dynamo_convert_frame, "trace_frame", None)
    if getattr(original, "_moe_inductor_wrapper", False):
        return True
    if not _known_signature(original):
        _warn_once(
            f"torch {torch.__version__}: expert loops are captured only as far as stock does"
        )
        return False
    _compat.SubgraphTracer.create_node = _noting_numbers(_compat.SubgraphTracer.create_node)
    _compat.dynamo_convert_frame.trace_frame = _wrapper(original)
    return True


def _known_signature(function: Any) -> bool:
    """The parameters that we read have to be where they were, and positional; what comes after them
    is passed on.
    """
    if not callable(function):
        return False
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    head = parameters[: len(_KNOWN_PARAMETERS)]
    return tuple(p.name for p in head) == _KNOWN_PARAMETERS and all(
        p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in head
    )


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def trace_frame(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        settings = None if bound.get("export") else _settings_of(bound["compiler_fn"])
        if settings is None:
            with _without_outer_attempt():
                return original(*args, **kwargs)
        frame = _frame(bound["speculation_log"], settings, bound["code"])
        with _attempt(frame, bound["speculation_log"], bound["one_graph"]) as attempt:
            try:
                return original(*args, **kwargs)
            except _compat.dynamo_exc.RestartAnalysis:
                raise
            except Exception as error:
                if (
                    not attempt.on
                    or _must_reach_user(error)
                    or not _may_pass_as_stock(attempt, error)
                ):
                    raise
                _note(_reason_of(error), frame.where)
                raise _restart_as_stock(attempt) from error

    trace_frame._moe_inductor_wrapper = True  # type: ignore[attr-defined]
    return trace_frame


def _noting_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo erases ``item`` nodes whose value it knows, so they have to be seen when they are
    made.
    """

    @functools.wraps(original)
    def create_node(self: Any, op: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        if op == "call_method" and target == "item" and _state.attempt is not None:
            _state.attempt.read_a_number = True
        return original(self, op, target, *args, **kwargs)

    return create_node


def _settings_of(compiler_fn: Any) -> _Settings | None:
    """How the backend at the core of Dynamo's and torch.compile's wrappers was installed, if it
    was.
    """
    while True:
        if hasattr(compiler_fn, "_torchdynamo_orig_backend"):
            compiler_fn = compiler_fn._torchdynamo_orig_backend
        elif isinstance(compiler_fn, _compat.TorchCompileWrapper):
            compiler_fn = compiler_fn.compiler_fn
        else:
            settings = _installed.get(id(compiler_fn))
            return settings if settings is not None and settings.backend is compiler_fn else None


def _frame(speculation_log: Any, settings: _Settings, code: types.CodeType) -> _Frame:
    frame = getattr(speculation_log, _ATTRIBUTE, None)
    if frame is None:
        where = f"{code.co_filename}:{code.co_firstlineno}"
        specialised = frozenset(_compat.TensorifyState.force_specializations)
        frame = _Frame(settings, where, specialised)
        setattr(speculation_log, _ATTRIBUTE, frame)
    return frame


@contextlib.contextmanager
def _attempt(frame: _Frame, speculation_log: Any, one_graph: bool) -> Iterator[Attempt]:
    """Make the attempt visible to the backend, and patch the flags unless the frame was declined."""
    outer = _state.attempt
    flags = _outer_flags(outer)
    # one_graph (fullgraph=True) implies both flags.
    needed = not one_graph and not all(flags.values())
    attempt = Attempt(frame, speculation_log, needed and not frame.stock, flags)
    _state.attempt = attempt
    wanted = dict.fromkeys(_FLAGS, True) if attempt.on else flags
    try:
        with _flags(wanted):
            yield attempt
    finally:
        _state.attempt = outer


@contextlib.contextmanager
def _without_outer_attempt() -> Iterator[None]:
    """Another backend compiles inside an attempt of ours: our settings are none of its business."""
    outer = _state.attempt
    if outer is None:
        yield
        return
    _state.attempt = None
    try:
        with _flags(outer.outer_flags):
            yield
    finally:
        _state.attempt = outer


def _outer_flags(outer: Attempt | None) -> dict[str, bool]:
    """The flags as the user set them, also when an attempt of ours has them patched."""
    if outer is not None:
        return outer.outer_flags
    return {name: getattr(_compat.dynamo_config, name) for name in _FLAGS}


@contextlib.contextmanager
def _flags(wanted: dict[str, bool]) -> Iterator[None]:
    """Patch what differs, and only that, so that a config which nobody changed stays unchanged in
    every respect.
    """
    changes = {n: v for n, v in wanted.items() if getattr(_compat.dynamo_config, n) != v}
    if not changes:
        yield
        return
    with _compat.dynamo_config.patch(changes):
        yield


def _restart_as_stock(attempt: Attempt) -> _RestartAsStock:
    """Switch the frame to stock.  Returns what the caller has to raise."""
    attempt.frame.stock = True
    # The next attempt takes another path on purpose; Dynamo compares it with this log otherwise.
    attempt.speculation_log.clear()
    _compat.TensorifyState.force_specializations = set(attempt.frame.tensorify_state)
    return _RestartAsStock(restart_reason="moe_inductor: back to stock capture")


def _note(reason: Reason, where: str) -> None:
    _state.reasons.append(
        reason if reason.location else dataclasses.replace(reason, location=where)
    )


def _must_reach_user(error: BaseException) -> bool:
    """Strict mode raises NotFused in the compile call; a retry as stock would swallow it."""
    inner = getattr(error, "inner_exception", None)
    return isinstance(error, NotFused) or isinstance(inner, NotFused)


def _may_pass_as_stock(attempt: Attempt, error: BaseException) -> bool:
    """Could the attempt that failed have gone differently as stock?  If we cannot tell: yes."""
    try:
        tracer_output = error._torch_dynamo_tracer_output  # type: ignore[attr-defined]
        return _flags_mattered(attempt, tracer_output.output_graph_for_cleanup.shape_env)
    except AttributeError:
        return True


def _flags_mattered(attempt: Attempt, shape_env: Any) -> bool:
    """Was a data-dependent size or number made, or a tensor's value read?  Stock breaks the graph
    there.
    """
    return (
        attempt.read_a_number
        or shape_env is None
        or bool(shape_env.unbacked_symint_counter or shape_env.unbacked_symfloat_counter)
    )


def _reason_of(error: BaseException) -> Reason:
    """One line for the summary.  Dynamo's errors know where in the user's code they happened."""
    inner = getattr(error, "inner_exception", None)
    code = Code.CONTROL_FLOW if inner is None else Code.INTERNAL
    shown = error if inner is None else inner
    first_line = next(iter(str(shown).strip().splitlines()), "")
    stack = getattr(error, "real_stack", None)
    location = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
    return Reason(code, f"{code.value} ({type(shown).__name__}: {first_line})", location)
