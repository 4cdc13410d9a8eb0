"""A Python loop over all experts: select an expert's tokens, run them, add the weighted result at their rows.

    for e in range(num_experts):
        slot, token = torch.where(expert_mask[e])
        y = expert[e](x[token]) * topk_weights[token, slot, None]
        out.index_add_(0, token, y)

The most common eager spelling: Mixtral and Qwen of transformers up to 4.51, OLMoE of 4.57, DeepSeek-V3 of 4.5x.
"""

import torch
from moe_inductor.patterns import (
    _blocks,
    _buffers,
    _compared_ids,
    _identities,
    _limited_rows,
    _mask_loops,
    _own_scores,
)
from moe_inductor.patterns._blocks import HIDDEN, INTERMEDIATE, NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import ExpertsSpelling, NearMiss, Sample


def reference(x, topk_ids, topk_weights, experts, *, mask, sum_in, weight_on):
    dtype = torch.float32 if sum_in == "float32" else x.dtype
    if sum_in == "weights" and weight_on != "nothing":
        dtype = topk_weights.dtype
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for e, expert in experts:
        # In the normal form a row of a one-hot mask is this comparison.
        hit = topk_ids == e
        if mask == "slots first":
            slot, token = torch.where(hit.T)
        else:
            token, slot = torch.where(hit)
        rows = x[token]
        if weight_on == "input":
            rows = (rows * topk_weights[token, slot, None]).to(x.dtype)
        y = expert(rows)
        if weight_on == "output":
            y = y * topk_weights[token, slot, None]
        out = out.index_add(0, token, y.to(dtype))
    return out


class Loop(_blocks.Block):
    """As transformers writes it; every method is one place to go wrong."""

    visited = range(NUM_EXPERTS)

    def mask(self, topk_ids):
        return F.one_hot(topk_ids, num_classes=NUM_EXPERTS).permute(2, 1, 0)

    def where(self, mask, e):
        return torch.where(mask[e])

    def linear(self, rows, weight, bias, e):
        if not self.transposed:
            return F.linear(rows, weight[e], None if bias is None else bias[e])
        return rows @ weight[e] if bias is None else rows @ weight[e] + bias[e]

    def expert(self, e, rows):
        hidden = self.act(self.linear(rows, self.gate_up_proj, self.gate_up_bias, e))
        return self.linear(hidden, self.down_proj, self.down_bias, e)

    def start(self, x):
        return torch.zeros_like(x)

    def weight(self, topk_weights, token, slot):
        return topk_weights[token, slot, None]

    def add(self, out, token, y):
        out.index_add_(0, token, y.to(out.dtype))

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in self.visited:
            slot, token = self.where(mask, e)
            rows = x[None, token].reshape(-1, HIDDEN)
            weights = self.weight(topk_weights, token, slot)
            if self.weight_on_input:
                self.add(out, token, self.expert(e, rows * weights))
            else:
                self.add(out, token, self.expert(e, rows) * weights)
        return out


class TokensFirst(Loop):
    """DeepSeek-V3 of transformers 4.5x: the mask the other way round, and the sum in the dtype of the weights, fp32."""

    def route(self, logits):
        return super().route(logits.float() if logits.dtype != torch.float64 else logits)

    def mask(self, topk_ids):
        return F.one_hot(topk_ids, num_classes=NUM_EXPERTS).permute(2, 0, 1)

    def experts(self, x, topk_ids, topk_weights):
        out, mask = torch.zeros_like(x, dtype=topk_weights.dtype), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            token, slot = torch.where(mask[e])
            y = self.expert(e, x[token]) * topk_weights[token, slot].unsqueeze(-1)
            out.index_add_(0, token, y)
        return out.type(x.dtype)


class Compare(Loop):
    """``torch.where(topk_ids == e)`` instead of a one-hot mask, and out-of-place sums."""

    def experts(self, x, topk_ids, topk_weights):
        out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for e in range(NUM_EXPERTS):
            token, slot = torch.where(topk_ids == e)
            out = out.index_add(
                0, token, self.expert(e, x[token]) * topk_weights[token, slot, None]
            )
        return out


