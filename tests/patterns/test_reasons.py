"""What a refusal says, where the code alone would not help the author of a model."""

from __future__ import annotations

import pytest
import torch
from moe_inductor.patterns import (
    _blocks,
    _grouped_mm,
    _mask_loops,
    _own_scores,
    capacity_slots,
    dense_experts,
    expert_loop,
    hf_batched_mm,
    sorted_experts,
)
from moe_inductor.patterns._blocks import HIDDEN, NUM_EXPERTS
from torch.nn import functional as F

T = 11


class WrittenNorm(expert_loop.Loop):
    """muse_spark: a norm between the experts and their routing weights, as its authors write norms."""

    def expert(self, e, rows):
        y = super().expert(e, rows)
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_norm_after_the_experts_is_named(rewritten):
    compiled = rewritten(WrittenNorm())
    compiled(torch.randn(T, 32))
    (block,) = compiled.blocks[:1]
    assert "a norm stands between the experts and the sum over them" in block.reason.message
    assert block.reason.location.startswith("test_reasons.py:")


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm", "projected"])
def test_a_norm_after_experts_without_a_loop_is_named(rewritten, name):
    block = {
        "grouped_mm": _grouped_mm.PostNorm,
        "batched_mm": hf_batched_mm.PostNorm,
        "projected": MuseSpark,
    }[name]
    compiled = rewritten(block().bfloat16())
    compiled(torch.randn(T, 32, dtype=torch.bfloat16))
    (found,) = compiled.blocks
    assert "a norm stands between the experts and the sum over them" in found.reason.message
    assert "mean" in found.reason.message or "rms_norm" in found.reason.message
    assert found.reason.location.startswith(("hf_batched_mm.py:", "_grouped_mm.py:"))


class MuseSpark(_grouped_mm.PostNorm):
    """The rows are projected once more after the sum."""

    def __init__(self):
        super().__init__()
        self.post = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        return self.post(super().forward(x))


class NoNorm(hf_batched_mm.Batched):
    """Another mistake, in front of a norm that follows the block."""

    def act(self, gate_up):
        return F.mish(super().act(gate_up))

    def forward(self, x):
        return F.rms_norm(super().forward(x), (HIDDEN,))


def test_a_norm_after_the_sum_is_not_blamed(rewritten):
    compiled = rewritten(NoNorm())
    compiled(torch.randn(T, 32))
    (found,) = compiled.blocks
    assert not found.fused
    assert "a norm" not in found.reason.message


class DenseAboveTheKth(_blocks.Block):
    """All experts for all tokens, of which the scores below the k-th largest are zero."""

    def scores(self, logits):
        least = torch.topk(logits, self.k, dim=-1)[0][:, -1].unsqueeze(-1)
        return F.softmax(torch.where(logits < least, float("-inf"), logits), dim=-1)

    def forward(self, x):
        scores = self.scores(self.gate(x))
        hidden = self.act(torch.einsum("th,eih->eti", x, self.gate_up_proj))
        y = torch.einsum("eti,ehi->eth", hidden, self.down_proj)
        return torch.einsum("eth,te->th", y, scores)


class AtLeastTheKth(DenseAboveTheKth):
    def scores(self, logits):
        scores = F.softmax(logits, dim=-1)
        return scores * (scores >= scores.topk(self.k, dim=-1).values.amin(-1, keepdim=True))


@pytest.mark.parametrize("block", [_mask_loops.AboveTheKth, DenseAboveTheKth, AtLeastTheKth])
def test_a_threshold_that_ties_can_reach_is_named(rewritten, block):
    compiled = rewritten(block())
    compiled(torch.randn(T, 32))
    assert all(
        "where scores tie, a token has more than k experts" in found.reason.message
        for found in compiled.blocks
    )
    assert compiled.blocks


class Chosen(_blocks.Block):
    """Expert choice: every expert takes the tokens that score best."""

    def rows(self, x, tokens):
        return x[tokens]

    def put_back(self, x, tokens, y):
        return torch.zeros_like(x).index_add(0, tokens.reshape(-1), y.reshape(-1, HIDDEN))

    def forward(self, x):
        weights, tokens = torch.topk(F.softmax(self.gate(x), dim=-1).T, 4, dim=-1)
        hidden = self.act(torch.bmm(self.rows(x, tokens), self.gate_up_proj.transpose(1, 2)))
        y = torch.bmm(hidden, self.down_proj.transpose(1, 2)) * weights[..., None]
        return self.put_back(x, tokens, y)


