"""Bad-input campaign: every public function called with arguments spoiled by hypothesis.

    python reliability/fuzz.py --examples 200 --out reliability/results/fuzz.json
    python reliability/fuzz.py --only policy.ppo_loss

A valid call of each function is spoiled in one or two arguments (``_fuzz_mutations``) and the
answer judged (``_fuzz_verdict`` states the rules). Exit code 1 when an answer is bad, when a public
name has no case, or when a valid call fails.
"""

import argparse
import functools
import json
import platform
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
import torch._dynamo  # imported late it could meet the watchdog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from _fuzz_known import DOMAIN, KINDS, KNOWN
from _fuzz_mutations import Mutation, mutations
from _fuzz_registry import CASES, EXEMPT, PASSED_ON, SLOW, missing, obsolete, prepared
from _fuzz_verdict import floats_of, judge

MEMORY = 16 * 2**30
"""Address space in bytes: an input that asks for more fails instead of filling the machine."""

OPEN_FINDINGS = Path(__file__).with_name("open_findings.json")
"""Findings not mended yet, by function: beginnings of what came. Shorten it, never lengthen it."""

SLOW_SHARE = 8
"""Fits and figures get one example in so many."""


@dataclass
class Tally:
    """Counts of one function.

    ``bad``, ``open`` (not mended yet) and ``known`` (stands for a reason) map a reproduction to
    what came.
    """

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    bad: dict[str, str] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)


def fuzz(name: str, *, examples: int, seed: int = 0) -> Tally:
    """Try one function with ``examples`` spoiled inputs."""
    started = time.perf_counter()
    tally = Tally()
    valid = prepared(name)[1]
    clean = judge(*prepared(name), {}, not_finite=not_finite_of(name))
    if clean.status != "accepted":
        tally.bad["the valid call"] = clean.reason
        return tally
    spoils = st.one_of(
        [
            mutations(value).map(lambda mutation, key=key: (key, mutation))
            for key, value in valid.items()
            if key not in PASSED_ON
        ]
    )
    documented = not_finite_of(name)

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(spoils, min_size=1, max_size=2, unique_by=lambda spoil: spoil[0]))
    def trial(drawn: list[tuple[str, Mutation]]) -> None:
        call, arguments = prepared(name)
        for key, mutation in drawn:
            arguments[key] = mutation.apply(arguments[key])
        verdict = judge(call, arguments, dict(drawn), not_finite=documented, domain=name in DOMAIN)
        _record(tally, name, drawn, verdict.status, verdict.reason)

    if valid.keys() - set(PASSED_ON):
        trial()
    tally.seconds = time.perf_counter() - started
    return tally


def not_finite_of(name: str) -> frozenset[str]:
    """Results that are not finite at the valid call, such as a generator's slope at infinity."""
    call, arguments = prepared(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = floats_of(call(**arguments))
        return frozenset(path for path, value in found if not np.isfinite(value).all())


@functools.cache
def open_findings() -> dict[str, list[str]]:
    """Read the findings not mended yet."""
    found: dict[str, list[str]] = json.loads(OPEN_FINDINGS.read_text())
    return found


def _record(
    tally: Tally, name: str, drawn: Iterable[tuple[str, Mutation]], status: str, reason: str
) -> None:
    tally.tried += 1
    if status == "accepted":
        tally.accepted += 1
    elif status == "refused":
        tally.refused += 1
    else:
        text = ", ".join(f"{key}: {mutation.label}" for key, mutation in drawn)
        known = any(part in f"{text}: {reason}" for part, _ in KNOWN.get(name, ()))
        known = known or any(part in reason for part in KINDS)
        still_open = reason.startswith(tuple(open_findings().get(name, ())))
        kept = tally.known if known else tally.open if still_open else tally.bad
        seen = [key.split(": ")[0] for key, why in kept.items() if why == reason]
        if text.split(": ")[0] not in seen:
            kept[text] = reason


def campaign(names: list[str], *, examples: int, seed: int) -> Iterator[tuple[str, Tally]]:
    """Fuzz function after function."""
    for name in names:
        share = max(examples // SLOW_SHARE, 5) if name in SLOW else examples
        yield name, fuzz(name, examples=share, seed=seed)


def report(tallies: dict[str, Tally], *, examples: int, seed: int) -> dict[str, Any]:
    """The JSON of a campaign."""
    every = list(tallies.values())
    totals = {key: sum(getattr(t, key) for t in every) for key in ("tried", "accepted", "refused")}
    return {
        "examples": examples,
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "hypothesis": hypothesis.__version__,
        },
        "functions": len(every),
        **totals,
        "bad": sum(len(t.bad) for t in every),
        "open": sum(len(t.open) for t in every),
        "known": sum(len(t.known) for t in every),
        "seconds": round(sum(t.seconds for t in every), 1),
        "known_reasons": KINDS | {k: [why for _, why in pairs] for k, pairs in KNOWN.items()},
        "outside_domain": DOMAIN,
        "open_findings": open_findings(),
        "exempt": EXEMPT,
        "by_function": {
            name: asdict(tally) | {"bad": len(tally.bad), "seconds": round(tally.seconds, 2)}
            for name, tally in tallies.items()
        },
    }


def _progress(done: int, of: int, name: str) -> None:
    if sys.stderr.isatty():
        bar = "#" * (30 * done // of)
        print(f"\r[{bar:<30}] {done}/{of} {name:<50.50}", end="", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200, help="inputs for each function")
    parser.add_argument("--only", action="append", help="a name or its beginning; may repeat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    unknown = [f"no case: {name}" for name in missing()]
    unknown += [f"not public: {name}" for name in obsolete()]
    print("\n".join(unknown), end="\n" if unknown else "")
    names = [n for n in CASES if not options.only or n.startswith(tuple(options.only))]
    tallies = {}
    for name, tally in campaign(names, examples=options.examples, seed=options.seed):
        tallies[name] = tally
        _progress(len(tallies), len(names), name)
        for text, reason in tally.bad.items():
            print(f"{name}({text}): {reason}", flush=True)
    result = report(tallies, examples=options.examples, seed=options.seed)
    print(
        f"{result['functions']} functions, {result['tried']} inputs: "
        f"{result['accepted']} accepted, {result['refused']} refused, "
        f"{result['bad']} bad, {result['open']} open, {result['known']} known"
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    return 1 if result["bad"] or unknown else 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    sys.exit(main())
