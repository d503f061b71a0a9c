"""Advice: each line comes where it helps, and nowhere else."""

import os
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from running import document, random_tokens, run
from torch import nn

from dynlight import Overlapping, TransformerXL
from dynlight.learning import advice
from dynlight.learning.advice import advise
from dynlight.running.pretrained import Pretrained

TRAINER = SimpleNamespace(world_size=1, precision="32-true")
LONG = [document(random_tokens(300, seed=1))]


def said(recwarn, model=None, context=None, documents=LONG, trainer=TRAINER, compile=False) -> list[str]:
    advise(model or tiny(), context or Overlapping(16, 64), documents, trainer, compile)
    return [str(each.message) for each in recwarn]


def test_a_run_that_is_as_it_should_be_gets_none(recwarn):
    assert said(recwarn) == []


class OnGpu(nn.Module):
    """A model that says it lies on a GPU."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device = model, model.config, torch.device("cuda")


@pytest.mark.parametrize(("segment", "compile", "lines"), [(16, False, 1), (256, False, 0), (16, True, 0)])
def test_short_segments_on_a_gpu(recwarn, segment, compile, lines):
    found = said(recwarn, OnGpu(tiny()), Overlapping(segment, segment), compile=compile)
    assert len(found) == lines and all("set model.compile" in line for line in found)


@pytest.mark.parametrize(("threads", "cores", "lines"), [(1, 8, 1), (8, 8, 0)])
def test_threads_that_are_not_used(recwarn, monkeypatch, threads, cores, lines):
    monkeypatch.setattr(advice, "_LARGE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert said(recwarn) == ["8 cores, of which this run uses 1; set OMP_NUM_THREADS=8"] * lines


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bf16_on_a_cpu_without_its_instructions(recwarn, monkeypatch, precision):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    found = said(recwarn, trainer=SimpleNamespace(world_size=1, precision=precision))
    assert [line.partition(":")[0] for line in found] == ["trainer.precision"] * ("bf16" in precision)
    assert any("model.dtype: bfloat16" in line for line in said(recwarn, tiny().bfloat16()))


def test_windows_that_read_a_token_many_times(recwarn):
    (line,) = said(recwarn, context=Overlapping(8, 64))
    assert line.startswith("each token is read 8 times; TransformerXL(segment 8, memory 56, sinks 4) has")


def test_windows_that_a_memory_cannot_take_the_place_of(recwarn):
    assert said(recwarn, tiny("gpt2"), Overlapping(8, 64)) == []


class HeedsTheFirst(nn.Module):
    """Attention whose output is nothing to rely on unless the position at which a text begins is in view."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, past_key_values=None, position_ids=None, **settings):
        held = past_key_values.get_seq_length() if past_key_values is not None else 0
        output, weights = self.inner(
            hidden_states, past_key_values=past_key_values, position_ids=position_ids, **settings
        )
        begins = int(position_ids[0, 0]) - held  # the first position in view
        return (output if begins == 0 else output + 5), weights


def heedful():
    model = Pretrained("tiny-books").load()
    model.model.layers[0].self_attn = HeedsTheFirst(model.model.layers[0].self_attn)
    return model


def test_a_model_that_misses_its_first_tokens(recwarn):
    (line,) = said(recwarn, heedful(), TransformerXL(16, 32))
    assert line.startswith("this model reads ") and line.endswith("set context.sinks: 4")


@pytest.mark.parametrize(
    ("context", "length"),
    [
        (TransformerXL(16, 32, sinks=4), 300),
        (TransformerXL(16, 0), 300),
        (TransformerXL(16, 300), 300),
        (TransformerXL(16, 32), 40),
    ],
)
def test_no_trial_where_none_can_drop_out(recwarn, context, length):
    assert said(recwarn, heedful(), context, [document(random_tokens(length, seed=1))]) == []


def test_a_run_warns():
    with pytest.warns(UserWarning, match="each token is read 8 times"):
        run(tiny(), [random_tokens(30, seed=1)], Overlapping(4, 32))
