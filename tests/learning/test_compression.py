"""What is sent of a gradient, and what is made of it: in one process, and against `Compressed`."""

import math

import pytest
import torch
import torch.distributed as dist

from dynlight import Compressed, CompressedGradients, SettingError
from dynlight.choices.gradient import RowGradients


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "settings", [{"share": 0.1}, {"share": 1.0}, {"bits": 1}, {"bits": 2}, {"bits": 4}, {"bits": 8}], ids=str
)
def test_it_sends_what_compressed_keeps(alone, settings):
    generator = torch.Generator().manual_seed(0)
    sent, change, error = CompressedGradients(**settings), Compressed(**settings), torch.zeros(1, 203)
    for step in range(1, 4):
        gradient = torch.randn(203, generator=generator)
        expected = gradient[None].clone()
        change.change(RowGradients({0: expected}, lambda: None, [error]))
        torch.testing.assert_close(sent.exchanged(gradient), expected[0], rtol=1e-5, atol=1e-6)
        assert sent.bytes_whole == step * 4 * 203
        size = 8 * round(settings["share"] * 203) if "share" in settings else 4 + math.ceil(203 * settings["bits"] / 8)
        assert sent.bytes_sent == step * size


@pytest.mark.parametrize("settings", [{"share": 0.1}, {"bits": 2}], ids=str)
def test_a_gradient_that_is_no_number_is_told_and_leaves_nothing(alone, settings):
    state = CompressedGradients(**settings)
    broken, healthy = torch.ones(20), torch.ones(20)
    broken[3] = math.nan
    assert not state.exchanged(broken).isfinite().all()
    assert state.exchanged(healthy).isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"share": 0.1, "bits": 2}, {"share": 0.0}, {"bits": 3}], ids=str)
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(SettingError, match="trainer.strategy.ddp_comm_state"):
        CompressedGradients(**settings)
