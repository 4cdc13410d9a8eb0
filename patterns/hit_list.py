"""The list of the experts that got any token at all, which a loop runs over to leave out the others.

expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()      # transformers 4.52 and later
for expert_idx in expert_hit:
    ...
"""

import torch
from moe_inductor.patterns._blocks import NUM_EXPERTS
from moe_inductor.patterns._loop_mistakes import loop_mistakes
from moe_inductor.patterns.expert_loop import Loop
from torch.nn import functional as F

from moe_inductor.match.api import HitListSpelling, NearMiss, Sample


def reference(topk_ids, num_classes, *, test):
    counts = F.one_hot(topk_ids, num_classes).sum(dim=(0, 1))
    hit = counts > 0 if test == "greater" else counts != 0 if test == "unequal" else counts
    return hit.nonzero()


class HitLoop(Loop):
    """Mixtral and its heirs, transformers 4.52 to 4.57 and the eager experts of 5.x."""

    def hits(self, mask, topk_ids):
        return torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()

    def index(self, row):
        return row[0]

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for row in self.hits(mask, topk_ids):
            e = self.index(row)
            slot, token = self.where(mask, e)
            y = self.expert(e, x[token]) * self.weight(topk_weights, token, slot)
            self.add(out, token, y)
        return out


class Squeezed(HitLoop):
    """``for e in hits`` over a list of numbers."""

    def hits(self, mask, topk_ids):
        return super().hits(mask, topk_ids).squeeze(-1)

    def index(self, row):
        return row


class Counted(Squeezed):
    """The mask the other way round, and any count other than 0."""

    def hits(self, mask, topk_ids):
        return (F.one_hot(topk_ids, NUM_EXPERTS).sum(dim=(0, 1)) != 0).nonzero().flatten()


class Counts(Squeezed):
    """nonzero of the counts themselves."""

    def hits(self, mask, topk_ids):
        return torch.nonzero(mask.sum((1, 2)), as_tuple=True)[0]


class Sentinel(HitLoop):
    """transformers 5.x under expert parallelism: one class more than experts, for tokens of other ranks."""

    def mask(self, topk_ids):
        return F.one_hot(topk_ids, num_classes=NUM_EXPERTS + 1).permute(2, 1, 0)

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for row in self.hits(mask, topk_ids):
            e = row[0]
            if e == NUM_EXPERTS:
                continue
            slot, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out


class SpareClass(HitLoop):
    """nemotron_h: one class more than experts, and no test for it, because no id is that large."""

    def mask(self, topk_ids):
        return F.one_hot(topk_ids, num_classes=NUM_EXPERTS + 1).permute(2, 1, 0)


class ColumnOfScores(HitLoop):
    """gpt_oss of transformers 4.57: gradients are off for the mask, and the index holds a row of the hit list."""

    def scores(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_ids.shape[0], NUM_EXPERTS)
        return zeros.scatter_(1, topk_ids, topk_weights)

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        out, mask = self.start(x), self.mask(topk_ids)
        for row in self.hits(mask, topk_ids)[:]:
            e = row[0]
            with torch.no_grad():
                _, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * scores[token, e, None])
        return out


class RowAsIndex(ColumnOfScores):
    """qwen3_vl_moe of transformers 4.57 in training: ``weight[row]`` is [1, in, out], and products are [1, n, out]."""

    transposed = True

    def linear(self, rows, weight, bias, row):
        y = rows @ weight[row]
        return y if bias is None else y + bias[row]

    def product(self, y):
        return y[0]

    def experts(self, x, topk_ids, topk_weights):
        scores = self.scores(topk_ids, topk_weights)
        out, mask = self.start(x), self.mask(topk_ids)
        for row in self.hits(mask, topk_ids)[:]:
            with torch.no_grad():
                _, token = self.where(mask, row[0])
            y = self.product(self.expert(row, x[token]))
            self.add(out, token, y * scores[token, row, None])
        return out


class RowAsIndexInterleaved(RowAsIndex):
    """With biases, and gate and up next to each other."""

    biased = True

    def act(self, gate_up):
        return F.gelu(gate_up[..., ::2]) * gate_up[..., 1::2]


class RowsSummedAsBatch(RowAsIndex):
    """A softmax over the rows of an expert: the dimension in front is not that of the rows."""

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.softmax(gate, dim=1) * up


class NextRowAsIndex(RowAsIndex):
    def linear(self, rows, weight, bias, row):
        return super().linear(rows, weight.flip(0), bias, row)


class RowOfOthers(RowAsIndex):
    """The expert's rows, each in the place of another."""

    def product(self, y):
        return y[0].flip(0)


