import statistics
import subprocess
import sys
import time

import pytest

import steelyard

OPTIONAL = ("gymnasium", "trl", "transformers", "ray", "flwr", "stable_baselines3", "mujoco")
HEAVY = ("torch", "numpy", "scipy", "matplotlib", "rich", "tyro", "jinja2", "tensorboard")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


def seconds(statement: str) -> float:
    def once() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - begin

    return statistics.median(once() for _ in range(5))


def test_importing_steelyard_loads_nothing_heavy():
    assert not loaded_by("import steelyard") & {*HEAVY, *OPTIONAL}


def test_importing_steelyard_takes_under_a_fifth_of_a_second():
    assert seconds("import steelyard") - seconds("pass") < 0.2


def test_the_catalogue_loads_nothing_heavy():
    assert not loaded_by("import steelyard.recipes.catalog, steelyard.cli") & {*HEAVY, *OPTIONAL}


def test_no_package_loads_an_extra():
    packages = ["divergences", "fused", "policy", "integrations", "recipes"]
    statement = "; ".join(f"import steelyard.{package}" for package in packages)
    assert not loaded_by(statement) & {*OPTIONAL}


def test_the_lab_loads_no_extra_and_nothing_of_the_command_line():
    shell = {"matplotlib", "tyro", "rich", "jinja2", "tensorboard"}
    assert not loaded_by("import steelyard.lab") & {*OPTIONAL, *shell}


def test_a_package_loads_on_first_use():
    assert steelyard.divergences.__name__ == "steelyard.divergences"


def test_an_unknown_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = steelyard.nonsense
