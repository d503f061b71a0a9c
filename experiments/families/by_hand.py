"""By hand: settings of types that small sizes alone don't make, or not with all that is peculiar to them."""

from typing import Any

VOCABULARY = 600
SPARE = VOCABULARY - 1  # a token that no text has: for padding, images, whatever a type must have a token for
USUAL = object()  # as the configuration's class has it

Settings = dict[str, Any]

_SLIDING = ["sliding_attention", "full_attention"]
_PADDED: Settings = {"pad_token_id": SPARE}
_SLIDING_OF_TWO: Settings = {"num_hidden_layers": 2, "layer_types": _SLIDING}
_ROTARY: Settings = {"rope_type": "default", "rope_theta": 10000.0}
_SHARING_KEYS: Settings = {"num_hidden_layers": 4, "layer_types": _SLIDING * 2, "num_kv_shared_layers": 2}
_CONVOLUTION: Settings = {
    "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "full_attn_idxs": USUAL,
}  # fmt: skip
_ZAMBA: Settings = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "layer_types": USUAL,
    "num_key_value_heads": 4,
}  # fmt: skip
_QWEN4: Settings = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 500, "split_ngram_parts": 2, "hc_lowrank": 16,
}  # fmt: skip
_DOTS3: Settings = {
    "num_hidden_layers": 2, "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"], "per_layer_config": USUAL, "rope_parameters": USUAL, "sliding_window": 24,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "swa_head_dim": 24, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip

# What the class of a configuration must be given before its other fields can be asked for.
_NONE_PER_LAYER: Settings = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
AS_BORN: dict[str, Settings] = {"gemma4_assistant": {"text_config": _NONE_PER_LAYER}}
_WITH_STATES: dict[str, Settings] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "bailing_hybrid": {"qk_head_dim": 24, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8,
        "mamba_d_head": 16, "position_embedding_type": "rope",
    },
    "jamba": {
        "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": USUAL,
        "layer_types": USUAL,
    },
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": _ZAMBA | {"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 2},
    "zamba2": {
        **_ZAMBA, "hybrid_layer_ids": [1, 3], "n_mamba_heads": 8, "mamba_headdim": 16, "use_mem_rope": True,
        "attention_hidden_size": USUAL, "attention_head_dim": USUAL,
    },
    "zaya": {
        "num_hidden_layers": 2, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 24,
        "num_experts_per_tok": 1,
    },
}  # fmt: skip
_OF_EXPERTS: dict[str, Settings] = {
    "axk1": {"head_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"head_dim": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {"head_dim": 8},
    "dots1": {
        **_SLIDING_OF_TWO, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            "hidden_size": 64, "adapter_in_dim": 64, "adapter_out_dim": 64, "num_hidden_layers": 2,
            "mlp_layer_types": ["dense", "dense"], "num_attention_heads": 4,
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
    },
    "dots3_note_text": _DOTS3,
    "hunyuan_v1_moe": {"head_dim": 16},
    "laguna": {**_SLIDING_OF_TWO, "num_attention_heads_per_layer": USUAL},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mellum": _SLIDING_OF_TWO,
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2, "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"], "index_block_size": 8, "index_topk_blocks": 2,
    },
}  # fmt: skip
_OF_ATTENTION: dict[str, Settings] = {
    "cohere_compass_text": _SLIDING_OF_TWO | {"rope_parameters": dict.fromkeys(_SLIDING, _ROTARY)},
    "gemma3n_text": _SHARING_KEYS | {"altup_num_inputs": 2, "intermediate_size": [96] * 4,
                                     "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_assistant": {"text_config": _NONE_PER_LAYER},
    "gemma4_text": _SHARING_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": USUAL},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {**_SLIDING_OF_TWO, "head_dim": 16, "num_key_value_heads": 2},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [32, 32], "num_buckets": 4,
        "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, **_PADDED,
    },
    "moshi": {"sliding_window": USUAL},  # which its cache heeds, and its mask doesn't
    "smollm3": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 0]},
    "xlm": {"causal": True, **_PADDED},
    "youtu": {"head_dim": 8},
}  # fmt: skip
_OF_TOKENS: dict[str, Settings] = {
    "blt": {"encoder_config": {"hidden_size_global": 64}, "decoder_config": {"hidden_size_global": 64}},
    "emu3": {"text_config": _PADDED, **_PADDED},
    "gemma4": {"text_config": _PADDED, **_PADDED},
    "gemma4_unified": {"text_config": _PADDED, **_PADDED},
    "git": {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "image_size": 32, "patch_size": 16}},
    "modernbert-decoder": _PADDED,
    "prophetnet": _PADDED,
    "roc_bert": {"shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    # Their positions begin behind the padding token's.
    **dict.fromkeys(
        ["camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"], _PADDED
    ),
    "xmod": {**_PADDED, "default_language": "en_XX"},
}  # fmt: skip
BY_HAND = _WITH_STATES | _OF_EXPERTS | _OF_ATTENTION | _OF_TOKENS
