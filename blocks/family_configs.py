"""Tiny configs of every decoder family that transformers knows, to try the cut on. Leaves out the trying."""

from __future__ import annotations

import inspect

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_LAYERS = 6
VOCAB_SIZE = 99

_SIZES: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the same under older names
    "n_embd": 64,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 128,
    "d_model": 64,
    "n_layers": NUM_LAYERS,
    "n_heads": 4,
    "max_seq_len": 128,
    "rotary_dim": 8,
    "ffn_dim": 128,
    "attention_heads": 4,
    "num_layers": NUM_LAYERS,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,  # as head_dim, from which some families make their rotary table
    "v_head_dim": 16,
}
_OWN: dict[str, dict[str, object]] = {
    "biogpt": {"is_decoder": True},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "dots1": {"n_shared_experts": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "opt": {"word_embed_proj_dim": 32},
}


def family_names() -> list[str]:
    """The `model_type` of every family with a causal language model, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> PretrainedConfig:
    """A config of a few thousand weights, as far as the family's config takes the usual names.

    Raises:
        Exception: whatever the family's config has against it.
    """
    plain = AutoConfig.for_model(family)
    try:
        text = plain.get_text_config(decoder=True)
    except ValueError:  # several text models, which is refused for what it is
        return plain
    taken = inspect.signature(type(text).__init__).parameters
    known = {name: value for name, value in _SIZES.items() if name in taken or hasattr(text, name)}
    if "kv_lora_rank" in known:  # every head has keys of its own there
        known["num_key_value_heads"] = known["num_attention_heads"]
    known = {name: value for name, value in (known | _OWN.get(family, {})).items() if value is not None}
    if text is plain:
        return AutoConfig.for_model(family, **known)
    part = next((name for name in plain.sub_configs if getattr(plain, name, None) is text), "text_config")
    return AutoConfig.for_model(family, **{part: known | {"model_type": text.model_type}})
