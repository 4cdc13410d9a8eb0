"""Capture settings that hold for one backend only.

Dynamo breaks the graph at ``torch.where(mask[e])`` unless two global flags are set, and nothing in
the public interface of ``torch.compile`` lets a backend set them for its own frames.  So
``install`` wraps the one function that Dynamo calls for every attempt at a frame,
``convert_frame.trace_frame``.  The wrapper does nothing unless the frame is being compiled for an
installed backend; then it patches the flags for the duration of that attempt.  Other threads do not
trace meanwhile, because Dynamo holds a lock; the patch itself is per thread on torch 2.13 and later
and process-wide on 2.11.

A capture that turns out to be of no use can be undone: ``decline`` makes Dynamo trace the same
frame once more with our settings off, and what the backend then sees is what ``backend="inductor"``
would have seen.  The same happens by itself when anything fails while our settings are on.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
import linecache
import logging
import os
import threading
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from moe_inductor import _compat
from moe_inductor.capture import emptiness
from moe_inductor.capture.assumptions import Assumption, Rolled, RolledModules
from moe_inductor.reasons import Code, NotFused, Reason

log = logging.getLogger(__name__)

ErrorT = TypeVar("ErrorT", bound=BaseException)

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


class _Restart(_compat.StockRestart):
    """Dynamo traces the frame again.  Of all restarts only this base class passes through a backend
    unwrapped.
    """


@dataclasses.dataclass(frozen=True)
class _Settings:
    """How one backend was installed."""

    backend: object
    speculate: bool
    roll: bool
    roll_modules: bool
    on_lost_frame: Callable[[Mapping[str, Any] | None], None]


class Level(enum.IntEnum):
    """How far the capture of a frame goes beyond stock.  It only ever goes down."""

    STOCK = 0
    FLAGS = 1
    SPECULATE = 2
    ROLLED = 3  # and a loop over experts is traced once where that is possible


@dataclasses.dataclass
class _Frame:
    """One frame being compiled for an installed backend: shared by all of Dynamo's attempts at it."""

    settings: _Settings
    where: str
    tensorify_state: frozenset[str]
    level: Level
    distrusted: set[str] = dataclasses.field(
        default_factory=set
    )  # where nothing is assumed any more
    unrolled: set[str] = dataclasses.field(
        default_factory=set
    )  # loops that need each expert's number
    sentinels: set[str] = dataclasses.field(default_factory=set)  # loops whose last row is none
    paired: set[str] = dataclasses.field(default_factory=set)  # loops over experts that are modules
    given_up: Reason | None = None  # why the level went down, the first time
    chooses_experts: bool = False  # somebody sorted, counted or compared the ids of a top-k


@dataclasses.dataclass
class Attempt:
    """One attempt at a frame, while it runs."""

    frame: _Frame
    speculation_log: Any
    flags_needed: bool
    level: Level  # STOCK also where our settings would not differ from the user's
    outer_flags: dict[str, bool]  # what the flags were before we touched them
    restarted: bool = False  # a restart was raised; somebody may have caught it
    read_a_number: bool = False  # Tensor.item() was traced, which need not leave a node behind
    assumptions: list[Assumption] = dataclasses.field(default_factory=list)
    # By the symbol of the index: its loop, and in which of the loop's passes it is.
    rolled: dict[Any, tuple[Rolled | RolledModules, int]] = dataclasses.field(default_factory=dict)
    padded: list[Any] = dataclasses.field(default_factory=list)  # padded.Counts
    indexed: dict[Any, Any] = dataclasses.field(default_factory=dict)  # alike.Indexed
    regions: list[Any] = dataclasses.field(default_factory=list)  # purity.Region


class _State(threading.local):
    attempt: Attempt | None = None

    def __init__(self) -> None:
        # Why our settings were given up, until somebody asks.  Bounded: nobody may ever ask.
        self.reasons: collections.deque[Reason] = collections.deque(maxlen=64)


_state = _State()
_lock = threading.Lock()
_installed: dict[int, _Settings] = {}


