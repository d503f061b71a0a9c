"""A memory that is made anew by the present weights, against a loop that reads the last segments again."""

from functools import partial

import pytest
import reference
import torch
from models import tiny
from running import as_ours, random_tokens, run

from dynlight import LoRA, Matching, NGrams, Records, SettingError, Surprising, TransformerXL, UpdateFrequency

DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((150, 33, 1, 64, 120))]
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("parameters", [Matching(""), LoRA(rank=3)], ids=str)
@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({"memory": 40, "refresh": 1}, {}),
        ({"memory": 32, "refresh": 3, "sinks": 3}, {}),
        ({"memory": 40, "refresh": 2, "sinks": 4}, {"every": 2, "passes": 2}),
    ],
    ids=["each update", "third, sinks", "two passes"],
)
def test_it_equals_the_reference(architecture, parameters, settings, schedule):
    theirs = tiny(architecture)
    parameters.prepare(theirs)
    expected = reference.evaluate(
        theirs,
        DOCUMENTS,
        0,
        segment=16,
        make_optimizer=partial(as_ours, SGD),
        learns=lambda i: (i + 1) % schedule.get("every", 1) == 0,
        passes=schedule.get("passes", 1),
        **settings,
    )
    for together in (1, 4):
        choices = {"parameters": parameters, "update": SGD, "schedule": UpdateFrequency(**schedule)}
        found = run(tiny(architecture), DOCUMENTS, TransformerXL(16, **settings), together=together, **choices)
        for mine, other in zip(found.nats, expected, strict=True):
            if mine:
                torch.testing.assert_close(torch.cat(mine), torch.cat(other), rtol=1e-4, atol=1e-4)
                assert float(sum(map(torch.sum, mine))) == pytest.approx(float(sum(map(torch.sum, other))), rel=1e-5)


def test_it_changes_what_is_read_next():
    carried, anew = (run(tiny(), DOCUMENTS, TransformerXL(16, 40, refresh=m), update=SGD) for m in (None, 1))
    assert torch.equal(carried.nats[0][0], anew.nats[0][0])
    assert not torch.equal(carried.nats[0][1], anew.nats[0][1])


@pytest.mark.parametrize("together", [1, 4])
def test_with_nothing_learned_or_no_time_for_it_it_is_what_is_carried(together):
    rate_0 = partial(torch.optim.SGD, lr=0.0)
    for update, refresh in ((SGD, 10**6), (rate_0, 1), (rate_0, 2)):
        contexts = TransformerXL(16, 40, sinks=3), TransformerXL(16, 40, sinks=3, refresh=refresh)
        carried, anew = (run(tiny(), DOCUMENTS, each, together=together, update=update) for each in contexts)
        # To the last bit, but for sums in another order where fewer documents are read again than were read together.
        apart = 0.0 if together == 1 or refresh > 100 else 1e-5
        for mine, other in zip(anew.nats, carried.nats, strict=True):
            for each, same in zip(mine, other, strict=True):
                torch.testing.assert_close(each, same, rtol=apart, atol=apart)


def test_rows_of_a_mixture_each_have_a_memory_by_their_own_weights():
    choices = {"update": torch.optim.SGD, "rates": [0.01, 0.1], "reference": "static", "memories": [NGrams(4, 3.0)]}
    context = TransformerXL(16, 40, refresh=1)
    alone, together = (run(tiny(), DOCUMENTS, context, together=n, **choices) for n in (1, 4))
    for mine, other in zip(alone.nats, together.nats, strict=True):
        if mine:
            torch.testing.assert_close(torch.cat(mine), torch.cat(other), rtol=1e-4, atol=1e-4)


@pytest.mark.flops
def test_flops_are_those_of_the_segments_that_are_read_again():
    records, without = Records(), Records()
    run(tiny(), [DOCUMENTS[0]], TransformerXL(16, 40, sinks=3, refresh=2), [records], update=SGD, reference="static")
    run(tiny(), [DOCUMENTS[0]], TransformerXL(16, 40, sinks=3), [without], update=SGD, reference="static")
    more = (records.segments.flops - without.segments.flops).tolist()
    forward = without.segments.forward_flops.tolist()
    # 10 segments, the last of 6 tokens; after every second up to three are read again, but for the last.
    assert more == [0, sum(forward[0:2]), 0, sum(forward[1:4]), 0, sum(forward[3:6]), 0, sum(forward[5:8]), 0, 0]
    assert records.segments.updates.tolist() == without.segments.updates.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(TransformerXL, 16, 40, refresh=0), "context.refresh must be at least 1, got 0"),
        (partial(TransformerXL, 16, 0, refresh=1), "context.refresh must be null with context.memory 0, got 1"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(SettingError, match=message):
        make()


@pytest.mark.parametrize("choice", [{"objective": Surprising(4.0)}, {"schedule": UpdateFrequency(above=4.0)}], ids=["objective", "schedule"])
def test_rows_that_learn_at_different_times_are_refused(choice):
    with pytest.raises(SettingError, match="context.refresh must be null where each row asks its score"):
        run(tiny(), DOCUMENTS, TransformerXL(16, 40, refresh=1), update=SGD, **choice)
