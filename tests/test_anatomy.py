import math
import re
import shlex
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from steelyard.anatomy import decompose, draw_curves, plot_weights, weight_curves
from steelyard.policy import bpo_loss, ppo_loss
from steelyard.preference import f_dpo_loss

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/concepts/anatomy.md"
F64 = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 7))
@settings(max_examples=20, deadline=None)
def test_weight_times_direction_is_the_gradient(seed: int, items: int, classes: int) -> None:
    logits = random(items, classes, seed=seed).requires_grad_()
    target = random(items, classes, seed=seed + 1).softmax(-1)
    loss, weight, direction = decompose(cross_entropy, logits, target)
    expected = cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(weight[:, None] * direction, gradient, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(direction.norm(dim=-1), torch.ones(items, dtype=F64))
    assert not any(part.requires_grad for part in (loss, weight, direction))


def test_a_scalar_item_has_the_size_and_the_sign_of_its_slope() -> None:
    log_ratio, advantages = random(6), random(6, seed=1)
    surrogate = partial(ppo_loss, epsilon=1.0, epsilon_high=1e9, reduction="none")
    loss, weight, direction = decompose(surrogate, log_ratio, advantages)
    torch.testing.assert_close(loss, -log_ratio.exp() * advantages)
    torch.testing.assert_close(weight, log_ratio.exp() * advantages.abs())
    assert torch.equal(direction, -advantages.sign())


def test_a_mean_carries_its_share_into_the_weights_and_losses_of_items_do_not() -> None:
    logits, labels = random(4, 3), torch.tensor([0, 1, 2, 0])
    mean = decompose(cross_entropy, logits, labels)
    each = decompose(partial(cross_entropy, reduction="none"), logits, labels)
    torch.testing.assert_close(each.weight, 4 * mean.weight)
    torch.testing.assert_close(each.direction, mean.direction)
    assert each.loss.shape == (4,)


def test_where_items_meet_a_row_answers_for_all_losses() -> None:
    def centred(values: Tensor) -> Tensor:
        return (values - values.mean()).square()

    values = random(5)
    _, weight, direction = decompose(centred, values)
    torch.testing.assert_close(weight * direction, 2 * (values - values.mean()))


def test_ppo_has_no_weight_where_it_clips() -> None:
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.19, 1.21, 2.0], dtype=F64)
    for sign, silent in ((1.0, ratio > 1.2), (-1.0, ratio < 0.8)):
        advantages = torch.full_like(ratio, sign)
        weight = decompose(partial(ppo_loss, reduction="sum"), ratio.log(), advantages).weight
        assert torch.equal(weight == 0, silent)
        torch.testing.assert_close(weight[~silent], ratio[~silent])


def test_dpo_weighs_a_pair_by_the_chance_that_it_is_ranked_wrong() -> None:
    margin, beta = random(8) * 30, 0.1
    dpo = partial(f_dpo_loss, beta=beta, reduction="sum")
    part = decompose(dpo, margin, torch.zeros_like(margin))
    torch.testing.assert_close(part.weight, beta * torch.sigmoid(-beta * margin))
    assert torch.equal(part.direction, -torch.ones_like(margin))


@pytest.mark.parametrize("classes", [2, 10])
def test_cross_entropy_weighs_an_item_by_what_the_label_lacks(classes: int) -> None:
    curves = weight_curves({"ce": cross_entropy}, "probability", classes=classes, points=9)
    lack = 1 - curves.x
    expected = (lack.square() + lack.square() / (classes - 1)).sqrt()
    torch.testing.assert_close(curves.panels["weight"]["ce"], expected)
    share = torch.full_like(expected, math.sqrt((classes - 1) / classes))
    torch.testing.assert_close(curves.panels["direction"]["ce"], share)


def test_a_gradient_of_zero_has_no_weight_and_no_direction() -> None:
    constant = torch.tensor(3.0)
    parameter = torch.ones(2, requires_grad=True)
    for function in (lambda z: 0 * z, lambda z: constant, lambda z: parameter.sum()):
        for logits in (random(3), random(2, 3)):
            _, weight, direction = decompose(function, logits)
            assert torch.equal(weight, torch.zeros(len(logits), dtype=F64))
            assert torch.equal(direction, torch.zeros_like(logits))
    assert parameter.grad is None