class AllAlike(Compare):
    """Hash layers and BASE layers: one expert for each token, which weighs one."""

    k = 1

    def route(self, logits):
        topk_ids = logits.topk(1, dim=-1)[1]
        return torch.ones(len(logits), 1, dtype=logits.dtype), topk_ids


class InModules(Loop):
    """Experts in a ModuleList, each with its own three weights."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def expert(self, e, rows):
        return self.mlps[e](rows)


class HiddenScored(InModules):
    """DeepSeek-V3.2's own code: an expert is given its routing weights, and scales what its last projection reads."""

    def __init__(self):
        super().__init__()
        self.bias = None

    def experts(self, x, topk_ids, topk_weights):
        out = self.start(x)
        for e in self.visited:
            token, slot = torch.where(topk_ids == e)
            out[token] += self.scored(self.mlps[e], x[token], topk_weights[token, slot, None])
        return out

    def scored(self, mlp, rows, weights):
        hidden = F.silu(mlp.w1(rows).float()) * mlp.w3(rows).float()
        return F.linear((weights * hidden).to(rows.dtype), mlp.w2.weight, self.bias)


class HiddenScoredWithBias(HiddenScored):
    """The bias of the last projection is not scaled."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HIDDEN))


class FirstModules(InModules):
    """Tokens of an expert that is never visited add nothing; its router chooses among one more than are fused."""

    visited = range(NUM_EXPERTS - 1)


class InDict(Loop):
    """Experts in a ModuleDict, plain with biases: nllb_moe, switch_transformers."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleDict({f"expert_{e}": _blocks.Plain() for e in range(NUM_EXPERTS)})

    def expert(self, e, rows):
        return self.mlps[f"expert_{e}"](rows)


class Flat(Loop):
    """All experts in one ``[E * I, H]`` weight per projection; the last one is used untransposed: dbrx."""

    def __init__(self):
        super().__init__()
        self.w1, self.v1, self.w2 = (
            nn.Parameter(torch.randn(NUM_EXPERTS * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5)
            for _ in range(3)
        )

    def expert(self, e, rows):
        w1, v1, w2 = (
            w.view(NUM_EXPERTS, INTERMEDIATE, HIDDEN).chunk(NUM_EXPERTS, dim=0)[e].squeeze(0)
            for w in (self.w1, self.v1, self.w2)
        )
        return (F.silu(rows @ w1.t()) * (rows @ v1.t())) @ w2


class Scattered(Loop):
    """gpt_oss and qwen3_vl_moe of transformers 4.57: ``[T, E]`` scores instead of ``[T, k]`` weights."""

    biased = True

    def experts(self, x, topk_ids, topk_weights):
        scores = torch.zeros(
            x.shape[0], NUM_EXPERTS, dtype=topk_weights.dtype, device=x.device
        ).scatter_(1, topk_ids, topk_weights)
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            _, token = self.where(mask, e)
            y = self.expert(e, x[token]) * scores[token, self.column(e), None]
            self.add(out, token, y)
        return out

    def column(self, e):
        return e


class ChoosesTwice(Loop):
    """phimoe in training: what comes last of all choices in its router weights the experts, and chooses none."""

    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        with torch.no_grad():
            best = logits.max(dim=-1, keepdim=True).indices
            bonus = torch.where(topk_ids == best, 1.0, 0.7)
        return Estimated.apply(topk_weights, bonus.to(topk_weights.dtype)), topk_ids


class ComparesScores(Loop):
    """phimoe in inference mode: a threshold without gradients, after the choice, that only the router reads."""

    def route(self, logits):
        with torch.no_grad():
            best, topk_ids = torch.topk(logits, self.k, dim=-1)
            far = (best[:, :1] - logits) / logits.abs().clamp(min=1.0) > 1.0
        scores = F.softmax(logits.masked_fill(far, -8.0), dim=-1)
        return scores.gather(-1, topk_ids), topk_ids


class Estimated(torch.autograd.Function):
    """A router's own idea of its gradient."""

    @staticmethod
    def forward(ctx, topk_weights, bonus):
        ctx.save_for_backward(bonus)
        return topk_weights * bonus

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


class OtherColumn(Scattered):
    """The score of another expert."""

    def column(self, e):
        return NUM_EXPERTS - 1 - e


class SumInFloat(Loop):
    """inkling2, openai_privacy_filter: the sum in fp32 whatever the model's dtype is."""

    def start(self, x):
        return torch.zeros_like(x, dtype=torch.float32)

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids, topk_weights).to(x.dtype)


