"""Samples and near misses of tokens that a map [T, E] of who goes where permutes, without a sort.

Megatron-LM: the token dispatcher without communication (``permute`` and ``unpermute``), around one module per expert.
"""

import torch
from moe_inductor.patterns import _blocks
from moe_inductor.patterns._blocks import HIDDEN, INTERMEDIATE, NUM_EXPERTS
from torch import nn
from torch.nn import functional as F

from moe_inductor.match.api import NearMiss, Sample


class Permuted(_blocks.Block):
    """Probabilities after the experts; every method is a place to go wrong."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(_blocks.MLP() for _ in range(NUM_EXPERTS))

    def map(self, topk_ids, topk_weights):
        zeros = topk_weights.new_zeros(topk_weights.shape[0], NUM_EXPERTS)
        probs = zeros.scatter(1, topk_ids, topk_weights)
        return probs, zeros.int().scatter(1, topk_ids, 1).bool()

    def tokens(self, x):
        return torch.arange(x.shape[0], device=x.device).unsqueeze(0).expand(NUM_EXPERTS, -1)

    def sorted_probs(self, probs, routing_map):
        return probs.T.contiguous().masked_select(routing_map.T.contiguous())

    def permute(self, x, routing_map):
        by_expert = routing_map.bool().T.contiguous()
        sorted_indices = self.tokens(x).masked_select(by_expert)
        return x.index_select(0, sorted_indices), sorted_indices

    def counts(self, routing_map):
        return routing_map.sum(dim=0).tolist()

    def mlp(self, rows, counts):
        parts = torch.split(rows, counts)
        return torch.cat([self.mlps[e](part) for e, part in enumerate(parts)], dim=0)

    def unpermute(self, y, sorted_indices, x, probs):
        y = y * probs.unsqueeze(-1)
        out = torch.zeros(x.shape, dtype=y.dtype, device=x.device)
        out.scatter_add_(0, sorted_indices.unsqueeze(1).expand(-1, HIDDEN), y)
        return out.to(x.dtype)

    def experts(self, x, topk_ids, topk_weights):
        return self.sent(x, *self.map(topk_ids, topk_weights))

    def sent(self, x, probs, routing_map):
        rows, sorted_indices = self.permute(x, routing_map)
        y = self.mlp(rows, self.counts(routing_map))
        return self.unpermute(y, sorted_indices, x, self.sorted_probs(probs, routing_map))


class PermutedLikeLogits(Permuted):
    """The map is made of zeros like the logits, which are there before the choice."""

    def forward(self, x):
        logits = self.gate(x)
        topk_weights, topk_ids = self.route(logits)
        probs = torch.zeros_like(logits).scatter(1, topk_ids, topk_weights)
        return self.sent(x, probs, torch.zeros_like(logits).int().scatter(1, topk_ids, 1).bool())


class PermutedShared(Permuted):
    """Added to what shared experts gave."""

    def __init__(self):
        super().__init__()
        self.shared = _blocks.MLP()

    def experts(self, x, topk_ids, topk_weights):
        return super().experts(x, topk_ids, topk_weights) + self.shared(x)


class PermutedPairs(Permuted):
    """Earlier releases: pairs are sorted, written back where they came from, and weighted."""

    def experts(self, x, topk_ids, topk_weights):
        sorted_indices = torch.argsort(topk_ids.reshape(-1), stable=True)
        counts = torch.bincount(topk_ids.reshape(-1), minlength=NUM_EXPERTS).tolist()
        y = self.mlp(x.index_select(0, sorted_indices // self.k), counts)
        pairs = torch.zeros(topk_ids.numel(), HIDDEN, dtype=y.dtype, device=y.device)
        pairs.index_copy_(0, sorted_indices, y)
        pairs = pairs.reshape(-1, self.k, HIDDEN) * topk_weights.unsqueeze(-1)
        return pairs.sum(dim=1).to(x.dtype)


class PermutedInFloat(Permuted):
    """Probabilities stay in fp32, and so does the sum."""

    def route(self, logits):
        topk_weights, topk_ids = super().route(logits)
        return topk_weights.to(torch.promote_types(logits.dtype, torch.float32)), topk_ids


class Scored(nn.Module):
    """One expert, which scales its rows before the last projection."""

    def __init__(self, bias=False):
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=bias)
        self.fc2 = nn.Linear(INTERMEDIATE, HIDDEN, bias=bias)

    def scaled(self, hidden, probs):
        return (hidden * probs.unsqueeze(-1)).to(hidden.dtype)

    def forward(self, rows, probs):
        gate, up = self.fc1(rows).chunk(2, dim=-1)
        return self.fc2(self.scaled(F.silu(gate) * up, probs))


class PermutedScored(PermutedInFloat):
    """Releases of 2025 on: each expert is given the probabilities of its rows, and scales its hidden rows with them."""

    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList(self.expert() for _ in range(NUM_EXPERTS))

    def expert(self):
        return Scored()

    def split_probs(self, probs, counts):
        return torch.split(probs, counts)

    def mlp(self, rows, counts, probs):
        parts = zip(torch.split(rows, counts), self.split_probs(probs, counts), strict=True)
        return torch.cat([self.mlps[e](*part) for e, part in enumerate(parts)], dim=0)

    def experts(self, x, topk_ids, topk_weights):
        probs, routing_map = self.map(topk_ids, topk_weights)
        rows, sorted_indices = self.permute(x, routing_map)
        y = self.mlp(rows, self.counts(routing_map), self.sorted_probs(probs, routing_map))
        out = torch.zeros(x.shape, dtype=y.dtype, device=x.device)
        out.scatter_add_(0, sorted_indices.unsqueeze(1).expand(-1, HIDDEN), y)
        return out.to(x.dtype)


class PermutedScoredFirst(PermutedScored):
    """``moe_apply_probs_on_input``: rows are scaled before the experts, which are then given ones."""

    k = 1

    def mlp(self, rows, counts, probs):
        rows = (probs.unsqueeze(-1) * rows).to(rows.dtype)
        return super().mlp(rows, counts, torch.ones_like(probs))


# -- near misses ------------------------------------------------------------------------------------------------------


class MapOfOthers(Permuted):
    """Tokens go to the experts that they like least."""

    def map(self, topk_ids, topk_weights):
        probs, _ = super().map(topk_ids, topk_weights)
        _, routing_map = super().map(NUM_EXPERTS - 1 - topk_ids, topk_weights)
        return probs, routing_map


class MapOfProbs(Permuted):
    """Pairs of little weight are left out."""

    def map(self, topk_ids, topk_weights):
        probs, _ = super().map(topk_ids, topk_weights)
        return probs, probs > 0.45


class MapOfFirst(Permuted):
    """The second choice goes nowhere."""

    def map(self, topk_ids, topk_weights):
        probs, _ = super().map(topk_ids, topk_weights)
        return probs, super().map(topk_ids[:, :1], topk_weights)[1]


class TokensReversed(Permuted):
    def tokens(self, x):
        return super().tokens(x).flip(-1)


class TokensFromOne(Permuted):
    def tokens(self, x):
        numbers = torch.arange(1, x.shape[0] + 1, device=x.device) % x.shape[0]
        return numbers.unsqueeze(0).expand(NUM_EXPERTS, -1)


class ProbsOfOthers(Permuted):
    def sorted_probs(self, probs, routing_map):
        return super().sorted_probs(probs.roll(1, 1), routing_map)


class ProbsOfOtherChoice(Permuted):
    """Rows are weighted by where other experts were chosen."""

    def forward(self, x):
        self.others = torch.topk(self.gate(x), self.k, largest=False).indices
        return super().forward(x)

    def map(self, topk_ids, topk_weights):
        _, routing_map = super().map(topk_ids, topk_weights)
        return super().map(self.others, topk_weights)[0], routing_map


class ProbsByToken(Permuted):
    """Probabilities in the order of the tokens, where rows are in the order of the experts."""

    def sorted_probs(self, probs, routing_map):
        return probs.masked_select(routing_map)


class CountsByOthers(Permuted):
    def counts(self, routing_map):
        return routing_map.flip(1).sum(dim=0).tolist()


class PermutedTwice(Permuted):
    """Rows come back to the tokens after next."""

    def unpermute(self, y, sorted_indices, x, probs):
        return super().unpermute(y, (sorted_indices + 2) % x.shape[0], x, probs)


class ScoredWithBias(PermutedScored):
    """The bias of the last projection is not scaled."""

    def expert(self):
        return Scored(bias=True)


class ScoredGate(PermutedScored):
    """What is scaled goes through the activation."""

    def expert(self):
        return _ScoredGate()


class _ScoredGate(Scored):
    def forward(self, rows, probs):
        gate, up = self.fc1(rows).chunk(2, dim=-1)
        return self.fc2(F.silu(self.scaled(gate, probs)) * up)


class ScoredTwice(PermutedScored):
    def mlp(self, rows, counts, probs):
        return super().mlp(rows, counts, probs) * probs.unsqueeze(-1).to(rows.dtype)


class ScoredByOthers(PermutedScored):
    """Scaled with the probabilities of other experts, in a row that has fewer of them."""

    def sorted_probs(self, probs, routing_map):
        return super().sorted_probs(probs.flip(1), routing_map)


class ScoredByNeighbours(PermutedScored):
    """Each row is scaled by the probability of the row before it."""

    def split_probs(self, probs, counts):
        return torch.split(probs.roll(1), counts)


class ScoredByMean(PermutedScored):
    """All rows of an expert are scaled by the mean of their probabilities."""

    def expert(self):
        return _ScoredByMean()


class _ScoredByMean(Scored):
    def scaled(self, hidden, probs):
        return (hidden * probs.mean()).to(hidden.dtype)


class ScoredByColumn(PermutedScored):
    """A number per column, not per row."""

    def expert(self):
        return _ScoredByColumn()


class _ScoredByColumn(Scored):
    def __init__(self):
        super().__init__()
        self.columns = nn.Parameter(torch.rand(INTERMEDIATE))

    def scaled(self, hidden, probs):
        return super().scaled(hidden * self.columns, probs)


SAMPLES = (
    Sample(name="permuted", build=Permuted),
    Sample(name="permuted_like_logits", build=PermutedLikeLogits, brief=True),
    Sample(name="permuted_shared", build=PermutedShared, brief=True),
    Sample(name="permuted_pairs", build=PermutedPairs, brief=True),
    Sample(name="permuted_in_float", build=PermutedInFloat, brief=True),
    Sample(name="permuted_scored", build=PermutedScored, brief=True),
    Sample(name="permuted_scored_first", build=PermutedScoredFirst, brief=True),
)

NEAR_MISSES = (
    NearMiss(name="map_of_others", build=MapOfOthers, code="SPELLING"),
    NearMiss(name="map_of_probs", build=MapOfProbs, code="SPELLING"),
    NearMiss(name="map_of_first", build=MapOfFirst, code="SPELLING"),
    NearMiss(name="tokens_reversed", build=TokensReversed, code="SPELLING"),
    NearMiss(name="tokens_from_one", build=TokensFromOne, code="SPELLING"),
    NearMiss(name="probs_of_others", build=ProbsOfOthers, code="SPELLING"),
    NearMiss(name="probs_of_other_choice", build=ProbsOfOtherChoice, code="SPELLING"),
    NearMiss(name="probs_by_token", build=ProbsByToken, code="SPELLING"),
    NearMiss(name="counts_by_others", build=CountsByOthers, code="SPELLING"),
    NearMiss(name="scored_with_bias", build=ScoredWithBias, code="SPELLING"),
    NearMiss(name="scored_gate", build=ScoredGate, code="SPELLING"),
    NearMiss(name="scored_twice", build=ScoredTwice, code="SPELLING"),
    NearMiss(name="scored_by_others", build=ScoredByOthers, code="EXPERT_SHAPES"),
    NearMiss(name="scored_by_neighbours", build=ScoredByNeighbours, code="SPELLING"),
    NearMiss(name="scored_by_mean", build=ScoredByMean, code="ACTIVATION"),
    NearMiss(name="scored_by_column", build=ScoredByColumn, code="SPELLING"),
    NearMiss(name="permuted_twice", build=PermutedTwice, code="SPELLING"),
)
