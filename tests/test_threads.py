"""Work in threads: its order, and that an error is told when no thread works any more."""

import threading

import pytest

from chestxray.config import StudyError
from chestxray.files import in_threads


@pytest.mark.parametrize("ordered", [True, False])
def test_every_batch_is_worked_on(ordered):
    done = list(in_threads(lambda number: number**2, range(50), 4, ordered))
    expected = [number**2 for number in range(50)]
    assert (done if ordered else sorted(done)) == expected


@pytest.mark.parametrize("ordered", [True, False])
def test_an_error_is_told_when_every_thread_is_done(ordered):
    begun, ended, broken = [], [], threading.Event()

    def work(number):
        begun.append(number)
        if number == 0:
            broken.set()
            raise StudyError("the disk is full")
        broken.wait()
        threading.Event().wait(0.2)  # still writing when the other one fails
        ended.append(number)

    with pytest.raises(StudyError, match="the disk is full"):
        list(in_threads(work, range(100), 2, ordered))
    assert ended == [number for number in begun if number] and len(begun) < 5