class TopOne(Loop):
    k = 1


class AuxiliaryLoss(Loop):
    """Logits, ids and the mask are read outside; everything but the experts stays as it is."""

    def forward(self, x):
        logits = self.gate(x)
        topk_weights, topk_ids = self.route(logits)
        load = self.mask(topk_ids).float().mean(dim=(1, 2))
        balance = (load * logits.softmax(-1).mean(0)).sum()
        return self.experts(x, topk_ids, topk_weights), balance, topk_ids


class OneAlpha(Loop):
    """The constants of one expert's activation are not the others'."""

    def expert(self, e, rows):
        gate, up = self.linear(rows, self.gate_up_proj, None, e).chunk(2, dim=-1)
        alpha = 1.702 if e != 2 else 1.7
        return self.linear(gate * torch.sigmoid(gate * alpha) * up, self.down_proj, None, e)


class OneInterleaved(Loop):
    def expert(self, e, rows):
        both = self.linear(rows, self.gate_up_proj, None, e)
        gate, up = both.chunk(2, dim=-1) if e else (both[:, ::2], both[:, 1::2])
        return self.linear(F.silu(gate) * up, self.down_proj, None, e)


class OneUpFirst(Loop):
    def expert(self, e, rows):
        gate, up = self.linear(rows, self.gate_up_proj, None, e).chunk(2, dim=-1)
        hidden = F.silu(gate) * up if e != 1 else F.silu(up) * gate
        return self.linear(hidden, self.down_proj, None, e)


class Biased(Loop):
    biased = True


class BiasOfNext(Biased):
    def linear(self, rows, weight, bias, e):
        return F.linear(rows, weight[e], bias[(e + 1) % NUM_EXPERTS])


class OneWithoutBias(Biased):
    def linear(self, rows, weight, bias, e):
        return F.linear(rows, weight[e], bias[e] if e != 1 else None)


class OneBiasForAll(Biased):
    def linear(self, rows, weight, bias, e):
        return F.linear(rows, weight[e], bias[0])


class BiasNotWeighted(Biased):
    """The bias of the second projection is added after the routing weight."""

    def add(self, out, token, y):
        super().add(out, token, y + self.down_bias[0])


class ScaledBias(Biased):
    def linear(self, rows, weight, bias, e):
        return torch.addmm(bias[e], rows, weight[e].t(), beta=0.5)


class OneUnderAutocast(Loop):
    def expert(self, e, rows):
        if e != 3:
            return super().expert(e, rows)
        with torch.autocast("cpu", torch.bfloat16):
            return super().expert(e, rows)


class WeightTwice(Loop):
    """On the input and on the output."""

    weight_on_input = True

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            weights = topk_weights[token, slot, None]
            self.add(out, token, self.expert(e, x[token] * weights) * weights)
        return out


class PostNorm(Loop):
    """muse_spark: a norm between the expert and its routing weight."""

    def expert(self, e, rows):
        return F.rms_norm(super().expert(e, rows), (HIDDEN,))


class ComputesInDouble(Loop):
    """openai_privacy_filter: what is stored in one dtype is cast to a wider one for the products."""

    def linear(self, rows, weight, bias, e):
        return F.linear(rows.double(), weight[e].double())

    def expert(self, e, rows):
        return super().expert(e, rows).to(rows.dtype)


class OneGelu(InModules):
    def __init__(self):
        super().__init__()
        self.mlps[2] = _blocks.MLP(F.gelu)


class Missing(Loop):
    visited = range(NUM_EXPERTS - 1)


class Twice(Loop):
    visited = (*range(NUM_EXPERTS), 1)


