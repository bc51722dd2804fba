"""The faults: what is done to a run in each kind of trial, and what must come of it."""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from _faults_run import Outcome, Trial, WrongError, complaint, snapshot, tidy
from _faults_session import Session, kill, starve

FRESH = 0.1
"""Share of the kills that meet fresh interpreters."""

SETTINGS = ("config.json", "seeds/config.json")
"""Files without which a run rightly does not go on."""

CLOCK = '''
"""A wall clock that jumps back by up to ten days every few calls, from a year ago."""
import datetime, random, time
_time, _chance = time.time, random.Random(0)
_lag = [365 * 86400.0]
def _now():
    if _chance.random() < 0.3:
        _lag[0] += _chance.uniform(0, 864000)
    return _time() - _lag[0]
time.time = _now
time.time_ns = lambda: int(_now() * 1e9)
class _Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(_now(), tz)
    @classmethod
    def utcnow(cls):
        return cls.fromtimestamp(_now(), datetime.timezone.utc).replace(tzinfo=None)
datetime.datetime = _Datetime
'''


class SkipError(Exception):
    """This kind cannot be had here; the message says why."""


def kills(trial: Trial) -> Outcome:
    """End processes by SIGKILL, one to three times, at instants drawn over the run's life."""
    fresh = trial.chance.random() < FRESH
    wanted, hits = trial.chance.choice((1, 1, 2, 3)), 0
    while hits < wanted:
        life = (trial.case.life + 8 * fresh) * (1.0 if hits == 0 else 0.7)
        target = trial.chance.choice(("all", "driver", "worker"))
        hits += _strike(trial, trial.session(fresh=fresh), target, trial.chance.uniform(0, life))
    return trial.settle(hits)


def _strike(trial: Trial, session: Session, target: str, instant: float) -> bool:
    """Kill the command with its workers, it alone, or one worker; tell whether that hit."""
    running = session.sleep(instant)
    workers = trial.remember(session)
    if target == "worker":
        while running and not workers:
            running = session.sleep(0.01)
            workers = trial.remember(session)
        if workers:
            kill(trial.chance.choice(workers))
        ended = tidy(session.wait())
        return bool(workers) and ended.code == 1
    if not running:
        tidy(session.wait())
        return False
    victims = [session.pid, *workers] if target == "all" else [session.pid]
    trial.chance.shuffle(victims)
    for pid in victims:
        kill(pid)
    return session.wait().code < 0


def corrupt(trial: Trial) -> Outcome:
    """Spoil one file of a finished or a killed run, then resume."""
    case, chance = trial.case, trial.chance
    shutil.copytree(chance.choice((case.finished, case.interrupted)), trial.folder)
    files = [p for p in trial.folder.rglob("*") if p.is_file() and p.name != "lock"]
    sorts = sorted({_sort(path) for path in files})
    sort = chance.choice(sorts)
    path = chance.choice(sorted(p for p in files if _sort(p) == sort))
    name = str(path.relative_to(trial.folder))
    damage = chance.choice(("truncate", "flip", "empty", "remove", "replace"))
    _spoil(trial, path, damage)
    before = snapshot(trial.folder)
    ended = Session(["resume", str(trial.folder)], trial.said).wait()
    what = f"{damage} {name}"
    if ended.code == 1 and name in SETTINGS and not complaint(ended):
        touched = snapshot(trial.folder) != before
        lines = ended.text.strip().splitlines()
        status = "wrong" if touched or len(lines) > 1 else "refused"
        return Outcome(status, f"{what}: {ended.last_line}")
    if untidy := complaint(ended):
        return Outcome("wrong", f"{what}: {untidy}")
    if ended.code:
        return Outcome("lost", f"{what}: {ended.last_line}")
    outcome = trial.settle()  # a second time: what was made good stays so
    return outcome._replace(reason=f"{what}: {outcome.reason}" if outcome.reason else "")


def _sort(path: Path) -> str:
    """Name of a file without its numbers; figures and events count as one sort each."""
    return path.suffix if path.parent.name == "figures" else re.sub(r"\d+", "#", path.name)


def _spoil(trial: Trial, path: Path, damage: str) -> None:
    data = path.read_bytes()
    place = trial.chance.randrange(max(len(data), 1))
    if damage == "truncate":
        path.write_bytes(data[:place])
    elif damage == "flip" and data:
        other = data[place] ^ trial.chance.randrange(1, 256)
        path.write_bytes(data[:place] + bytes([other]) + data[place + 1 :])
    elif damage == "replace":
        foreign = trial.case.foreign
        same = foreign / path.relative_to(trial.folder)
        alike = sorted(p for p in foreign.rglob("*") if p.is_file() and _sort(p) == _sort(path))
        source = same if same.is_file() or not alike else trial.chance.choice(alike)
        path.write_bytes(source.read_bytes() if source.is_file() else b"something else\n")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


