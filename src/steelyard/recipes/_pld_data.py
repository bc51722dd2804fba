"""Images and small networks of the recipe pld, anew for each seed."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steelyard.lab.data import digits, fashion_mnist

CLASSES = 10


class Split(NamedTuple):
    """Images and the labels that were given."""

    images: Tensor
    labels: Tensor


def digits_splits(count: int, seed: int) -> dict[str, Split]:
    """Split the digits: 900 for the teacher, so many for the student, as many to validate."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    sizes = {"teacher": 900, "train": count, "validation": count}
    return dealt(Split(torch.from_numpy(images), torch.from_numpy(labels)), order, sizes, "test")


def fashion_splits(count: int, teacher_count: int, seed: int) -> dict[str, Split]:
    """Draw training images, half as many to validate; the test set is the published one."""
    data = _scaled(*fashion_mnist("train"))
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    sizes = {"teacher": teacher_count, "train": count, "validation": count // 2}
    return dealt(data, order, sizes, "rest") | {"test": _scaled(*fashion_mnist("test"))}


def dealt(data: Split, order: Tensor, sizes: dict[str, int], rest: str) -> dict[str, Split]:
    """Cut data in an order into parts, the last with what is left."""
    parts, start = {}, 0
    for name, size in (*sizes.items(), (rest, len(order))):
        index = order[start : start + size]
        parts[name], start = Split(data.images[index], data.labels[index]), start + size
    return parts


def _scaled(images: Any, labels: Any) -> Split:
    return Split(torch.from_numpy(images.copy())[:, None] / 255.0, torch.from_numpy(labels))


def spoiled(labels: Tensor, share: float, seed: int) -> Tensor:
    """Replace a share of the labels by another class each, drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < share
    shift = torch.randint(1, CLASSES, labels.shape, generator=generator)
    return torch.where(wrong, (labels + shift) % CLASSES, labels)


def mlp(*widths: int) -> nn.Module:
    """A perceptron with ReLU between its layers."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional(channels: tuple[int, int], hidden: int | None = None) -> nn.Module:
    """Two strided convolutions, then one linear layer or two."""
    first, second = channels
    features = 49 * second
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        mlp(features, CLASSES) if hidden is None else mlp(features, hidden, CLASSES),
    )


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "digits": partial(mlp, 64, 128, 128, CLASSES),  # 26,000 parameters
    "fashion": partial(convolutional, (32, 64), 128),  # 420,000
}
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "digits": partial(mlp, 64, 16, CLASSES),  # 1,200
    "fashion": partial(convolutional, (8, 8)),  # 4,600
}


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a model whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return make()
