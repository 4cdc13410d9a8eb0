"""transformers 4.x: blocks that sort their tokens by expert, and count them into Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hf.compare import (
    Compiled,
    check_inference,
    check_training,
    find_case,
    randomise,
    require_transformers,
)

require_transformers(4)

HIDDEN, EXPERTS, K = 32, 6, 2


def granitemoe():
    from transformers.models.granitemoe.configuration_granitemoe import GraniteMoeConfig
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE

    config = GraniteMoeConfig(
        hidden_size=HIDDEN, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=K
    )
    return GraniteMoeMoE(config)


def jetmoe():
    from transformers.models.jetmoe.configuration_jetmoe import JetMoeConfig
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE

    config = JetMoeConfig(
        hidden_size=HIDDEN, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=K
    )
    return JetMoeMoE(config)


def deepseek_v2(**kwargs):
    from transformers.models.deepseek_v2 import modeling_deepseek_v2
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=24,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=K,
        n_shared_experts=1,
        **kwargs,
    )
    return modeling_deepseek_v2.DeepseekV2MoE(config)  # type: ignore[attr-defined]


def deepseek_v2_groups():
    return deepseek_v2(topk_method="group_limited_greedy", n_group=3, topk_group=2)


def aria():
    from transformers.models.aria.configuration_aria import AriaTextConfig
    from transformers.models.aria.modeling_aria import AriaTextMoELayer

    config = AriaTextConfig(
        hidden_size=HIDDEN, intermediate_size=24, moe_num_experts=EXPERTS, moe_topk=K
    )
    return AriaTextMoELayer(config)


def chosen(block: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    router: Any = getattr(block, "router", None) or getattr(block, "gate", None)
    found: list[torch.Tensor] = []

    def note(module, args, output):
        scores = output if isinstance(output, torch.Tensor) else output[0]
        ids = scores.topk(K).indices if scores.dtype.is_floating_point else scores
        found.append(ids.flatten().sort().values)

    handle = router.register_forward_hook(note)
    with torch.no_grad():
        block(x)
    handle.remove()
    return found


@pytest.mark.parametrize("build", [granitemoe, jetmoe, deepseek_v2, deepseek_v2_groups, aria])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block(build, dtype):
    """One training step, and inference with as few tokens as leave experts without any, at two more lengths."""
    block = randomise(build()).to(dtype)
    compiled = Compiled(block)

    def states(*shape: int):
        return lambda generator: torch.randn(*shape, HIDDEN, generator=generator).to(dtype)

    check_training(compiled, find_case(block, states(2, 5), chosen, count=3))
    compiled.assert_fused(1)
    for length in (2, 9):
        check_inference(compiled, find_case(block, states(1, length), chosen, count=3))
    compiled.assert_fused(1, graphs=len(compiled.reports))
    assert {report.spelling for report in compiled.blocks} == {"sorted_experts"}
