"""Tables of the recipe ``fair_dcov``, and how scores on them are judged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from steelyard.diffusion import hypervolume
from steelyard.lab import data
from steelyard.lab.loans import auc
from steelyard.tabular import group_js, unfairness
from steelyard.tabular._sensitive import intersectional_groups

Array = NDArray[np.float64]

_LARGE = ("African-American", "Caucasian")
_LATIN = {"Hispanic": "Latin", "Mexican": "Latin", "Puertorican": "Latin", "Amerindian": "Other"}


@dataclass(frozen=True)
class Study:
    """Features ``[n, m]``, outcomes ``[n]``, protected attributes, and the cell of each row."""

    features: Array
    outcome: Array
    sensitive: dict[str, NDArray[Any]]
    cells: NDArray[np.str_]
    regression: bool = False

    def rows(self, index: NDArray[np.int64]) -> "Study":
        """Return some of the rows."""
        sensitive = {name: values[index] for name, values in self.sensitive.items()}
        parts = (self.features[index], self.outcome[index], sensitive, self.cells[index])
        return Study(*parts, self.regression)


def make_study(
    columns: list[Any], outcome: Array, sensitive: dict[str, NDArray[Any]], **more: bool
) -> Study:
    """Stack the columns; cells are the combinations, with age in four bins."""
    features = np.column_stack(columns).astype(np.float64)
    return Study(features, outcome, sensitive, intersectional_groups(sensitive), **more)


def xor(rows: int, seed: int) -> Study:
    """Draw two fair bits, a fair feature, and a proxy of the exclusive or that predicts."""
    random = np.random.default_rng((seed, 1))
    first, second = random.integers(0, 2, (2, rows))
    fair = random.normal(size=rows)
    proxy = 2 * (first ^ second) - 1 + 0.7 * random.normal(size=rows)
    outcome = (random.random(rows) < special.expit(fair + proxy)).astype(np.float64)
    bits = {"s1": first.astype(np.float64), "s2": second.astype(np.float64)}
    return make_study([fair, proxy], outcome, bits)


@cache
def real(name: str) -> Study:
    """Read one of the three tables; counts and amounts enter as logarithms."""
    if name == "compas":
        table = data.compas()
        columns = [np.log1p(table[key]) for key in table if key.endswith("_count")]
        race = np.where(np.isin(table["race"], _LARGE), table["race"], "Other")
        sensitive = {"sex": table["sex"], "race": race, "age": table["age"]}
        return make_study([*columns, table["felony"]], table["two_year_recid"], sensitive)
    if name == "law":
        table = data.law_school()
        race = np.array([_LATIN.get(label, label) for label in table["race"]])
        columns = [table["LSAT"], table["UGPA"]]
        sensitive = {"race": race, "sex": table["sex"]}
        return make_study(columns, table["ZFYA"], sensitive, regression=True)
    table = data.taiwan_default()
    amounts = [table[key] for key in table if "_AMT" in key or key == "LIMIT_BAL"]
    columns = [np.sign(amount) * np.log1p(np.abs(amount)) for amount in amounts]
    columns += [table[f"PAY_{month}"] for month in (0, 2, 3, 4, 5, 6)]
    columns += [table["EDUCATION"] == level for level in ("1", "2", "3")]
    return make_study(columns, table["bad"], {"sex": table["SEX"], "age": table["AGE"]})


def split(study: Study, most: int, seed: int) -> tuple[Study, Study]:
    """Draw at most ``most`` rows; 60 % of them train, the others test. Features standardised."""
    random = np.random.default_rng((seed, 2))
    order = random.permutation(len(study.outcome))[:most]
    cut = round(0.6 * len(order))
    train, test = study.rows(order[:cut]), study.rows(order[cut:])
    mean, scale = train.features.mean(0), train.features.std(0)
    for half in (train, test):
        half.features[:] = (half.features - mean) / np.where(scale > 0, scale, 1.0)
    return train, test


def judge(test: Study, score: Array, accepted: Array | None, permutations: int) -> dict[str, float]:
    """Skill and dependence on the protected attributes, less what chance gives."""
    found = {
        "divergence": above_chance(partial(_divergence, score), test.cells, permutations),
        "published": above_chance(partial(_published, score), test.cells, permutations),
        "unfairness": unfairness(score, test.cells),
        "gap": float(np.ptp([score[test.cells == cell].mean() for cell in np.unique(test.cells)])),
    }
    if "age" in test.sensitive:
        age = intersectional_groups({"age": test.sensitive["age"]}, bins=10)
        found["age"] = above_chance(partial(_divergence, score), age, permutations)
    if accepted is None:
        error = float(np.square(score - test.outcome).mean())
        return found | {"error": error, "skill": 1 - error / float(test.outcome.var())}
    right = float(np.where(test.outcome == 1, accepted, 1 - accepted).mean())
    base = max(float(test.outcome.mean()), 1 - float(test.outcome.mean()))
    area = auc(test.outcome, score)
    return found | {
        "auc": area,
        "skill": 2 * area - 1,
        "accuracy": right,
        "decision_skill": right - base,
        "decision": above_chance(partial(decision_information, accepted), test.cells, permutations),
    }


def above_chance(measure: Any, groups: NDArray[Any], permutations: int) -> float:
    """Measure on the groups, less its mean over permuted groups."""
    random = np.random.default_rng(0)
    chance = [measure(random.permutation(groups)) for _ in range(permutations)]
    return float(measure(groups) - np.mean(chance))


def _divergence(score: Array, groups: NDArray[Any]) -> float:
    return group_js(score, groups, bandwidth="relative", grid=200)


def _published(score: Array, groups: NDArray[Any]) -> float:
    return group_js(score, groups, bandwidth=0.15, grid=200)


def decision_information(accepted: Array, groups: NDArray[Any]) -> float:
    """Mutual information of group and decision in bits; decisions may be probabilities."""
    index = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(index)
    rates = np.bincount(index, accepted) / sizes

    def entropy(rate: Any) -> Any:
        return (special.entr(rate) + special.entr(1 - rate)) / np.log(2)

    return float(entropy(accepted.mean()) - sizes / len(index) @ entropy(rates))


def volume(points: Sequence[Mapping[str, float]], none: Mapping[str, float], keys: Any) -> float:
    """Area that the points dominate: shares of skill lost and of dependence left, up to 1."""
    skill, dependence = keys
    shares = [
        (1 - point[skill] / none[skill], point[dependence] / none[dependence]) for point in points
    ]
    inside = torch.tensor(shares, dtype=torch.float64).clamp(min=0.0)
    return float(hypervolume(inside, torch.ones(2, dtype=torch.float64)))


def cell_means(score: Array, cells: NDArray[np.str_]) -> dict[str, float]:
    """Mean score of each cell of at least 20 rows."""
    names, sizes = np.unique(cells, return_counts=True)
    return {f"cell/{n}": float(score[cells == n].mean()) for n in names[sizes >= 20]}
