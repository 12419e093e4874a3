"""Tiny six-layer configs of twenty decoder families, to test exactness on. Not a list of what is supported."""

from __future__ import annotations

NUM_LAYERS = 6
VOCAB_SIZE = 99

_COMMON: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"

FAMILIES: dict[str, dict[str, object]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": 8},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "gemma": _COMMON | {"head_dim": 16},
    "gemma2": _COMMON | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": _COMMON
    | {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": [_SLIDING, _SLIDING, _FULL] * 2,
    },
    "phi3": _COMMON,
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": NUM_LAYERS,
        "n_head": 4,
        "n_positions": 128,
        "scale_attn_by_inverse_layer_idx": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
    },
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": NUM_LAYERS, "n_head": 4},
    "falcon": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "max_position_embeddings": 128,
    },
    "gpt_neox": _COMMON,
    "mixtral": _COMMON | {"num_local_experts": 4},
    "qwen3_moe": _COMMON
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "mlp_only_layers": [1],
    },
    "granite": _COMMON
    | {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "smollm3": _COMMON | {"no_rope_layer_interval": 3},
    "gpt_oss": _COMMON
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": [_SLIDING, _FULL] * 3,
    },
    "olmo2": _COMMON,
    "stablelm": _COMMON,
}