class OtherWeights(Loop):
    def expert(self, e, rows):
        return super().expert(NUM_EXPERTS - 1 - e, rows)


class OtherDown(Loop):
    def expert(self, e, rows):
        return F.linear(
            self.act(F.linear(rows, self.gate_up_proj[e])), self.down_proj[(e + 1) % NUM_EXPERTS]
        )


class StartsFromX(Loop):
    def start(self, x):
        return x.clone()


class StartsFromOnes(Loop):
    def start(self, x):
        return torch.ones_like(x)


class StartsFromShared(Loop):
    """Experts are added to what a shared expert gave, in place."""

    def __init__(self):
        super().__init__()
        self.shared = _blocks.MLP()

    def start(self, x):
        return self.shared(x)


class SharedByAnotherName(StartsFromShared):
    """The sum is read under the name that it had before the loop, in another shape."""

    def experts(self, x, topk_ids, topk_weights):
        self.given = self.shared(x).view(1, -1, HIDDEN)
        super().experts(x, topk_ids, topk_weights)
        return (self.given * 2.0)[0]

    def start(self, x):
        return self.given.view(-1, HIDDEN)


class AddedToShared(StartsFromShared):
    """The same from value to value."""

    def experts(self, x, topk_ids, topk_weights):
        out = self.start(x)
        for e in self.visited:
            token, slot = torch.where(topk_ids == e)
            y = self.expert(e, x[token]) * topk_weights[token, slot, None]
            out = out.index_add(0, token, y)
        return out


class ReadBefore(StartsFromShared):
    """What the sum starts from is read before."""

    def experts(self, x, topk_ids, topk_weights):
        self.given = self.shared(x) * 1.0
        loss = self.given.mean()
        return super().experts(x, topk_ids, topk_weights) + loss

    def start(self, x):
        return self.given


class ReadBetween(StartsFromShared):
    """The sum of the shared expert and two others is read as well."""

    def add(self, out, token, y):
        super().add(out, token, y)
        self.sums.append(out.sum())

    def experts(self, x, topk_ids, topk_weights):
        self.sums = []
        return super().experts(x, topk_ids, topk_weights) + self.sums[1]


class ReadsItsBase(StartsFromShared):
    """Experts read the rows that they are added to."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in self.visited:
            slot, token = self.where(mask, e)
            rows = out[token]
            out.index_add_(0, token, self.expert(e, rows) * topk_weights[token, slot, None])
        return out


class ScaledBetween(StartsFromShared):
    """What was there counts less after each expert."""

    def add(self, out, token, y):
        super().add(out, token, y)
        out.mul_(0.5)


class KnownTwice(StartsFromShared):
    """Experts are added to a tensor under one name, and read it under another."""

    def experts(self, x, topk_ids, topk_weights):
        given = self.shared(x)
        one, other = given[:], given.view(-1, HIDDEN)
        mask = self.mask(topk_ids)
        for e in self.visited:
            slot, token = self.where(mask, e)
            y = self.expert(e, other[token]) * topk_weights[token, slot, None]
            self.add(one, token, y)
        return one


class AddsTwice(Loop):
    def add(self, out, token, y):
        out.index_add_(0, token, y, alpha=2)


class AddsBias(Loop):
    def add(self, out, token, y):
        super().add(out, token, y)
        out.add_(0.5)


class NoGradExpert(Loop):
    def expert(self, e, rows):
        with torch.no_grad():
            return super().expert(e, rows)


class NoGradWeights(Loop):
    """The weights are viewed where gradients are off, and so have none."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            with torch.no_grad():
                weights = topk_weights.reshape(-1).view(topk_ids.shape)
            self.add(out, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class NoGradScores(Scattered):
    def experts(self, x, topk_ids, topk_weights):
        scatter = torch.zeros(x.shape[0], NUM_EXPERTS, dtype=x.dtype)
        with torch.no_grad():
            scores = scatter.scatter(1, topk_ids, topk_weights)
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            _, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * scores[token, e, None])
        return out


