"""What the terminal shows."""

import threading

import pytest

from vlmpipe.progress import progress, shown_while


def test_progress_lines_say_how_far(capsys):
    assert list(progress(range(3), 3, "scoring", every_s=0)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("scoring: 3/3 (100%)")


def test_a_view_is_shown_while_the_work_goes_on_and_once_at_its_end():
    seen, looked = [], threading.Event()

    def show(last):
        seen.append(last)
        looked.set()

    with pytest.raises(KeyError), shown_while(show, every_s=0.01):
        assert looked.wait(10)
        raise KeyError("the work's own")
    assert seen[0] is False and seen[-1] is True and seen.count(True) == 1
    shown = len(seen)
    looked.clear()
    assert not looked.wait(0.1) and len(seen) == shown
