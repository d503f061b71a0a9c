"""Token by token a module predicts what it predicts of a whole segment, and is changed by nothing."""

from functools import partial

import numpy as np
import pytest
import torch
from models import CONFIGS, tiny
from running import random_tokens
from transformers import Lfm2Config

from dynlight import LoRA, Mixture, NeuralCache, NGrams, OutputBias, Overlapping, Reader, SettingError, TransformerXL
from dynlight.learning.token_by_token import TokenByToken, check_token_by_token

TOKENS = torch.tensor(random_tokens(75, 3))
ADAM = partial(torch.optim.AdamW, lr=0.01)
MEMORY, WINDOWS = TransformerXL(16, 24), Overlapping(16, 40)
MEMORIES = [NGrams(4, 3.0), NeuralCache(20, 0.3, 0.2), OutputBias(0.1, over="static"), OutputBias(0.2)]
CASES = {
    **{f"{name} in windows": (name, {"context": WINDOWS}) for name in CONFIGS},
    **{f"{name}, memory": (name, {"context": MEMORY}) for name in ("llama", "gpt_neox", "qwen3", "mistral", "gemma3")},
    "no memory": ("llama", {"context": TransformerXL(16, 0)}),
    "sinks": ("llama", {"context": TransformerXL(16, 24, sinks=3, refresh=2)}),
    "a prefix in each window": ("gemma3", {"context": Overlapping(16, 20, prefix=True)}),
    "experts": ("mixtral", {"context": MEMORY}),
    "soft caps, shared keys": ("gemma4", {"context": WINDOWS}),
    "rates": ("llama", {"context": MEMORY, "update": torch.optim.AdamW, "rates": [0.01, 0.1]}),
    "a mixture of its own": ("llama", {"context": WINDOWS, "update": None, "mixture": Mixture(switching=0.0)}),
    "memories over static": ("llama", {"context": WINDOWS, "update": None, "memories": MEMORIES}),
    "memories over rates": (
        "llama",
        {"context": MEMORY, "update": torch.optim.AdamW, "rates": [0.01, 0.1], "memories": MEMORIES},
    ),
    "memories, and a rate fails": (
        "llama",
        {"context": MEMORY, "update": torch.optim.SGD, "rates": [0.01, 1e9], "memories": MEMORIES},
    ),
    "one rate fails": ("llama", {"context": MEMORY, "update": torch.optim.SGD, "rates": [0.01, 1e9]}),
}


def reader_of(architecture, choices):
    choices = {"parameters": LoRA(rank=2), "update": ADAM} | choices
    tokenizer = type("Tokenizer", (), {"bos_token_id": 0, "eos_token_id": 0})()
    return Reader(tiny(architecture), tokenizer, trainer={"accelerator": "cpu"}, **choices)


@pytest.mark.filterwarnings("ignore:read one row after another")
@pytest.mark.parametrize(("architecture", "choices"), CASES.values(), ids=CASES)
def test_nats_are_those_of_whole_segments(architecture, choices):
    reader, other = reader_of(architecture, choices), reader_of(architecture, choices)
    reader.make_ready()
    check_token_by_token(reader.module)
    for tokens in TOKENS.split(16):
        nats, ahead = [], TokenByToken(reader.module, reader.sequence, len(tokens))
        for place, token in enumerate(tokens.tolist()):
            chances = ahead.probabilities()
            assert chances.sum() == pytest.approx(1, abs=1e-5)
            nats.append(-np.log(chances[token]))
            ahead.take(token, is_last=place == len(tokens) - 1)
        [score], [expected] = reader.read_tokens(tokens), other.read_tokens(tokens)
        assert nats == pytest.approx(score.nats[0].tolist(), abs=2e-5)
        assert torch.equal(score.nats, expected.nats)  # looking ahead has changed nothing


def test_an_earlier_text_is_forgotten():
    reader = reader_of("llama", {"context": MEMORY})
    reader.make_ready()
    first = TokenByToken(reader.module, reader.sequence, 16).probabilities()
    reader.read_tokens(TOKENS)
    assert not np.allclose(TokenByToken(reader.module, reader.sequence, 16).probabilities(), first)
    reader.forget()
    assert np.array_equal(TokenByToken(reader.module, reader.sequence, 16).probabilities(), first)


def test_models_with_states_are_refused():
    reader = reader_of("llama", {"context": MEMORY})
    reader.make_ready()
    reader.module.model.config = Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    with pytest.raises(SettingError, match="model.pretrained must have a cache of keys and values alone"):
        check_token_by_token(reader.module)