def test_logits_and_parameters_are_left_alone() -> None:
    logits, matrix = random(2, 3).requires_grad_(), random(3, 3).requires_grad_()
    with torch.no_grad():
        decompose(lambda z: (z @ matrix).square(), logits)
    assert logits.grad is None
    assert matrix.grad is None


def test_inference_mode_is_no_obstacle() -> None:
    with torch.inference_mode():
        logits = random(2, 3)
        weight = decompose(lambda z: z.square() / 2, logits).weight
    torch.testing.assert_close(weight, logits.norm(dim=-1))


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_the_norm_of_tiny_and_huge_gradients_is_exact(size: float) -> None:
    slope = torch.tensor([[3.0, 4.0]], dtype=F64) * size
    _, weight, direction = decompose(lambda z: z * slope, random(1, 2))
    torch.testing.assert_close(weight, torch.tensor([5 * size], dtype=F64))
    torch.testing.assert_close(direction, torch.tensor([[0.6, 0.8]], dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_keep_the_dtype(dtype: torch.dtype) -> None:
    logits, labels = random(3, 5, dtype=dtype), torch.tensor([0, 4, 2])
    half = decompose(cross_entropy, logits, labels)
    exact = decompose(cross_entropy, logits.double(), labels)
    for got, want in zip(half, exact, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-3)


def test_many_float16_entries_do_not_overflow_the_norm() -> None:
    _, weight, _ = decompose(lambda z: 1000 * z, torch.zeros(1, 400, dtype=torch.float16))
    assert float(weight) == pytest.approx(20000)  # the sum of squares is 4e8


def test_extreme_logits_stay_finite_and_nan_shows() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1.0, math.nan]], dtype=F64)
    _, weight, direction = decompose(cross_entropy, logits, torch.tensor([1, 1]))
    torch.testing.assert_close(weight[0], torch.tensor(math.sqrt(2) / 2, dtype=F64))
    assert weight[1].isnan()
    assert direction[1].isnan().all()


def test_more_dimensions_and_other_strides_are_items_too() -> None:
    logits = random(4, 3, 2).transpose(0, 2)
    _, weight, direction = decompose(lambda z: z.square() / 2, logits)
    torch.testing.assert_close(weight, logits.norm(dim=-1))
    assert direction.shape == logits.shape


@pytest.mark.parametrize(
    ("function", "logits", "error", "says"),
    [
        (None, torch.ones(2), TypeError, "loss_fn must be callable, got NoneType"),
        (torch.sum, [1.0], TypeError, "logits must be a torch.Tensor, got list"),
        (torch.sum, torch.ones(2, dtype=torch.long), TypeError, "floating dtype"),
        (torch.sum, torch.ones(0, 3), ValueError, "logits must not be empty"),
        (torch.sum, torch.tensor(1.0), ValueError, "got []"),
        (lambda z: 1.0, torch.ones(2), TypeError, "loss_fn must return a torch.Tensor, got float"),
        (lambda z: z > 0, torch.ones(2), TypeError, "loss_fn must return a floating tensor"),
    ],
)
def test_a_mistake_names_the_argument(function, logits, error, says) -> None:
    with pytest.raises(error, match=re.escape(says)):
        decompose(function, logits)


