import io
import json
import os
import time
from typing import Any

import pytest
from rich.console import Console

from steelyard.lab import progress
from steelyard.lab.progress import duration, open_display
from steelyard.lab.worker import Channel


def show(*, terminal: bool, steps: int = 1) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with open_display(console, seeds=3, finished=1) as display:
        display.started("seed 2")
        for step in range(steps):
            display.progressed("seed 2", "control/Hopper-v5/bpo", 4096 + step, 1_000_000, 1234.5)
        if terminal:
            time.sleep(0.6)  # bars are drawn four times a second
        display.note("a line with [brackets] and /a/path/that/is/" + "long/" * 20 + "end")
        display.ended("seed 2", None)
    return file.getvalue()


def test_a_terminal_gets_a_bar_for_each_running_seed_and_one_for_all() -> None:
    shown = show(terminal=True)
    assert "seed 2 control/Hopper-v5/bpo" in shown
    assert "4,096 of 1,000,000 steps, 1,234/s, 13 min left" in shown
    assert "seeds finished" in shown
    assert "2 of 3" in shown


def test_a_file_gets_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Hopper" not in show(terminal=False, steps=50)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    shown = show(terminal=False)
    line = "seed 2 control/Hopper-v5/bpo: 4,096 of 1,000,000 steps, 1,234/s, 13 min left\n"
    assert shown.startswith(line)
    assert "a line with [brackets] and /a/path/that/is/" + "long/" * 20 + "end\n" in shown
    assert shown.endswith("seed 2: finished (2 of 3 seeds finished)\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "1 h 00 min"), (36_000, "10 h 00 min")],
)
def test_durations_are_rounded_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_worker_never_waits_for_a_parent_that_does_not_listen() -> None:
    listen, speak = os.pipe()
    channel = Channel(speak)
    began = time.monotonic()
    for step in range(3000):  # more than a pipe holds
        channel.progress(f"trial{step}", step, None)
    assert time.monotonic() - began < 5
    lines = os.read(listen, 1 << 20).decode().split("\n")
    assert json.loads(lines[0])["trial"] == "trial0"
    os.close(listen)
    channel.warn("nobody is there")  # nor does it die of it
    os.close(speak)


def test_progress_is_sent_at_most_five_times_a_second_and_warnings_always() -> None:
    listen, speak = os.pipe()
    channel = Channel(speak)
    for step in range(1000):
        channel.progress("trial", step, 1000)
    channel.warn("w" * 5000)
    os.close(speak)
    messages: list[dict[str, Any]] = [
        json.loads(line) for line in os.read(listen, 1 << 20).splitlines()
    ]
    os.close(listen)
    assert len(messages) == 2
    assert messages[1] == {"warning": "w" * 1000}
