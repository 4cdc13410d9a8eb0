"""``torch.compile(model, backend="moe_inductor")``: wires the stages, and stands back when they have nothing to say.

The entry point ``moe_inductor`` below is the only thing that torch sees of this package.  Whatever happens in our
stages, the user gets a compiled graph: an error of ours restores the captured graph and stock Inductor compiles it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import os
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule

import moe_inductor as package
from moe_inductor import _compat
from moe_inductor.capture import scope
from moe_inductor.capture.assumptions import Assumption
from moe_inductor.debug import dump
from moe_inductor.debug.log import announce, log
from moe_inductor.debug.report import CompileReport
from moe_inductor.options import Options, split
from moe_inductor.reasons import Code, NotFused, Reason

Compiled = Callable[..., Any]

# A graph that calls none of these holds no MoE, whole or cut in pieces by graph breaks.  Compared with the last part
# of the target's name; wide on purpose: it only spares other models the copy of their graph.
_TELLTALES = re.compile(
    "topk|argmax|max|sort|one_hot|nonzero|where|bincount|histc|unique|index_add|index_put|index_select|scatter|gather"
    "|take_along_dim|bmm|grouped_mm"
)


class MoEInductor:
    """The backend object.  torch calls it, its ``reset()`` and, from 2.15 on, its ``_dynamo_backend_init()``.

    dry_run: only report; the graphs run as they were captured and nothing is compiled.
    reports: one per graph, the latest last, until ``reset()``.
    """

    __name__ = "moe_inductor"

    def __init__(self, *, dry_run: bool = False) -> None:
        self.dry_run = dry_run
        # Bounded because a server may recompile for months; explain() wants all.
        self.reports: deque[CompileReport] = deque(maxlen=None if dry_run else 256)
        self._inductors: list[Any] = []
        self._told: set[str] = set()
        # Where refusals were told to be, by the frame that was being compiled.
        self._told_of: dict[str, set[str]] = {}
        self._declined: tuple[CompileReport, Options] | None = None

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Compiled:
        try:
            ours, theirs = split(options)
            inductor = self._inductor(mode, theirs, name)
        except RuntimeError as error:
            raise _compat.user_error(error) from None

        report = CompileReport(frame=_compat.compile_id())
        if _may_hold_moe(gm):
            self._rewrite(gm, report, ours)
        if not report.fused:
            self._decline(gm, report, ours)
        self.reports.append(report)
        if self.dry_run:
            return gm.forward
        self._tell(report, ours)
        if not report.fused:
            # As Dynamo made it: same graph, same caches, same everything as backend="inductor".
            return inductor(gm, example_inputs)
        with _compat.cache_tag(f"moe_inductor-{_fingerprint()}-{ours}"):
            return inductor(gm, example_inputs)

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset()`` for every backend in use."""
        for inductor in self._inductors:
            inductor.reset()
        self._inductors.clear()
        self._told.clear()
        self._told_of.clear()
        self.reports.clear()

    def _dynamo_backend_init(self) -> None:
        """Called by torch >= 2.15 when torch.compile() resolves the backend; older ones import this module then."""
        self.install()

    def install(self) -> None:
        """Have frames compiled for this object captured as far as the stages can prove."""
        scope.install(
            self,
            speculate=True,
            roll=True,
            roll_modules=True,
            on_lost_frame=self._lost_frame,
        )

    def _inductor(
        self, mode: str | None, options: dict[str, Any], name: str | None
    ) -> Callable[[GraphModule, Sequence[Any]], Compiled]:
        inductor = _compat.inductor(mode, options, name)
        if inductor not in self._inductors:
            self._inductors.append(inductor)
        return inductor

    def _rewrite(self, gm: GraphModule, report: CompileReport, options: Options) -> None:
        """Run the stages on ``gm``, and leave it either rewritten or exactly as it was."""
        captured = _Snapshot(gm)
        start = time.perf_counter()
        try:
            from moe_inductor.rewrite.pipeline import fuse_moe_blocks

            assumed = fuse_moe_blocks(
                gm,
                report,
                options,
                scope.assumptions(),
                scope.given_up(gm),
                scope.lost_experts(),
            )
            if report.fused and assumed:
                # Captured once more, without the loops that nobody could vouch for.
                told = next((why for why in assumed.values() if why), None)
                told = told or _unproved(report, next(iter(assumed)))
                scope.distrust(told, {a.location for a in assumed})
            if report.fused:
                gm.graph.lint()
                gm.recompile()
        except Exception as error:
            if _compat.passes_through(error):
                raise
            if options.strict or _raise_internal_errors():
                raise scope.final(error) from None  # not to be taken for a failed capture
            captured.restore()
            self._internal_error(error, report)
        report.stage_seconds["all stages"] = time.perf_counter() - start

        if options.strict and report.refused:
            raise _compat.user_error(NotFused(f"moe_inductor: {report.summary()}"))
        if report.blocks and (self.dry_run or dump.wanted(options.dump)):
            report.graph_before = captured.text(gm)
            report.graph_after = gm.print_readable(print_output=False)
        if self.dry_run and not (report.fused and scope.assumptions()):
            captured.restore()  # else only what was rewritten is proved to be what the model means

    def _decline(self, gm: GraphModule, report: CompileReport, options: Options) -> None:
        """Nothing was fused: have the frame captured once more as stock if our capture may have changed it."""
        (declined, its), self._declined = self._declined or (None, None), None
        if declined is not None and its is not None and declined.frame != report.frame:
            self._tell_lost(declined, its)  # stock capture made no graph of that one
            declined = None
        if scope.changed_capture(gm):
            self._declined = report, options
            reason = report.refused[0].reason if report.refused else None
            scope.decline(reason)
        # Here again, or never declined.  Stock capture tends to cut an MoE into pieces that no longer look like one:
        # then what was refused before is the news.
        if declined is not None and not report.blocks:
            report.blocks += declined.blocks
            report.notes += declined.notes
            report.graph_before, report.graph_after = declined.graph_before, declined.graph_after

    def _lost_frame(self, options: Mapping[str, Any] | None) -> None:
        """Stock capture made no graph of a frame that we gave up: why is still to be told."""
        (report, _), self._declined = self._declined or (None, None), None
        if report is None or report.frame != _compat.compile_id():
            reason = scope.given_up()
            if reason is None or not scope.lost_experts():
                return
            from moe_inductor.rewrite.pipeline import not_captured

            report = CompileReport(frame=_compat.compile_id(), blocks=[not_captured(reason)])
        self._tell_lost(report, split(options)[0])

    def _tell_lost(self, report: CompileReport, options: Options) -> None:
        """Of a frame that has no graph any more.  Raises NotFused under ``strict``."""
        self.reports.append(report)
        if options.strict and report.refused:
            raise _compat.user_error(NotFused(f"moe_inductor: {report.summary()}"))
        self._tell(report, options)

    def _tell(self, report: CompileReport, options: Options) -> None:
        """Everybody who wants to know: the user, the debug folder, the structured trace."""
        if not report.blocks and not report.notes:
            return
        log.debug("%s", report)
        folder = dump.write(report, options.dump)
        if folder is not None:
            log.info("graphs and report in %s", folder)
        if options.summary and report.blocks and self._is_news(report):
            announce(f"moe_inductor: {report.summary()}")

    def _is_news(self, report: CompileReport) -> bool:
        """Or has the same been said of a frame that this one is called from?  What stock capture makes of a frame that
        was given up is several, one inside of the other, and each is given up for the same loop."""
        frame, *callers = scope.frames()
        told = set().union(*(self._told_of.get(caller, ()) for caller in callers))
        places = {block.reason.location for block in report.refused if block.reason is not None}
        self._told_of.setdefault(frame, set()).update(places)
        return bool(report.fused) or not places or not places <= told

    def _internal_error(self, error: Exception, report: CompileReport) -> None:
        """Nothing is fused any more; say so once per kind of error and how to get at its cause."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        text = f"{Code.INTERNAL.value}: {type(error).__name__}: {error} at {place}"
        report.blocks.clear()
        report.notes.append(text)
        if text in self._told:
            return
        self._told.add(text)
        log.warning(
            "%s\nThe model was compiled by stock Inductor instead: same results, nothing fused. Please report it: "
            "MOE_INDUCTOR_RAISE=1 shows the traceback, TORCH_COMPILE_DEBUG=1 saves the graph, and "
            "`python -m moe_inductor info` prints the versions.",
            text,
        )


def _unproved(report: CompileReport, assumption: Assumption) -> Reason:
    """Why a speculated loop next to fused ones was in vain."""
    reasons = [block.reason for block in report.refused if block.reason is not None]
    why = "the loop makes something that is not part of a fused block"
    default = Reason(Code.ASSUMPTION, why, os.path.basename(assumption.location))
    return next(iter(reasons), default)


class _Snapshot:
    """The captured graphs, of the module and of the bodies of its higher-order ops, kept so as to go back."""

    def __init__(self, gm: GraphModule) -> None:
        self._graphs = [(module, _copy(module.graph)) for module in _graph_modules(gm)]

    def restore(self) -> None:
        for module, graph in self._graphs:
            module.graph = graph

    def text(self, gm: GraphModule) -> str:
        return GraphModule(gm, self._graphs[0][1]).print_readable(print_output=False)


def _copy(graph: Graph) -> Graph:
    """A copy that Dynamo's consumers accept: they look for attributes that fx does not know, hence does not copy."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        for name in vars(old).keys() - vars(new).keys():
            setattr(new, name, getattr(old, name))
    return copied


