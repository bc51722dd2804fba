"""Write the parts of the documentation that come from the catalogue and the committed results.

A generated part stands between two marker comments, ``<!-- NAME:start -->`` and
``<!-- NAME:end -->``; everything else is written by hand.

    python docs/generate.py           # rewrite what is stale
    python docs/generate.py --check   # change nothing; name what is stale and exit with 1
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
    stale = {path: content for path, content in expected(ROOT) if _read(path) != content}
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
    yield _filled(root / "README.md", "systems", systems_table("docs/systems/", root))
    index = root / "docs/systems/index.md"
    yield _filled(index, "systems", systems_table("", root))
    benchmark = rl_benchmark(root / "benchmarks/results/rl.json")
    yield _filled(root / "docs/benchmarks.md", "benchmark-rl", benchmark)
    for system in catalog.SYSTEMS:
        page = root / f"docs/systems/{system.name}.md"
        if not page.exists():
            continue
        results = root / "results" / system.name
        figures = sorted(results.glob("figures/*.svg"))
        yield _filled(page, "results", results_section(results, figures))
        for figure in figures:
            yield root / "docs/figures" / _figure_name(figure), figure.read_bytes()


def systems_table(pages: str, root: Path) -> str:
    """Return the table of all systems; ``pages`` is the way to their pages from the reader."""
    return _table(
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


def rl_benchmark(file: Path) -> str:
    """Return what the committed measurement of training speed says."""
    if not file.exists():
        return "No result is committed yet."
    result = json.loads(file.read_text(encoding="utf-8"))
    settings, machine = result["settings"], result["machine"]
    facts = (
        f"{settings['rounds']} rounds; {settings['rollouts']} counted rollouts of "
        f"{settings['steps']} steps of {settings['num_envs']} environments, "
        f"{settings['epochs']} epochs each; {machine['processor']}, {settings['threads']} thread; "
        f"{result['wall_seconds'] / 60:.0f} minutes. Versions: {_versions(result)}."
    )
    ratios = _table(
        ["task", "minibatch", "CPU time of the better peer by Steelyard's"],
        (
            [row["env"], str(row["minibatch"]), f"**{_middle(row['ratio'])}**"]
            for row in result["against_better"]
        ),
    )
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["summary"]:
        cases[f"{row['env']}, minibatch {row['minibatch']}"].append(row)
    tables = [f"### {case}\n\n{_speed_table(rows)}" for case, rows in cases.items()]
    return "\n\n".join([facts, ratios, *tables])


def _speed_table(rows: Iterable[dict[str, Any]]) -> str:
    parts = ("stepping", "update", "rest")
    return _table(
        [
            "training loop",
            "CPU ms a step",
            "steps a CPU second",
            "by Steelyard's",
            *parts,
            "peak MiB (at start)",
        ],
        (
            [
                row["contestant"],
                f"{row['ms_per_step']['cpu']:.3f}",
                number(1000 / row["ms_per_step"]["cpu"]),
                _middle(row["ratio"]),
                *(f"{row['ms_per_step'][part]:.3f}" for part in parts),
                f"{row['peak_mib']:.0f} ({row['start_mib']:.0f})",
            ]
            for row in rows
        ),
    )


def _middle(values: Sequence[float]) -> str:
    middle, low, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def _judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [claim for claim in result.get("claims", ()) if claim["verdict"] != "NOT RUN"]


def _result(name: str, result: dict[str, Any]) -> str:
    facts = (
        f"`{command(result)}`: {len(result['seeds'])} seeds, {result['steps']:,} steps, "
        f"{result['wall_seconds'] / 60:.0f} minutes on {result['machine']['cores']} cores "
        f"({result['machine']['processor']}), {result['steps_per_second']:,.0f} steps a second. "
        f"Versions: {_versions(result)}."
    )
    failed = "".join(
        f"\n\nSeed {seed} failed: {reason}" for seed, reason in result.get("failed", {}).items()
    )
    judged = [claim for claim in result["claims"] if claim["verdict"] != "NOT RUN"]
    claims = (
        "No claim is judged on this part."
        if not judged
        else _table(
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
        table = _table(
            ["trial", *(name.replace("_", " ") for name in names)],
            (
                [trial or part, *(_spread(row.get(name, [])) for name in names)]
                for trial, row in rows.items()
            ),
        )
        folded = "\n".join("    " + line for line in table.splitlines())
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


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _filled(path: Path, name: str, content: str) -> tuple[Path, bytes]:
    """Return the file with ``content`` between the markers called ``name``."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{path.name} must hold {start} and {end} once, in this order")
    filled = pattern.sub(lambda _: f"{start}\n\n{content}\n\n{end}", text)
    return path, filled.encode()


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
