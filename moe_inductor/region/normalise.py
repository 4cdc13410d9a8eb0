"""The normal form of a canonical region: one way to write what people write in many ways.

``normalise`` re-emits an ATen graph node by node.  Each node is first spelled uniformly (arguments by position,
defaults dropped, sizes spelled out), then rewritten by the first rule that applies, then interned: equal expressions
become one node.  Rules never change a value; each states its equation.  The model's region and the reference that is to
be proved equal to it go through the same function, so a rule can make a match possible but never make it wrong.

The result is only read (matched and compared), never run.  A symbolic size stands in it by name ("s77"), a size that
depends on data as ``sym_size`` of the node that made it, so that it means the same in two traces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_inductor._compat import FakeTensor, OpOverload, size_expr
from moe_inductor.capture.rolled import EXPERT_INDEX
from moe_inductor.reasons import Refusal
from moe_inductor.region.alternate import columns_of
from moe_inductor.region.counts import Numbers
from moe_inductor.region.nodes import (
    is_floating,
    is_integral,
    is_one,
    is_random,
    node_arg,
    unbacked,
    uncast,
    value,
)
from moe_inductor.region.orders import Order
from moe_inductor.region.pairs import unsorted

aten = torch.ops.aten

_COPIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
}
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
_PERMUTES = {aten.t.default, aten.transpose.int, aten.permute.default}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_FULLS = {aten.full.default, aten.full_like.default, aten.new_full.default}
_ASSERTS = {
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
_PROMOTING = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor}
_ACTIVATIONS = {
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
}

Rule = Callable[["Emitter", fx.Node, tuple, dict], Any]
RULES: dict[Any, list[Rule]] = {}


def rule(*targets: Any, first: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for nodes of these targets; ``first``: before those that are there."""

    def register(fn: Rule) -> Rule:
        for target in targets:
            rules = RULES.setdefault(target, [])
            rules.insert(0 if first else len(rules), fn)
        return fn

    return register


