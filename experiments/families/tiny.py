"""Tiny: a model of any type that `AutoModelForCausalLM` knows, random and small enough to be read in seconds."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from experiments.families.by_hand import AS_BORN, BY_HAND, SPARE, USUAL, VOCABULARY

TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_WEIGHTS = 6_000_000
_MOST_BLOCKS = 4
# Where a configuration's field of one of these names holds a number, this number takes its place.
_BY_MEANING: dict[str, tuple[int, str]] = {
    "width": (
        64,
        "hidden_size n_embd d_model emb_dim embedding_size embedding_dim input_embedding_size output_embedding_size "
        "word_embed_proj_dim attention_hidden_size lru_width hidden_size_global input_size ple_embed_dim",
    ),
    "width within an MLP": (
        96,
        "intermediate_size ffn_dim n_inner d_ff dff dim_ff d_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
        "feed_forward_size dense_intermediate_size prefix_dense_intermediate_size intermediate_size_mlp",
    ),
    "width within an expert": (
        32,
        "expert_ffn_hidden_size moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    ),
    "blocks": (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_blocks num_layers_per_stack depth max_window_layers",
    ),
    "heads": (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_heads "
        "linear_num_value_heads",
    ),
    "heads of keys": (
        2,
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups linear_num_key_heads "
        "index_n_heads indexer_n_heads",
    ),
    "width of a head": (
        16,
        "head_dim swa_head_dim dim_head d_head attention_head_size attention_head_dim kv_channels d_kv "
        "qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
        "index_head_dim indexer_head_dim",
    ),
    "width of a head that is rotated": (8, "rotary_dim qk_rope_head_dim"),
    "width of both": (24, "qk_head_dim"),
    "rank": (16, "kv_lora_rank q_lora_rank o_lora_rank laurel_rank adapter_rank hidden_size_per_layer_input"),
    "experts": (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    "experts that are chosen": (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts o_groups",
    ),
    "groups, and what is of one kind": (
        1,
        "n_group topk_group n_groups num_expert_group mamba_n_groups mamba_ngroups first_k_dense_replace "
        "num_dense_layers n_shared_experts num_shared_experts moe_num_shared_experts",
    ),
    "blocks that predict no next token": (0, "num_nextn_predict_layers num_mtp_layers"),
    "vocabulary": (
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base "
        "encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size audio_vocab_size",
    ),
    "positions": (
        1024,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions context_length",
    ),
    "keys in view": (
        24,
        "sliding_window attention_window_size sliding_window_size attention_chunk_size window_size local_attention",
    ),
    "keys that are chosen": (16, "index_topk keep_window_size"),
    "states": (
        8,
        "state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank mamba_chunk_size chunk_size "
        "mamba_n_heads mamba_num_heads n_mamba_heads",
    ),
    "width of a head of states": (16, "mamba_d_head mamba_head_dim mamba_headdim router_hidden_size"),
    "images, which no text has": (32, "image_size"),
    "parts of them": (16, "patch_size"),
}
_SIZES = {name: size for size, names in _BY_MEANING.values() for name in names.split()}
_BLOCKS = _BY_MEANING["blocks"][1].split()
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0, "pad_token_id": None}


class NotMadeError(Exception):
    """There is no tiny model of a type; the text says why."""


def save(model_type: str, folder: Path) -> None:
    """Writes a tiny model of a type as `save_pretrained` does.

    Raises:
        NotMadeError: if none can be made, or none so small.
    """
    try:
        config = config_of(model_type)
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(config).num_parameters()
        if weights <= MOST_WEIGHTS:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config_of(model_type)).float().eval()
            liven(model)
            model.save_pretrained(folder)
    except Exception as error:  # whatever a type raises that does not suit the settings
        text = " ".join(str(error).split())
        raise NotMadeError(f"{type(error).__name__}: {text}") from error
    if weights > MOST_WEIGHTS:
        raise NotMadeError(f"{weights / 1e6:.0f}M weights, and no setting that makes them fewer")


def config_of(model_type: str) -> PretrainedConfig:
    """The configuration of a type with all sizes small, as a decoder alone."""
    kind, by_hand = CONFIG_MAPPING[model_type], BY_HAND.get(model_type, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        born = kind(**AS_BORN.get(model_type, {}))
        settings = _small(born) | {"is_decoder": True}
        if getattr(born, "is_encoder_decoder", False):
            settings["is_encoder_decoder"] = False
        return kind(**_merged(settings, by_hand))


def _small(config: PretrainedConfig) -> dict[str, Any]:
    """Of a configuration, the fields that are to be of another size."""
    every = config.to_dict()
    blocks = next((every[name] for name in _BLOCKS if isinstance(every.get(name), int)), None)
    settings: dict[str, Any] = {}
    patterns: dict[str, list[Any]] = {}
    for name, value in every.items():
        if isinstance(value, dict):
            if isinstance(nested := getattr(config, name, None), PretrainedConfig):
                settings[name] = _small(nested) | {"model_type": nested.model_type}
        elif isinstance(value, list | tuple) and len(value) == blocks and not name.startswith("_"):
            patterns[name] = _pattern([_size(name, each) for each in value])
        elif (size := _size(name, value)) != value:
            settings[name] = size
    if patterns:
        length = max(2, *map(len, patterns.values()))
        settings |= {name: _lengthened(pattern, length) for name, pattern in patterns.items()}
        settings |= {name: length for name in _BLOCKS if settings.get(name)}
    if "kv_lora_rank" in settings and "num_key_value_heads" in every:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # latent attention has a key for each head
    return settings


def _size(name: str, value: Any) -> Any:
    """What takes the place of one field's value."""
    if name in _TOKENS:
        return _TOKENS[name]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and name.endswith(("_token_id", "_token_index")):
        return SPARE
    return _SIZES.get(name, value) if is_number and value > 0 else value


def _pattern(values: list[Any]) -> list[Any]:
    """One of each kind of block, in the order in which they come."""
    return list(dict.fromkeys(values))[:_MOST_BLOCKS]


def _lengthened(pattern: list[Any], length: int) -> list[Any]:
    """A pattern over so many blocks: from its beginning again, but the first, dense MLP once."""
    if pattern[0] == "dense":
        return [pattern[0], *[pattern[-1]] * (length - 1)]
    return (pattern * length)[:length]


def _merged(settings: dict[str, Any], by_hand: dict[str, Any]) -> dict[str, Any]:
    """Settings with those by hand in their place, nested ones too."""
    merged = dict(settings)
    for name, value in by_hand.items():
        if value is USUAL:
            merged.pop(name, None)
        elif isinstance(value, dict) and isinstance(settings.get(name), dict):
            merged[name] = _merged(settings[name], value)
        else:
            merged[name] = value
    return merged


@torch.no_grad()
def liven(model: PreTrainedModel) -> None:
    """Makes weights larger than at birth, so that nats depend on what is in view and no weight is without effect.

    What sets how fast a recurrence forgets stays as it is.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or _sets_decay(name):
            continue
        noise = torch.randn(weight.shape, generator=generator)
        weight.add_(0.1 * noise) if weight.ndim < 2 else _widen(weight, noise)


def _sets_decay(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("A_log", "D", "dt_bias", "recurrent_param") or "time_" in last or "rg_lru" in name


def _widen(weight: Tensor, noise: Tensor) -> None:
    """Scales a matrix to a standard deviation of at least 0.12; noise takes the place of one that is 0."""
    deviation = weight.std()
    if deviation < 1e-8:
        weight.add_(0.08 * noise)
    elif deviation < 0.08:
        weight.mul_(0.12 / deviation)