class ChosenByMasks(Chosen):
    def rows(self, x, tokens):
        return torch.einsum("ect,th->ech", F.one_hot(tokens, x.shape[0]).to(x.dtype), x)

    def put_back(self, x, tokens, y):
        return torch.einsum("ect,ech->th", F.one_hot(tokens, x.shape[0]).to(x.dtype), y)


class ChosenInALoop(_blocks.Block):
    def forward(self, x):
        weights, tokens = torch.topk(F.softmax(self.gate(x), dim=-1), 4, dim=0)
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            hidden = self.act(F.linear(x[tokens[:, e]], self.gate_up_proj[e]))
            y = F.linear(hidden, self.down_proj[e])
            out.index_add_(0, tokens[:, e], y * weights[:, e, None])
        return out


class ChosenInModules(ChosenByMasks):
    def __init__(self):
        super().__init__()
        self.mlps = torch.nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def forward(self, x):
        weights, tokens = torch.topk(F.softmax(self.gate(x), dim=-1).T, 4, dim=-1)
        rows = self.rows(x, tokens)
        y = torch.stack([mlp(rows[e]) for e, mlp in enumerate(self.mlps)])
        return self.put_back(x, tokens, y * weights[..., None])


@pytest.mark.parametrize("block", [Chosen, ChosenByMasks, ChosenInALoop, ChosenInModules])
def test_experts_that_choose_tokens_are_named(rewritten, block):
    compiled = rewritten(block())
    x = torch.randn(T, 32)
    assert torch.equal(compiled(x), compiled.run(x))
    (found,) = compiled.blocks
    assert "experts choose their tokens" in found.reason.message
    assert found.reason.location.startswith("test_reasons.py:")


class AboveAHalf(expert_loop.Loop):
    """Every expert that scores above a half."""

    def kept(self, logits):
        scores = logits.sigmoid()
        return scores, scores > 0.5

    def forward(self, x):
        scores, kept = self.kept(self.gate(x))
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            (token,) = torch.where(kept[:, e])
            out.index_add_(0, token, self.expert(e, x[token]) * scores[token, e, None])
        return out


class Positive(AboveAHalf):
    """ReMoE: scores are rectified, and the experts run whose scores are left."""

    def forward(self, x):
        scores = F.relu(self.gate(x))
        out = torch.zeros_like(x)
        for e in range(NUM_EXPERTS):
            (token,) = torch.where(scores[:, e] > 0)
            out.index_add_(0, token, self.expert(e, x[token]) * scores[token, e, None])
        return out


class TopP(AboveAHalf):
    def kept(self, logits):
        scores = F.softmax(logits, dim=-1)
        best, order = scores.sort(dim=-1, descending=True)
        kept = best.cumsum(-1) - best < 0.5
        return scores, torch.zeros_like(kept).scatter(1, order, kept)


@pytest.mark.parametrize("block", [AboveAHalf, Positive, TopP])
def test_a_threshold_is_named(rewritten, block):
    module = block()
    compiled = rewritten(module)
    x = torch.randn(T, 32)
    torch.testing.assert_close(compiled(x), module(x))
    told = [found.reason.message for found in compiled.blocks]
    assert told
    assert all("a token may have any number of experts" in words for words in told)
    assert all(("top-p" in words) == (block is TopP) for words in told)


class AboveAHalfBesideOthers(AboveAHalf):
    """A block of the usual kind behind it, in the same graph."""

    def __init__(self):
        super().__init__()
        self.usual = hf_batched_mm.Batched()

    def forward(self, x):
        return self.usual(super().forward(x))


def test_a_threshold_is_named_beside_others(rewritten):
    compiled = rewritten(AboveAHalfBesideOthers())
    compiled(torch.randn(T, 32))
    (other, usual) = compiled.blocks
    assert "comparing scores with a threshold" in other.reason.message
    assert usual.fused, "what it reads was written to before it, by others"


