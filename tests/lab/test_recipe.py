from pathlib import Path

import pytest

from steelyard.lab import Form, load_recipe

GOOD = '''"""Title.

More."""
from dataclasses import dataclass
from steelyard.lab import Claim, Form

@dataclass(frozen=True)
class Config:
    rates: tuple[float, ...] = (0.1, 0.2)
    name: str = "a"

QUICK = Form(Config(), seeds=2, minutes=1.0)
FULL = Form(Config(name="b"), seeds=3, minutes=2.0)
CLAIMS = (Claim("up", "here", "a", "b", "higher"),)

def run(config, lab):
    return {}
'''


def write(folder: Path, source: str) -> str:
    path = folder / "my_recipe.py"
    path.write_text(source)
    return str(path)


def test_a_users_file_is_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert (recipe.name, recipe.title) == ("my-recipe", "Title.")
    assert recipe.reference == str(tmp_path / "my_recipe.py")
    assert recipe.form("quick").seeds == 2
    assert recipe.form("full").config.name == "b"
    assert (recipe.curves, recipe.figures) == ((), None)
    with pytest.raises(ValueError, match="form must be one of 'quick', 'full', got 'huge'"):
        recipe.form("huge")


def test_a_file_loaded_twice_has_one_config_class_and_an_edited_one_another(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, GOOD)
    first, second = load_recipe(path), load_recipe(path)
    assert first.config_type is second.config_type
    edited = load_recipe(write(tmp_path, GOOD.replace('"a"', '"z"', 1)))
    assert edited.quick.config.name == "z"


def test_a_users_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("NAME = 'n'\n")
    source = GOOD.replace("from dataclasses", "import neighbour_of_mine\nfrom dataclasses", 1)
    assert load_recipe(write(tmp_path, source)).name == "my-recipe"


def test_an_edited_part_of_a_recipe_changes_its_digest(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    alone = load_recipe(path).digest()
    part = tmp_path / f"_{Path(path).stem}_testbed.py"
    part.write_text("SIZE = 1")
    first = load_recipe(path).digest()
    part.write_text("SIZE = 2")
    (tmp_path / "_another_testbed.py").write_text("SIZE = 3")
    assert len({alone, first, load_recipe(path).digest()}) == 3
    part.write_text("SIZE = 1")
    assert load_recipe(path).digest() == first


@pytest.mark.parametrize("name", ["Config", "QUICK", "FULL", "CLAIMS", "run"])
def test_a_file_that_lacks_a_name_says_which(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + f"\ndel {name}\n")
    with pytest.raises(ValueError, match=rf"my_recipe\.py lacks {name}$"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("frozen=True", "frozen=False"), "Config must be a frozen dataclass"),
        (("QUICK = Form(Config(), ", "QUICK = Form(3, "), "QUICK must be Form"),
        (("(Claim(", "(str("), "takes at most|CLAIMS must hold Claim"),
        (("def run", "run = 3\ndef walk"), "run must be a function"),
        (("seeds=2", "seeds=0"), "seeds must be >= 1, got 0"),
        (("minutes=1.0", "minutes=-1.0"), "minutes must be >= 0, got -1.0"),
    ],
)
def test_a_file_with_a_wrong_kind_of_thing_says_so(
    change: tuple[str, str], text: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        load_recipe(write(tmp_path, GOOD.replace(*change, 1)))


def test_an_unknown_recipe_suggests_the_nearest_and_a_lost_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe named 'catalogg'; did you mean 'catalog'"):
        load_recipe("catalogg")
    with pytest.raises(ValueError, match="no recipe named 'zzz'; `steelyard list` shows them"):
        load_recipe("zzz")
    with pytest.raises(ValueError, match=r"no recipe file at .*gone\.py"):
        load_recipe(tmp_path / "gone.py")


def test_a_config_survives_json_or_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    config = recipe.config_type(rates=(0.1, float("inf")), name="x")
    stored = recipe.config_to(config)
    assert stored == {"rates": [0.1, float("inf")], "name": "x"}
    assert recipe.config_from(stored) == config
    for wrong in ([0.1], {0.1}, Path("x"), float("nan")):
        with pytest.raises(ValueError, match="config field rates must be made of"):
            recipe.config_to(recipe.config_type(rates=wrong))
    with pytest.raises(TypeError, match="config must be a my-recipe Config or a dict, got Form"):
        recipe.config_to(Form(config, 1, 1.0))


def test_unknown_and_missing_config_fields_are_named(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="has unknown fields: rate, speed"):
        recipe.config_from({"rates": [], "name": "", "rate": 1, "speed": 2})
    with pytest.raises(ValueError, match="lacks fields: name"):
        recipe.config_from({"rates": []})
