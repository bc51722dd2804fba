"""Arguments of the wrong kind are refused by name."""

import functools

import pytest
import torch

from steelyard import classification

X = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
Y = torch.tensor([0, 1])
ATTACKS = (
    functools.partial(classification.pgd_attack, steps=1, step_size=0.1, epsilon=0.1),
    functools.partial(classification.counted_pgd_attack, steps=1, step_size=0.1, epsilon=0.1),
    functools.partial(
        classification.log_barrier_attack, steps=1, step_size=0.1, epsilon=0.1, barrier=0.1
    ),
)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("bounds", ["text", 3, (0.0, 0.5, 1.0), (float("nan"), 1.0)])
def test_an_attack_refuses_bounds_that_are_no_two_numbers(attack, bounds):
    with pytest.raises((TypeError, ValueError), match="bounds"):
        attack(torch.nn.Identity(), X, Y, bounds=bounds)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_refuses_a_loss_that_cannot_be_called(attack):
    with pytest.raises(TypeError, match="loss must be callable"):
        attack(torch.nn.Identity(), X, Y, loss=3)


def test_a_counted_attack_needs_one_label_an_item():
    with pytest.raises(ValueError, match=r"y must have shape \[2\]"):
        ATTACKS[1](torch.nn.Identity(), X, Y[:1])


@pytest.mark.parametrize(
    ("name", "value"), [("optimizer", None), ("optimizer", "text"), ("tracker", {}), ("loss", 3)]
)
def test_a_robust_step_refuses_what_is_no_part_of_it(name, value):
    model = torch.nn.Linear(2, 2)
    arguments = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), name: value}
    with pytest.raises(TypeError, match=name):
        classification.doubly_robust_step(
            model, x=X, y=Y, attack=lambda model, x, y: x, **arguments
        )


@pytest.mark.parametrize(
    ("lam", "error"),
    [(1j, TypeError), ("0.1", TypeError), (None, TypeError), (float("nan"), ValueError)],
)
def test_geometry_weights_refuse_a_shift_that_is_no_number(lam, error):
    with pytest.raises(error, match="lam must be a number"):
        classification.gairat_weights(torch.tensor([0, 1]), 2, lam=lam)


def test_a_threshold_is_no_truth_value():
    with pytest.raises(TypeError, match="threshold"):
        classification.soft_confusion(X[:, 0], Y, threshold=True)


def test_labels_are_needed_for_a_soft_confusion():
    with pytest.raises(TypeError, match="labels"):
        classification.soft_confusion(X[:, 0], None)


def test_features_that_are_text_are_refused():
    with pytest.raises(TypeError, match="X must hold numbers"):
        classification.lambda_max("text", Y)
