"""Write the parts of the documentation that come from the catalogue and the committed results.

A generated part stands between two marker comments, ``<!-- NAME:start -->`` and
``<!-- NAME:end -->``; everything else is written by hand.

    python docs/generate.py           # rewrite what is stale
    python docs/generate.py --check   # change nothing; name what is stale and exit with 1
"""

import argparse
import hashlib
import inspect
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.lab import interquartile_mean
from steelyard.lab._format import effect, number
from steelyard.lab.report import command
from steelyard.recipes import catalog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    yield from fused_benchmark(root)
    yield from divergence_benchmark(root)
    for system in catalog.SYSTEMS:
        page = root / f"docs/systems/{system.name}.md"
        results = root / "results" / system.name
        if not page.exists() or not results.exists():
            continue
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


def fused_benchmark(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the figures of the fused heads and their page, with the committed measurement."""
    file, page = root / "benchmarks/results/fused.json", root / "docs/concepts/fused.md"
    result = json.loads(file.read_text(encoding="utf-8"))
    for part, other in (("vocabulary", "rows"), ("rows", "vocabulary")):
        rows = [row for row in result["results"] if row["part"] == part]
        if rows:
            figure = root / f"docs/figures/fused-{part}.svg"
            yield figure, _drawn(figure, fused_figure, rows, part, other, helper=_fused_panel)
    yield _filled(page, "benchmark-fused", fused_tables(result))


def fused_tables(result: dict[str, Any]) -> str:
    """Return what the committed measurement of the fused heads says."""
    minutes = sum(result["wall_seconds"].values()) / 60
    used = ("steelyard", "python", "torch", "trl", "liger_kernel", "cut_cross_entropy")
    versions = {name: result["versions"][name] for name in used if name in result["versions"]}
    facts = (
        f"{result['settings']['rounds']} rounds; {result['machine']['processor']} with "
        f"{result['machine']['instructions']}, {result['settings']['threads']} thread; "
        f"{minutes:.0f} minutes. Versions: {_versions({'versions': versions})}."
    )
    rows = [row for row in result["results"] if row["part"] not in ("vocabulary", "rows")]
    sizes: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        many = row["part"] in ("small", "half", "wide")
        sizes[row["task"] if many else "more", row["name"] if many else ""].append(row)
    tables = {
        "`linear_logprobs`, both outputs trained": _peer_table("logprobs", sizes),
        "`linear_divergence`, Jensen-Shannon, frozen teacher": _peer_table("jensen_shannon", sizes),
        "More divergences, bfloat16, and the large size": _case_table(sizes["more", ""]),
        "Targets": _target_table(result["targets"]),
    }
    return "\n\n".join([facts, *(f"### {name}\n\n{table}" for name, table in tables.items())])


def _peer_table(task: str, sizes: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    widths = sorted({row["width"] for (of, _), rows in sizes.items() if of == task for row in rows})
    header = ["", *(f"D = {width}" for width in widths), "MiB", "error"]
    lines = []
    for (of, name), rows in sizes.items():
        if of != task:
            continue
        if "missing" in rows[0]:
            lines.append([name, f"{rows[0]['missing']} is not installed"])
            continue
        by_width = {row["width"]: row for row in rows}
        half = by_width.get(512, rows[0])
        ratios = [_middle(by_width[w]["ratio"]) if w in by_width else "" for w in widths]
        lines.append([name, *ratios, _beside(half), f"{half['error']:.1e}"])
    return _table(header, lines)


def _case_table(rows: Iterable[dict[str, Any]]) -> str:
    return _table(
        ["case", "", "N", "V", "D", "CPU s", "ratio", "MiB", "error"],
        (
            [
                row["task"].replace("_", " ") + (", bfloat16" if row["dtype"] != "float32" else ""),
                row["name"],
                str(row["rows"]),
                str(row["vocabulary"]),
                str(row["width"]),
                f"{row['cpu_seconds']:.2f}",
                f"{row['ratio'][0]:.3f}" if "ratio" in row else "",
                _beside(row),
                _error(row),
            ]
            for row in rows
        ),
    )


def _target_table(targets: Iterable[dict[str, Any]]) -> str:
    words = {True: "met", False: "**missed**", None: "not run"}
    return _table(
        ["size", "case", "by the plain formula's", "at most", "measured", ""],
        (
            [
                row["part"],
                row["task"].replace("_", " "),
                {"ratio": "CPU time", "memory_ratio": "peak memory"}[row["figure"]],
                f"{row['target']:g}",
                "" if row["value"] is None else f"{row['value']:.3f}",
                words[row["met"]],
            ]
            for row in targets
        ),
    )


def _error(row: dict[str, Any]) -> str:
    if "error_with_ties" not in row:
        return f"{row['error']:.1e}" if "error" in row else ""
    ties = f"{row['rows_with_ties']} of {row['rows']} rows with a tie"
    return f"{row['error']:.1e}; {row['error_with_ties']:.1e} with the {ties}"


def _beside(row: dict[str, Any]) -> str:
    return f"{row['peak_extra_mib'] - row['gradients_mib']:.0f}"


def fused_figure(rows: list[dict[str, Any]], along: str, other: str) -> "Figure":
    """Draw CPU time and peak memory of the fused heads over ``N`` or ``V``, both axes in powers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from steelyard.lab.plots import STYLE

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    symbols = {"vocabulary": "V (vocabulary)", "rows": "N (tokens)"}
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 5.6), layout="constrained")
        for task, line in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False), strict=True):
            for key, axes in zip(("cpu_seconds", "peak_extra_mib"), line, strict=True):
                _fused_panel(axes, [row for row in rows if row["task"] == task], along, key)
                axes.set_title(task.replace("_", " "), loc="left", fontsize=10)
                axes.set_xlabel(symbols[along])
        last = [row for row in rows if row[along] == max(row[along] for row in rows)]
        ours, plain = ([r for r in last if r["name"] == n] for n in ("steelyard", "plain"))
        times, memory = (
            [a[key] / b[key] for a, b in zip(ours, plain, strict=True)]
            for key in ("cpu_seconds", "peak_extra_mib")
        )
        figure.suptitle(
            f"At {symbols[along][0]} = {last[0][along]:,}: "
            f"{min(times):.2f} to {max(times):.2f} times the plain formula's CPU time, "
            f"{min(memory):.2f} to {max(memory):.2f} times its memory\n"
            f"({symbols[other][0]} = {last[0][other]:,}, D = {last[0]['width']}, float32)",
            x=0.01,
            ha="left",
            fontsize=11,
        )
    return figure


