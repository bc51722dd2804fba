"""The settings of a run stay those it began with."""

import shutil
from pathlib import Path

import pytest

from steelyard.lab import LabError, load_recipe
from steelyard.lab.setup import Setup, new_setup
from steelyard.lab.storage import read_sealed


@pytest.fixture
def begun(tmp_path: Path, toy_path: str):
    """Write the settings of a run with so many steps; return its folder."""

    def begin(steps: int) -> Path:
        folder = tmp_path / str(steps)
        folder.mkdir()
        recipe = load_recipe(toy_path)
        options = {"checkpoint_seconds": 0.0, "tensorboard": False}
        new_setup(recipe, "quick", {"steps": steps}, 2, 1, **options).write(folder)
        return folder

    return begin


def test_settings_of_another_run_are_refused(begun) -> None:
    ours, theirs = begun(8), begun(9)
    before = (ours / "seeds/config.json").read_bytes()
    shutil.copy(theirs / "config.json", ours / "config.json")
    with pytest.raises(LabError, match=r"are of different runs; put back the one") as caught:
        Setup.read(ours)
    assert "\n" not in str(caught.value)
    assert (ours / "seeds/config.json").read_bytes() == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_a_copy_of_the_settings_that_is_gone_or_damaged_does_not_stop_a_run(begun, damage) -> None:
    folder = begun(8)
    assert read_sealed(folder / "seeds/config.json") == read_sealed(folder / "config.json")
    damage(folder / "seeds/config.json")
    assert Setup.read(folder).config["steps"] == 8
