"""A tiny config from any config class: every size that has a known name is made small, the rest stays as it is.

Sizes are chosen so that mistakes show: hidden, width and number of experts differ, and a group of experts holds more
experts than a token may choose.
"""

from __future__ import annotations

import re
from typing import Any

import transformers

from census.discover import defaults

HIDDEN, WIDTH, DENSE_WIDTH, EXPERTS, K, GROUPS = 32, 24, 40, 6, 2, 2
HEADS, HEAD, LAYERS, VOCAB, POSITIONS = 2, 16, 2, 64, 128

# The first rule whose pattern is found in an argument's name gives its value; None leaves the default alone.
_RULES: list[tuple[str, Any]] = [
    (r"dropout|_drop$|drop_rate|jitter|drop_path|pdrop|layerdrop", 0.0),
    (r"rope_theta|rope_local|(^|_)(attn|moe|expert)_layer_(offset|period)$", None),
    # Experts.
    (r"^(num|n)_expert_groups?$|^n_groups?$", GROUPS),
    (r"^topk_group$|^num_limited_groups?$", 1),
    (r"^(num|n)(_\w+)?_shared_experts?$", 1),
    (r"^zero_expert_num$", 2),
    (r"experts_per_tok|^num_experts_per_token$|^(moe_|num_)?top_?k$|^moe_k$|experts?_top_?k$", K),
    (r"^num_selected_experts$|experts?_num_per_tok$|^top_k_experts$", K),
    (r"(^|_)(num|n)_(\w+_)?experts$", EXPERTS),
    (r"expert_capacity$", 64),
    (r"latent_(size|dim)$", HEAD),
    (r"(moe|expert)\w*_(size|dim|width)$", WIDTH),
    (r"^first_k_dense_replace$|^num_dense_layers$|^n_dense_layers$", 1),
    (r"^(encoder_|decoder_)?sparse_step$|interleave_moe_layer_step", 1),
    # Attention.
    (r"lora_rank$", HEAD),
    (r"rope_head_dim$|nope_head_dim$|^linear_\w*head_dim$", HEAD // 2),
    (r"head_dim$|^kv_channels$|^d_kv$", HEAD),
    (r"(^|_)(num|n)_(\w+_)?heads$|_attention_heads$", HEADS),
    (r"sliding_window$|window_size$|chunk_size$", 16),
    # The rest of the model.
    (r"^(hidden_size|d_model|n_embd|embed_dim|dim|emb_dim|embedding_size|hidden_dim)$", HIDDEN),
    (r"^router_hidden_size$", HEAD),
    (r"(intermediate|ffn|feed_forward|ffn_hidden)_(size|dim)\w*$|^d_ff$|^ffn_\w*dim$", DENSE_WIDTH),
    (r"^(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_decoder_layers)$", LAYERS),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (r"vocab_size\w*$", VOCAB),
    (r"max_position_embeddings$|max_seq_len$|^n_positions$|max_sequence_length$", POSITIONS),
    (r"^pad_token_id$", 0),
    (r"_token_id$", 1),
]
RULES = [(re.compile(pattern), value) for pattern, value in _RULES]
# Without these there is no MoE at all, whatever the default.
_NEEDED = re.compile(r"experts_per_tok$|^n_routed_experts$")


def tiny(config: type, **given: Any) -> Any:
    """An instance of the config class with small sizes; ``given`` wins."""
    return config(**(overrides(config) | given))


def overrides(config: type) -> dict[str, Any]:
    """Arguments that make the config small, its parts included."""
    parts = getattr(config, "sub_configs", None) or {}
    small = {}
    for name, default in defaults(config).items():
        if name in parts:
            if issubclass(parts[name], transformers.PretrainedConfig):
                small[name] = tiny(parts[name])
        elif (value := _small(name, default)) is not None:
            small[name] = value
    return small


def _small(name: str, default: Any) -> Any:
    """The small value of an argument, or None.  What is None by default is derived from others, or switched off."""
    if default is None and not _NEEDED.search(name):
        return None
    if isinstance(default, bool | str | list | tuple | dict):
        return None
    return next((value for pattern, value in RULES if pattern.search(name)), None)