class NoGradLastExpert(Loop):
    """The pass is the same code as the others, and its weights have no gradient."""

    def linear(self, rows, weight, bias, e):
        if e == NUM_EXPERTS - 1:
            with torch.no_grad():
                weight = weight.clone()
        else:
            weight = weight.clone()
        return super().linear(rows, weight, bias, e)


class Detached(Loop):
    def expert(self, e, rows):
        return super().expert(e, rows).detach()


class ChangesInput(Loop):
    def experts(self, x, topk_ids, topk_weights):
        x = x.clone()
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
            x.mul_(0.9)
        return out


class HiddenEscapes(Loop):
    def experts(self, x, topk_ids, topk_weights):
        out, mask, norm = self.start(x), self.mask(topk_ids), 0.0
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            y = self.expert(e, x[token])
            norm = norm + y.square().sum()
            self.add(out, token, y * topk_weights[token, slot, None])
        return out + norm


class PartialSumEscapes(Loop):
    def experts(self, x, topk_ids, topk_weights):
        out, mask, norm = self.start(x), self.mask(topk_ids), 0.0
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
            norm = norm + out.sum()
        return out + norm


class OtherRows(Loop):
    """Tokens of one router choice, weights of another."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask = self.start(x), self.mask(topk_ids)
        for e in range(NUM_EXPERTS):
            slot, token = self.where(mask, e)
            rows = x.flip(0)[token] if e == 1 else x[token]
            self.add(out, token, self.expert(e, rows) * topk_weights[token, slot, None])
        return out


class WeightSquared(Loop):
    def add(self, out, token, y):
        out.index_add_(0, token, y * y)


class MeanOverTokens(Loop):
    """What an expert gives is divided by the number of its tokens, which depends on data."""

    def expert(self, e, rows):
        return super().expert(e, rows) / rows.shape[0]


class WrongSlots(Loop):
    """The mask is not permuted to (slot, token) as the loop reads it: two axes of equal size hide the mistake."""

    k = NUM_EXPERTS

    def mask(self, topk_ids):
        return F.one_hot(topk_ids, num_classes=NUM_EXPERTS).permute(1, 2, 0)


EXPERT_LOOP = ExpertsSpelling(
    name="expert_loop",
    source="transformers 4.36 to 4.57: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v3",
    reference=reference,
    anchor="aten::nonzero",
    facts={
        "mask": ("slots first", "tokens first"),
        "sum_in": ("x", "weights", "float32"),
        "weight_on": ("output", "input", "nothing"),
    },
    loop=True,
    samples=(
        Sample(name="stacked", build=Loop),
        Sample(name="tokens_first", build=TokensFirst),
        Sample(name="compare", build=Compare),
        Sample(name="module_list", build=InModules),
        Sample(name="hidden_scored", build=HiddenScored, brief=True),
        Sample(name="first_modules", build=FirstModules),
        Sample(name="module_dict", build=InDict),
        Sample(name="flat", build=Flat),
        Sample(name="scattered", build=Scattered),
        Sample(name="sum_in_float", build=SumInFloat, dtypes=(torch.bfloat16,)),
        Sample(name="all_alike", build=AllAlike),
        Sample(name="chooses_twice", build=ChoosesTwice, brief=True),
        Sample(name="compares_scores", build=ComparesScores, brief=True),
        Sample(name="no_grad_weights", build=NoGradWeights, brief=True),
        Sample(name="top_one", build=TopOne),
        Sample(name="auxiliary_loss", build=AuxiliaryLoss),
        Sample(name="starts_from_shared", build=StartsFromShared),
        Sample(name="starts_from_x", build=StartsFromX, brief=True),
        Sample(name="starts_from_ones", build=StartsFromOnes, brief=True),
        Sample(name="shared_by_another_name", build=SharedByAnotherName, brief=True),
        Sample(name="added_to_shared", build=AddedToShared, brief=True),
        Sample(name="read_before", build=ReadBefore, brief=True),
        *_mask_loops.SAMPLES,
        *_buffers.SAMPLES,
        *_limited_rows.SAMPLES,
        *_compared_ids.SAMPLES,
        *_own_scores.SAMPLES,
        *_identities.SAMPLES,
        *(Sample(name=name, build=block, brief=True) for name, block in _blocks.variants(Loop)),
    ),
    near_misses=(
        *(NearMiss(name=n, build=b, code=c) for n, b, c in _blocks.near_variants(Loop)),
        *_mask_loops.NEAR_MISSES,
        *_buffers.NEAR_MISSES,
        *_limited_rows.NEAR_MISSES,
        *_compared_ids.NEAR_MISSES,
        *_own_scores.NEAR_MISSES,
        *_identities.NEAR_MISSES,
        NearMiss(name="computes_in_double", build=ComputesInDouble, code="DTYPE"),
        NearMiss(name="one_expert_gelu", build=OneGelu, code="ACTIVATION"),
        NearMiss(name="one_expert_alpha", build=OneAlpha, code="ACTIVATION"),
        NearMiss(name="one_expert_up_first", build=OneUpFirst, code="ACTIVATION"),
        NearMiss(name="one_expert_interleaved", build=OneInterleaved, code="ACTIVATION"),
        NearMiss(name="bias_of_next_expert", build=BiasOfNext, code="EXPERT_WEIGHTS"),
        NearMiss(name="one_expert_without_bias", build=OneWithoutBias, code="EXPERT_SHAPES"),
        NearMiss(name="one_bias_for_all", build=OneBiasForAll, code="EXPERT_WEIGHTS"),
        NearMiss(name="bias_not_weighted", build=BiasNotWeighted, code="SPELLING"),
        NearMiss(name="scaled_bias", build=ScaledBias, code="SPELLING"),
        NearMiss(name="one_expert_under_autocast", build=OneUnderAutocast, code="SPELLING"),
        NearMiss(name="score_of_other_expert", build=OtherColumn, code="SPELLING"),
        NearMiss(name="weight_twice", build=WeightTwice, code="SPELLING"),
        NearMiss(name="norm_after_expert", build=PostNorm, code="SPELLING"),
        NearMiss(name="hidden_scored_with_bias", build=HiddenScoredWithBias, code="SPELLING"),
        NearMiss(name="expert_missing", build=Missing, code="EXPERT_MISSING"),
        NearMiss(name="expert_twice", build=Twice, code="EXPERT_TWICE"),
        NearMiss(name="weights_permuted", build=OtherWeights, code="EXPERT_WEIGHTS"),
        NearMiss(name="down_of_next_expert", build=OtherDown, code="EXPERT_WEIGHTS"),
        NearMiss(name="read_between", build=ReadBetween, code="ESCAPES"),
        NearMiss(name="reads_its_base", build=ReadsItsBase, code="INPUTS_DIFFER"),
        NearMiss(name="scaled_between", build=ScaledBetween, code="ACCUMULATOR"),
        NearMiss(name="known_twice", build=KnownTwice, code="ACCUMULATOR"),
        NearMiss(name="adds_a_constant", build=AddsBias, code="ACCUMULATOR"),
        NearMiss(name="index_add_alpha", build=AddsTwice, code="SPELLING"),
        NearMiss(name="no_grad_inside", build=NoGradExpert, code="GRAD_STATE"),
        NearMiss(name="no_grad_scores", build=NoGradScores, code="ROUTER"),
        NearMiss(name="no_grad_last_expert", build=NoGradLastExpert, code="GRAD_STATE"),
        NearMiss(name="detached", build=Detached, code="SPELLING"),
        NearMiss(name="input_changed_in_loop", build=ChangesInput, code="MUTATION"),
        NearMiss(name="expert_output_escapes", build=HiddenEscapes, code="ESCAPES"),
        NearMiss(name="partial_sum_escapes", build=PartialSumEscapes, code="ESCAPES"),
        NearMiss(name="other_rows_for_one_expert", build=OtherRows, code="INPUTS_DIFFER"),
        NearMiss(name="weights_squared", build=WeightSquared, code="SPELLING"),
        NearMiss(name="mean_over_tokens", build=MeanOverTokens, code="SPELLING"),
        NearMiss(name="mask_axes_exchanged", build=WrongSlots, code="SPELLING"),
    ),
)