def install(
    backend: object,
    *,
    speculate: bool = False,
    roll: bool = False,
    roll_modules: bool = False,
    on_lost_frame: Callable[[Mapping[str, Any] | None], None] = lambda options: None,
) -> bool:
    """Turn scoped capture on for ``backend``, recognised by identity.  Idempotent.

    False, with one warning, if this torch is not one that we know how to wrap; the backend then
    works with what stock capture gives.

    speculate: also capture data-dependent loops by assuming things about the data
    (``capture.speculate``).  Only for a backend that proves or declines every one of
    ``scope.assumptions()``.

    roll: also trace a loop over experts only once, on assumptions of the kind ``Rolled``.
    roll_modules: and one over experts that are modules twice, ``RolledModules``.

    on_lost_frame: called when a frame that was given up ends without another compile call: Dynamo
    skips a frame, for instance, whose graph it would have to break inside of a loop.  With the options
    that the backend would have been called with.
    """
    with _lock:
        if not _wrap_trace_frame():
            return False
        if speculate:
            importlib.import_module("moe_inductor.capture.speculate").hook()
        _installed[id(backend)] = _Settings(
            backend, speculate, speculate and roll, roll_modules, on_lost_frame
        )
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
    return current() is not None


def changed_capture(gm: torch.fx.GraphModule) -> bool:
    """Might stock capture have given another graph than ``gm``?  Asked in the compile call.

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


def decline(reason: Reason | None) -> None:
    """What was captured is of no use: trace this frame again.  Called in the compile call.

    reason: the user's answer to why, when there is one.  If assumptions were made the next attempt
    makes none, otherwise it is stock.  Does not return while ``active()``; otherwise there is nothing
    to undo, and the reason is only noted.
    """
    attempt = _state.attempt
    if reason is not None:
        _note(reason, attempt.frame if attempt is not None else None)
    if attempt is not None and attempt.level > Level.STOCK:
        raise _restart(attempt)


def assumptions() -> list[Assumption]:
    """What the capture of this graph took for granted.  For the backend, in its compile call.

    A backend that asked for speculation has to prove every one of them or decline.
    """
    attempt = current()
    if attempt is None:
        return []
    if any(not region.closed for region in attempt.regions):
        # A graph break inside of a speculated loop: the rest of the loop is in another frame.
        decline(Reason(Code.CONTROL_FLOW, "the graph ends inside of a speculated loop or branch"))
    return list(attempt.assumptions)


def final(error: ErrorT) -> ErrorT:
    """Mark an error of the compile call that has to reach the user, not end in a stock retry."""
    error.moe_inductor_final = True  # type: ignore[attr-defined]
    return error


def given_up(gm: torch.fx.GraphModule | None = None) -> Reason | None:
    """Why the frame being compiled is not captured as far as it might have been; None if it is.

    gm: what Dynamo made of it.
    """
    attempt = _state.attempt
    if attempt is None or attempt.frame.given_up is not None or gm is None:
        return attempt.frame.given_up if attempt is not None else None
    end = getattr(gm, "compile_subgraph_reason", None)
    if end is None or not end.graph_break:
        return None
    first_line = next(iter(str(end.reason).strip().splitlines()), "")
    why = "" if first_line == "step_unsupported" else f" ({first_line})"  # Dynamo's "I forgot"
    return reason_at(_location_in(end.user_stack), f"the graph ends here{why}")


def frames() -> list[str]:
    """The frame being compiled and those that it is called from, innermost first, each ``/path/file.py:first line``."""
    attempt, found = _state.attempt, []
    if attempt is not None:
        found.append(attempt.frame.where)
    caller = inspect.currentframe()
    while caller is not None:
        found.append(f"{caller.f_code.co_filename}:{caller.f_code.co_firstlineno}")
        caller = caller.f_back
    return found


def lost_experts() -> bool:
    """Are experts told apart in the frame?  Then what was given up is most likely their loop."""
    attempt = _state.attempt
    return attempt is not None and attempt.frame.chooses_experts


def take_decline_reasons() -> list[Reason]:
    """Why our settings were given up in this thread; each reason is handed out once.

    The backend asks in its compile call: what it gets is about the frame being compiled, and about
    earlier frames that were given up and then did not reach the backend as stock either.
    """
    taken = list(_state.reasons)
    _state.reasons.clear()
    return taken


def current() -> Attempt | None:
    """The attempt under our settings that this thread is inside of.  For the hooks of this package."""
    attempt = _state.attempt
    return attempt if attempt is not None and attempt.level > Level.STOCK else None


def speculating() -> Attempt | None:
    """The attempt of this thread if it may make assumptions.  For the hooks of this package."""
    attempt = _state.attempt
    return attempt if attempt is not None and attempt.level >= Level.SPECULATE else None


def distrust(reason: Reason, locations: Collection[str]) -> NoReturn:
    """The assumptions made at ``locations`` are not safe: trace this frame again without them."""
    attempt = _state.attempt
    assert attempt is not None
    _note(reason, attempt.frame)
    new = set(locations) - attempt.frame.distrusted
    attempt.frame.distrusted |= new
    raise _restart(attempt, next_level=attempt.level if new else Level.FLAGS)


def unroll(location: str) -> NoReturn:
    """The loop at ``location`` needs to know the experts' numbers: trace this frame again, and it one by one."""
    attempt = _state.attempt
    assert attempt is not None
    attempt.frame.unrolled.add(location)
    raise _restart(attempt, next_level=attempt.level)


