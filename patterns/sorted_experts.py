"""Experts on sorted tokens: sort the (token, choice) pairs by expert, cut, run each expert on its slice, put back.

    order = topk_ids.view(-1).argsort()
    rows = x[order // k].split(counts.tolist())
    y = torch.cat([expert[e](rows[e]) for e in range(num_experts)])
    out.index_add_(0, order // k, y * topk_weights.view(-1)[order, None])

What is sorted, how it is counted, cut and put back is written in many ways.  The normal form has none of it
(``region/pairs.py``), so the reference says what is left: each pair's row through its own expert.
"""

import torch
from moe_inductor.patterns import _added_parts, _blocks, _cut_rows, _grouped_rows, _permuted_rows
from moe_inductor.patterns._blocks import HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample, linear_of_pairs


def reference(x, topk_ids, topk_weights, experts, *, weight_on, product_in, sum_in):
    T, k = topk_ids.shape
    ids, weights = topk_ids.reshape(-1), topk_weights.reshape(-1, 1)
    dtype = {"weights": weights.dtype, "float32": torch.float32}[product_in]
    rows = x.unsqueeze(1).expand(T, k, -1).reshape(T * k, -1)
    if weight_on == "input":
        rows = (rows * weights.to(dtype)).to(x.dtype)

    def linear(operand, weight, bias):
        return linear_of_pairs(operand.to(weight.dtype), ids, weight, bias)

    y = experts(rows, linear).view(T, k, -1).to(x.dtype)
    if weight_on == "output":
        y = y * topk_weights.unsqueeze(-1).to(dtype)
    return y.to({"product": y.dtype, "x": x.dtype}[sum_in]).sum(dim=1)


class Split(_blocks.Block):
    """granitemoe, jetmoe: each projection is a loop over the parts of a split; every method is a place to go wrong."""

    def counts(self, topk_ids, topk_weights):
        zeros = torch.zeros(topk_ids.shape[0], NUM_EXPERTS, dtype=topk_weights.dtype)
        return zeros.scatter(1, topk_ids, 1).long().sum(0)

    def order(self, topk_ids):
        return topk_ids.flatten().sort(0)[1]

    def token(self, order):
        return order.div(self.k, rounding_mode="trunc")

    def parts(self, rows, sizes):
        return rows.split(sizes, dim=0)

    def one(self, e, rows, weight, bias):
        if not self.transposed:
            return F.linear(rows, weight[e], None if bias is None else bias[e])
        return rows @ weight[e] if bias is None else rows @ weight[e] + bias[e]

    def linear(self, rows, weight, bias, sizes):
        parts = self.parts(rows, sizes)
        return torch.cat([self.one(e, parts[e], weight, bias) for e in range(NUM_EXPERTS)], dim=0)

    def rows(self, x, token):
        return x[token]

    def sorted_weights(self, topk_weights, order):
        return topk_weights.flatten()[order]

    def mlp(self, rows, sizes):
        hidden = self.act(self.linear(rows, self.gate_up_proj, self.gate_up_bias, sizes))
        return self.linear(hidden, self.down_proj, self.down_bias, sizes)

    def weighted(self, y, weights):
        return y * weights[:, None]

    def add(self, x, token, y):
        return torch.zeros(x.shape, dtype=y.dtype, device=x.device).index_add(0, token, y)

    def experts(self, x, topk_ids, topk_weights):
        sizes = self.counts(topk_ids, topk_weights).tolist()
        order = self.order(topk_ids)
        token = self.token(order)
        rows, weights = self.rows(x, token), self.sorted_weights(topk_weights, order)
        if self.weight_on_input:
            return self.add(x, token, self.mlp(self.weighted(rows, weights), sizes))
        return self.add(x, token, self.weighted(self.mlp(rows, sizes), weights))