class Exits(torch.nn.Module):
    """Tokens that are not sure go on: one product of rows above a threshold chooses no experts."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(32, 1), torch.nn.Linear(32, 32)

    def forward(self, x):
        (token,) = torch.where(self.gate(x)[:, 0] > 0)
        return x.index_add(0, token, self.up(x[token]))


class Boxes(torch.nn.Module):
    """A detector: for each class the boxes that score, and nothing is multiplied with them."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(32, 4), torch.nn.Linear(32, 32)

    def forward(self, x):
        scores, boxes = self.gate(x), self.up(x)
        return [boxes[torch.where(scores[:, c] > 0)[0]] for c in range(4)]


class BothWays(torch.nn.Module):
    """Attention in two directions: one product of scores after the other."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(32, 32)

    def forward(self, x):
        scores = x @ self.up(x).T
        return scores.softmax(-1) @ (scores.T.softmax(-1) @ self.up(x))


@pytest.mark.parametrize("module", [Exits, Boxes, BothWays])
def test_no_experts_are_seen_where_there_are_none(rewritten, module):
    compiled = rewritten(module())
    compiled(torch.randn(T, 32))
    assert not compiled.blocks


class SoftMoE(_blocks.Block):
    """Two slots for each expert; tokens are normalised for slots, and slots for tokens."""

    def __init__(self):
        super().__init__()
        self.slots = torch.nn.Parameter(torch.randn(HIDDEN, NUM_EXPERTS, 2))

    def run(self, rows):
        hidden = self.act(torch.einsum("esh,eih->esi", rows, self.gate_up_proj))
        return torch.einsum("esi,ehi->esh", hidden, self.down_proj)

    def forward(self, x):
        scores = torch.einsum("th,hes->tes", x, self.slots)
        dispatch, combine = scores.softmax(0), scores.flatten(1).softmax(-1).view_as(scores)
        y = self.run(torch.einsum("th,tes->esh", x, dispatch))
        return torch.einsum("esh,tes->th", y, combine)


class SoftMoEInModules(SoftMoE):
    def __init__(self):
        super().__init__()
        self.mlps = torch.nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def run(self, rows):
        return torch.stack([mlp(rows[e]) for e, mlp in enumerate(self.mlps)])


@pytest.mark.parametrize("block", [SoftMoE, SoftMoEInModules])
def test_soft_moe_is_named(rewritten, block):
    compiled = rewritten(block())
    compiled(torch.randn(T, 32))
    (found,) = compiled.blocks
    assert "soft MoE" in found.reason.message
    assert found.reason.location.startswith("test_reasons.py:")


class ChosenBesideOthers(Chosen):
    """A block of the usual kind in the same graph."""

    def __init__(self):
        super().__init__()
        self.usual = hf_batched_mm.Batched()

    def forward(self, x):
        return super().forward(self.usual(x))


def test_experts_that_choose_tokens_are_named_beside_others(rewritten):
    compiled = rewritten(ChosenBesideOthers())
    compiled(torch.randn(T, 32))
    fused = [block for block in compiled.blocks if block.fused]
    (other,) = (block for block in compiled.blocks if not block.fused)
    assert len(fused) == 1
    assert "experts choose their tokens" in other.reason.message


class Sampler(torch.nn.Module):
    """What language models do with the logits of the last token."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(32, 100)

    def forward(self, x):
        logits = self.head(x)
        least = torch.topk(logits, 5).values[..., -1, None]
        return F.softmax(torch.where(logits < least, float("-inf"), logits), dim=-1)


def test_a_sampler_is_no_block(rewritten):
    compiled = rewritten(Sampler())
    compiled(torch.randn(T, 32))
    assert not compiled.blocks