def target_ratio(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    return bpo_loss(log_ratio, 1 + 0.2 * advantages, advantages.abs())


def test_bpo_pulls_back_where_ppo_is_silent() -> None:
    curves = weight_curves({"ppo": ppo_loss, "bpo": target_ratio}, "log_ratio")
    for panel, outside in (
        ("advantage +1", curves.x > 1.2),
        ("advantage -1", curves.x < 0.8),
    ):
        ppo, bpo = curves.panels[panel]["ppo"], curves.panels[panel]["bpo"]
        sign = 1 if panel == "advantage +1" else -1
        assert torch.equal(ppo == 0, outside)
        torch.testing.assert_close(ppo[~outside], sign * curves.x[~outside])
        torch.testing.assert_close(bpo, sign * torch.where(outside, -curves.x, curves.x))
    assert not torch.isclose(curves.x[:, None], torch.tensor([0.8, 1.2], dtype=F64)).any()


def test_dpo_pushes_both_responses_alike() -> None:
    curves = weight_curves({"dpo": f_dpo_loss}, "margin", limits=(-50.0, 50.0), points=11)
    expected = 0.1 * torch.sigmoid(-0.1 * curves.x)
    torch.testing.assert_close(curves.panels["chosen response"]["dpo"], expected)
    torch.testing.assert_close(curves.panels["rejected response"]["dpo"], -expected)


def test_the_reduction_does_not_change_a_curve() -> None:
    forms = {name: partial(ppo_loss, reduction=name) for name in ("mean", "sum", "none")}
    for curves in weight_curves(forms, "log_ratio", points=7).panels.values():
        assert torch.equal(curves["mean"], curves["sum"])
        assert torch.equal(curves["mean"], curves["none"])


def test_a_function_of_one_argument_is_one_of_the_axis() -> None:
    of_margin = {"pair": f_dpo_loss, "alone": lambda margin, beta=0.1: -logsigmoid(beta * margin)}
    for curves in weight_curves(of_margin, "margin", points=5).panels.values():
        torch.testing.assert_close(curves["pair"], curves["alone"])
    of_ratio = weight_curves({"k1": lambda log_ratio: -log_ratio}, "log_ratio", points=3)
    for curves in of_ratio.panels.values():
        assert torch.equal(curves["k1"], torch.ones(3, dtype=F64))
    of_logits = weight_curves({"nll": lambda z: -z.log_softmax(-1)[:, 0]}, "probability", points=3)
    ce = weight_curves({"ce": cross_entropy}, "probability", points=3)
    torch.testing.assert_close(of_logits.panels["weight"]["nll"], ce.panels["weight"]["ce"])


def test_a_module_and_a_builtin_are_functions_of_two() -> None:
    losses = {"module": torch.nn.CrossEntropyLoss(), "function": cross_entropy}
    for curves in weight_curves(losses, "probability", points=3).panels.values():
        assert torch.equal(curves["module"], curves["function"])
    assert weight_curves({"mul": torch.mul}, "log_ratio", points=3).panels["advantage +1"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"over": "ratio"}, ValueError, "over must be one of"),
        ({"objectives": {}}, ValueError, "objectives must hold at least one"),
        ({"limits": (2.0, 1.0)}, ValueError, "limits[0] must be"),
        ({"limits": (-1.0, 1.0)}, ValueError, "limits[0] must be >= 0"),
        ({"over": "probability", "limits": (0.0, 1.5)}, ValueError, "limits[1] must be"),
        ({"points": 1}, ValueError, "points must be >= 2"),
        ({"over": "probability", "classes": 1}, ValueError, "classes must be >= 2"),
        ({"objectives": {"bpo": bpo_loss}}, ValueError, "bpo: expected a function of (log_ratio"),
        ({"objectives": {"f": lambda: 0}}, ValueError, "f: expected a function of (log_ratio"),
        ({"objectives": {"f": 3}}, TypeError, "f: an objective must be callable, got int"),
        ({"objectives": {"f": lambda x: 3.0}}, TypeError, "f: loss_fn must return a torch.Tensor"),
    ],
)
def test_a_mistake_in_what_to_draw_is_named(changes, error, says) -> None:
    arguments = {"objectives": {"ppo": ppo_loss}, "over": "log_ratio", **changes}
    with pytest.raises(error, match=re.escape(says)):
        plot_weights(**arguments)


def names_of(figure) -> list[set[str]]:
    return [{text.get_text() for text in axes.texts} for axes in figure.axes]


def test_a_figure_shows_the_curves_and_their_names() -> None:
    losses = {"ppo": ppo_loss, "bpo": target_ratio}
    figure = plot_weights(losses, over="log_ratio", points=20, title="A finding")
    curves = weight_curves(losses, "log_ratio", points=20)
    assert figure.get_suptitle() == "A finding"
    assert names_of(figure) == [{"ppo", "bpo"}] * 2
    for axes, panel in zip(figure.axes, curves.panels, strict=True):
        drawn = {line.get_gid(): line for line in axes.lines if line.get_gid()}
        for name, curve in curves.panels[panel].items():
            assert list(drawn[f"{panel}/{name}"].get_ydata()) == curve.tolist()
        looks = [(line.get_color(), str(line.get_linestyle())) for line in drawn.values()]
        assert len(set(looks)) == 2
        assert axes.get_ylabel()
    assert "ratio" in figure.axes[1].get_xlabel()
    assert figure.axes[1].get_xlim() == (0.0, 2.5)


