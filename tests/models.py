"""Models of every tested architecture, small enough to run thousands of segments, with random weights."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 61
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LLAMA = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(**_COMMON, n_embd=32, n_layer=4, n_head=4, n_positions=256),
    "gpt_neox": GPTNeoXConfig(**(LLAMA | {"num_key_value_heads": None}), tie_word_embeddings=False),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=False),
    "mistral": MistralConfig(**LLAMA, sliding_window=24),
    "opt": OPTConfig(
        **(_COMMON | {"pad_token_id": 1}),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "gemma3": Gemma3TextConfig(
        **(LLAMA | {"pad_token_id": 1}),
        head_dim=8,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}
# Mixtures of experts.
EXPERTS = {
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**LLAMA, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
}
# Models whose attention is given more than queries, keys, values and a mask: a soft cap, sinks, keys of another block.
PECULIAR = {
    "gemma2": Gemma2Config(**(LLAMA | {"pad_token_id": 1}), head_dim=8, attn_logit_softcapping=2.0, sliding_window=24),
    "gpt_oss": GptOssConfig(
        **LLAMA,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=24,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gemma4": Gemma4TextConfig(
        **(LLAMA | {"pad_token_id": 1}),
        head_dim=8,
        global_head_dim=8,
        num_kv_shared_layers=2,
        sliding_window=24,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}
WITH_MEMORY = ["llama", "gpt_neox", "qwen3", "mistral", "gemma3"]


def tiny(architecture: str = "llama", seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """A small model, large enough in its weights that predictions differ from token to token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy((CONFIGS | EXPERTS | PECULIAR)[architecture]), attn_implementation=attention
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model
