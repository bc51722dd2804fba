import re
import subprocess
import sys
from pathlib import Path

import pytest

from steelyard import cli
from steelyard.anatomy import weight_curves
from steelyard.cli import anatomy

MINE = """
import torch
from torch.nn.functional import logsigmoid


def my_policy(log_ratio, advantages):
    return -(log_ratio.exp() * advantages).mean()


def my_pair(margin):
    return -logsigmoid(0.1 * margin)


def broken(log_ratio, advantages):
    return {}["no such key"]


def no_loss(log_ratio, advantages):
    return 1.0


def many(a, b, c):
    return a


number = 3
"""


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file in the working folder; the command may import it and look beside it."""
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    yield "mine.py"
    sys.modules.pop("mine", None)


@pytest.fixture
def call(capsys):
    """Run the command: its exit code, what it printed, its errors; white space collapsed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["anatomy", *arguments])
        except SystemExit as leaving:
            code = leaving.code
        printed = capsys.readouterr()
        return code, " ".join(printed.out.split()), " ".join(printed.err.split())

    return run


@pytest.fixture
def few(monkeypatch):
    """Draw with few points: these tests are about the command, not the curves."""
    from steelyard import anatomy as drawn

    monkeypatch.setattr(
        drawn,
        "weight_curves",
        lambda *positional, **options: weight_curves(*positional, **{**options, "points": 8}),
    )


def texts_of(file: str) -> list[str]:
    return re.findall("<!-- (.*) -->", Path(file).read_text(encoding="utf-8"))


def test_policies_are_drawn_over_the_ratio_and_told_in_words(call):
    code, out, _ = call("ppo", "bpo", "grpo", "gbpo")
    assert code == 0
    for part in (
        "ppo, advantage +1: up to 1.2: raises it, beyond: does not look",
        "bpo, advantage +1: up to 1.2: raises it, beyond: lowers it",
        "gbpo, advantage -1: up to 0.8: raises it, beyond: lowers it",
        "Figure: anatomy.svg",
    ):
        assert part in out
    texts = texts_of("anatomy.svg")
    assert {"ppo = grpo", "bpo = gbpo", "advantage +1", "advantage -1"} <= set(texts)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("names", "axis"),
    [
        (["awm", "awm:clip=0.5", "ppo:epsilon=0.1,epsilon_high=0.28"], "ratio of the new"),
        (["dpo", "f-dpo:jsd", "f-dpo:alpha=0.5", "f-dpo:forward-kl,beta=0.03"], "margin"),
        (["ce", "pld", "sinkd", "kd"], "probability of the label"),
        (["ce", "ldr", "ldr:temperature=inf", "ldr:top_k=2", "aldr"], "probability of the label"),
        (["anyloss", "anyloss:accuracy", "anyloss:matthews,threshold=0.3"], "probability"),
    ],
)
def test_every_family_has_its_axis(names, axis, call):
    code, out, _ = call(*names, "--out", "it.svg")
    assert code == 0
    assert all(f"{name}, " in out for name in names)
    assert any(text.startswith(axis) for text in texts_of("it.svg"))


def test_every_name_draws_and_its_reverse_kl_is_dpo():
    by_family = {}
    for name, objective in anatomy.OBJECTIVES.items():
        own = {"f-dpo": "f-dpo:reverse-kl"}.get(name, name)
        by_family.setdefault(objective.over, {})[name] = anatomy._objective(own)
    for over, objectives in by_family.items():
        for curves in weight_curves(objectives, over, points=4).panels.values():
            assert curves.keys() == objectives.keys()
            assert all(curve.isfinite().all() and curve.any() for curve in curves.values())
    pairs = weight_curves(by_family["margin"], "margin", points=4).panels
    assert all(curves["dpo"].equal(curves["f-dpo"]) for curves in pairs.values())


def test_the_defaults_are_those_of_the_library():
    import inspect

    from steelyard import classification, diffusion, distillation, policy, preference

    for name, function in {
        "ppo": policy.ppo_loss,
        "grpo": policy.grpo_loss,
        "bpo": policy.bpo_target_ratio,
        "awm": diffusion.awm_loss,
        "dpo": preference.f_dpo_loss,
        "kd": distillation.kd_loss,
        "pld": distillation.pld_loss,
        "sinkd": distillation.sinkhorn_kd_loss,
        "ldr": classification.ldr_loss,
        "aldr": classification.aldr_loss,
        "anyloss": classification.anyloss_with_logits,
    }.items():
        library = inspect.signature(function).parameters
        for key, own in inspect.signature(anatomy.OBJECTIVES[name].make).parameters.items():
            if own.kind is own.KEYWORD_ONLY:
                assert own.default == library[key].default, (name, key)


def test_the_teacher_is_a_law_for_any_number_of_classes():
    import torch

    for classes in (2, 3, 4, 10):
        probs = anatomy.teacher(torch.zeros(1, classes, dtype=torch.float64)).softmax(-1)[0]
        assert probs.argmax() == 0
        assert (probs > 0).all()
    assert probs[:3].tolist() == pytest.approx([0.6, 0.2, 0.1])