def test_objectives_that_coincide_share_a_curve() -> None:
    same = {"a": ppo_loss, "b": target_ratio, "c": partial(ppo_loss, epsilon=0.2)}
    assert names_of(plot_weights(same, "log_ratio", points=20)) == [{"a = c", "b"}] * 2


def test_curves_that_coincide_in_one_panel_are_named_there() -> None:
    def double(logits: Tensor, labels: Tensor) -> Tensor:
        return 2 * cross_entropy(logits, labels)

    figure = plot_weights({"one": cross_entropy, "two": double}, "probability", points=5)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["weight", "direction, where all coincide"]


@pytest.mark.parametrize(("factor", "scale"), [(2.0, "linear"), (100.0, "log")])
def test_the_scale_is_logarithmic_only_where_one_scale_hides_a_curve(factor, scale) -> None:
    losses = {"dpo": f_dpo_loss, "more": lambda margin: -factor * logsigmoid(0.1 * margin)}
    figure = plot_weights(losses, "margin", points=5)
    assert [axes.get_yscale() for axes in figure.axes] == [scale] * 2
    assert plot_weights(losses, "margin", points=5, scale="log").axes[0].get_yscale() == "log"
    signed = {"bpo": target_ratio, "more": lambda *x: factor * target_ratio(*x)}
    assert plot_weights(signed, "log_ratio", points=9).axes[0].get_yscale() == "linear"
    with pytest.raises(ValueError, match="scale must be one of"):
        draw_curves(weight_curves(losses, "margin", points=2), scale="square")


def test_names_stay_beside_their_panel() -> None:
    losses = {f"times {k}": partial(lambda k, m: -k * logsigmoid(m), k) for k in (1.0, 1.1, 1.2)}
    for axes in plot_weights(losses, "margin", points=9).axes:
        places = sorted(text.get_position()[1] for text in axes.texts)
        assert places[0] >= -1e-9
        assert places[-1] <= 1 + 1e-9
        assert min(b - a for a, b in pairwise(places)) > 0.09


COMMANDS = re.findall(r"^!\[.*\]\((.*\.svg)\)\n\n`steelyard anatomy (.*)`$", PAGE.read_text(), re.M)


def curves_in(svg: str) -> dict[str, list[float]]:
    """Coordinates of every curve in a figure, and of its frame."""
    parts = re.findall(r'<g id="([^"]+/[^"]+|patch_\d+)">\s*<path d="([^"]*)"', svg)
    return {name: [float(x) for x in re.findall(r"-?\d+\.?\d*", path)] for name, path in parts}


def test_every_figure_of_the_page_comes_with_its_command() -> None:
    assert len(COMMANDS) >= 5
    assert len(COMMANDS) == PAGE.read_text().count("![")


@pytest.mark.parametrize(("figure", "command"), COMMANDS)
def test_a_committed_figure_is_what_its_command_draws(figure, command, tmp_path, capsys) -> None:
    from steelyard import cli

    out = tmp_path / "figure.svg"
    assert cli.main(["anatomy", *shlex.split(command), "--out", str(out)]) == 0
    committed = (PAGE.parent / figure).read_text(encoding="utf-8")
    drawn = out.read_text(encoding="utf-8")
    assert re.findall("<!-- (.*) -->", committed) == re.findall("<!-- (.*) -->", drawn)
    # Not the bytes, and 1/20 point: another release of matplotlib lays out and rounds a little
    # differently.
    was, now = curves_in(committed), curves_in(drawn)
    assert sum("/" in name for name in now) >= 4
    assert was.keys() == now.keys()
    for name, path in now.items():
        assert was[name] == pytest.approx(path, abs=0.05)


def test_curves_of_another_kind_are_named():
    with pytest.raises(TypeError, match="curves must be WeightCurves, got str"):
        draw_curves("text")


@pytest.mark.parametrize("limits", [3, "text", (0.0, 1.0, 2.0), ()])
def test_limits_that_are_no_two_numbers_are_refused(limits):
    with pytest.raises(TypeError, match="limits must be two numbers"):
        weight_curves({"square": torch.square}, "log_ratio", limits=limits)


def test_objectives_come_by_name():
    with pytest.raises(TypeError, match="objectives must be a mapping"):
        weight_curves("text", "log_ratio")