def split_last(location: str) -> NoReturn:
    """The last row of the loop at ``location`` is treated differently: trace this frame again, and it by itself."""
    attempt = _state.attempt
    assert attempt is not None
    attempt.frame.sentinels.add(location)
    raise _restart(attempt, next_level=attempt.level)


def pair(location: str) -> NoReturn:
    """The loop at ``location`` is one over modules: trace this frame again, and it with two of them."""
    attempt = _state.attempt
    assert attempt is not None
    attempt.frame.paired.add(location)
    raise _restart(attempt, next_level=attempt.level)


def stop_capturing(reason: Reason) -> NoReturn:
    """Our settings lead Dynamo astray: trace this frame again without them."""
    attempt = _state.attempt
    assert attempt is not None
    _note(reason, attempt.frame)
    raise _restart(attempt, next_level=Level.STOCK)


def refuse(reason: Reason, location: str) -> None:
    """Nothing can be assumed at ``location``: this attempt goes on there as Dynamo does."""
    attempt = _state.attempt
    assert attempt is not None
    _note(reason, attempt.frame)
    attempt.frame.distrusted.add(location)


def _wrap_trace_frame() -> bool:
    """Put the wrapper in place.  Called under the lock."""
    original: Any = getattr(_compat.dynamo_convert_frame, "trace_frame", None)
    if getattr(original, "_moe_inductor_wrapper", False):
        return True
    if not _known_signature(original):
        _warn_once(
            f"torch {torch.__version__}: expert loops are captured only as far as stock does"
        )
        return False
    _compat.SubgraphTracer.create_node = _noting_nodes(_compat.SubgraphTracer.create_node)
    _compat.dynamo_convert_frame.trace_frame = _wrapper(original)
    _compat.number_slices_once(lambda: current() is not None)
    return True


def _known_signature(function: Any) -> bool:
    """What we read of the parameters has to be where it was; the rest is passed on."""
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
                result = original(*args, **kwargs)
            except _compat.dynamo_exc.RestartAnalysis:
                raise
            except Exception as error:
                if (
                    attempt.level is Level.STOCK
                    or _must_reach_user(error)
                    or not _may_pass_as_stock(attempt, error)
                ):
                    if frame.given_up is not None:
                        _explain(error, frame.given_up)
                        settings.on_lost_frame(_options_of(bound["compiler_fn"]))
                    raise
                _note(_reason_of(error), frame)
                raise _restart(attempt) from error
            if attempt.restarted:  # somebody inside Dynamo caught our restart
                raise _restart(attempt, next_level=frame.level)
            return result

    trace_frame._moe_inductor_wrapper = True  # type: ignore[attr-defined]
    return trace_frame