def full_disk(trial: Trial) -> Outcome:
    """Run on a disk too small for it, make room, resume."""
    size = sum(map(len, snapshot(trial.case.finished).values()))
    room = trial.chance.randrange(4, max(size // 4096, 5)) * 4096
    tensorboard = trial.chance.random() < 0.3
    if not _can_mount() or trial.chance.random() < 0.25:
        limit = max(room // 8, 16384)  # of each file, in place of the disk
        tidy(trial.session(prepare=lambda: _limit_files(limit), tensorboard=tensorboard).wait())
        return trial.settle()
    with _mounted(trial, room):
        trial.folder /= "deep"
        tidy(trial.session(tensorboard=tensorboard).wait())
        _remount(trial, "size=256m")
        return trial.settle()


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def read_only(trial: Trial) -> Outcome:
    """Resume, or start, in a folder that cannot be written; then open it and go on."""
    if not _can_mount():
        raise SkipError("needs the right to mount a file system")
    with _mounted(trial, 1 << 28):
        trial.folder /= "deep"
        if trial.chance.random() < 0.8:
            source = trial.chance.choice((trial.case.interrupted, trial.case.finished))
            shutil.copytree(source, trial.folder)
        before = snapshot(trial.folder)
        _remount(trial, "ro")
        ended = tidy(trial.session().wait())
        if ended.code != 1 or "Read-only file system" not in ended.last_line:
            return Outcome("wrong", f"did not name the read-only folder: {ended.last_line}")
        if snapshot(trial.folder) != before:
            return Outcome("wrong", "a read-only folder was changed")
        _remount(trial, "rw")
        return trial.settle()


def clock(trial: Trial) -> Outcome:
    """Start with a wall clock that keeps jumping back, kill, resume with it, then without."""
    place = trial.place / "clock"
    place.mkdir()
    (place / "sitecustomize.py").write_text(CLOCK)
    jumping = {"fresh": True, "environment": {"PYTHONPATH": str(place)}}
    session = trial.session(**jumping)
    _strike(trial, session, "all", trial.chance.uniform(0.5, 1) * (8 + trial.case.life))
    if trial.chance.random() < 0.5:
        return trial.settle(**jumping)
    return trial.settle()


def lock(trial: Trial) -> Outcome:
    """Start or resume twice at one instant: one process works, the other says why not."""
    if trial.chance.random() < 0.5:
        shutil.copytree(trial.case.interrupted, trial.folder)
        arguments = ["resume", str(trial.folder)]
    else:
        arguments = trial.case.arguments(trial.folder)
    outputs = (trial.said, trial.place / "said too")
    # The same instant up to a millisecond, now and then up to a fifth of the run.
    pause = trial.chance.choice((0.0, 0.001, 0.01, 0.2 * trial.case.life))
    first = Session(arguments, outputs[0])
    first.sleep(trial.chance.uniform(0, pause))
    both = (first, Session(arguments, outputs[1]))
    ended = [tidy(session.wait()) for session in both]
    losers = [each for each in ended if each.code]
    if len(losers) != 1:
        return Outcome("wrong", f"{len(losers)} of two processes were refused")
    words = ("is in use by another process", "exists; resume with")
    said = [line for line in losers[0].text.splitlines() if line.startswith("steelyard: ")]
    if len(said) != 1 or not any(word in said[0] for word in words):
        return Outcome("wrong", f"the second process said: {losers[0].last_line}")
    return trial.settle()


def memory(trial: Trial) -> Outcome:
    """Let one seed have no more memory; the others finish, and it does on resume."""
    fresh = trial.case.name == "toy"  # it needs no more than a warm process has
    for _ in range(20):
        session = trial.session(fresh=fresh)
        session.sleep(trial.chance.uniform(0, 5.0 if fresh else trial.case.life / 2))
        workers = trial.remember(session)
        while not workers and session.sleep(0.002):
            workers = trial.remember(session)
        victim = trial.chance.choice(workers) if workers else None
        if victim:
            starve(victim)
        ended = tidy(session.wait())
        failed = re.findall(r"seed (\d+) failed: (.*)", ended.text)
        if ended.code and victim:
            break
        shutil.rmtree(trial.folder)  # it needed no more
    else:
        raise SkipError("twenty seeds in a row needed no more memory than they had")
    if len(failed) != 1 or not failed[0][1]:
        return Outcome("wrong", f"the seed and the reason are not named: {ended.last_line}")
    finished = {path.parent.name for path in trial.folder.glob("seeds/*/result.json")}
    seeds = {path.name for path in trial.case.finished.glob("seeds/*") if path.is_dir()}
    if seeds - finished > {failed[0][0]}:
        return Outcome("wrong", "other seeds did not finish")
    return trial.settle()


def _can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def _mounted(trial: Trial, size: int) -> Iterator[None]:
    """Give the trial's folder a file system in memory of so many bytes."""
    trial.folder.mkdir()
    options = f"size={size}"
    made = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(trial.folder)]
    mount = trial.folder
    if subprocess.run(made, capture_output=True, check=False).returncode:
        raise SkipError("mounting a file system is refused here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def _remount(trial: Trial, option: str) -> None:
    options = f"remount,{option}"
    subprocess.run(["mount", "-o", options, str(trial.folder.parent)], check=True)


KINDS: dict[str, Callable[[Trial], Outcome]] = {
    "kill": kills,
    "corrupt": corrupt,
    "full-disk": full_disk,
    "read-only": read_only,
    "clock": clock,
    "lock": lock,
    "memory": memory,
}


def attempt(kind: str, trial: Trial) -> Outcome:
    """Carry out one trial.

    Raises:
        SkipError: this kind cannot be had here.
    """
    try:
        return KINDS[kind](trial)
    except WrongError as error:
        return Outcome("wrong", str(error))
    finally:
        trial.clear()
