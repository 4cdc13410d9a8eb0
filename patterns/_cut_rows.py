"""Sorted rows that are cut where cumulated counts say: samples of ``sorted_experts``.

    Megatron's SequentialMLP            out[start:end] = expert(rows[start:end])
    DeepSeek's remote code (MoE-16b)    if start == end: continue
                                        out.scatter_reduce_(0, token of the rows, expert(rows) * weights, reduce="sum")

The ends are read as tensors, as numbers, as a list or as an array.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS, TOP_K
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class Cut(_blocks.Block):
    """Every method is one place to go wrong."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def counts(self, topk_ids):
        return torch.bincount(topk_ids.flatten(), minlength=NUM_EXPERTS)

    def ends(self, counts):
        return torch.cat((counts.new_zeros(1), counts.cumsum(0)))

    def bounds(self, ends, e):
        return ends[e], ends[e + 1]

    def one(self, e, rows, start, end, out):
        out[start:end] = self.mlps[e](rows[start:end])

    def put_back(self, y, order):
        pairs = torch.empty_like(y)
        pairs[order] = y
        return pairs

    def experts(self, x, topk_ids, topk_weights):
        order = topk_ids.flatten().argsort()
        rows = x.index_select(0, order // TOP_K)
        out, ends = torch.zeros_like(rows), self.ends(self.counts(topk_ids))
        for e in range(NUM_EXPERTS):
            start, end = self.bounds(ends, e)
            self.one(e, rows, start, end, out)
        pairs = self.put_back(out, order).view(-1, TOP_K, HIDDEN)
        return (pairs * topk_weights[..., None]).sum(dim=1)


class Items(Cut):
    def bounds(self, ends, e):
        return ends[e].item(), int(ends[e + 1])


class Listed(Cut):
    def ends(self, counts):
        return super().ends(counts).cpu().tolist()


class OneHot(Cut):
    def counts(self, topk_ids):
        return F.one_hot(topk_ids.flatten(), NUM_EXPERTS).sum(dim=0)

    def ends(self, counts):
        return F.pad(counts.cumsum(0), (1, 0))


class Histogram(Cut):
    """Put back by the inverse: every write into a slice is alike, and none may be left out."""

    def counts(self, topk_ids):
        ids = topk_ids.flatten().float()
        return torch.histc(ids, bins=NUM_EXPERTS, min=0, max=NUM_EXPERTS).long()

    def put_back(self, y, order):
        return y[order.argsort()]


class Tied(Histogram):
    """The last expert has the weights of the first."""

    def one(self, e, rows, start, end, out):
        super().one(e % (NUM_EXPERTS - 1), rows, start, end, out)


class Added(Cut):
    def counts(self, topk_ids):
        ids = topk_ids.flatten()
        return torch.zeros(NUM_EXPERTS, dtype=torch.long).scatter_add_(0, ids, torch.ones_like(ids))

    def put_back(self, y, order):
        index = order.argsort()[:, None].expand(-1, HIDDEN)
        return y.gather(0, index)


class PastEqual(Cut):
    """Past experts without tokens: from one end to the next there are none."""

    def experts(self, x, topk_ids, topk_weights):
        order = topk_ids.flatten().argsort()
        rows = x[order // TOP_K]
        out, ends = torch.zeros_like(rows), self.ends(self.counts(topk_ids))
        for e in range(NUM_EXPERTS):
            start, end = self.bounds(ends, e)
            if self.is_empty(ends, e, start, end):
                continue
            self.one(e, rows, start, end, out)
        pairs = self.put_back(out, order).view(-1, TOP_K, HIDDEN)
        return (pairs * topk_weights[..., None]).sum(dim=1)

    def is_empty(self, ends, e, start, end):
        return start == end


class PastEqualNumbers(PastEqual):
    def ends(self, counts):
        return super().ends(counts).tolist()


class PastNoneBetween(PastEqualNumbers):
    def is_empty(self, ends, e, start, end):
        return end - start <= 0


class PastNotBefore(PastEqual):
    def is_empty(self, ends, e, start, end):
        return start >= end


class Reduced(_blocks.Block):
    """``moe_infer`` of deepseek-moe-16b: rows are weighted in place, and added up at their tokens."""

    reduce = "sum"

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def ends(self, topk_ids):
        return topk_ids.flatten().bincount(minlength=NUM_EXPERTS).cpu().numpy().cumsum(0)

    def is_empty(self, ends, e, start, end):
        return start == end

    def add(self, out, token, y):
        index = token.view(-1, 1).repeat(1, HIDDEN)
        if torch.is_grad_enabled():  # torch cannot differentiate it in place
            return out.scatter_reduce(0, index, y, reduce=self.reduce)
        return out.scatter_reduce_(0, index, y, reduce=self.reduce)

    def experts(self, x, topk_ids, topk_weights):
        flat_weights = topk_weights.view(-1, 1)
        out, order = torch.zeros_like(x), topk_ids.view(-1).argsort()
        ends, tokens = self.ends(topk_ids), order // TOP_K
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if self.is_empty(ends, e, start, end):
                continue
            token = tokens[start:end]
            y = self.mlps[e](x[token])
            y.mul_(flat_weights[order[start:end]])
            out = self.add(out, token, y)
        return out


class ReducedNumbers(Reduced):
    def ends(self, topk_ids):
        zeros = topk_ids.new_zeros((topk_ids.shape[0], NUM_EXPERTS))
        return zeros.scatter_(1, topk_ids, 1).sum(dim=0).cumsum(0).tolist()


class ReducedUpToLast(Reduced):
    """Up to the last expert that has any tokens, as the authors have it."""

    def ends(self, topk_ids):
        return topk_ids.flatten().bincount().cpu().numpy().cumsum(0)


class CountedUpToLast(Reduced):
    """The same without a test, by counts and not by their sums."""

    def add(self, out, token, y):
        return out.index_add_(0, token, y)

    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.view(-1).argsort()
        tokens, start = order // TOP_K, 0
        for e, n in enumerate(self.counts(topk_ids)):
            end = start + n
            token = tokens[start:end]
            self.add(
                out, token, self.mlps[e](x[token]) * topk_weights.view(-1, 1)[order[start:end]]
            )
            start = end
        return out

    def counts(self, topk_ids):
        return torch.bincount(topk_ids.flatten())


# -- near misses ------------------------------------------------------------------------------------------------------


class OneEarly(Cut):
    def bounds(self, ends, e):
        start, end = super().bounds(ends, e)
        return (start - 1, end - 1) if e == 2 else (start, end)


class FirstChoices(Cut):
    """Ends of what the first choices alone would be."""

    def counts(self, topk_ids):
        return torch.bincount(topk_ids[:, 0], minlength=NUM_EXPERTS)


class ChosenAtAll(Cut):
    """One for each expert that was chosen, however often."""

    def counts(self, topk_ids):
        ids = topk_ids.flatten()
        return torch.zeros(NUM_EXPERTS, dtype=torch.long).scatter(0, ids, torch.ones_like(ids))


class LastMissing(Histogram):
    """The rows of the last expert stay zeros."""

    def one(self, e, rows, start, end, out):
        if e < NUM_EXPERTS - 1:
            super().one(e, rows, start, end, out)


class PastOther(PastEqualNumbers):
    """Past experts of which the next has no tokens."""

    def is_empty(self, ends, e, start, end):
        return ends[(e + 1) % NUM_EXPERTS] == ends[(e + 1) % NUM_EXPERTS + 1]


class PastOtherTensors(PastEqual):
    def is_empty(self, ends, e, start, end):
        return ends[0] == end


class PastFew(PastEqualNumbers):
    """Past experts with a single token as well."""

    def is_empty(self, ends, e, start, end):
        return end - start <= 1


class WritesOneMore(PastEqual):
    """An expert with tokens also changes the row before its own."""

    def one(self, e, rows, start, end, out):
        super().one(e, rows, start, end, out)
        out[:1] = rows[:1]


class ReducedToLargest(Reduced):
    reduce = "amax"


class ReducedToMean(Reduced):
    reduce = "mean"


class ReducedWithoutStart(Reduced):
    """What the first expert of a token adds takes the place of what is there, and so does what the second adds."""

    def add(self, out, token, y):
        index = token.view(-1, 1).repeat(1, HIDDEN)
        return out.scatter_reduce(0, index, y, reduce="sum", include_self=False)


class ReducedPastOther(Reduced):
    def is_empty(self, ends, e, start, end):
        return ends[0] == end


class CountsVisits(CountedUpToLast):
    """How many passes there were can be seen."""

    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.view(-1).argsort()
        tokens, start, visits = order // TOP_K, 0, torch.zeros(())
        for e, n in enumerate(self.counts(topk_ids)):
            end = start + n
            token = tokens[start:end]
            out = self.add(
                out, token, self.mlps[e](x[token]) * topk_weights.view(-1, 1)[order[start:end]]
            )
            start, visits = end, visits + 1
        return out * visits


class OthersUpToLast(CountedUpToLast):
    """As many passes as the first choices of all tokens say."""

    def counts(self, topk_ids):
        return torch.bincount(topk_ids[:, 0])


class OtherPasses(CountedUpToLast):
    """Rows by the counts of all choices, but as many passes as the first choices of all tokens say."""

    def experts(self, x, topk_ids, topk_weights):
        out, order = torch.zeros_like(x), topk_ids.view(-1).argsort()
        ends = torch.bincount(topk_ids.flatten(), minlength=NUM_EXPERTS).cumsum(0).tolist()
        tokens = order // TOP_K
        for e, _ in enumerate(self.counts(topk_ids[:, 0])):
            start, end = ends[e - 1] if e else 0, ends[e]
            y = self.mlps[e](x[tokens[start:end]])
            self.add(out, tokens[start:end], y * topk_weights.view(-1, 1)[order[start:end]])
        return out


SAMPLES = (
    Sample(name="cut", build=Cut),
    Sample(name="cut_by_items", build=Items, brief=True),
    Sample(name="cut_by_list", build=Listed, brief=True),
    Sample(name="cut_one_hot", build=OneHot, brief=True),
    Sample(name="cut_histogram", build=Histogram),
    Sample(name="cut_tied", build=Tied, brief=True),
    Sample(name="cut_added", build=Added, brief=True),
    Sample(name="past_equal", build=PastEqual),
    Sample(name="past_equal_numbers", build=PastEqualNumbers),
    Sample(name="past_none_between", build=PastNoneBetween, brief=True),
    Sample(name="past_not_before", build=PastNotBefore, brief=True),
    Sample(name="reduced", build=Reduced),
    Sample(name="reduced_numbers", build=ReducedNumbers, brief=True),
    Sample(name="reduced_up_to_last", build=ReducedUpToLast),
    Sample(name="counted_up_to_last", build=CountedUpToLast, brief=True),
)
NEAR_MISSES = (
    NearMiss(name="cut_one_early", build=OneEarly, code="PROOF"),
    NearMiss(name="cut_by_first_choices", build=FirstChoices, code="PROOF"),
    NearMiss(name="cut_by_chosen_at_all", build=ChosenAtAll, code="PROOF"),
    NearMiss(name="cut_last_missing", build=LastMissing, code="EXPERT_MISSING"),
    NearMiss(name="past_other", build=PastOther, code="ASSUMPTION"),
    NearMiss(name="past_other_tensors", build=PastOtherTensors, code="ASSUMPTION"),
    NearMiss(name="past_few", build=PastFew, code="CONTROL_FLOW"),
    NearMiss(name="writes_one_more", build=WritesOneMore, code="SPELLING"),
    NearMiss(name="reduced_to_largest", build=ReducedToLargest, code="SPELLING"),
    NearMiss(name="reduced_to_mean", build=ReducedToMean, code="SPELLING"),
    NearMiss(name="reduced_without_start", build=ReducedWithoutStart, code="SPELLING"),
    NearMiss(name="reduced_past_other", build=ReducedPastOther, code="ASSUMPTION"),
    NearMiss(name="counts_visits", build=CountsVisits, code="ASSUMPTION"),
    NearMiss(name="others_up_to_last", build=OthersUpToLast, code="PROOF"),
    NearMiss(name="other_passes", build=OtherPasses, code="ASSUMPTION"),
)
