"""The parts of the documentation that show committed benchmarks."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from page_parts import drawn, filled, middle, table, versions

from steelyard.lab._format import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
        f"{result['wall_seconds'] / 60:.0f} minutes. Versions: {versions(result)}."
    )
    ratios = table(
        ["task", "minibatch", "CPU time of the better peer by Steelyard's"],
        (
            [row["env"], str(row["minibatch"]), f"**{middle(row['ratio'])}**"]
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
    return table(
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
                middle(row["ratio"]),
                *(f"{row['ms_per_step'][part]:.3f}" for part in parts),
                f"{row['peak_mib']:.0f} ({row['start_mib']:.0f})",
            ]
            for row in rows
        ),
    )


def fused_benchmark(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the figures of the fused heads and their page, with the committed measurement."""
    file, page = root / "benchmarks/results/fused.json", root / "docs/concepts/fused.md"
    result = json.loads(file.read_text(encoding="utf-8"))
    for part, other in (("vocabulary", "rows"), ("rows", "vocabulary")):
        rows = [row for row in result["results"] if row["part"] == part]
        if rows:
            figure = root / f"docs/figures/fused-{part}.svg"
            yield figure, drawn(figure, fused_figure, rows, part, other, helper=_fused_panel)
    yield filled(page, {"benchmark-fused": fused_tables(result)})


def fused_tables(result: dict[str, Any]) -> str:
    """Return what the committed measurement of the fused heads says."""
    minutes = sum(result["wall_seconds"].values()) / 60
    used = ("steelyard", "python", "torch", "trl", "liger_kernel", "cut_cross_entropy")
    found = {name: result["versions"][name] for name in used if name in result["versions"]}
    facts = (
        f"{result['settings']['rounds']} rounds; {result['machine']['processor']} with "
        f"{result['machine']['instructions']}, {result['settings']['threads']} thread; "
        f"{minutes:.0f} minutes. Versions: {versions({'versions': found})}."
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
        ratios = [middle(by_width[w]["ratio"]) if w in by_width else "" for w in widths]
        lines.append([name, *ratios, _beside(half), f"{half['error']:.1e}"])
    return table(header, lines)


def _case_table(rows: Iterable[dict[str, Any]]) -> str:
    return table(
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
    return table(
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
        yield figures[task], drawn(figures[task], divergence_figure, rows, DIVERGENCE_TASKS[task])
    yield filled(page, {"benchmark-divergences": divergence_tables(result, figures)})


def divergence_tables(result: dict[str, Any], figures: dict[str, Path]) -> str:
    """Return what the committed measurement of the divergences says."""
    facts = (
        f"{result['settings']['rounds']} rounds on {result['date']}; "
        f"{result['machine']['processor']}, {result['settings']['threads']} thread; "
        f"{sum(result['wall_seconds'].values()) / 60:.0f} minutes. Versions: {versions(result)}."
    )
    parts = [facts]
    for task, title in DIVERGENCE_TASKS.items():
        parts.append(f"### {title}")
        if task in figures:
            parts.append(f"![{title}: time and memory over N](../figures/{figures[task].name})")
        parts.append(_divergence_table([row for row in result["results"] if row["task"] == task]))
    targets = table(
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
                "" if row["name"] == "steelyard" else middle(row["ours_over_this"]),
                f"{row['peak_extra_mib']:.1f}",
                "(reference)" if row["name"] == row.get("reference") else error,
            ]
        )
    return table(header, lines)


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


METHOD_TASKS = {
    "adamp": "AdamP step, 25M parameters",
    "sgdp": "SGDP step, 25M parameters",
    "tcm": "Threshold-consistent margins, with gradient",
    "opis": "OPIS",
    "tcm_opis": "Both together",
    "ldr": "LDR on the top k, with gradient",
    "dpp": "Projection DPP sample",
    "volume": "Volume sample",
    "info_gain": "Information-gain scores",
    "hypervolume": "Hypervolume",
    "ponita": "PONITA, forward and backward",
    "update": "Loss and gradients of completions that are there",
    "step": "Sample, score and update",
    "dpo": "DPO",
    "f_dpo": "f-DPO, Jensen-Shannon",
    "sparse_po": "SparsePO",
    "dckd": "DCKD",
    "adpa": "ADPA",
    "pld": "Plackett-Luce distillation",
    "sinkd": "Sinkhorn distillation",
    "binning": "Bins and information values of a table",
    "parquet_iv": "Information values from a Parquet file",
    "parquet_psi": "Drift between two Parquet files",
    "exact_binning": "Exact monotone binning",
    "presto": "PRESTO, one penalty",
    "presto_path": "PRESTO, a path of penalties",
    "dcov": "Distance-covariance penalty, with gradient",
    "bound": "Causal bounds of finite support",
}
FIGURES = {"time": "CPU time", "memory": "peak memory", "seconds": "CPU seconds"}


def paired_benchmark(file: Path) -> str:
    """Return what a committed measurement by ``benchmarks/paired.py`` says."""
    if not file.exists():
        return "No result is committed yet."
    result = json.loads(file.read_text(encoding="utf-8"))
    minutes = sum(result["wall_seconds"].values()) / 60
    parts = [
        f"{result['settings']['rounds']} rounds on {result['date']}; "
        f"{result['machine']['processor']}, {result['settings']['threads']} thread; "
        f"{minutes:.0f} minutes. Versions: {versions(result)}."
    ]
    of_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["results"]:
        of_task[row["task"]].append(row)
    for task, rows in of_task.items():
        parts += [f"### {METHOD_TASKS[task]}", _paired_table(rows)]
    targets = table(
        ["case", "size", "figure", "by that of", "at most", "measured", ""],
        (
            [
                METHOD_TASKS[row["task"]],
                _size(row["size"]),
                FIGURES[row["figure"]],
                "(absolute)" if row["figure"] == "seconds" else row["peer"],
                f"{row['target']:.3g}",
                f"{row['value']:.3f}",
                "met" if row["met"] else "**missed**",
            ]
            for row in result["targets"]
        ),
    )
    return "\n\n".join([*parts, "### Targets", targets])


def _paired_table(rows: Sequence[dict[str, Any]]) -> str:
    return table(
        ["size", "", "CPU ms", "Steelyard's by its", "peak MiB", "deviation"],
        (
            [
                _size(row["size"]),
                row["name"],
                f"{1e3 * row['cpu_seconds']:,.1f}",
                "" if row["name"] == "steelyard" else middle(row["ours_over_this"]),
                f"{row['peak_extra_mib']:.1f}",
                "" if row["error"] is None else f"{row['error']:.1e}",
            ]
            for row in rows
        ),
    )


def _size(size: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else str(value)
        for name, value in size.items()
    )
