"""Runs a recipe: seeds, storage, resume, statistics, plots and the report. Knows no method.

A recipe declares a configuration, claims and ``run(config, lab)``; the lab does the rest. How a
run is stored, resumed and judged is described in ``docs/concepts/lab.md``.
"""

from steelyard.lab.claims import Claim, Judgement, interquartile_mean, judge
from steelyard.lab.recipe import Form, Recipe, load_recipe, prefixed
from steelyard.lab.storage import LabError, StorageError
from steelyard.lab.training import Lab, Learner, NonFiniteError, StoppedError

__all__ = [
    "Claim",
    "Form",
    "Judgement",
    "Lab",
    "LabError",
    "Learner",
    "NonFiniteError",
    "Recipe",
    "StoppedError",
    "StorageError",
    "interquartile_mean",
    "judge",
    "load_recipe",
    "prefixed",
]
