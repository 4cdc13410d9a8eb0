"""``module.to(dtype)`` in front of a loop over experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.capture.fake_backend import installed
from tests.capture.models import H
from tests.capture.test_purity import Believer, Loop


def converted(s, x, w, m, out, hit):
    """transformers: the routers of switch_transformers and nllb_moe."""
    s.scale = s.scale.to(torch.float32)
    for e in hit:
        s.add(x * s.scale(x), w, m, out, e[0])
    return out


def test_to_the_dtype_that_it_has_or_had():
    block, x, backend = Loop(converted), torch.randn(3, H), Believer()
    block.scale = nn.Linear(H, 1)
    with torch.no_grad(), installed(backend, speculate=True):
        expected = block(x)
        compiled = torch.compile(block, backend=backend)
        torch.testing.assert_close(compiled(x), expected)
        assert [str(r) for r in backend.reasons] == []
        (gm,) = backend.graphs
        if torch.__version__ < "2.15":
            assert not [n for n in gm.graph.nodes if "set_" in str(n.target)]
        block.scale = copy.deepcopy(block.scale).to(torch.float64)
        torch.testing.assert_close(compiled(x), expected)
    assert block.scale.weight.dtype == torch.float32


class Counted(nn.Linear):
    def _apply(self, *args, **kwargs):
        self.conversions = getattr(self, "conversions", 0) + 1
        return super()._apply(*args, **kwargs)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo does not trace Module._apply")
def test_a_module_with_a_conversion_of_its_own():
    block, x, backend = Loop(converted), torch.randn(3, H), Believer()
    block.scale = Counted(H, 1)
    with torch.no_grad(), installed(backend, speculate=True):
        expected = block(x)
        torch.testing.assert_close(torch.compile(block, backend=backend)(x), expected)
    assert block.scale.conversions == 2
