"""Write the parts of the documentation that come from the catalogue and the committed results.

A generated part stands between two marker comments, ``<!-- NAME:start -->`` and
``<!-- NAME:end -->``; everything else is written by hand.

    python docs/generate.py           # rewrite what is stale
    python docs/generate.py --check   # change nothing; name what is stale and exit with 1
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmark_pages import (
    divergence_benchmark,
    fused_benchmark,
    paired_benchmark,
    rl_benchmark,
)
from page_parts import filled, read, table, versions
from reliability_pages import determinism_table, faults_table, fuzz_table

from steelyard.lab import interquartile_mean
from steelyard.lab._format import effect, number
from steelyard.lab.report import command
from steelyard.recipes import catalog

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check every generated file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail when stale")
    check = parser.parse_args(arguments).check
    stale = {path: content for path, content in expected(ROOT) if read(path) != content}
    for path, content in stale.items():
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    if check and stale:
        print("run: python docs/generate.py")
    return int(check and bool(stale))


def expected(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield each generated file of the tree at ``root`` with the content it should have."""
    yield filled(root / "README.md", {"systems": systems_table("docs/systems/", root)})
    index = root / "docs/systems/index.md"
    yield filled(index, {"systems": systems_table("", root)})
    measured = root / "benchmarks/results"
    benchmarks = {"benchmark-rl": rl_benchmark(measured / "rl.json")}
    for name in ("methods", "rlvr", "preference", "distillation", "tabular"):
        benchmarks[f"benchmark-{name}"] = paired_benchmark(measured / f"{name}.json")
    yield filled(root / "docs/benchmarks.md", benchmarks)
    broken = root / "reliability/results"
    tables = {
        "faults": faults_table(broken / "faults.json"),
        "fuzz": fuzz_table(broken / "fuzz.json"),
        "determinism": determinism_table(broken / "determinism.json"),
    }
    yield filled(root / "docs/reliability.md", tables)
    yield from fused_benchmark(root)
    yield from divergence_benchmark(root)
    for system in catalog.SYSTEMS:
        page = root / f"docs/systems/{system.name}.md"
        results = root / "results" / system.name
        if not page.exists() or not results.exists():
            continue
        figures = sorted(results.glob("figures/*.svg"))
        yield filled(page, {"results": results_section(results, figures)})
        for figure in figures:
            yield root / "docs/figures" / _figure_name(figure), figure.read_bytes()


def systems_table(pages: str, root: Path) -> str:
    """Return the table of all systems; ``pages`` is the way to their pages from the reader."""
    return table(
        ["", "system", "what it is for", "package", "paper", "status"],
        (
            [
                str(s.number),
                _system_link(s, pages, root),
                s.purpose,
                f"`{s.package}`",
                f"[{s.arxiv}](https://arxiv.org/abs/{s.arxiv})",
                catalog.status(s),
            ]
            for s in catalog.SYSTEMS
        ),
    )


def results_section(folder: Path, figures: Iterable[Path]) -> str:
    """Return what the committed results of one system say: verdicts, figures, all numbers."""
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    order = sorted(results, key=lambda stem: (not _judged(results[stem]), stem != "full", stem))
    results = {stem: results[stem] for stem in order}
    parts = [_result(name, result) for name, result in results.items() if "claims" in result]
    if not parts:
        return "No result is committed yet."
    images = [f"![{path.stem}](../figures/{_figure_name(path)})" for path in figures]
    return "\n\n".join([parts[0], *images, *parts[1:]])


def _judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [claim for claim in result.get("claims", ()) if claim["verdict"] != "NOT RUN"]


def _result(name: str, result: dict[str, Any]) -> str:
    facts = (
        f"`{command(result)}`: {len(result['seeds'])} seeds, {result['steps']:,} steps, "
        f"{result['wall_seconds'] / 60:.0f} minutes on {result['machine']['cores']} cores "
        f"({result['machine']['processor']}), {result['steps_per_second']:,.0f} steps a second. "
        f"Versions: {versions(result)}."
    )
    failed = "".join(
        f"\n\nSeed {seed} failed: {reason}" for seed, reason in result.get("failed", {}).items()
    )
    judged = [claim for claim in result["claims"] if claim["verdict"] != "NOT RUN"]
    claims = (
        "No claim is judged on this part."
        if not judged
        else table(
            ["claim", "verdict", "effect [95 % interval]", "margin", "seeds", "note"],
            (
                [
                    claim["statement"],
                    f"**{claim['verdict']}**",
                    effect(claim),
                    number(claim["margin"]),
                    str(claim["seeds"]),
                    claim["note"],
                ]
                for claim in judged
            ),
        )
    )
    title = f"### Result: {name}"
    return "\n\n".join([title, facts + failed, claims, *_metric_tables(result["metrics"])])


def _metric_tables(metrics: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield one folded table for each part of the experiment: rows are trials, columns metrics.

    A key reads ``part/.../trial/metric``; a cell holds the interquartile mean over the seeds and,
    in brackets, the smallest and largest value.
    """
    values: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for of_seed in metrics.values():
        for key, value in of_seed.items():
            trial, _, name = key.rpartition("/")
            part, _, rest = trial.partition("/")
            values[part][rest][name].append(value)
    for part, rows in values.items():
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        numbers = table(
            ["trial", *(name.replace("_", " ") for name in names)],
            (
                [trial or part, *(_spread(row.get(name, [])) for name in names)]
                for trial, row in rows.items()
            ),
        )
        folded = "\n".join("    " + line for line in numbers.splitlines())
        yield f'??? note "All numbers: {part or "metrics"}"\n\n{folded}'


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    middle = number(interquartile_mean(values))
    low, high = number(min(values)), number(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def _system_link(system: catalog.System, pages: str, root: Path) -> str:
    has_page = (root / f"docs/systems/{system.name}.md").exists()
    return f"[`{system.name}`]({pages}{system.name}.md)" if has_page else f"`{system.name}`"


def _figure_name(figure: Path) -> str:
    """Name a figure in the documentation: ``results/bpo/figures/x.svg`` is ``bpo-x.svg``."""
    return f"{figure.parents[1].name}-{figure.name}"


if __name__ == "__main__":
    sys.exit(main())
