"""The tables of the page on reliability, from the committed results of its campaigns."""

import json
from pathlib import Path

from page_parts import table, versions

OUTCOMES = ("trials", "recovered", "refused", "lost", "wrong", "hits")


def faults_table(file: Path) -> str:
    """Return what a campaign of ``reliability/faults.py`` found."""
    if not file.exists():
        return "No result is committed yet."
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = result["rows"]
    total = [str(sum(row[key] for row in rows)) for key in OUTCOMES]
    skipped = "".join(f" {kind} was skipped: {why}." for kind, why in result["skipped"].items())
    return "\n\n".join(
        (
            f"Seed {result['seed']}; {versions(result)}.{skipped}",
            table(
                ["kind", "recipe", *OUTCOMES],
                [
                    *(
                        [row["kind"], row["recipe"], *(str(row[key]) for key in OUTCOMES)]
                        for row in rows
                    ),
                    ["all", "", *total],
                ],
            ),
        )
    )


def fuzz_table(file: Path) -> str:
    """Return what a campaign of ``reliability/fuzz.py`` found."""
    if not file.exists():
        return "No result is committed yet."
    result = json.loads(file.read_text(encoding="utf-8"))
    packages: dict[str, list[int]] = {}
    counts = ("tried", "accepted", "refused", "bad")
    for name, found in result["by_function"].items():
        sums = packages.setdefault(name.split(".")[0], [0] * (len(counts) + 3))
        values = (1, *(found[key] for key in counts), len(found["open"]), len(found["known"]))
        packages[name.split(".")[0]] = [a + b for a, b in zip(sums, values, strict=True)]
    rows = [[name, *map(str, sums)] for name, sums in sorted(packages.items())]
    total = [str(sum(column)) for column in zip(*packages.values(), strict=True)]
    return "\n\n".join(
        (
            f"{result['tried']:,} inputs, seed {result['seed']}, up to {result['examples']} a "
            f"function; {versions(result)}. *Open*: cases still to be mended; *known*: cases that "
            "stand for a reason.",
            table(["package", "functions", *counts, "open", "known"], [*rows, ["all", *total]]),
        )
    )


def determinism_table(file: Path) -> str:
    """Return what ``reliability/determinism.py`` compared."""
    if not file.exists():
        return "No result is committed yet."
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        [
            row["recipe"],
            str(row["files"]),
            f"{row['bytes']:,}",
            ", ".join(row["different"]) or "none",
            f"{row['seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    seeds = "one seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    return "\n\n".join(
        (
            f"Quick form, {seeds}; {versions(result)}.",
            table(["recipe", "files compared", "bytes", "files that differ", "seconds"], rows),
        )
    )