class Emitter:
    """Builds the normal form.  ``emit`` is the only way to make a node, so every node is interned.

    numbers: what is known about sizes that depend on data.  pairs: what has been unsorted (``region/pairs.py``).
    refused: why something that was sorted could not be.  batches: views that put a batch of one in front of what they
    view (``region/one_batch.py``).  sequences: what views [B, S, ..] of tokens view.  packs: several of these.
    lead: B and S (``region/sequences.py``).
    """

    def __init__(self, *, keep_detach: bool) -> None:
        self.graph = fx.Graph()
        self.keep_detach = keep_detach
        self.numbers = Numbers()
        self.pairs: dict[fx.Node, Order] = {}
        self.refused: list[Refusal] = []
        self.batches: dict[fx.Node, fx.Node] = {}
        self.sequences: dict[fx.Node, fx.Node] = {}
        self.packs: set[fx.Node] = set()
        self.lead: Any = None
        self._scratch = fx.Graph()
        self._interned: dict[Any, fx.Node] = {}
        self._made: dict[Any, tuple[fx.Node, int]] = {}  # unbacked symbol -> where it was made
        self._equal: dict[Any, Any] = {}  # unbacked symbol -> the size that it is

    def emit(
        self, target: Any, args: tuple, kwargs: dict, val: Any, origin: str | None = None
    ) -> fx.Node:
        key = (target, _key(args), _key(kwargs))
        # A fresh unbacked symbol is a new fact each time; two nonzeros of one mask are still equal.
        node = None if is_random(target) else self._interned.get(key)
        if node is None:
            node = self.graph.call_function(target, args, kwargs)
            node.meta["val"] = val
            if origin is not None:
                node.meta["stack_trace"] = origin
            self._interned[key] = node
        self._note_symbols(node, val)
        return node

    def apply(
        self, target: Any, args: tuple, kwargs: dict, val: Any, origin: str | None = None
    ) -> fx.Node:
        """A further node, in normal form like those of the traced graph."""
        raw = self._scratch.call_function(target, args, kwargs)
        raw.meta.update(val=val, stack_trace=origin)
        made = None
        for rule in RULES.get(target, ()):
            made = rule(self, raw, args, kwargs) if made is None else made
        self._scratch.erase_node(raw)
        return self.emit(target, args, kwargs, val, origin) if made is None else made

    def _note_symbols(self, node: fx.Node, val: Any) -> None:
        if isinstance(val, torch.Tensor):
            for dim, size in enumerate(val.shape):
                if isinstance(size, torch.SymInt) and unbacked(size):
                    self._made.setdefault(size.node.expr, (node, dim))

    # -- sizes -------------------------------------------------------------------------------------------------------
    def size(self, size: Any) -> Any:
        """An int, the name of a symbolic size, or ``sym_size`` of the node whose data decide it."""
        if not isinstance(size, torch.SymInt):
            return size
        expr = size_expr(size)
        if expr.is_Integer:
            return int(expr)
        if expr in self._equal:
            return self._equal[expr]
        if expr not in self._made:
            return str(expr)
        node, dim = self._made[expr]
        return self.emit(aten.sym_size.int, (node, dim), {}, size)

    def note_equal(self, size: Any, known: Any) -> None:
        """``size``, which depends on data, is always ``known``."""
        if isinstance(size, torch.SymInt) and unbacked(size):
            self._equal[size_expr(size)] = self.size(known)

    def note_rows(self, node: fx.Node) -> None:
        """From now on ``node`` is what the size of its first dimension, which depends on data, is spelled by."""
        size = value(node).shape[0]
        if isinstance(size, torch.SymInt) and unbacked(size):
            self._equal[size_expr(size)] = self.emit(aten.sym_size.int, (node, 0), {}, size)

    def _total(self, size: Any) -> Any:
        """The number of all choices, where ``size`` is how often each expert was chosen, added up."""
        return self.numbers.total(size) if unbacked(size) else size

    def sizes(self, val: torch.Tensor) -> list[Any]:
        return [self.size(s) for s in val.shape]

    def same_sizes(self, a: Any, b: Any) -> bool:
        """Two nonzeros of one mask are one node here, so their sizes are the same although torch made two symbols."""
        return len(a) == len(b) and all(
            self.size(x) == self.size(y) or self.size(self._total(x)) == self.size(self._total(y))
            for x, y in zip(a, b, strict=True)
        )

    def same_shape(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return self.same_sizes(a.shape, b.shape)

    # -- the three uniform spellings that rules build -------------------------------------------------------------
    def view(self, base: fx.Node, val: Any, origin: str | None) -> fx.Node:
        """view(view(x, a), b) = view(x, b);  view(x, shape of x) = x;  view(full(a, c), b) = full(b, c)"""
        if base.target is aten.view.default:
            base = node_arg(base, 0)
        if base.target is aten.full.default:
            args = (self.sizes(val), base.args[1])
            return self.emit(aten.full.default, args, dict(base.kwargs), val, origin)
        if self.same_shape(value(base), val):
            return base
        made = self.emit(aten.view.default, (base, self.sizes(val)), {}, val, origin)
        _sequences.note(self, made, base)
        return made

    def permute(self, base: fx.Node, dims: list[int], val: Any, origin: str | None) -> fx.Node:
        """permute(permute(x, p), q) = permute(x, p[q]);  permute(x, identity) = x
        permute(x, p) = view(x, ..) where only dimensions of size 1 change their place"""
        if base.target is aten.permute.default:
            inner = base.args[1]
            dims = [inner[d] for d in dims]  # type: ignore[index]
            base = base.args[0]  # type: ignore[assignment]
        if dims == sorted(dims):
            return base
        moved = [d for d in dims if not is_one(value(base).shape[d])]
        # The dimensions of a one-hot mask must be told apart even where tokens and choices are one.
        if moved == sorted(moved) and not _is_mask(base):
            return self.view(base, val, origin)
        return self.emit(aten.permute.default, (base, dims), {}, val, origin)

    def batched(self, base: fx.Node, val: torch.Tensor, origin: str | None) -> fx.Node:
        """``base`` viewed as a batch of one."""
        made = self.view(base, val, origin)
        self.batches[made] = base
        return made

    def slice(
        self, base: fx.Node, dim: int, start: Any, end: Any, val: Any, origin: str | None
    ) -> fx.Node:
        """slice(x, dim, 0, size) = x"""
        if type(start) is int and start == 0 and self.same_shape(value(base), val):
            return base
        if base in self.batches and dim > 0:
            inner = self.slice(self.batches[base], dim - 1, start, end, val.squeeze(0), origin)
            return self.batched(inner, val, origin)
        return self.emit(aten.slice.Tensor, (base, dim, start, end), {}, val, origin)


def normalise(
    graph: fx.Graph, *, keep_detach: bool = True, out: Emitter | None = None
) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """Returns the normal form of ``graph`` and, for each old node, what it became (a node, a size, or None).

    keep_detach: keep ``detach`` on floating-point tensors; it is a no-op only where no gradient can flow.
    out: what to build it with, for a caller who wants to know what was found out on the way; it knows ``keep_detach``.
    """
    out = out or Emitter(keep_detach=keep_detach)
    env: dict[fx.Node, Any] = {}
    if not out.keep_detach or all(n.target is not aten.detach.default for n in graph.nodes):
        for node in graph.nodes:
            env[node] = _emit(out, node, env)
        return out.graph, env
    # No gradient flows through what is not floating point: it is made of values without any detach.
    attached: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op != "output":
            out.keep_detach = False
            attached[node] = env[node] = _emit(out, node, attached)
            out.keep_detach = True
        if node.op == "output" or (node.op == "call_function" and is_floating(node)):
            env[node] = _emit(out, node, env)
    for node in reversed(out.graph.nodes):
        if (
            node.op == "call_function" and not node.users
        ):  # nobody's value: it was tried without its detach
            out.graph.erase_node(node)
    return out.graph, env


def _emit(out: Emitter, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        found = value(node)
        if isinstance(found, (int, torch.SymInt)) and not unbacked(found):
            return out.size(found)  # spelled by its symbol wherever it occurs
        new = out.graph.placeholder(node.name)
        new.meta.update(node.meta)
        _sequences.enter(out, new)
        return new
    if node.op == "get_attr":
        new = out.graph.get_attr(str(node.target))
        new.meta.update(node.meta)
        return new
    if node.op == "output":
        return out.graph.output(fx.map_arg(node.args[0], lambda a: env[a]))
    found = value(node)
    if node.target in _ASSERTS or isinstance(found, (torch.SymBool, bool)):
        return None  # says that a size is in its bounds; the fused op has no such size
    if isinstance(found, (int, torch.SymInt)) and node.target is not EXPERT_INDEX:
        if node.target is aten._local_scalar_dense.default:
            out.numbers.note_item(found, env[node_arg(node, 0)])
        return out.size(found)
    args, kwargs = _uniform(node, lambda a: env[a])
    made = _one_batch.element_by_element(out, node, args, kwargs) if out.batches else None
    if made is None and out.sequences:
        made = _sequences.token_by_token(out, node, args, kwargs)
    for apply in RULES.get(node.target, ()) if made is None else ():
        made = apply(out, node, args, kwargs)
        if made is not None:
            break
    if made is None:
        made = out.emit(node.target, args, kwargs, found, node.meta.get("stack_trace"))
    if not isinstance(made, fx.Node):
        return made
    if made.target in (aten.slice.Tensor, aten.slice_scatter.default):
        _note_bounds(out, node, made)
    return unsorted(out, made) or made


def _note_bounds(out: Emitter, node: fx.Node, made: fx.Node) -> None:
    """Rows from one number that depends on data to another."""
    after = 1 if node.target is aten.slice.Tensor else 2
    given = list(node.args[after:])
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    start, end = (value(n) if isinstance(n, fx.Node) else n for n in (start, end))
    if step == 1 and dim == 0 and (unbacked(start) or unbacked(end)):
        out.numbers.note_slice(made, 0 if start is None else start, end)


# -- rules -------------------------------------------------------------------------------------------------------------


@rule(*_COPIES)
def _copy(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """clone(x) = x as a value; nothing in a canonical region is mutated."""
    return None if node.target in RESHAPES else args[0]


@rule(aten.detach.default)
def _detach(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """detach(x) = x where no gradient flows: integers, constants, or gradients are off."""
    constant = not args[0].all_input_nodes and args[0].op == "call_function"
    return args[0] if constant or is_integral(node) or not out.keep_detach else None


@rule(aten._to_copy.default)
def _cast(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    return cast(out, args[0], value(node), node.meta.get("stack_trace"))


def cast(out: Emitter, base: fx.Node, made: torch.Tensor, origin: str | None) -> fx.Node:
    """cast(x, dtype of x) = x;  cast(cast(b, a), c) = cast(b, c) for a boolean b
    cast(full(0), c) = full(0, dtype c), and so for 1"""
    if base.target is aten._to_copy.default and value(node_arg(base, 0)).dtype == torch.bool:
        base = node_arg(base, 0)
    source = value(base)
    if source.dtype == made.dtype and source.device == made.device:
        return base
    if base.target is aten.full.default and made.dtype != torch.bool:
        fill = base.args[1]
        if isinstance(fill, (int, float)) and fill in (0, 1):
            kept = {"dtype": made.dtype, "device": made.device}
            return out.emit(aten.full.default, (base.args[0], int(fill)), kept, made, origin)
    kept: dict[str, Any] = {"dtype": made.dtype} if source.dtype != made.dtype else {}
    if source.device != made.device:
        kept["device"] = made.device
    return out.emit(aten._to_copy.default, (base,), kept, made, origin)


@rule(*RESHAPES)
def _reshape(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """unsqueeze, squeeze, flatten, reshape(x, ..) = view(x, shape of the result)
    view(slice(x, d, i, i + 1)) without dimension d = select(x, d, i)"""
    made, base = value(node), args[0]
    if base.target is aten.slice.Tensor and len(base.args) == 4:
        source, dim, start, end = base.args
        shape = list(value(source).shape)
        if (
            isinstance(start, int)
            and isinstance(end, int)
            and end == start + 1
            and out.same_sizes(made.shape, shape[:dim] + shape[dim + 1 :])
        ):
            return row_of(out, source, dim, start, made, node.meta.get("stack_trace"))
    return out.view(base, made, node.meta.get("stack_trace"))


@rule(*_PERMUTES)
def _transpose(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """t(x), transpose(x, a, b) = permute(x, dims)"""
    rank = value(args[0]).dim()
    dims = list(range(rank))
    if node.target is aten.permute.default:
        dims = [d % rank for d in args[1]]
    elif rank >= 2:
        a, b = (0, 1) if node.target is aten.t.default else (args[1] % rank, args[2] % rank)
        dims[a], dims[b] = dims[b], dims[a]
    return out.permute(args[0], dims, value(node), node.meta.get("stack_trace"))


@rule(aten.cat.default)
def _cat(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """cat([x]) = x"""
    return args[0][0] if len(args[0]) == 1 else None


@rule(aten.expand.default)
def _expand(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """expand(x, shape of x) = x;  expand(x, [1, ..]) = view(x, [1, ..]); sizes are spelled out, never -1"""
    made, shape = value(node), value(args[0]).shape
    if out.same_shape(value(args[0]), made):
        return args[0]
    new = made.dim() - len(shape)
    if all(map(is_one, made.shape[:new])) and out.same_sizes(made.shape[new:], shape):
        return out.view(args[0], made, node.meta.get("stack_trace"))
    return out.emit(
        aten.expand.default, (args[0], out.sizes(made)), {}, made, node.meta.get("stack_trace")
    )


@rule(*_ZEROS, *_FULLS)
def _fill(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """zeros(..), zeros_like(..), new_zeros(..) = full(shape, 0, dtype)"""
    made = value(node)
    fill = 0
    if node.target in _FULLS:
        position = 2 if node.target is aten.new_full.default else 1
        fill = args[position] if len(args) > position else kwargs.get("fill_value", 0)
        fill = 0 if fill == 0 else fill
    fill = bool(fill) if made.dtype == torch.bool else fill
    kept = {"dtype": made.dtype, "device": made.device}
    return out.emit(
        aten.full.default, (out.sizes(made), fill), kept, made, node.meta.get("stack_trace")
    )


@rule(aten._unique2.default)
def _unique(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """unique(view(x)) = unique(x), where nobody asks which element is which"""
    told = (*args[2:], *kwargs.values())
    if any(told) or args[0].target is not aten.view.default:
        return None
    args = (node_arg(args[0], 0), *args[1:])
    return out.emit(node.target, args, kwargs, value(node), node.meta.get("stack_trace"))


@rule(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
def _empty(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """empty(..) = full(shape, 0, dtype) for floating-point numbers: whatever is in it will do, and zeros are"""
    return _fill(out, node, args, kwargs) if value(node).dtype.is_floating_point else None


@rule(aten.scalar_tensor.default)
def _scalar(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """scalar_tensor(c) = full([], c)"""
    made = value(node)
    kept = {"dtype": made.dtype, "device": made.device}
    fill = 0 if args[0] == 0 else args[0]
    return out.emit(aten.full.default, ([], fill), kept, made, node.meta.get("stack_trace"))


@rule(aten.slice.Tensor)
def _slice(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """slice(x, d, a, b, step): bounds inside the dimension, never negative; no step where it is 1"""
    given = list(args[1:])
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    size = value(args[0]).shape[dim]
    start = 0 if start is None else start
    if isinstance(size, int):
        end = size if end is None else end
        if isinstance(start, int) and isinstance(end, int):
            start, end = (min(max(v + size if v < 0 else v, 0), size) for v in (start, end))
    dim, made, origin = dim % value(args[0]).dim(), value(node), node.meta.get("stack_trace")
    if step == 1:
        return out.slice(args[0], dim, start, end, made, origin)
    return out.emit(aten.slice.Tensor, (args[0], dim, start, end, step), {}, made, origin)


@rule(operator.getitem)
def _part(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """split(x, n, d)[i] = slice(x, d, i n, (i + 1) n);  unbind(x, d)[i] = select(x, d, i)"""
    pack, position = args
    made = value(node)
    origin = node.meta.get("stack_trace")
    if not isinstance(pack, fx.Node):
        return None
    rest = list(pack.args[1:])
    if pack.target is aten.unbind.int:
        dim = rest[0] if rest else 0
        base = node_arg(pack, 0)
        return row_of(out, base, dim % value(base).dim(), position, made, origin)
    if pack.target in (aten.split.Tensor, aten.split_with_sizes.default):
        base = node_arg(pack, 0)
        dim = (rest[1] if len(rest) > 1 else 0) % value(base).dim()
        lengths = [v.shape[dim] for v in value(pack)]
        if all(isinstance(n, int) for n in lengths):
            start = sum(lengths[:position])
            return out.slice(base, dim, start, start + lengths[position], made, origin)
    return None


@rule(aten.select.int)
def _select(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """select(x, d, i): neither d nor a constant i is negative"""
    base, dim, index = args
    shape = value(base).shape
    dim %= len(shape)
    if isinstance(index, int) and index < 0 and isinstance(shape[dim], int):
        index += shape[dim]
    return row_of(out, base, dim, index, value(node), node.meta.get("stack_trace"))


def row_of(out: Emitter, base: fx.Node, dim: int, index: Any, made: Any, origin: str | None) -> Any:
    """select(x [.., 1, ..], d, 0) = view(x, ..) for what is computed; a weight's experts are selected, be there one
    select(view(x, s), d, i) = view(select(x, d, i), ..) where the view keeps the dimensions up to d
    select(stack(xs, d), d, i) = xs[i]"""
    if base.target is aten.stack.default and type(index) is int:
        parts, at = (*base.args, 0)[:2]
        if at == dim and 0 <= index < len(parts):  # type: ignore[arg-type]
            return parts[index]  # type: ignore[index]
    if base.target is aten.view.default:
        inner = node_arg(base, 0)
        leading = value(inner).shape[: dim + 1]
        if len(leading) > dim and out.same_sizes(value(base).shape[: dim + 1], leading):
            narrow = row_of(out, inner, dim, index, value(inner).select(dim, 0), origin)
            return out.view(narrow, made, origin)
    columns = columns_of(out, base, dim, index, made, origin)
    if columns is not None:
        return columns
    source = node_arg(base, 0) if base.target is aten.permute.default else base
    if source is not base and source.target is aten.view.default:
        source = node_arg(source, 0)
    computed = source.op == "call_function" and (source is base or not _is_mask(source))
    if computed and is_one(value(base).shape[dim]):
        return out.apply(aten.view.default, (base, out.sizes(made)), {}, made, origin)
    row = _one_hot_row(out, base, dim, index, made, origin)
    if row is not None:
        return row
    return out.emit(aten.select.int, (base, dim, index), {}, made, origin)


def _one_hot_row(
    out: Emitter, mask: fx.Node, dim: int, index: Any, made: Any, origin: str | None
) -> Any:
    """select(one_hot(ids, E), -1, e) = (ids == e), for any permutation of the one_hot's dimensions and 0 <= e < E"""
    dims = list(range(value(mask).dim()))
    one_hot = mask
    if mask.target is aten.permute.default:
        dims, one_hot = list(mask.args[1]), node_arg(mask, 0)  # type: ignore[arg-type]
    compared = uncast(one_hot)
    classes = dims[dim]
    if compared.target is not aten.eq.Tensor or classes != len(dims) - 1:
        return None
    ids, numbers = node_arg(compared, 0), compared.args[1]
    if not isinstance(numbers, fx.Node) or numbers.target is not aten.arange.default:
        return None
    if len(numbers.args) != 1 or value(ids).dim() != len(dims) or not is_one(value(ids).shape[-1]):
        return None
    if isinstance(index, int) and not 0 <= index < value(numbers).shape[0]:
        return None
    flat = out.view(ids, value(ids).squeeze(-1), origin)
    hit = torch.empty_like(value(flat), dtype=torch.bool)
    row = out.emit(aten.eq.Scalar, (flat, index), {}, hit, origin)
    rest = [d for i, d in enumerate(dims) if i != dim]
    row = out.permute(row, rest, torch.empty_like(made, dtype=torch.bool), origin)
    if made.dtype == torch.bool:
        return row
    return out.emit(aten._to_copy.default, (row,), {"dtype": made.dtype}, made, origin)


@rule(aten.sum.dim_IntList, aten.sum.default, aten.any.default)
def _count(out: Emitter, node: fx.Node, args: tuple[Any, ...], kwargs: dict) -> Any:
    """sum(permute(x, p), dims) = sum(x, p[dims]) for integers, where at most one dimension is left
    sum(x, every dimension) = sum(x);  sum(view(x)) = sum(x);  any(permute(x)) = any(view(x)) = any(x)
    any(any(x, d)) = any(x);  sum(cast(b, int64)) = sum(b);  any(cast(b)) = any(b) for a boolean b: integers add up in
    any order;  sum(view(x) == e) = sum(x == e)"""
    made, base = value(node), args[0]
    if node.target is not aten.any.default and not is_integral(node):
        return None
    if made.dim() > 1 or len(args) > 2:
        return None
    rank = value(base).dim()
    given: Any = range(rank) if made.dim() == 0 else list(args)[-1]
    dims = sorted(d % rank for d in given)
    peeled = [aten._to_copy.default, aten.permute.default, aten.view.default]
    if node.target is aten.any.default:
        peeled.append(aten.any.dim)
    while base.target in peeled:
        inner = node_arg(base, 0)
        if base.target is aten.permute.default:
            order: Any = base.args[1]
            dims = sorted(order[d] for d in dims)
        elif base.target is aten.view.default and made.dim() == 0:
            dims = list(range(value(inner).dim()))
        elif value(inner).dtype != torch.bool or base.target is aten.view.default:
            break
        base = inner
    if base.target is aten.eq.Scalar and made.dim() == 0:
        ids, e = node_arg(base, 0), base.args[1]
        if ids.target is aten.view.default:
            hit = torch.empty_like(value(node_arg(ids, 0)), dtype=torch.bool)
            base = out.emit(aten.eq.Scalar, (ids.args[0], e), {}, hit, node.meta.get("stack_trace"))
    target = aten.any.default if node.target is aten.any.default else aten.sum.default
    rest: tuple = ()
    if made.dim() == 1:
        target, rest = aten.sum.dim_IntList, (dims,)
    return out.emit(target, (base, *rest), kwargs, made, node.meta.get("stack_trace"))


@rule(aten.index_select.default)
def _index_select(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """index_select(x, 0, i) = index(x, [i])"""
    base, dim, index = args
    if dim != 0 or value(index).dim() != 1:
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    return out.apply(aten.index.Tensor, (base, [index]), {}, made, origin)


@rule(aten.gather.default)
def _gather(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """gather(x [.., n], 0, i [m, 1] in each of n columns) = index(x, [i])"""
    base, dim, index = args[:3]
    rows = _repeated(index, value(base)) if dim == 0 and len(args) == 3 else None
    if rows is None:
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    return out.apply(aten.index.Tensor, (base, [rows]), {}, made, origin)


@rule(aten.scatter_reduce.two)
def _scatter_reduce(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """scatter_reduce(x, d, i, y, "sum") = scatter_add(x, d, i, y)"""
    *given, how = args
    if how != "sum" or not kwargs.get("include_self", True):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    return out.apply(aten.scatter_add.default, tuple(given), {}, made, origin)


@rule(aten.scatter_add.default, aten.scatter.src)
def _scatter(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """scatter_add(x [.., n], 0, i [m, 1] in each of n columns, y [m, n]) = index_add(x, 0, i, y)
    scatter(x, 0, i, y) = index_put(x, [i], y)"""
    base, dim, index, source = args
    rows = _repeated(index, value(base)) if dim == 0 else None
    if rows is None or not out.same_shape(value(index), value(source)):
        return None
    made, origin = value(node), node.meta.get("stack_trace")
    if node.target is aten.scatter_add.default:
        return out.emit(aten.index_add.default, (base, 0, rows, source), {}, made, origin)
    return out.emit(aten.index_put.default, (base, [rows], source), {}, made, origin)


def _repeated(index: fx.Node, base: torch.Tensor) -> fx.Node | None:
    """i, where index [m, n] is i [m] in each of the n columns that base has."""
    made = value(index)
    if index.target not in (aten.expand.default, aten.repeat.default) or made.dim() != 2:
        return None
    column = node_arg(index, 0)
    shape = value(column).shape
    narrow = len(shape) == 2 and is_one(shape[1]) and str(shape[0]) == str(made.shape[0])
    if not narrow or str(made.shape[1]) != str(base.shape[-1]) or base.dim() != 2:
        return None
    return node_arg(column, 0) if column.target is aten.view.default else None


@rule(aten.addmm.default)
def _bias(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """addmm(bias, x, w) = add(mm(x, w), bias)"""
    if kwargs or len(args) != 3:
        return None
    bias, rows, weight = args
    made, origin = value(node), node.meta.get("stack_trace")
    product = out.emit(aten.mm.default, (rows, weight), {}, made, origin)
    return out.emit(aten.add.Tensor, (product, bias), {}, made, origin)


@rule(*_PROMOTING)
def _promote(out: Emitter, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 2:
        return None
    if not all(isinstance(a, fx.Node) and isinstance(value(a), torch.Tensor) for a in args):
        return None
    return arithmetic(out, node.target, args[0], args[1], value(node), node.meta.get("stack_trace"))


def arithmetic(
    out: Emitter, target: Any, a: fx.Node, b: fx.Node, made: torch.Tensor, origin: str | None
) -> fx.Node:
    """a * b = cast(a, dtype of the result) * b, and so for +, - and /, where a has another floating dtype
    a * view(b [n], [1, n]) = a * b where a has the result's shape
    a * b = b * a, a + b = b + a: the operand that has the result's shape comes first, then an activation, then
    what is not gathered"""
    given = (a, b)
    a, b = (_row_of_ones(out, n, made) for n in given)
    if not any(out.same_shape(value(n), made) for n in (a, b)):
        a, b = given
    a, b = (_promoted(out, n, made, origin) for n in (a, b))
    rank_a, rank_b = (
        (
            not out.same_shape(value(n), made),
            n.target not in _ACTIVATIONS,
            n.target is aten.index.Tensor,
        )
        for n in (a, b)
    )
    if target in _COMMUTATIVE and rank_b < rank_a:
        a, b = b, a
    if target is aten.mul.Tensor:
        a = _dispatched.unmasked(out, a, b) or a
    return out.emit(target, (a, b), {}, made, origin)


def _row_of_ones(out: Emitter, node: fx.Node, made: torch.Tensor) -> fx.Node:
    """A vector [n] viewed as [1, .., n]: broadcasting does the same."""
    if node.target is not aten.view.default or value(node).dim() > made.dim():
        return node
    base = node_arg(node, 0)
    ones, last = value(node).shape[:-1], value(node).shape[-1:]
    if (
        value(base).dim() == 1
        and all(map(is_one, ones))
        and out.same_sizes(value(base).shape, last)
    ):
        return base
    return node


def _promoted(out: Emitter, node: fx.Node, made: torch.Tensor, origin: str | None) -> fx.Node:
    found = value(node)
    if (
        found.dtype == made.dtype
        or found.dim() == 0  # a number with a dtype of its own does not promote
        or not (found.dtype.is_floating_point and made.dtype.is_floating_point)
    ):
        return node
    val = torch.empty_like(found, dtype=made.dtype)
    return out.emit(aten._to_copy.default, (node,), {"dtype": made.dtype}, val, origin)


def _is_mask(node: fx.Node) -> bool:
    source = uncast(node)
    return value(source).dtype == torch.bool


# -- uniform spelling -------------------------------------------------------------------------------------------------


def _uniform(node: fx.Node, env: Callable[[fx.Node], Any]) -> tuple[tuple, dict]:
    """Arguments by position in schema order; trailing defaults dropped."""
    args = fx.map_arg(node.args, env)
    kwargs = dict(fx.map_arg(node.kwargs, env))
    if not isinstance(node.target, OpOverload):
        return tuple(args), kwargs
    positional = [a for a in node.target._schema.arguments if not a.kwarg_only]
    spelled, named = list(args), dict(kwargs)
    for argument in positional[len(spelled) :]:
        if argument.name in named:
            spelled.append(named.pop(argument.name))
        elif argument.has_default_value():
            spelled.append(argument.default_value)
        else:
            break
    spelled = _count_dims_from_zero(spelled, positional)
    while len(spelled) and len(spelled) <= len(positional):
        argument = positional[len(spelled) - 1]
        if argument.has_default_value() and _plainly_equal(spelled[-1], argument.default_value):
            spelled.pop()
        else:
            break
    for argument in node.target._schema.arguments:
        if (
            argument.kwarg_only
            and argument.name in named
            and argument.has_default_value()
            and _plainly_equal(named[argument.name], argument.default_value)
        ):
            del named[argument.name]
    for scale in ("alpha", "beta"):
        if scale in named:  # by position: torch's matcher overlooks a further keyword before 2.15
            spelled.append(named.pop(scale))
    for noise in ("pin_memory", "layout", "memory_format", "non_blocking"):
        named.pop(noise, None)
    return tuple(spelled), named


def _count_dims_from_zero(spelled: list[Any], schema: list[Any]) -> list[Any]:
    """dim=-1 of a matrix is dim=1"""
    if not spelled or not isinstance(spelled[0], fx.Node) or not hasattr(value(spelled[0]), "dim"):
        return spelled
    rank = max(value(spelled[0]).dim(), 1)
    for i, argument in enumerate(schema[: len(spelled)]):
        given = spelled[i]
        if argument.name == "dim" and type(given) is int:
            spelled[i] = given % rank
        elif argument.name == "dim" and isinstance(given, (list, tuple)):
            spelled[i] = [d % rank if type(d) is int else d for d in given]
    return spelled


def _plainly_equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, (fx.Node, torch.SymInt)) and a == b


def _key(item: Any) -> Any:
    """Hashable identity of an argument: nodes by identity, sizes by expression, floats by type and value."""
    if isinstance(item, fx.Node):
        return item
    if isinstance(item, (tuple, list)):
        return tuple(_key(i) for i in item)
    if isinstance(item, dict):
        return tuple(sorted((k, _key(v)) for k, v in item.items()))
    if isinstance(item, FakeTensor):
        return id(item)
    return (type(item).__name__, repr(item))


# They register their rules, with what stands above.
from moe_inductor.region import buffers as _buffers  # noqa: E402, F401
from moe_inductor.region import columns as _columns  # noqa: E402, F401
from moe_inductor.region import dispatched as _dispatched  # noqa: E402
from moe_inductor.region import einsums as _einsums  # noqa: E402, F401
from moe_inductor.region import groups as _groups  # noqa: E402, F401
from moe_inductor.region import joined as _joined  # noqa: E402, F401
from moe_inductor.region import limited as _limited  # noqa: E402, F401
from moe_inductor.region import maps as _maps  # noqa: E402, F401
from moe_inductor.region import one_batch as _one_batch  # noqa: E402
from moe_inductor.region import operands as _operands  # noqa: E402, F401
from moe_inductor.region import pair_rows as _pair_rows  # noqa: E402, F401
from moe_inductor.region import picked as _picked  # noqa: E402, F401
from moe_inductor.region import picked_experts as _picked_experts  # noqa: E402, F401
from moe_inductor.region import rows as _rows  # noqa: E402, F401
from moe_inductor.region import scaled as _scaled  # noqa: E402, F401
from moe_inductor.region import sequences as _sequences  # noqa: E402
from moe_inductor.region import slot_pairs as _slot_pairs  # noqa: E402, F401
from moe_inductor.region import sparse as _sparse  # noqa: E402, F401
from moe_inductor.region import stacks as _stacks  # noqa: E402, F401