class LongestTokens(torch.nn.Module):
    """A top-k over tokens that chooses no experts."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(32, 32)

    def forward(self, x):
        best = torch.topk(x.square().sum(-1), 4).indices
        return self.up(x[best])


def test_a_top_k_over_tokens_without_experts_is_no_block(rewritten):
    compiled = rewritten(LongestTokens())
    compiled(torch.randn(T, 32))
    assert not compiled.blocks


def test_a_router_that_is_an_input_is_named(rewritten):
    compiled = rewritten(expert_loop.ChoosesTwice())
    compiled(torch.randn(T, 32, requires_grad=True))
    (block,) = compiled.blocks
    assert block.fused
    assert not block.router_fused
    assert "()" not in block.router_reason.message


def test_tokens_that_masks_send_to_slots_are_named(rewritten):
    compiled = rewritten(capacity_slots.Scaled())
    compiled(torch.randn(T, 32))
    (found,) = compiled.blocks
    assert "tokens are sent to slots of the experts by products with masks" in found.reason.message
    assert found.reason.location.startswith("capacity_slots.py:")


def test_a_dense_block_has_no_slots(rewritten):
    compiled = rewritten(dense_experts.EinsumUnweighted())
    compiled(torch.randn(T, 32))
    assert all("slots" not in found.reason.message for found in compiled.blocks)


class Counts(expert_loop.Loop):
    """The passes are counted, in Python."""

    def experts(self, x, topk_ids, topk_weights):
        out, mask, passes = self.start(x), self.mask(topk_ids), 0
        for e in mask.sum(dim=(1, 2)).nonzero().squeeze(-1):
            slot, token = self.where(mask, e)
            self.add(out, token, self.expert(e, x[token]) * topk_weights[token, slot, None])
            passes += 1
        return out / passes


class Pairs(expert_loop.Loop):
    """Results wait in a list of pairs."""

    def experts(self, x, topk_ids, topk_weights):
        out, pairs = self.start(x), []
        for e in topk_ids.unique():
            token, slot = torch.where(topk_ids == e)
            pairs.append((token, self.expert(e, x[token]) * topk_weights[token, slot, None]))
        for token, y in pairs:
            self.add(out, token, y)
        return out


class Slices(sorted_experts.Slices):
    """``outputs, start = [], 0``, and a count of the experts that have tokens."""

    def loop(self, rows, counts):
        outputs, start, used = [], 0, 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            used += 1
            outputs.append(self.mlps[e](rows[start : start + count]))
            start += count
        return torch.cat(outputs) / used


class Layers(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.layers = torch.nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("whole", [False, True], ids=["block", "layers"])
@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Counts, ("`passes`", "for e in mask.sum(dim=(1, 2)).nonzero().squeeze(-1):")),
        (Pairs, ("(list) is changed", "for e in topk_ids.unique():")),
        (Slices, ("`used`", "if count == 0:")),
    ],
)
def test_a_loop_that_was_not_captured_is_told_once_with_its_statement(
    rewritten, caplog, block, words, whole
):
    """Stock capture makes several frames of it, one inside of the other, and each is given up for the same loop."""
    module, x = Layers(block) if whole else block(), torch.randn(T, 32)
    with caplog.at_level("INFO", "moe_inductor"):
        torch.testing.assert_close(rewritten(module)(x), module(x))
    (line,) = [r.getMessage() for r in caplog.records if " MoE block" in r.getMessage()]
    assert "only the router was captured: " in line
    assert all(word in line for word in (*words, " at test_reasons.py:"))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (_own_scores.BeforeOwn, "expert 0 is weighed by the score of expert 3"),
        (_own_scores.OwnReversed, "expert 0 is weighed by the score of expert 3"),
        (_own_scores.OwnOfMore, "that ids are those of a top-k among as many is not known"),
        (_own_scores.OwnOfNextIds, "that ids are those of a top-k among as many is not known"),
        (_own_scores.OwnOfTokensOnce, "that a token has an expert at most once is not known"),
        (_own_scores.MaskOfNext, "expert 0 takes its weights where its tokens have the id 1"),
        (_own_scores.MaskOfOtherIds, "expert 0 takes its weights by other ids than its tokens"),
        (_own_scores.MaskOfNextIds, "that a token has an expert at most once is not known"),
        (_mask_loops.OtherScattered, "that ids are those of a top-k among as many is not known"),
    ],
)
def test_a_weight_that_is_not_read_as_the_expert_s_own_is_named(block, words, rewritten):
    compiled = rewritten(block())
    compiled(torch.randn(T, HIDDEN))
    (found, *_) = compiled.blocks
    assert not found.fused
    assert words in found.reason.message, found.reason