class Slices(_blocks.Block):
    """deepseek_v2: one slice after the other, past experts without tokens; the sum in the dtype of the weights."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def route(self, logits):
        return super().route(logits.float() if logits.dtype != torch.float64 else logits)

    def counts(self, topk_ids):
        counts = topk_ids.new_zeros((topk_ids.shape[0], NUM_EXPERTS))
        counts.scatter_(1, topk_ids, 1)
        return counts.sum(dim=0)

    def loop(self, rows, counts):
        outputs = []
        start = 0
        for e, n in enumerate(counts):
            if n == 0:
                continue
            end = start + n
            outputs.append(self.mlps[e](rows[start:end]))
            start = end
        return torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)

    def put_back(self, outs, order):
        new_x = torch.empty_like(outs)
        new_x[order] = outs
        return new_x

    def experts(self, x, topk_ids, topk_weights):
        counts, order = self.counts(topk_ids), topk_ids.view(-1).argsort()
        outs = self.put_back(self.loop(x[order // topk_ids.shape[1]], counts), order)
        weighted = outs.view(*topk_ids.shape, -1).type(topk_weights.dtype)
        return weighted.mul_(topk_weights.unsqueeze(dim=-1)).sum(dim=1).type(outs.dtype)


class Infer(Slices):
    """``moe_infer`` of DeepSeek's own code: counts as a numpy array."""

    def experts(self, x, topk_ids, topk_weights):
        counts, order = self.counts(topk_ids), topk_ids.view(-1).argsort()
        rows = x[order // topk_ids.shape[1]]
        outs = self.put_back(self.loop(rows, counts.cpu().numpy()), order)
        weighted = outs.view(*topk_ids.shape, -1).type(topk_weights.dtype)
        return weighted.mul_(topk_weights.unsqueeze(dim=-1)).sum(dim=1).type(outs.dtype)


class Listed(Slices):
    """The same with counts of ``bincount`` in a list."""

    def experts(self, x, topk_ids, topk_weights):
        counts = torch.bincount(topk_ids.flatten(), minlength=NUM_EXPERTS).tolist()
        order = topk_ids.flatten().argsort(stable=True)
        y = self.loop(x[order // TOP_K], counts)
        y = y * topk_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x, dtype=y.dtype).index_add_(0, order // TOP_K, y).to(x.dtype)


class Written(Split):
    """aria: every expert writes its rows into a tensor of zeros, between two elements of a cumulated sum."""

    transposed = True

    def counts(self, topk_ids, topk_weights):
        ids = topk_ids.flatten().to(torch.float32)
        return torch.histc(ids, bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS - 1).to(torch.int64)

    def bounds(self, ends, e):
        return ends[e], ends[e + 1]

    def linear(self, rows, weight, bias, counts):
        out = torch.zeros(rows.shape[0], weight.shape[-1], dtype=rows.dtype, device=rows.device)
        zero = torch.zeros(1, dtype=torch.long, device=rows.device)
        ends = torch.cat((zero, torch.cumsum(counts, dim=0)))
        for e in range(NUM_EXPERTS):
            start, end = self.bounds(ends, e)
            out[start:end] = torch.matmul(rows[start:end], weight[e])
        return out

    def experts(self, x, topk_ids, topk_weights):
        counts = self.counts(topk_ids, topk_weights).cpu()
        order = torch.argsort(topk_ids.view(-1))
        y = self.mlp(x.index_select(0, order // TOP_K), counts)
        pairs = torch.zeros(x.shape[0] * TOP_K, y.size(1), dtype=y.dtype, device=y.device)
        pairs.index_copy_(0, order, y)
        return (pairs.view(-1, TOP_K, y.size(1)) * topk_weights.unsqueeze(-1)).sum(dim=1)


class Scattered(Split):
    """torchtitan: scores before the experts and in fp32, sorted rows cut and padded, and added up by scatter_add."""

    def counts(self, topk_ids, topk_weights):
        ids = topk_ids.view(-1).float()
        return torch.histc(ids, bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS).long()

    def linear(self, rows, weight, bias, sizes):
        missing = rows.shape[0] - sum(sizes)
        parts = torch.split(rows[: sum(sizes)], split_size_or_sections=sizes, dim=0)
        out = torch.cat([part @ weight[e].T for e, part in enumerate(parts)], dim=0)
        return torch.vstack((out, out.new_zeros((missing, out.shape[-1]))))

    def experts(self, x, topk_ids, topk_weights):
        sizes = self.counts(topk_ids, topk_weights).tolist()
        order = torch.argsort(topk_ids.view(-1), stable=True)
        token = (order // TOP_K).reshape(-1, 1).expand(-1, HIDDEN)
        rows = torch.gather(x, dim=0, index=token)
        weights = topk_weights.view(-1)[order].reshape(-1, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = self.mlp((rows.to(wide) * weights).to(x.dtype), sizes)
        return torch.zeros_like(x).scatter_add(dim=0, index=token, src=y)


class ScoredAfter(Scattered):
    """torchtitan with scores after the experts."""

    def start(self, x):
        return torch.zeros_like(x)

    def add_to(self, base, token, y):
        return base.scatter_add(dim=0, index=token, src=y)

    def experts(self, x, topk_ids, topk_weights):
        base = self.start(x)
        sizes = self.counts(topk_ids, topk_weights).tolist()
        order = torch.argsort(topk_ids.view(-1), stable=True)
        token = (order // TOP_K).reshape(-1, 1).expand(-1, HIDDEN)
        y = self.mlp(torch.gather(x, dim=0, index=token), sizes)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (y.to(wide) * topk_weights.view(-1)[order].reshape(-1, 1)).to(x.dtype)
        return self.add_to(base, token, y)


class SharedFirst(ScoredAfter):
    """torchtitan with shared experts: the rows of the others are added to what these gave."""

    def __init__(self):
        super().__init__()
        self.shared = _blocks.MLP()

    def start(self, x):
        return self.shared(x)


class AddsToX(Split):
    def add(self, x, token, y):
        return x.clone().index_add(0, token, y)


class PutBackByInverse(Split):
    """Pairs are put back by the inverse permutation, as grouped GEMMs do it, and then weighted."""

    def counts(self, topk_ids, topk_weights):
        return F.one_hot(topk_ids, num_classes=NUM_EXPERTS).sum(dim=(0, 1))

    def inverse(self, order):
        return order.argsort()

    def experts(self, x, topk_ids, topk_weights):
        order = topk_ids.view(-1).argsort()
        token = torch.arange(x.shape[0]).repeat_interleave(TOP_K)
        y = self.mlp(x[token][order], self.counts(topk_ids, topk_weights).tolist())
        y = y[self.inverse(order)].view(-1, TOP_K, HIDDEN)
        return (y * topk_weights[..., None]).sum(dim=1)


class TopOne(Split):
    k = 1


class AuxiliaryLoss(Split):
    """Counts are read outside as well."""

    def forward(self, x):
        logits = self.gate(x)
        topk_weights, topk_ids = self.route(logits)
        load = self.counts(topk_ids, topk_weights).to(logits.dtype)
        balance = (load * logits.softmax(-1).mean(0)).sum()
        return self.experts(x, topk_ids, topk_weights), balance


class NotPutBack(PutBackByInverse):
    """The pairs stay in the order of the experts."""

    def inverse(self, order):
        return torch.arange(order.shape[0])


class OrderForInverse(PutBackByInverse):
    def inverse(self, order):
        return order


class Descending(Split):
    """Rows of the last expert first, to whom the slice of the first is given."""

    def order(self, topk_ids):
        return topk_ids.flatten().sort(0, descending=True)[1]


class OtherKey(Split):
    def order(self, topk_ids):
        return (topk_ids.flatten() % 2).sort(0)[1]


class OrderOfWeights(Split):
    def experts(self, x, topk_ids, topk_weights):
        self.weights = topk_weights
        return super().experts(x, topk_ids, topk_weights)

    def order(self, topk_ids):
        return self.weights.flatten().argsort()


class ClampedIds(Split):
    """Tokens of the last expert go to the one before."""

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids.clamp(max=NUM_EXPERTS - 2), topk_weights)

    def counts(self, topk_ids, topk_weights):
        return F.one_hot(topk_ids, num_classes=NUM_EXPERTS).sum(dim=(0, 1))


class WeightsNotSorted(Split):
    def sorted_weights(self, topk_weights, order):
        return topk_weights.flatten()


class WrongK(Split):
    """Pairs are divided among tokens by another k than the one they were chosen with."""

    def token(self, order):
        return order.div(TOP_K + 1, rounding_mode="trunc")


class OtherTokens(Split):
    def rows(self, x, token):
        return x[token.flip(0)]


class TokenModulo(Split):
    """The token of a pair if all first choices came before all second ones."""

    def token(self, order):
        return order % (order.shape[0] // TOP_K)


class CountsOfOthers(Split):
    """How often each expert would have been chosen last."""

    def experts(self, x, topk_ids, topk_weights):
        self.others = torch.topk(self.gate(x), self.k, largest=False).indices
        return super().experts(x, topk_ids, topk_weights)

    def counts(self, topk_ids, topk_weights):
        return super().counts(self.others, topk_weights)


class CountsRolled(Split):
    def counts(self, topk_ids, topk_weights):
        return super().counts(topk_ids, topk_weights).roll(1)


class CountsRounded(Split):
    """Added up in the dtype of the weights, which is exact for a few tokens only."""

    def counts(self, topk_ids, topk_weights):
        zeros = torch.zeros(topk_ids.shape[0], NUM_EXPERTS, dtype=topk_weights.dtype)
        return zeros.scatter(1, topk_ids, 1).sum(0).long()


class OtherBins(Split):
    """The third expert's rows go to the second: four bins between 0 and 5."""

    def counts(self, topk_ids, topk_weights):
        ids = topk_ids.flatten().float()
        return torch.histc(ids, bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS + 1).long()


class CountsTwice(Split):
    """Doubled and halved again."""

    def counts(self, topk_ids, topk_weights):
        zeros = torch.zeros(topk_ids.shape[0], NUM_EXPERTS)
        return zeros.scatter(1, topk_ids, 2).long().sum(0) // 2


class NextPart(Split):
    """Every expert gets the rows of the next one."""

    def parts(self, rows, sizes):
        parts = rows.split(sizes, dim=0)
        return (*parts[1:], parts[0])


class OtherPartsForDown(Split):
    def parts(self, rows, sizes):
        if rows.shape[-1] == INTERMEDIATE:
            sizes = [*sizes[1:], sizes[0]]
        return rows.split(sizes, dim=0)


class LastDropped(Split):
    """The rows of the last expert are zeros."""

    def linear(self, rows, weight, bias, sizes):
        parts = rows.split(sizes, dim=0)
        made = [self.one(e, parts[e], weight, bias) for e in range(NUM_EXPERTS - 1)]
        return torch.cat([*made, rows.new_zeros(sizes[-1], weight.shape[1])], dim=0)


class FirstThree(Split):
    """The router chooses among four experts, of which three are run, on tokens of these three."""

    def linear(self, rows, weight, bias, sizes):
        parts = rows.split(sizes, dim=0)
        return torch.cat([self.one(e, parts[e], weight, bias) for e in (0, 1, 2)], dim=0)

    def experts(self, x, topk_ids, topk_weights):
        sizes = self.counts(topk_ids, topk_weights).tolist()
        order = self.order(topk_ids)
        y = self.mlp_of_first(x[self.token(order)], sizes)
        y = torch.cat((y, x.new_zeros(order.shape[0] - y.shape[0], HIDDEN)))
        return self.add(x, self.token(order), y * topk_weights.flatten()[order][:, None])

    def mlp_of_first(self, rows, sizes):
        parts = rows.split(sizes, dim=0)
        hidden = [self.act(F.linear(parts[e], self.gate_up_proj[e])) for e in (0, 1, 2)]
        made = [F.linear(h, self.down_proj[e]) for e, h in enumerate(hidden)]
        return torch.cat(made, dim=0)


class OtherWeights(Split):
    def one(self, e, rows, weight, bias):
        return super().one(NUM_EXPERTS - 1 - e, rows, weight, bias)


class NextDown(Split):
    def one(self, e, rows, weight, bias):
        return super().one((e + (weight is self.down_proj)) % NUM_EXPERTS, rows, weight, bias)


class SameWeights(Split):
    def one(self, e, rows, weight, bias):
        return super().one(0, rows, weight, bias)


class Biased(Split):
    biased = True


class NextBias(Biased):
    def one(self, e, rows, weight, bias):
        return F.linear(rows, weight[e], bias[(e + 1) % NUM_EXPERTS])


class OneBias(Biased):
    def one(self, e, rows, weight, bias):
        return F.linear(rows, weight[e], bias[0])


class OneWithoutBias(Biased):
    def one(self, e, rows, weight, bias):
        return F.linear(rows, weight[e], bias[e] if e else None)


class OneScaled(Split):
    def one(self, e, rows, weight, bias):
        return super().one(e, rows, weight, bias) * (1.0 if e else 2.0)


class WeightTwice(Split):
    def rows(self, x, token):
        return x[token] * 0.5

    def weighted(self, y, weights):
        return super().weighted(super().weighted(y, weights), weights)


class PostNorm(Split):
    """muse_spark: a norm between the expert and its routing weight."""

    def weighted(self, y, weights):
        return super().weighted(F.rms_norm(y, (HIDDEN,)), weights)


class Detached(Split):
    def weighted(self, y, weights):
        return super().weighted(y.detach(), weights)


class NoGrad(Split):
    def mlp(self, rows, sizes):
        with torch.no_grad():
            return super().mlp(rows, sizes)


class AddsTwiceToBase(SharedFirst):
    """The sum counts twice, what it is added to once."""

    def add_to(self, base, token, y):
        return base.index_add(0, token[:, 0], y, alpha=2)


class AddsToBaseElsewhere(SharedFirst):
    def add_to(self, base, token, y):
        return base.scatter_add(dim=0, index=token.flip(0), src=y)


class PutsIntoBase(SharedFirst):
    """Replaced, not added to."""

    def add_to(self, base, token, y):
        return base.index_copy(0, token[:, 0], y)


class BaseReadsRows(SharedFirst):
    """What the rows are added to is scaled by one of them."""

    def add_to(self, base, token, y):
        return super().add_to(base * y[:1], token, y)


class AddsTwice(Split):
    def add(self, x, token, y):
        return torch.zeros_like(x).index_add(0, token, y, alpha=2)


class AddsElsewhere(Split):
    def add(self, x, token, y):
        return torch.zeros_like(x).index_add(0, token.flip(0), y)


class OverwritesTokens(Split):
    """Of a token's experts, one is left."""

    def add(self, x, token, y):
        return torch.zeros_like(x).index_copy(0, token, y)


class HiddenEscapes(Split):
    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids, topk_weights) + self.norm

    def weighted(self, y, weights):
        self.norm = y.square().mean()
        return super().weighted(y, weights)


class OneGelu(Slices):
    def __init__(self):
        super().__init__()
        self.mlps[2] = _blocks.MLP(F.gelu)


class PutBackByOther(Slices):
    def put_back(self, outs, order):
        new_x = torch.empty_like(outs)
        new_x[order.flip(0)] = outs
        return new_x


class Shifted(Written):
    """Every slice begins one row late, and the last one with the first row."""

    def mlp(self, rows, counts):
        return super().mlp(rows.roll(1, 0), counts)


class OneLate(Written):
    """The second expert's rows begin one row after the first's end."""

    def linear(self, rows, weight, bias, counts):
        out = torch.zeros(rows.shape[0], weight.shape[-1], dtype=rows.dtype, device=rows.device)
        zero = torch.zeros(1, dtype=torch.long, device=rows.device)
        ends = torch.cat((zero, torch.cumsum(counts, dim=0)))
        for e in range(NUM_EXPERTS):
            start, end = ends[e] + (e == 1), ends[e + 1]
            out[start:end] = torch.matmul(rows[start:end], weight[e])
        return out


class OneEarly(Written):
    """The third expert is given as many rows as it has, from one row before its own on."""

    def linear(self, rows, weight, bias, counts):
        out = torch.zeros(rows.shape[0], weight.shape[-1], dtype=rows.dtype, device=rows.device)
        zero = torch.zeros(1, dtype=torch.long, device=rows.device)
        ends = torch.cat((zero, torch.cumsum(counts, dim=0)))
        for e in range(NUM_EXPERTS):
            start, end = ends[e], ends[e + 1]
            read = rows[start - 1 : end - 1] if e == 2 else rows[start:end]
            out[start:end] = torch.matmul(read, weight[e])
        return out


class Overlap(Written):
    """The second expert is given the first's rows as well, and writes all of them."""

    def bounds(self, ends, e):
        return ends[0 if e == 1 else e], ends[e + 1]


class WrittenTwice(Written):
    def bounds(self, ends, e):
        return ends[max(e, 1)], ends[max(e, 1) + 1]


class ReadsElsewhere(Written):
    """The rows of the expert before are multiplied, and written to an expert's own place."""

    def linear(self, rows, weight, bias, counts):
        out = torch.zeros(rows.shape[0], weight.shape[-1], dtype=rows.dtype, device=rows.device)
        zero = torch.zeros(1, dtype=torch.long, device=rows.device)
        ends = torch.cat((zero, torch.cumsum(counts, dim=0)))
        for e in range(NUM_EXPERTS):
            start, end = ends[e], ends[e + 1]
            out[start:end] = torch.matmul(rows.flip(0)[start:end], weight[e])
        return out


class SkipsOther(Slices):
    """An expert is skipped where the next has no tokens."""

    def loop(self, rows, counts):
        outputs = []
        start = 0
        others = counts.roll(-1)
        for e, n in enumerate(counts):
            end = start + n
            if others[e] == 0:
                continue
            outputs.append(self.mlps[e](rows[start:end]))
            start = end
        return torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)


class OneMoreRow(Slices):
    """A pass that is not skipped also puts a row of zeros in front, which is cut off in the end."""

    def loop(self, rows, counts):
        outputs = []
        start = 0
        for e, n in enumerate(counts):
            if n == 0:
                continue
            end = start + n
            outputs.append(self.mlps[e](rows[start:end]))
            outputs.append(rows[:1])
            start = end
        made = torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)
        return made[: rows.shape[0]]


_OF_WRITTEN = (
    NearMiss(name="one_late", build=OneLate, code="PROOF"),
    # torch 2.11 does not trace a write of unknown many rows to what may be another number of rows.
    NearMiss(
        name="one_early",
        build=OneEarly,
        code="PROOF" if torch.__version__ >= "2.13" else "CONTROL_FLOW",
    ),
    NearMiss(name="overlap", build=Overlap, code="PROOF"),
    NearMiss(name="written_twice", build=WrittenTwice, code="EXPERT_TWICE"),
    NearMiss(name="reads_elsewhere", build=ReadsElsewhere, code="ACTIVATION"),
    NearMiss(name="shifted", build=Shifted, code="SPELLING"),
)

SORTED_EXPERTS = ExpertsSpelling(
    name="sorted_experts",
    source="transformers 4.57: granitemoe, jetmoe, deepseek_v2, aria; torchtitan; Megatron's SequentialMLP",
    reference=reference,
    anchor="moe_inductor_region::pair_linear",
    facts={
        "weight_on": ("output", "input"),
        # Of what has been multiplied by the weights, and what is then added up.
        "product_in": ("float32", "weights"),
        "sum_in": ("product", "x"),
    },
    samples=(
        Sample(name="split", build=Split),
        Sample(name="slices", build=Slices),
        Sample(name="moe_infer", build=Infer, brief=True),
        Sample(name="listed", build=Listed, brief=True),
        Sample(name="written", build=Written),
        Sample(name="scattered", build=Scattered, brief=True),
        Sample(name="shared_first", build=SharedFirst),
        Sample(name="adds_to_x", build=AddsToX, brief=True),
        Sample(name="scored_after", build=ScoredAfter, brief=True),
        Sample(name="put_back_by_inverse", build=PutBackByInverse, brief=True),
        Sample(name="top_one", build=TopOne, brief=True),
        Sample(name="auxiliary_loss", build=AuxiliaryLoss, brief=True),
        *_added_parts.SAMPLES,
        *_cut_rows.SAMPLES,
        *_grouped_rows.SAMPLES,
        *_permuted_rows.SAMPLES,
        *(Sample(name=name, build=block, brief=True) for name, block in _blocks.variants(Split)),
    ),
    near_misses=(
        *(NearMiss(name=n, build=b, code=c) for n, b, c in _blocks.near_variants(Split)),
        *_OF_WRITTEN,
        *_added_parts.NEAR_MISSES,
        *_cut_rows.NEAR_MISSES,
        *_grouped_rows.NEAR_MISSES,
        *_permuted_rows.NEAR_MISSES,
        NearMiss(name="not_put_back", build=NotPutBack, code="SPELLING"),
        NearMiss(name="order_for_inverse", build=OrderForInverse, code="SPELLING"),
        NearMiss(name="descending", build=Descending, code="SPELLING"),
        NearMiss(name="other_key", build=OtherKey, code="SPELLING"),
        NearMiss(name="order_of_weights", build=OrderOfWeights, code="SPELLING"),
        NearMiss(name="clamped_ids", build=ClampedIds, code="SPELLING"),
        NearMiss(name="weights_not_sorted", build=WeightsNotSorted, code="SPELLING"),
        NearMiss(name="wrong_k", build=WrongK, code="SPELLING"),
        NearMiss(name="other_tokens", build=OtherTokens, code="SPELLING"),
        NearMiss(name="token_modulo", build=TokenModulo, code="SPELLING"),
        NearMiss(name="counts_of_others", build=CountsOfOthers, code="SPELLING"),
        NearMiss(name="counts_rolled", build=CountsRolled, code="PROOF"),
        NearMiss(name="counts_rounded", build=CountsRounded, code="PROOF"),
        NearMiss(name="other_bins", build=OtherBins, code="PROOF"),
        NearMiss(name="counts_twice", build=CountsTwice, code="PROOF"),
        NearMiss(name="next_part", build=NextPart, code="EXPERT_WEIGHTS"),
        NearMiss(name="other_parts_for_down", build=OtherPartsForDown, code="PROOF"),
        NearMiss(name="last_dropped", build=LastDropped, code="SPELLING"),
        NearMiss(name="first_three", build=FirstThree, code="SPELLING"),
        NearMiss(name="other_weights", build=OtherWeights, code="EXPERT_WEIGHTS"),
        NearMiss(name="next_down", build=NextDown, code="EXPERT_WEIGHTS"),
        NearMiss(name="same_weights", build=SameWeights, code="EXPERT_WEIGHTS"),
        NearMiss(name="next_bias", build=NextBias, code="EXPERT_WEIGHTS"),
        NearMiss(name="one_bias", build=OneBias, code="EXPERT_WEIGHTS"),
        NearMiss(name="one_without_bias", build=OneWithoutBias, code="SPELLING"),
        NearMiss(name="one_scaled", build=OneScaled, code="ACTIVATION"),
        NearMiss(name="weight_twice", build=WeightTwice, code="SPELLING"),
        NearMiss(name="post_norm", build=PostNorm, code="SPELLING"),
        NearMiss(name="detached", build=Detached, code="SPELLING"),
        NearMiss(name="no_grad", build=NoGrad, code="GRAD_STATE"),
        NearMiss(name="adds_twice_to_base", build=AddsTwiceToBase, code="SPELLING"),
        NearMiss(name="adds_to_base_elsewhere", build=AddsToBaseElsewhere, code="SPELLING"),
        NearMiss(name="puts_into_base", build=PutsIntoBase, code="SPELLING"),
        NearMiss(name="base_reads_rows", build=BaseReadsRows, code="ESCAPES"),
        NearMiss(name="adds_twice", build=AddsTwice, code="SPELLING"),
        NearMiss(name="adds_elsewhere", build=AddsElsewhere, code="SPELLING"),
        NearMiss(name="overwrites_tokens", build=OverwritesTokens, code="SPELLING"),
        NearMiss(name="hidden_escapes", build=HiddenEscapes, code="ESCAPES"),
        NearMiss(name="one_gelu", build=OneGelu, code="ACTIVATION"),
        NearMiss(name="put_back_by_other", build=PutBackByOther, code="SPELLING"),
        NearMiss(name="skips_other", build=SkipsOther, code="ASSUMPTION"),
        NearMiss(name="one_more_row", build=OneMoreRow, code="EXPERT_TWICE"),
    ),
)