@pytest.mark.usefixtures("few")
def test_a_function_of_yours_is_drawn_beside_ours(mine, call):
    assert call("ppo", f"{mine}:my_policy")[0] == 0
    assert {"ppo", "mine.py:my_policy"} <= set(texts_of("anatomy.svg"))
    code, out, _ = call("mine:my_pair", "--over", "margin", "--out", "pair.png")
    assert code == 0
    assert "chosen response: everywhere: raises it" in out
    assert Path("pair.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("few")
def test_options_reach_the_figure(call):
    options = ["--limits", "0.5", "1.5", "--scale", "log", "--title", "A finding"]
    assert call("ppo", *options)[0] == 0
    texts = texts_of("anatomy.svg")
    assert {"A finding", "0.6", "1.4", "push on the log-ratio (size)"} <= set(texts)
    first = call("ce", "--classes", "2")[1]
    assert first != call("ce", "--classes", "5")[1]


@pytest.mark.usefixtures("few")
def test_the_same_command_writes_the_same_bytes(call):
    call("ppo", "--out", "a.svg")
    call("ppo", "--out", "b.svg")
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name at least one objective (see: steelyard anatomy --help)"),
        (["pppo"], "no objective is called 'pppo'; did you mean 'ppo'?"),
        (["fdpo:jsd"], "no objective and no module is called 'fdpo'; did you mean 'f-dpo'?"),
        (["ppo", "dpo"], "ppo is drawn over log_ratio, but dpo over margin: draw them in two"),
        (["ppo", "--over", "margin"], "--over is margin, but ppo over log_ratio"),
        (["ppo", "ppo"], "ppo is named twice"),
        (["ppo:eps=0.1"], "ppo takes epsilon=..., epsilon_high=..., got 'eps=0.1'"),
        (["ppo:0.1"], "ppo takes epsilon=..., epsilon_high=..., got '0.1'"),
        (["ce:soft"], "ce takes no setting, got 'soft'"),
        (["ppo:epsilon=small"], "ppo:epsilon=small: 'epsilon=small' is no number"),
        (["ppo:epsilon=2"], "ppo:epsilon=2: epsilon must be >= 0.0 and <= 1.0, got 2"),
        (["ldr:top_k=1.5"], "ldr:top_k=1.5: top_k must be"),
        (["f-dpo"], "takes either alpha=A or one of reverse-kl, forward-kl, jsd"),
        (["f-dpo:jsd,alpha=0.5"], "takes either alpha=A or one of"),
        (["f-dpo:js"], "f-dpo:js: knows reverse-kl, forward-kl, jsd; not 'js'"),
        (["anyloss:auc"], "anyloss:auc: knows accuracy, balanced-accuracy, f1"),
        (["mine.py:my_policy"], "say what mine.py:my_policy is drawn over: --over"),
        (["ppo", "mine.py:my_polcy"], "mine.py has no function 'my_polcy'; did you mean"),
        (["ppo", "mine.py:number"], "mine.py has no function 'number'"),
        (["ppo", "mine.py:many"], "mine.py:many: expected a function of (log_ratio, advantages)"),
        (["ppo", "mine.py:no_loss"], "mine.py:no_loss: loss_fn must return a torch.Tensor"),
        (["ppo", "absent.py:loss"], "there is no file absent.py"),
        (["ppo", "--out", "figure.gif"], "--out must end in .svg or .png, got 'figure.gif'"),
        (["ppo", "--limits", "2", "1"], "limits[0] must be"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, says, mine, call):
    code, _, err = call(*arguments)
    assert code == 2
    assert err.startswith("steelyard: ")
    assert says in err
    assert not Path("anatomy.svg").exists()


@pytest.mark.parametrize("flags", [["--over", "ratio"], ["--classes", "few"], ["--outt", "x"]])
def test_a_wrong_flag_is_explained(flags, call):
    code, _, err = call("ppo", *flags)
    assert code == 2
    assert "Traceback" not in err


def test_a_folder_that_is_not_there_is_one_line(call, few):
    code, _, err = call("ppo", "--out", "no/such/figure.svg")
    assert code == 2
    assert err == "steelyard: No such file or directory: no/such/figure.svg"


def test_a_bug_of_yours_keeps_its_traceback(mine, call):
    with pytest.raises(KeyError):
        call("ppo", f"{mine}:broken")


def test_a_module_whose_own_import_fails_says_so(tmp_path, call):
    (tmp_path / "half.py").write_text("import a_package_nobody_has")
    code, _, err = call("ppo", "half:loss")
    assert code == 1
    assert "a_package_nobody_has" in err


def test_help_teaches_with_examples_and_lists_every_name(call):
    code, out, _ = call("--help")
    assert code == 0
    for part in (
        "steelyard anatomy ppo bpo grpo gbpo",
        "mine.py:my_loss",
        "(log_ratio, advantages)",
        "(epsilon=0.2, epsilon_high=...)",
        "--over",
        "--limits LOW HIGH",
    ):
        assert part in out
    assert all(f" {name} {about.says}" in out for name, about in anatomy.OBJECTIVES.items())


def test_help_loads_no_method_and_no_torch():
    code = "import sys; from steelyard.cli.anatomy import describe; describe(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(run.stdout.split())
    assert not {"torch", "matplotlib", "steelyard.policy", "steelyard.anatomy"} & modules


def test_words_name_every_change_of_sign():
    verbs = ("up", "down", "still")
    assert anatomy.in_words([1.0, 2.0], [0.0, 0.0], verbs) == "everywhere: still"
    found = anatomy.in_words([0.0, 1.0, 2.0, 3.0], [-2.0, 1.0, 0.0, 1.0], verbs)
    parts = "up to 0.5: down, up to 1.5: up, up to 2.5: still, beyond: up; at most 2, at 0"
    assert found == parts
