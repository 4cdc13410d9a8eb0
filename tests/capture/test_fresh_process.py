"""What a process is like after it has compiled with our backend, compared with one that never has."""

from __future__ import annotations

import json
import subprocess
import sys

# argv[1]: compile for our backend first?  Prints [number of graphs of "inductor", settings that have changed].
SCRIPT = """
import json, sys, torch
import torch._inductor.config
from torch._dynamo.utils import counters

class Loop(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 4, bias=False)
        self.up = torch.nn.Parameter(torch.randn(4, 32, 8))
        self.down = torch.nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x):
        weights, ids = torch.topk(torch.softmax(self.gate(x), -1), 2, -1)
        return self.experts(x, weights, ids)

    def experts(self, x, weights, ids):
        out, mask = torch.zeros_like(x), torch.nn.functional.one_hot(ids, 4).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e[0]])
            gate, up = torch.nn.functional.linear(x[token], self.up[e[0]]).chunk(2, -1)
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, self.down[e[0]])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out

def settings():
    configs = torch._dynamo.config, torch._inductor.config, torch.fx.experimental._config, torch._functorch.config
    return [c.get_config_copy() for c in configs]

def graphs(backend):
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    return counters["stats"]["unique_graphs"]

torch.manual_seed(0)
model, x = Loop(), torch.randn(5, 8)
before = settings()
if sys.argv[1] == "True":
    assert graphs("moe_inductor") == 1
stock = graphs("inductor")
changed = [k for a, b in zip(before, settings()) for k in a if a[k] != b[k]]
assert (sys.argv[1] == "True") == ("moe_inductor" in sys.modules)
print(json.dumps([stock, changed]))
"""


def run(ours_first: bool) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", SCRIPT, str(ours_first)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    stock, changed = json.loads(done.stdout.splitlines()[-1])
    return stock, changed


def test_inductor_and_the_settings_are_as_in_a_fresh_process() -> None:
    stock, changed = run(ours_first=False)
    assert (stock > 1, changed) == (True, [])
    assert run(ours_first=True) == (stock, [])