def _noting_nodes(original: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo erases ``item`` nodes whose value it knows, so they are noted when they are made; and a
    region of speculated code wants to know what was made in it.
    """

    @functools.wraps(original)
    def create_node(self: Any, op: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        node = original(self, op, target, *args, **kwargs)
        attempt = _state.attempt
        if attempt is not None:
            if op == "call_method" and target == "item":
                attempt.read_a_number = True
            if not attempt.frame.chooses_experts:
                attempt.frame.chooses_experts = emptiness.groups_choices(node)
            for region in attempt.regions:
                region.note(node)
        return node

    return create_node


def _settings_of(compiler_fn: Any) -> _Settings | None:
    """How the backend inside of Dynamo's and torch.compile's wrappers was installed, if it was."""
    *_, backend = _unwrapped(compiler_fn)
    settings = _installed.get(id(backend))
    return settings if settings is not None and settings.backend is backend else None


def _options_of(compiler_fn: Any) -> Mapping[str, Any] | None:
    """``torch.compile(..., options=...)``."""
    for wrapper in _unwrapped(compiler_fn):
        if isinstance(wrapper, _compat.TorchCompileWrapper):
            return wrapper.kwargs.get("options")
    return None


def _unwrapped(compiler_fn: Any) -> Iterator[Any]:
    """Dynamo's and torch.compile's wrappers from the outside in, and last the backend."""
    while True:
        yield compiler_fn
        if hasattr(compiler_fn, "_torchdynamo_orig_backend"):
            compiler_fn = compiler_fn._torchdynamo_orig_backend
        elif isinstance(compiler_fn, _compat.TorchCompileWrapper):
            compiler_fn = compiler_fn.compiler_fn
        else:
            return


def _frame(speculation_log: Any, settings: _Settings, code: types.CodeType) -> _Frame:
    frame = getattr(speculation_log, _ATTRIBUTE, None)
    if frame is None:
        where = f"{code.co_filename}:{code.co_firstlineno}"
        specialised = frozenset(_compat.TensorifyState.force_specializations)
        level = Level.SPECULATE if settings.speculate else Level.FLAGS
        level = Level.ROLLED if settings.roll else level
        frame = _Frame(settings, where, specialised, level)
        setattr(speculation_log, _ATTRIBUTE, frame)
    return frame


@contextlib.contextmanager
def _attempt(frame: _Frame, speculation_log: Any, one_graph: bool) -> Iterator[Attempt]:
    """Make the attempt visible to the backend, and patch the flags unless the frame was declined."""
    outer = _state.attempt
    flags = _outer_flags(outer)
    # one_graph (fullgraph=True) implies both flags.
    needed = not one_graph and not all(flags.values())
    level = Level.STOCK if frame.level is Level.FLAGS and not needed else frame.level
    attempt = Attempt(frame, speculation_log, needed, level, flags)
    _state.attempt = attempt
    try:
        with _flags(flags if level is Level.STOCK else dict.fromkeys(flags, True)):
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
    return {str(name): getattr(_compat.dynamo_config, name) for name in _FLAGS}


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


def _restart(attempt: Attempt, next_level: Level | None = None) -> _Restart:
    """Lower the level of the frame's next attempt.  Returns what the caller has to raise.

    Without a level given: not at all if both ways of a test were being traced, which is then left alone; to
    unrolled loops if one was rolled, to the flags alone if speculation did something, else all the way.
    """
    forks = {r.location for r in attempt.regions if r.both_ways and not r.closed}
    if next_level is None and forks - attempt.frame.distrusted:
        attempt.frame.distrusted |= forks
        next_level = attempt.level
    elif next_level is None and attempt.rolled:
        next_level = Level.SPECULATE
    elif next_level is None:
        next_level = Level.FLAGS if attempt.assumptions and attempt.flags_needed else Level.STOCK
    attempt.restarted = True
    attempt.frame.level = min(attempt.frame.level, next_level)
    # The next attempt takes another path on purpose; Dynamo compares it with this log otherwise.
    attempt.speculation_log.clear()
    _compat.TensorifyState.force_specializations = set(attempt.frame.tensorify_state)
    return _Restart(restart_reason=f"moe_inductor: again as {next_level.name}")


def _note(reason: Reason, frame: _Frame | None) -> None:
    if frame is not None:
        if not reason.location:
            reason = dataclasses.replace(reason, location=os.path.basename(frame.where))
        frame.given_up = frame.given_up or reason
    _state.reasons.append(reason)


def _explain(error: Exception, reason: Reason) -> None:
    """Dynamo's own error reaches the user; next to it stands why we could not do better."""
    note = f"moe_inductor: {reason}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _must_reach_user(error: BaseException) -> bool:
    """Strict mode raises in the compile call; a retry as stock would swallow that."""
    inner = getattr(error, "inner_exception", None)
    return any(
        isinstance(e, NotFused) or getattr(e, "moe_inductor_final", False) for e in (error, inner)
    )


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
        or bool(attempt.assumptions)
        or shape_env is None
        or bool(shape_env.unbacked_symint_counter or shape_env.unbacked_symfloat_counter)
    )


def _reason_of(error: BaseException) -> Reason:
    """One line for the summary.  Dynamo's errors know where in the user's code they happened."""
    inner = getattr(error, "inner_exception", None)
    code = Code.CONTROL_FLOW if inner is None else Code.INTERNAL
    shown = error if inner is None else inner
    first_line = next(iter(str(shown).strip().splitlines()), "")
    location = _location_in(getattr(error, "real_stack", None) or [])
    return reason_at(location, f"{code.value} ({type(shown).__name__}: {first_line})", code)


def _location_in(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line that is not one of torch's own: Dynamo traces ``enumerate`` as Python."""
    own = [f for f in stack if not f.filename.startswith(_compat.TORCH_FOLDER)] or stack
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def reason_at(location: str, why: str, code: Code = Code.CONTROL_FLOW) -> Reason:
    """``why``, with the statement and the short form of its ``location``, ``/path/file.py:line``."""
    file, _, line = location.rpartition(":")
    statement = linecache.getline(file, int(line)).strip() if file else ""
    return Reason(code, f"{why}: `{statement}`" if statement else why, os.path.basename(location))
