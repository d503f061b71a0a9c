"""Models of other families than those of `models.py`: as one obvious loop reads them, or refused by name."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from models import CONFIGS, LLAMA, VOCABULARY, tiny
from peft import LoraConfig, inject_adapter_in_model
from reference import evaluate
from running import random_tokens, run
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DogeConfig,
    FalconH1Config,
    Gemma3Config,
    GPTJConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaForCausalLM,
    Mamba2Config,
    MambaConfig,
    MptConfig,
    Qwen3NextConfig,
    RobertaConfig,
    WhisperConfig,
)

from dynlight import LoRA, Overlapping, TransformerXL
from dynlight.choices.context import position_limit
from dynlight.errors import SettingError
from dynlight.learning.trial import reason_against_memory

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.families import loop  # a folder beside the tests, not installed

SIZES = LLAMA | {"num_hidden_layers": 2}
OF_POSITIONS = {  # relative ones, which their configurations tell in other words than a Llama's
    "mpt": MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
}
CARRIED = {  # states of convolutions and recurrences, beside keys and values, in the same block, or alone
    "lfm2": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "falcon_h1": FalconH1Config(
        **SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=8, mamba_n_groups=1
    ),
    "qwen3_next": Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "mamba2": Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        chunk_size=8,
    ),
}
OF_STATES = {  # a recurrence begun anew, chunks of attention, keys chosen by what the cache holds, positions in a table
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4),
    "llama4_text": Llama4TextConfig(
        **SIZES,
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=24,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "doge": DogeConfig(**SIZES, keep_window_size=16),
    "gptj": GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4),
}
TOKENS = [random_tokens(length, seed=length) for length in (90, 33, 5)]  # longer than an MPT's positions here
SGD = partial(torch.optim.SGD, lr=0.01)


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 and weight.std() < 0.05 else 1)
    return model


def assert_as_the_loop(config, context, **how):
    found = run(make(config), TOKENS, context, update=SGD).nats
    expected = evaluate(make(config), TOKENS, 0, segment=16, make_optimizer=SGD, **how)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(its), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*OF_POSITIONS, *OF_STATES, *CARRIED])
def test_windows_are_read_as_by_the_loop(family):
    assert_as_the_loop((OF_POSITIONS | OF_STATES | CARRIED)[family], Overlapping(16, 40), window=40)


@pytest.mark.parametrize("family", CARRIED)
def test_states_are_carried_as_by_the_loop(family):
    found = run(make(CARRIED[family]), TOKENS, TransformerXL(16, 128), update=SGD).nats
    for mine, tokens in zip(found, TOKENS, strict=True):
        torch.testing.assert_close(
            torch.cat(mine), loop.read(make(CARRIED[family]), tokens, 16, loop.Carried(), SGD), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", CARRIED)
def test_a_model_with_states_that_reads_in_parts_says_what_it_says_at_once(family):
    model, tokens = make(CARRIED[family]), TOKENS[0]
    found = torch.cat(run(model, [tokens], TransformerXL(16, 128)).nats[0])
    logits = model(input_ids=torch.tensor([[0, *tokens[:-1]]])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens), reduction="none")
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["lfm2", "mamba2", "qwen3_next"])
def test_states_are_carried_whole_beside_a_memory_of_one_position_and_in_bf16(family):
    context = TransformerXL(16, 4, sinks=3)
    found = torch.cat(run(make(CARRIED[family]), TOKENS[:1], context).nats[0])
    anew = torch.cat(run(make(CARRIED[family]), TOKENS[:1], TransformerXL(16, 0)).nats[0])
    assert (found - anew)[16:].abs().max() > 1e-3
    if family == "mamba2":  # without attention a memory of any size is the same
        whole = torch.cat(run(make(CARRIED[family]), TOKENS[:1], TransformerXL(16, 128)).nats[0])
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert reason_against_memory(make(CARRIED[family])) is None


def test_a_memory_of_no_positions_carries_no_state():
    whole = [tokens[: len(tokens) // 16 * 16] for tokens in TOKENS[:2]]  # the last window of another has context
    found = run(make(CARRIED["lfm2"]), whole, TransformerXL(16, 0)).nats
    expected = run(make(CARRIED["lfm2"]), whole, Overlapping(16, 16)).nats
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", OF_POSITIONS)
def test_a_memory_is_read_as_by_the_loop(family):
    assert_as_the_loop(OF_POSITIONS[family], TransformerXL(16, 32), memory=32)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gptj", "whose positions are not rotary"),  # but rows of a table, though rotated by
        ("mamba", "whose recurrence transformers begins anew in each forward"),
        ("llama4_text", "whose attention is cut into chunks of a document"),
        ("doge", "whose attention chooses among the keys"),
    ],
)
def test_a_memory_that_would_not_be_all_is_refused(family, reason):
    with pytest.raises(SettingError, match=f"context.class_path must be Overlapping for {family}, {reason}"):
        run(make(OF_STATES[family]), TOKENS, TransformerXL(16, 32))


def test_states_need_segments_of_more_than_a_token():
    with pytest.raises(SettingError, match="context.segment must be at least 2 for lfm2, whose states"):
        TransformerXL(1, 16).check(CARRIED["lfm2"])
    TransformerXL(1, 0).check(CARRIED["lfm2"])


def test_a_configuration_of_several_parts_is_read_as_that_of_its_text():
    text = CONFIGS["gemma3"].to_dict()
    whole = Gemma3Config(text_config=text, vision_config={"hidden_size": 16, "num_hidden_layers": 1})
    TransformerXL(16, 32).check(whole)
    assert position_limit(whole) == position_limit(CONFIGS["gemma3"]) == 256
    with pytest.raises(SettingError, match="context.memory must be at most 240 beside a segment of 16"):
        TransformerXL(16, 241).check(whole)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (MptConfig(max_seq_len=99), 99),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (WhisperConfig(max_target_positions=44), 44),
        (MambaConfig(), None),
    ],
)
def test_limits_of_positions(config, limit):
    assert position_limit(config) == limit


class LooksAtItsCache(nn.Module):
    """Attention whose output depends on how many keys the cache holds."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, past_key_values=None, **settings):
        held = past_key_values.get_seq_length(1) if past_key_values is not None else 0
        output, weights = self.inner(hidden_states, past_key_values=past_key_values, **settings)
        return output * (1 + 0.1 * (held > 0)), weights