def _fused_panel(axes: "Axes", rows: list[dict[str, Any]], along: str, key: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    from steelyard.lab.plots import COLOURS, DASHES

    points = [row[along] for row in rows if row["name"] == "plain"]
    names = ("plain", "steelyard")
    lines = {name: [row[key] for row in rows if row["name"] == name] for name in names}
    if key == "peak_extra_mib":
        gradients = [row["gradients_mib"] for row in rows if row["name"] == "plain"]
        lines["the gradients"] = gradients
    for place, (name, values) in enumerate(lines.items()):
        look = {"color": COLOURS[place], "linestyle": DASHES[place]}
        axes.loglog(points, values, marker="o", ms=4, **look)
        axes.annotate(
            name,
            (points[-1], values[-1]),
            (6, (3, 4, -5)[place]),
            textcoords="offset points",
            color=COLOURS[place],
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_xticks(points, [f"{x // 1024}k" if x >= 1024 else str(x) for x in points])
    axes.set_ylabel({"cpu_seconds": "CPU seconds", "peak_extra_mib": "peak extra MiB"}[key])


DIVERGENCE_TASKS = {
    "sinkhorn": "Sinkhorn plan",
    "sinkhorn_batch": "128 Sinkhorn plans at once",
    "scalars": "Distance covariance of scalars",
    "vectors": "Distance covariance of vectors",
    "conditional": "Conditional Cauchy-Schwarz, float32",
}


def divergence_benchmark(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the figures of the divergences and their page, with the committed measurement."""
    file, page = root / "benchmarks/results/divergences.json", root / "docs/concepts/divergences.md"
    result = json.loads(file.read_text(encoding="utf-8"))
    figures = {}
    for task, gradient in (("sinkhorn", False), ("scalars", True), ("conditional", True)):
        rows = [
            row
            for row in result["results"]
            if (row["task"], row["gradient"]) == (task, gradient)
            and (task != "sinkhorn" or (row["width"], row["share"]) == (3, 0.1))
        ]
        figures[task] = root / f"docs/figures/divergences-{task}.svg"
        yield figures[task], _drawn(figures[task], divergence_figure, rows, DIVERGENCE_TASKS[task])
    yield _filled(page, "benchmark-divergences", divergence_tables(result, figures))


def divergence_tables(result: dict[str, Any], figures: dict[str, Path]) -> str:
    """Return what the committed measurement of the divergences says."""
    facts = (
        f"{result['settings']['rounds']} rounds on {result['date']}; "
        f"{result['machine']['processor']}, {result['settings']['threads']} thread; "
        f"{sum(result['wall_seconds'].values()) / 60:.0f} minutes. Versions: {_versions(result)}."
    )
    parts = [facts]
    for task, title in DIVERGENCE_TASKS.items():
        parts.append(f"### {title}")
        if task in figures:
            parts.append(f"![{title}: time and memory over N](../figures/{figures[task].name})")
        parts.append(_divergence_table([row for row in result["results"] if row["task"] == task]))
    targets = _table(
        ["case", "N", "gradient", "figure", "by that of", "at most", "measured", ""],
        (
            [
                DIVERGENCE_TASKS[row["task"]],
                f"{row['n']:,}",
                "yes" if row["gradient"] else "",
                {"time": "CPU time", "memory": "peak memory"}[row["figure"]],
                row["peer"],
                f"{row['target']:g}",
                f"{row['value']:.2f}",
                "met" if row["met"] else "**missed**",
            ]
            for row in result["targets"]
        ),
    )
    return "\n\n".join([*parts, "### Targets", targets])


def _divergence_table(rows: list[dict[str, Any]]) -> str:
    plans = "transport_cost" in rows[0]
    more = ["epsilon by mean cost", "transport cost"] if plans else ["gradient"]
    header = ["N", "D", *more, "", "CPU ms", "Steelyard's by its", "peak MiB", "error"]
    lines = []
    for row in rows:
        cost = row.get("transport_cost")
        what = [f"{row['share']:g}", "NaN" if cost is None else f"{cost:.6f}"]
        error = "NaN" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(
            [
                f"{row['n']:,}",
                str(row["width"]),
                *(what if plans else ["yes" if row["gradient"] else ""]),
                row["name"],
                f"{1e3 * row['cpu_seconds']:,.1f}",
                "" if row["name"] == "steelyard" else _middle(row["ours_over_this"]),
                f"{row['peak_extra_mib']:.1f}",
                "(reference)" if row["name"] == row.get("reference") else error,
            ]
        )
    return _table(header, lines)


def divergence_figure(rows: list[dict[str, Any]], title: str) -> "Figure":
    """Draw CPU time and peak memory of one computation over ``N``, both axes in powers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, NullLocator

    from steelyard.lab.plots import COLOURS, DASHES, STYLE

    curves: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        curves[row["name"]].append(row)
    quantities = {"cpu_seconds": "CPU seconds", "peak_extra_mib": "peak extra MiB"}
    with rc_context({**STYLE}):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        for axes, (key, label) in zip(figure.subplots(1, 2), quantities.items(), strict=True):
            for place, (name, curve) in enumerate(curves.items()):
                points = [row["n"] for row in curve]
                values = [max(row[key], 0.1) if key != "cpu_seconds" else row[key] for row in curve]
                colour = COLOURS[place]
                axes.loglog(points, values, "o", ls=DASHES[place], color=colour, ms=4)
                short = name.removeprefix("plain torch, ").removeprefix("POT ")
                axes.annotate(
                    short.removesuffix(", value only"),
                    (points[-1], values[-1]),
                    (6, 0),
                    textcoords="offset points",
                    color=colour,
                    fontweight="bold",
                    va="center",
                    annotation_clip=False,
                )
            axes.margins(x=0.03)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xticks(sorted({row["n"] for row in rows}))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.xaxis.set_tick_params(rotation=30)
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_ylabel(label)
            axes.set_xlabel("N (items)")
        largest = max(row["n"] for row in rows)
        others = [r for r in rows if r["n"] == largest and r["name"] != "steelyard"]
        finding = ", ".join(f"{r['ours_over_this'][0]:.2f} of {r['name']}" for r in others)
        figure.suptitle(f"{title}: CPU time {finding} at N = {largest:,}", x=0.01, ha="left")
    return figure


def _drawn(
    path: Path,
    draw: "Callable[..., Figure]",
    *data: Any,
    helper: Callable[..., None] | None = None,
) -> bytes:
    """Return the figure ``draw(*data)``; the one at ``path`` if it shows the same.

    Another version of matplotlib writes other bytes: the digest inside tells whether the numbers,
    ``draw`` or the ``helper`` that it calls have changed.
    """
    source = json.dumps(data) + inspect.getsource(draw)
    source += inspect.getsource(helper) if helper else ""
    digest = hashlib.sha256(source.encode()).hexdigest()
    old = _read(path)
    if old is not None and digest.encode() in old:
        return old
    from matplotlib import rc_context

    stream = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        metadata = {"Date": None, "Description": digest}
        draw(*data).savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue()


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