class RoutedInBatches(HitLoop):
    """zaya: the router sees ``[B, T, H]``, and its ids lose the batch on the way to the experts."""

    def forward(self, x):
        topk_weights, topk_ids = self.route(self.gate(x[None]))
        k = topk_ids.shape[-1]
        return self.experts(x, topk_ids.reshape(-1, k), topk_weights.reshape(-1, k))


class ViewsItsWeights(HitLoop):
    """dbrx of transformers 5.x: every pass views the flat weights of all experts anew."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(self.gate_up_proj.detach().flatten(0, 1))

    def linear(self, rows, weight, bias, e):
        return super().linear(rows, weight.view(NUM_EXPERTS, -1, weight.shape[-1]), bias, e)


class OutOfPlace(HitLoop):
    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for row in self.hits(mask, topk_ids):
            slot, token = self.where(mask, row[0])
            y = self.expert(row[0], x[token]) * topk_weights[token, slot, None]
            out = out.index_add(0, token, y)
        return out


class SkipsEmpty(Loop):
    """All experts are visited, and left again when they have no tokens."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            if token.numel() == 0:
                continue
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out


class IfAny(Loop):
    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            if token.shape[0] > 0:
                y = self.expert(e, x[token]) * topk_weights[token, slot, None]
                self.add(out, token, y)
        return out


# -- near misses -------------------------------------------------------------------------------------------------------


class MoreThanOne(HitLoop):
    """Experts with a single token are left out."""

    def hits(self, mask, topk_ids):
        return torch.greater(mask.sum(dim=(-1, -2)), 1).nonzero()


class FirstChoices(HitLoop):
    """Experts that are nobody's first choice are left out."""

    def hits(self, mask, topk_ids):
        return torch.greater(F.one_hot(topk_ids[:, 0], NUM_EXPERTS).sum(dim=0), 0).nonzero()


class OtherChoices(HitLoop):
    """The hit list belongs to other tokens."""

    def hits(self, mask, topk_ids):
        other = F.one_hot(topk_ids.flip(-1)[:4], NUM_EXPERTS)
        return torch.greater(other.sum(dim=(0, 1)), 0).nonzero()


class Unchosen(HitLoop):
    def hits(self, mask, topk_ids):
        return (mask.sum(dim=(-1, -2)) == 0).nonzero()


class ByTokens(HitLoop):
    """Summed over the wrong dimensions: T and E happen to be distinguishable, the loop runs over slots."""

    def hits(self, mask, topk_ids):
        return torch.greater(mask.sum(dim=(0, 2)), 0).nonzero()


class Reordered(HitLoop):
    """Pass e adds another expert's rows: an expert may be left out because a different one has no tokens."""

    order = (1, 2, 3, 0)

    def index(self, row):
        return self.order[row[0]]


class AddsTheNextToo(HitLoop):
    """Two additions in one pass."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for row in self.hits(mask, topk_ids):
            for e in (0, 1, 2, 3):
                if row[0] == e and e % 2 == 0:
                    for f in (e, e + 1):
                        slot, token = self.where(mask, f)
                        y = self.expert(f, x[token]) * topk_weights[token, slot, None]
                        self.add(out, token, y)
        return out


class GuardsAnother(Loop):
    """The test is about expert 0, what it skips is expert 1."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        rows = [self.where(mask, e) for e in range(NUM_EXPERTS)]
        for e in range(NUM_EXPERTS):
            slot, token = rows[e]
            if rows[0][1].numel() == 0:
                continue
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out


class GuardsTwo(Loop):
    """Expert 3 is skipped as well when expert 2 has no tokens."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        rows = [self.where(mask, e) for e in range(NUM_EXPERTS)]
        for e in range(NUM_EXPERTS):
            if rows[e][1].numel() == 0 or rows[2][1].numel() == 0:
                continue
            slot, token = rows[e]
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
        return out


class MeanOfEmpty(HitLoop):
    """A mean over an expert's rows is NaN for an expert without any, which the model never visits."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask, level = self.start(x), self.mask(topk_ids), torch.zeros(())
        for row in self.hits(mask, topk_ids):
            slot, token = self.where(mask, row[0])
            y = self.expert(row[0], x[token])
            level = level + y.mean()
            self.add(out, token, y * topk_weights[token, slot, None])
        return out + level


class CountsVisits(HitLoop):
    """A tensor counts the passes: it would count all experts."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask, visits = self.start(x), self.mask(topk_ids), torch.zeros((), dtype=torch.int64)
        for row in self.hits(mask, topk_ids):
            slot, token = self.where(mask, row[0])
            visits.add_(1)
            self.add(out, token, self.expert(row[0], x[token]) * topk_weights[token, slot, None])
        return out, visits


class LastRows(HitLoop):
    """A tensor of the last pass is used after the loop."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask, token = self.start(x), self.mask(topk_ids), torch.zeros(1, dtype=torch.int64)
        for row in self.hits(mask, topk_ids):
            slot, token = self.where(mask, row[0])
            self.add(out, token, self.expert(row[0], x[token]) * topk_weights[token, slot, None])
        return out, token.sum()