def test_a_model_that_looks_at_what_its_cache_holds_is_refused_by_trial():
    model = tiny("llama")
    assert reason_against_memory(model) is None
    model.model.layers[1].self_attn = LooksAtItsCache(model.model.layers[1].self_attn)
    with pytest.raises(SettingError, match=r"Overlapping for llama, whose logits with a memory are [\d.]+ apart from"):
        run(model, TOKENS, TransformerXL(16, 32))
    model.model.layers[1].self_attn.forward = _no_cache_here
    assert reason_against_memory(model) == "which cannot be read with a memory (no cache here)"
    with pytest.raises(SettingError, match="parameters must suit llama, which cannot be read so .no cache here"):
        run(model, TOKENS, TransformerXL(16, 32))


def _no_cache_here(**settings):
    raise RuntimeError("no cache here")


class AllLogits(LlamaForCausalLM):
    """Takes no `logits_to_keep`, as models whose code comes with them may."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, use_cache=None):
        return super().forward(
            input_ids, position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache
        )


class Swallowing(AllLogits):
    """Takes it, and returns all logits."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, use_cache=None, **settings):
        return super().forward(input_ids, position_ids, past_key_values, use_cache)


@pytest.mark.parametrize("kind", [AllLogits, Swallowing])
@pytest.mark.parametrize("together", [1, 3])
def test_logits_of_the_context_are_cut_off_where_the_model_returns_them(kind, together):
    def other():
        model = tiny("llama")
        model.__class__ = kind
        return model

    found = run(other(), TOKENS, Overlapping(16, 40), update=SGD, together=together).nats
    expected = run(tiny("llama"), TOKENS, Overlapping(16, 40), update=SGD).nats
    for mine, usual in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(usual), rtol=1e-5, atol=1e-5)


def test_a_model_with_an_adapter_of_its_own_is_refused():
    model = tiny("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(
        SettingError, match="model must hold no adapter of its own, got LlamaForCausalLM with one; merge"
    ):
        run(model, TOKENS, Overlapping(16, 40))


def test_the_embedding_may_have_an_adapter():
    lora = {"parameters": LoRA(rank=2, targets=["embed_tokens", "q_proj"]), "update": SGD}
    alone = run(tiny("qwen3"), TOKENS, Overlapping(16, 40), **lora).nats
    static = run(tiny("qwen3"), TOKENS, Overlapping(16, 40)).nats
    assert not torch.equal(torch.cat(alone[0]), torch.cat(static[0]))
    with pytest.warns(UserWarning, match="read one row after another, which takes longer: Embedding"):
        together = run(tiny("qwen3"), TOKENS, Overlapping(16, 40), together=3, **lora).nats
    for mine, others in zip(alone, together, strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(others), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_read_past_its_adapter_is_named(monkeypatch):
    def forward(self, x):
        return torch.nn.functional.linear(self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    message = "parameters must suit llama, .*its forward reads the weight of down_proj past the adapter there"
    with pytest.raises(SettingError, match=message):
        run(tiny(), [[1, 2]], Overlapping(4, 4), parameters=LoRA(rank=2), update=partial(torch.optim.SGD, lr=0.1))
