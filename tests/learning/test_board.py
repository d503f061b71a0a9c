"""The board on which processes tell each other what they did."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from dynlight.learning.processes import board
from dynlight.learning.processes.board import Board, ProcessFailedError


@pytest.fixture
def two():
    store = HashStore()
    return Board(store, 0, 2), Board(store, 1, 2)


def test_alone_a_process_hears_itself():
    alone = Board()
    assert alone.total("sums", [1, 2.5]) == [1, 2.5]
    assert alone.gather("end", {"a": 1}) == [{"a": 1}]
    assert alone.of_first("folder", "x") == "x"
    alone.wait("here")
    alone.look()
    alone.leave()


def test_the_first_sees_sums_of_what_was_told(two, monkeypatch):
    first, second = two
    assert first.total("sums", [1, 10]) == [1, 10], "nobody else has told anything"
    second.total("sums", [2, 20], at_once=True)
    assert first.total("sums", [3, 30]) == [3, 30], "looked up less than a second ago"
    assert first.total("sums", [3, 30], at_once=True) == [5, 50]
    assert second.total("sums", [2, 20]) == [2, 20]


def test_words_are_gathered_where_all_have_come(two):
    with ThreadPoolExecutor() as pool:
        later = pool.submit(lambda: (time.sleep(0.2), two[1].of_first("name", "b"), two[1].gather("end", "second"))[1:])
        assert two[0].of_first("name", "a") == "a"
        assert two[0].gather("end", "first") == ["first", "second"]
        assert later.result() == ("a", [])


def test_one_that_fails_stops_the_others(two, monkeypatch):
    monkeypatch.setattr(board, "_AGE", 0.0)
    two[1].fail("process 1 failed", status=2)
    two[0].fail("process 0 failed of it", status=1)
    for each in two:
        with pytest.raises(ProcessFailedError, match="^process 1 failed$") as error:
            each.wait(f"where {each.rank} is alone")
        assert error.value.status == 2


def test_one_that_gives_no_sign_is_not_waited_for():
    first = Board(HashStore(), 0, 2, patience=timedelta(seconds=0.3))
    with pytest.raises(ProcessFailedError, match="process 1 gave no sign for 0 s"):
        first.wait("here")


def test_the_first_leaves_last(two):
    began = time.monotonic()
    two[0].leave(patience=0.2)
    assert time.monotonic() - began >= 0.2
    two[1].leave()
    began = time.monotonic()
    two[0].leave(patience=9)
    assert time.monotonic() - began < 1
