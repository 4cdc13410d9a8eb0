"""Every case of the census: one MoE block of one family of the installed transformers, and how to build it.

Most cases come out of ``discover.scan()`` and ``shrink.tiny()`` alone.  What those cannot know is in ``SPECIAL``: more
inputs than hidden states, a size that a config insists on, a layer whose block has to be taken out of it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from census import shrink
from census.discover import Found, config_class, config_classes, layers, scan
from census.weights import randomise, without_garbage

Draw = Callable[[torch.Generator, tuple[int, int]], list[Any]]


def states(generator: torch.Generator, shape: tuple[int, int]) -> list[Any]:
    """Hidden states [batch, length, H] of unit scale."""
    return [torch.randn(*shape, shrink.HIDDEN, generator=generator, dtype=torch.float64)]


@dataclasses.dataclass(frozen=True)
class Special:
    """What is particular about one case.

    config: class name; sizes: further arguments of it; attributes: what the class forgot to set.
    arguments: of the block's constructor, besides ``config``.
    wrap: makes the block out of (class, config) where it is not the class itself.
    dense: why this is no mixture of experts in the sense of this project, although it is called one.
    """

    block: str = ""
    config: str = ""
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    wrap: Callable[[type, Any], nn.Module] | None = None
    draw: Draw = states
    dense: str = ""
    blocks: int = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """name: the family, with ``:variant`` where the family has several blocks."""

    name: str
    found: Found
    special: Special

    @property
    def family(self) -> str:
        return self.found.family

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names of transformers; "own" is the only loop of a family that offers no choice."""
        return ("eager", "grouped_mm", "batched_mm") if self.found.on_interface else ("own",)

    @property
    def block_class(self) -> type:
        return getattr(self.found.module, self.special.block or self.found.block)

    def config(self) -> Any:
        if self.special.config:
            made_from = next(
                c for c in config_classes(self.found.folder) if c.__name__ == self.special.config
            )
        else:
            made_from = config_class(self.found)
        config = shrink.tiny(made_from, **self.special.sizes)
        for name, value in self.special.attributes.items():
            setattr(config, name, value)
        return config

    def build(self, implementation: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The block with unit-scale weights, the same ones on every call."""
        config = self.config()
        config._experts_implementation = "eager" if implementation == "own" else implementation
        with without_garbage():
            if self.special.wrap is not None:
                block = self.special.wrap(self.block_class, config)
            else:
                block = self.block_class(config, **self._arguments())
        return self._cast(randomise(block), dtype)

    def _cast(self, block: nn.Module, dtype: torch.dtype) -> nn.Module:
        """As ``from_pretrained(dtype=..)`` does it: what the authors keep in fp32 stays there."""
        block.to(dtype)
        kept = [
            re.escape(name)
            for owner in vars(self.found.module).values()
            for name in getattr(owner, "_keep_in_fp32_modules_strict", None) or ()
        ]
        named = re.compile(rf"(^|\.)({'|'.join(kept)})($|\.)")
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            # "mlp." is where blocks stand in their layers, and some of the names say so.
            if kept and tensor.is_floating_point() and named.search(f"mlp.{name}"):
                tensor.data = tensor.data.float()
        return block

    def _arguments(self) -> dict[str, Any]:
        """A block that asks for its layer is given the last: the first is dense in many models."""
        known = {"layer_idx": shrink.LAYERS - 1, "ffn_dim": shrink.DENSE_WIDTH}
        parameters = inspect.signature(self.block_class.__init__).parameters
        return {n: v for n, v in (known | self.special.arguments).items() if n in parameters}


# --- what is particular -------------------------------------------------------------------------------------------


class RouterAndExperts(nn.Module):
    """The MoE part of a Gemma decoder layer, which calls router and experts by itself, beside a dense MLP."""

    def __init__(self, layer: type, config: Any) -> None:
        super().__init__()
        module = inspect.getmodule(layer)
        prefix = layer.__name__.partition("Text")[0].removesuffix("Encoder").removesuffix("Decoder")
        self.router = getattr(module, f"{prefix}TextRouter")(config)
        self.norm = getattr(module, f"{prefix}RMSNorm")(config.hidden_size)
        self.experts = getattr(module, f"{prefix}TextExperts")(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.router(flat)
        return self.experts(self.norm(flat), index, weights).reshape(hidden_states.shape)


class MapAndReduce(nn.Module):
    """JetMoE's mixture of attention without the attention between its two halves."""

    def __init__(self, attention: type, config: Any) -> None:
        super().__init__()
        self.experts = attention(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        mapped, _, topology = self.experts.map(hidden_states)
        return self.experts.reduce(mapped, topology)


def _with_ids(generator: torch.Generator, shape: tuple[int, int], below: int) -> list[Any]:
    return [*states(generator, shape), torch.randint(0, below, shape, generator=generator)]


def _with_dataset(generator: torch.Generator, shape: tuple[int, int]) -> list[Any]:
    """VitPose: one number per image says from which data set it is."""
    return [
        *states(generator, shape),
        torch.randint(0, shrink.EXPERTS, shape[:1], generator=generator),
    ]


def _with_router_states(generator: torch.Generator, shape: tuple[int, int]) -> list[Any]:
    """Zaya: what the router of the layer before has left."""
    size = (*shape, shrink.HEAD)
    return [
        *states(generator, shape),
        torch.randn(*size, generator=generator, dtype=torch.float64),
    ]


def _without_padding_mask(generator: torch.Generator, shape: tuple[int, int]) -> list[Any]:
    return [*states(generator, shape), None]


GEMMA_SIZES = {
    "enable_moe_block": True,
    "num_experts": shrink.EXPERTS,
    "top_k_experts": shrink.K,
    "moe_intermediate_size": shrink.WIDTH,
}
_GEMMA = Special(sizes=GEMMA_SIZES, wrap=RouterAndExperts)
_GROUPED = {
    "topk_method": "group_limited_greedy",
    "n_group": shrink.GROUPS,
    "topk_group": 1,
}

# Time, height and width share the rotated half of a head.
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

_LINEAR_AND_FULL = Special(sizes={"layer_types": ["linear_attention", "full_attention"]})

_SECOND_SPARSE = Special(sizes={"mlp_layer_types": ["dense", "sparse"]})

# By family, then by variant ("" for the block itself).  A family that is here has exactly these cases.
SPECIAL: dict[str, dict[str, Special]] = {
    "bailing_hybrid": {"": _LINEAR_AND_FULL},
    "beam": {"": _SECOND_SPARSE},
    "dbrx": {"": Special(config="DbrxConfig")},
    "deepseek_v2": {"": Special(), "groups": Special(sizes=_GROUPED)},
    "deepseek_v4": {
        "": Special(sizes={"mlp_layer_types": ["hash_moe", "moe"]}),
        "hash": Special(
            sizes={"mlp_layer_types": ["moe", "hash_moe"]},
            draw=functools.partial(_with_ids, below=shrink.VOCAB),
        ),
    },
    "diffusion_gemma": {"": _GEMMA},
    "doge": {
        "": Special(
            block="DogeCDMoE",
            sizes={"is_moe": True, "num_experts": 16},
            dense="an expert is one neuron, looked up in an embedding: gathers and a dot product, no expert MLP",
        )
    },
    "dots1": {"": Special(sizes={"n_shared_experts": 1})},
    "dots3_note": {
        "": Special(block="Dots3NoteTextMoE"),
        "vision": Special(
            block="Dots3NoteVisionMoE",
            sizes={
                "adapter_in_dim": shrink.HIDDEN,
                "mlp_layer_types": ["dense", "sparse"],
                "per_layer_config": {1: {"num_local_experts": shrink.EXPERTS}},
            },
        ),
    },
    "ernie4_5_vl_moe": {
        "": Special(block="Ernie4_5_VLMoeMoeBlock"),
        "images": Special(
            block="Ernie4_5_VLMoeMoeBlock", draw=functools.partial(_with_ids, below=2), blocks=2
        ),
    },
    "gemma4": {"": _GEMMA},
    "glm5_next": {"": Special(sizes={"qk_rope_head_dim": 0})},
    "granitemoehybrid": {"": Special(sizes={"layer_types": ["mamba", "attention"]})},
    "hunyuan_v1_moe": {"": Special(sizes={"head_dim": shrink.HEAD})},
    "hy_v4_vl": {"": Special(sizes={"rope_parameters": _ROTARY})},
    "jamba": {
        "": Special(
            sizes={
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 1,
                "expert_layer_offset": 0,
                "use_mamba_kernels": False,
            }
        )
    },
    "jetmoe": {
        "": Special(block="JetMoeMoE"),
        "attention": Special(
            block="JetMoeMoA",
            wrap=MapAndReduce,
            dense="the experts are the projections around an attention, not MLPs",
        ),
    },
    "kimi_linear": {"": _LINEAR_AND_FULL},
    "lfm2_moe": {"": Special(sizes={"layer_types": ["conv", "full_attention"]})},
    "muse_spark": {"": Special(sizes={"moe_hidden_size": shrink.HEAD})},
    "nllb_moe": {"": Special(draw=_without_padding_mask)},
    # The noise is also the threshold of its router; without any, every token has one expert.
    "phimoe": {"": Special(sizes={"router_jitter_noise": 0.01})},
    "qwen3_5_moe": {"": _LINEAR_AND_FULL},
    "qwen3_next": {"": _LINEAR_AND_FULL},
    "qwen3_moe": {"": Special(), "renormalised": Special(sizes={"norm_topk_prob": True})},
    "qwen3_omni_moe": {
        "thinker": Special(
            block="Qwen3OmniMoeThinkerTextSparseMoeBlock", config="Qwen3OmniMoeTextConfig"
        ),
        "talker": Special(
            block="Qwen3OmniMoeTalkerTextSparseMoeBlock",
            config="Qwen3OmniMoeTalkerTextConfig",
            attributes={"shared_expert_intermediate_size": shrink.WIDTH},
        ),
    },
    "vitpose_backbone": {
        "": Special(
            sizes={"num_experts": shrink.EXPERTS, "part_features": 8},
            draw=_with_dataset,
            dense="no router: every expert (one matrix) runs on everything, and the data set's number picks one",
        )
    },
    "zaya": {"": Special(sizes={"num_experts_per_tok": 1}, draw=_with_router_states)},
}

# Families that own no ``self.experts``: scan() does not see them.
UNSEEN = ("doge",)


@functools.cache
def cases() -> dict[str, Case]:
    """Every case of the installed transformers by name."""
    by_family: dict[str, list[Found]] = {}
    for found in scan():
        by_family.setdefault(found.family, []).append(found)
    for folder in UNSEEN:
        by_family.setdefault(folder, []).append(
            Found(folder, next(s.block for s in SPECIAL[folder].values()))
        )
    named = {}
    for family, all_found in sorted(by_family.items()):
        for variant, special in SPECIAL.get(family, {"": Special()}).items():
            name = f"{family}:{variant}" if variant else family
            found = next((f for f in all_found if f.block == special.block), None)
            if found is None:
                plain = [f for f in all_found if not layers(f)] or all_found
                found = plain[0]
            named[name] = Case(name, found, special)
    return named
