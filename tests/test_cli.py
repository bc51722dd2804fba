import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import steelyard
from steelyard import _extras, cli
from steelyard.lab import runner
from steelyard.recipes import catalog

RECIPE = '''"""A toy study.

It compares nothing with nothing.
"""
from dataclasses import dataclass
from steelyard.lab import Claim, Form

@dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = (1, 2)
    """How large, one trial each."""
    rate: float = 0.5
    """How fast."""
    careful: bool = True
    """Whether to take care."""

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be > 0, got {self.rate}")

QUICK = Form(Config(), seeds=2, minutes=0.1)
FULL = Form(Config(rate=2.0), seeds=5, minutes=90.0)
CLAIMS = (Claim("more is more", "the toy", "more", "less", "higher", min_seeds=2),)

def run(config, lab):
    study = lambda: {"more": config.rate + lab.seed, "less": -1.0}
    return lab.compute("study", study)
'''


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Work in an empty folder, with an index of its own and no colours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEELYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    return "mine.py"


@pytest.fixture
def call(capsys):
    """Run a command: its exit code, what it printed, its errors; white space collapsed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as leaving:
            code = leaving.code
        printed = capsys.readouterr()
        return code, " ".join(printed.out.split()), " ".join(printed.err.split())

    return run


@pytest.fixture
def started(monkeypatch):
    """Replace the runner: record its arguments, or raise what the test puts into `error`."""
    record = {}

    def start_run(recipe, **settings):
        record.update(settings, recipe=recipe)
        raise record.pop("error", KeyboardInterrupt())

    monkeypatch.setattr(runner, "start_run", start_run)
    return record


def test_help_names_every_command(call):
    for arguments in ((), ("--help",), ("-h",), ("help",)):
        code, out, _ = call(*arguments)
        assert code == 0
        assert all(f" {command} " in out for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, call):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"usage: steelyard {command}" in out


def test_version(call):
    assert call("--version") == (0, f"steelyard {steelyard.__version__}", "")


def test_an_unknown_command_suggests_the_nearest(call):
    code, _, err = call("lst")
    assert code == 2
    assert "did you mean 'list'?" in err


def test_list_shows_all_systems_and_recipes_under_their_status(call):
    code, out, _ = call("list")
    assert code == 0
    assert all(f" {system.name} {system.package} " in f" {out} " for system in catalog.SYSTEMS)
    states = [catalog.status(catalog.find(name)) for name in catalog.names()]
    for state in set(states):
        assert f"{state} ({states.count(state)})" in out


def test_list_is_quick_because_it_loads_no_torch():
    code = "import sys; from steelyard.cli import main; main(['list']); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = run.stdout.splitlines()[-1].split()
    assert not {"torch", "numpy", "tyro", "matplotlib", "jinja2"} & set(modules)


def test_python_dash_m_is_the_same_command():
    command = [sys.executable, "-m", "steelyard", "lst"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("steelyard: no command")


def test_a_reader_that_has_gone_is_no_traceback():
    command = f"{sys.executable} -m steelyard list | true"
    run = subprocess.run(command, check=True, shell=True, capture_output=True, text=True)
    assert run.stderr == ""


def test_show_tells_purpose_paper_and_names(call):
    code, out, _ = call("show", "awm")
    assert code == 0
    for part in (
        "awm: method ready, experiment to come",
        "arxiv.org/abs/2509.25050",
        "steelyard.diffusion:",
        "awm_loss",
    ):
        assert part in out


def test_show_tells_a_recipes_claims_and_times(mine, call):
    code, out, _ = call("show", mine)
    assert code == 0
    for part in ("It compares nothing", "more is more (the toy)", "5 seeds, about 1 h 30 min"):
        assert part in out


@pytest.mark.parametrize("command", ["show", "run", "copy"])
def test_an_unknown_system_suggests_the_nearest(command, call):
    arguments = ["x.py"] if command == "copy" else []
    code, _, err = call(command, "pontia", *arguments)
    assert code == 2
    assert "no system is called 'pontia'; did you mean 'ponita'?" in err
    assert "steelyard list" in err


@pytest.mark.parametrize("command", ["run", "copy"])
def test_a_planned_system_says_that_it_is_not_built(command, call, monkeypatch):
    monkeypatch.setattr(catalog, "status", lambda system: "planned")
    code, _, err = call(command, "tcm", *(["x.py"] if command == "copy" else []))
    assert (code, err) == (2, "steelyard: tcm is not built yet (see: steelyard list)")


def test_a_method_without_experiment_says_how_to_import_it(call, monkeypatch):
    monkeypatch.setattr(catalog, "status", lambda system: catalog.STATUSES[1])
    code, _, err = call("run", "tcm")
    assert code == 2
    assert "from steelyard.metric_learning import tcm_loss" in err


def test_run_help_teaches_the_recipes_flags(mine, call):
    code, out, _ = call("run", mine, "--help")
    assert code == 0
    for part in ("--sizes", "How large, one trial each.", "(default: 1 2)", "(default: 0.5)"):
        assert part in out
    for part in ("Example: steelyard run mine.py --seeds 5", "--no-careful", "2 seeds, about 6 s"):
        assert part in out
    assert "(default: 2.0)" in call("run", mine, "--full", "--help")[1]


def test_run_without_a_name_explains_and_is_an_error(call):
    assert call("run")[0] == 2
    code, _, err = call("run", "--seeds", "3", "bpo")
    assert code == 2
    assert "the NAME comes first" in err


def test_run_hands_the_flags_to_the_lab(mine, call, started):
    options = ["--seeds", "7", "--out", "there", "--workers", "1"]
    fields = ["--sizes", "3", "--rate", "1e-3", "--no-careful"]
    assert call("run", mine, *options, *fields)[0] == 130
    started.pop("console")
    assert started == {
        "recipe": "mine.py",
        "form": "quick",
        "config": {"sizes": [3], "rate": 0.001, "careful": False},
        "seeds": 7,
        "out": Path("there"),
        "workers": 1,
    }


def test_full_takes_the_full_forms_values(mine, call, started):
    call("run", mine, "--full")
    assert (started["form"], started["seeds"], started["config"]["rate"]) == ("full", 5, 2.0)
    assert started["out"] is None


@pytest.mark.parametrize(
    "flags", [["--rates", "1"], ["--rate", "fast"], ["--seeds", "two"], ["--rate", "-1"]]
)
def test_a_wrong_flag_is_explained_without_traceback(flags, mine, call, started):
    code, _, err = call("run", mine, *flags)
    assert code == 2
    assert "Traceback" not in err
    assert err
    assert started == {}


def test_zero_seeds_is_an_error_naming_seeds(mine, call):
    code, _, err = call("run", mine, "--seeds", "0")
    assert (code, err) == (2, "steelyard: seeds must be >= 1, got 0")


def test_a_file_that_is_not_there_is_an_error(call):
    assert call("run", "absent.py")[::2] == (2, "steelyard: there is no file absent.py")


def test_a_file_that_is_no_recipe_says_what_is_missing(tmp_path, call):
    (tmp_path / "empty.py").write_text("Config = 1")
    code, _, err = call("run", "empty.py")
    assert code == 2
    assert "lacks QUICK, FULL, CLAIMS, run" in err


def test_a_config_field_named_like_an_option_is_an_error(tmp_path, call):
    (tmp_path / "bad.py").write_text(RECIPE.replace("rate", "seeds"))
    code, _, err = call("run", "bad.py")
    assert code == 2
    assert "'seeds'" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("rate must be > 0"), 2, "rate must be > 0"),
        (FileExistsError(17, "File exists", "out"), 2, "File exists: out"),
        (PermissionError(13, "Permission denied", "out"), 1, "Permission denied: out"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (ModuleNotFoundError("steelyard needs x for this"), 1, "steelyard needs x for this"),
        (runner.SeedsFailedError("seed 1 failed: killed"), 1, "seed 1 failed: killed"),
        (runner.StoppedError("Stopped. Continue"), 130, "Stopped. Continue"),
    ],
)
def test_an_error_is_one_line_and_a_code(error, code, line, mine, call, started):
    started["error"] = error
    assert call("run", mine)[::2] == (code, f"steelyard: {line}")
    started["error"] = error
    got, _, err = call("run", mine, "--debug")
    assert got == code
    assert "Traceback" in err


def test_a_bug_keeps_its_traceback(mine, call, started):
    started["error"] = KeyError("bug")
    with pytest.raises(KeyError):
        call("run", mine)


def test_copy_hands_over_the_recipe_and_never_overwrites(tmp_path, call, monkeypatch):
    (tmp_path / "token_shift.py").write_text("original")
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "catalog.py"))
    monkeypatch.setattr(catalog, "status", lambda system: "recipe ready")
    code, out, _ = call("copy", "token-shift", "mine.py")
    assert code == 0
    assert "steelyard run mine.py" in out
    assert Path("mine.py").read_text() == "original"
    Path("mine.py").write_text("changed")
    code, _, err = call("copy", "token-shift", "mine.py")
    assert code == 2
    assert "--force" in err
    assert Path("mine.py").read_text() == "changed"
    assert call("copy", "token-shift", "mine.py", "--force")[0] == 0
    assert Path("mine.py").read_text() == "original"
    assert call("copy", "token-shift", "no/such/folder.py")[0] == 2


def test_resume_of_what_is_no_run_is_an_error(call):
    code, _, err = call("resume", ".")
    assert code == 1
    assert "config.json" in err


def test_a_run_ends_with_verdicts_and_paths_and_can_be_reported(mine, call):
    code, out, _ = call("run", mine, "--rate", "2", "--out", "there")
    assert code == 0
    for part in ("A toy study.", "HOLDS", "more is more", "> 0", "there/figures", "report.html"):
        assert part in out
    result = json.loads(Path("there/result.json").read_text())
    assert result["config"]["rate"] == 2.0
    assert Path("there/report.html").is_file()
    assert Path("there/figures/claims.svg").is_file()
    code, _, err = call("run", mine, "--out", "there")
    assert code in (1, 2)
    assert "steelyard resume there" in err
    code, out, _ = call("resume", "there")
    assert code == 0
    assert "HOLDS" in out
    assert call("report")[:2] == (0, "1 result on report.html")
    assert call("report", "there", "--out", "page.html")[0] == 0
    assert "more is more" in Path("page.html").read_text()


def test_report_without_results_still_shows_the_systems(call):
    assert call("report")[:2] == (0, "0 results on report.html")
    assert "information-projection" in Path("report.html").read_text()
    assert call("report", "absent")[::2] == (2, "steelyard: there is no absent")


def test_doctor_names_versions_and_what_a_missing_extra_would_give(call, monkeypatch):
    extra = _extras.Extra(("a_package_nobody_has",), "flying")
    monkeypatch.setattr(_extras, "EXTRAS", _extras.EXTRAS)
    monkeypatch.setitem(_extras.EXTRAS, "wings", extra)
    code, out, _ = call("doctor")
    assert code == 0
    for part in (steelyard.__version__, "CPU", "cores", "memory", "threads", "0 runs recorded"):
        assert part in out
    assert "without a_package_nobody_has there is no flying" in out
    assert "pip install 'steelyard[wings]'" in out


def test_doctor_names_what_is_broken(call, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEELYARD_HOME", str(tmp_path / "file" / "below"))
    code, out, _ = call("doctor")
    assert code == 1
    assert "data folder broken" in out


def test_doctor_computes_what_is_known_and_notices_a_wrong_result(call, monkeypatch):
    assert "losses, gradient, fused head and checkpoint agree" in call("doctor")[1]
    monkeypatch.setattr("steelyard.divergences.f_divergence", lambda p, q, _: (p - q).sum(-1))
    code, out, _ = call("doctor")
    assert code == 1
    assert "self-test broken RuntimeError: the KL divergence is wrong on this installation" in out


def test_doctor_says_how_to_use_no_more_threads_than_cores(call, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr("steelyard.lab.setup.cores", lambda: 2)
    code, out, _ = call("doctor")
    assert code == 1
    assert "64 of torch on 2 cores; OMP_NUM_THREADS=64; to fix it: export OMP_NUM_THREADS=2" in out


def test_every_extra_is_declared():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert set(_extras.EXTRAS) <= set(project["project"]["optional-dependencies"])


def test_a_missing_extra_is_one_line_and_another_missing_module_is_its_own(tmp_path, monkeypatch):
    with pytest.raises(ModuleNotFoundError) as missing:
        _extras.require("a_package_nobody_has.part", extra="rl")
    reason = "steelyard needs a_package_nobody_has for this: pip install 'steelyard[rl]'"
    assert str(missing.value) == reason
    (tmp_path / "half_installed.py").write_text("import its_own_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_dependency"):
        _extras.require("half_installed", extra="rl")
    assert _extras.require("os.path", extra="rl") is os.path


def test_a_sweep_without_names_or_of_nothing_known_says_so(call):
    assert call("sweep")[0] == 2
    assert "name at least one experiment" in call("sweep")[2]
    code, _, err = call("sweep", "bpo", "no-such-system")
    assert code == 2
    assert "no-such-system" in err
    code, _, err = call("resume", "here", "--address", "auto")
    assert code == 2
    assert "--address is for sweeps" in err