def _graph_modules(gm: GraphModule) -> list[GraphModule]:
    return [module for module in gm.modules() if isinstance(module, GraphModule)]


def _may_hold_moe(gm: GraphModule) -> bool:
    """The pre-check that makes a model without any MoE cost nothing."""
    for module in _graph_modules(gm):
        for node in module.graph.nodes:
            name = (
                node.target
                if isinstance(node.target, str)
                else getattr(node.target, "__name__", "")
            )
            if node.op in ("call_function", "call_method") and _TELLTALES.search(name):
                return True
    return False


def _raise_internal_errors() -> bool:
    return os.environ.get("MOE_INDUCTOR_RAISE", "0") not in ("", "0")


@functools.cache
def _fingerprint() -> str:
    """Our version and sources: cached code must not outlive the code that made it."""
    digest = hashlib.sha256(package.__version__.encode())
    for folder in (*package.__path__, *patterns.__path__):
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


try:
    patterns = importlib.import_module("moe_inductor.patterns")
except ModuleNotFoundError as error:
    # Installed from a wheel, but a checkout stands before it on sys.path, where patterns/ lies elsewhere.
    raise ImportError(
        f"{package.__path__[0]} is a checkout of moe_inductor that is not installed: moe_inductor.patterns is missing. "
        "Run `pip install -e .` in it, or start Python from another folder."
    ) from error

moe_inductor = MoEInductor()
moe_inductor.install()