class KeepsTheSecondSum(HitLoop):
    """After an expert was skipped the sum is another tensor than the one that was added to."""

    def experts(self, x, topk_ids, topk_weights):
        start, mask = self.start(x), self.mask(topk_ids)
        out = torch.ones_like(start)
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            y = self.expert(e, x[token]) * topk_weights[token, slot, None]
            if token.numel() > 0:
                out = (start if e == 0 else out).index_add(0, token, y)
        return out


class EveryOtherToken(HitLoop):
    """Experts that only tokens with an odd number chose are left out."""

    def hits(self, mask, topk_ids):
        return torch.greater(mask[..., ::2].sum(dim=(-1, -2)), 0).nonzero()


class Shifted(HitLoop):
    """Each expert in the place of the one before it."""

    def hits(self, mask, topk_ids):
        return (super().hits(mask, topk_ids) + 1) % NUM_EXPERTS


class Heavy(HitLoop):
    """Experts of little weight are left out."""

    def experts(self, x, topk_ids, topk_weights):
        self.weights = topk_weights
        return super().experts(x, topk_ids, topk_weights)

    def hits(self, mask, topk_ids):
        weight = (mask * self.weights.T).sum(dim=(-1, -2))
        return torch.greater(weight, 0.4).nonzero()


HIT_LIST = HitListSpelling(
    name="hit_list",
    source="transformers 4.52 to 4.57: mixtral, qwen2_moe, qwen3_moe; eager experts of 5.x",
    reference=reference,
    facts={"test": ("greater", "unequal", "none")},
    samples=(
        Sample(name="rows", build=HitLoop),
        Sample(name="numbers", build=Squeezed),
        Sample(name="counted", build=Counted),
        Sample(name="counts", build=Counts),
        Sample(name="sentinel", build=Sentinel),
        Sample(name="spare_class", build=SpareClass),
        Sample(name="column_of_scores", build=ColumnOfScores),
        Sample(name="out_of_place", build=OutOfPlace),
        Sample(name="routed_in_batches", build=RoutedInBatches, brief=True),
        Sample(name="views_its_weights", build=ViewsItsWeights, brief=True),
        Sample(name="row_as_index", build=RowAsIndex, brief=True),
        Sample(name="row_as_index_interleaved", build=RowAsIndexInterleaved, brief=True),
        Sample(name="skips_empty", build=SkipsEmpty),
        Sample(name="if_any", build=IfAny),
    ),
    near_misses=(
        NearMiss(name="more_than_one", build=MoreThanOne, code="ASSUMPTION"),
        NearMiss(name="softmax_of_rows", build=RowsSummedAsBatch, code="SPELLING"),
        NearMiss(name="row_of_other_stack", build=NextRowAsIndex, code="ASSUMPTION"),
        NearMiss(name="rows_reversed", build=RowOfOthers, code="SPELLING"),
        NearMiss(name="first_choices", build=FirstChoices, code="ASSUMPTION"),
        NearMiss(name="other_choices", build=OtherChoices, code="ASSUMPTION"),
        NearMiss(name="unchosen", build=Unchosen, code="ASSUMPTION"),
        NearMiss(name="by_tokens", build=ByTokens, code="EXPERT_MISSING"),
        NearMiss(name="reordered", build=Reordered, code="ASSUMPTION"),
        NearMiss(name="adds_the_next_too", build=AddsTheNextToo, code="ASSUMPTION"),
        NearMiss(name="guards_another", build=GuardsAnother, code="ASSUMPTION"),
        NearMiss(name="guards_two", build=GuardsTwo, code="ASSUMPTION"),
        NearMiss(name="mean_of_empty", build=MeanOfEmpty, code="ASSUMPTION"),
        NearMiss(name="counts_visits", build=CountsVisits, code="ASSUMPTION"),
        NearMiss(name="last_rows", build=LastRows, code="ASSUMPTION"),
        NearMiss(name="keeps_the_second_sum", build=KeepsTheSecondSum, code="ASSUMPTION"),
        NearMiss(name="every_other_token", build=EveryOtherToken, code="ASSUMPTION"),
        NearMiss(name="shifted", build=Shifted, code="ASSUMPTION"),
        NearMiss(name="heavy", build=Heavy, code="ASSUMPTION"),
        *loop_mistakes(
            HitLoop,
            given_to_others="SPELLING",
            written_over="SPELLING",
            halved_each_pass="ASSUMPTION",
            weight_of_other_slot="SPELLING",
            weight_of_other_token="SPELLING",
            normalised_by_expert="SPELLING",
        ),
    ),
)
