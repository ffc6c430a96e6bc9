"""Bars in a notebook: one output, drawn anew; what a notebook itself does is a stand-in."""

import sys
import time
from types import SimpleNamespace

from rich.console import Console

from probe.run import progress_bar


def test_bars_in_a_notebook_are_one_output_that_is_drawn_anew(monkeypatch):
    drawn = []

    class Handle:
        def update(self, shown):
            drawn.append(shown._repr_mimebundle_([], [])["text/plain"])

    def display(shown, display_id):
        assert display_id is True
        drawn.append("begun")
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    with progress_bar(Console(force_jupyter=True)) as progress:
        task = progress.add_task("attribution", total=3)
        progress.advance(task, 2)
        deadline = time.monotonic() + 20
        while not any("2/3" in text for text in drawn) and time.monotonic() < deadline:
            time.sleep(0.02)
        progress.advance(task, 1)
    assert drawn.count("begun") == 1
    assert any("2/3" in text for text in drawn)
    assert "3/3" in drawn[-1]
    assert "attribution" in drawn[-1]
    count = len(drawn)
    time.sleep(0.4)
    assert len(drawn) == count  # nothing goes on drawing


def test_bars_elsewhere_are_those_of_rich():
    assert type(progress_bar(Console(force_jupyter=False))).__name__ == "Progress"
