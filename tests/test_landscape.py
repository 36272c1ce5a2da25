"""The landscape against the definition of its directions, and against the run whose weights are in its middle."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from noisysam import models
from noisysam.probes import PARTS, Subject, load
from noisysam.probes.landscape import (
    Landscape,
    LandscapeOptions,
    coordinates,
    filter_normalised,
    move,
    surface,
)
from noisysam.report.probe_figures import draw, lines, planes, write
from noisysam.runs.config import RunConfig
from noisysam.training.fit import fit

OPTIONS = LandscapeOptions(limit=20, points=2, grid=1)


@pytest.fixture(scope="module")
def store(digits: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """SGD, SAM, and two networks."""
    folder = tmp_path_factory.mktemp("store")
    configs = (digits(), digits(opt="sam", rho=0.05), digits(method="co-teaching"))
    return folder, [fit(config, store=folder).record for config in configs]


@pytest.fixture(scope="module")
def subjects(store: tuple[Path, list[Any]]) -> list[Subject]:
    return [load(store[0], record["key"], device="cpu") for record in store[1]]


# directions


def test_directions_are_as_long_as_the_filters() -> None:
    """Li et al. 2018: d_ij times |w_ij| over |d_ij|, for each filter j of each layer i; nothing else moves."""
    module = models.build("resnet8", 4, 1, width=0.5, norm="group")
    seen = 0
    drawn = torch.Generator().manual_seed(3)
    for weight, direction in zip(
        module.parameters(), filter_normalised(module, torch.Generator().manual_seed(3)), strict=True
    ):
        w, d = weight.detach().numpy(), direction.numpy()
        raw = torch.randn(weight.shape, generator=drawn).numpy()
        assert d.shape == w.shape
        if w.ndim == 1:
            assert not d.any()
            continue
        for own, along, first in zip(w, d, raw, strict=True):
            seen += 1
            np.testing.assert_allclose(along, first / np.linalg.norm(first) * np.linalg.norm(own), rtol=1e-4)
    assert seen == sum(len(p) for p in module.parameters() if p.ndim > 1)


def test_the_middle_is_exactly_zero() -> None:
    assert coordinates(0.7, 3)[3] == 0.0
    np.testing.assert_allclose(coordinates(1.0, 10), np.linspace(-1, 1, 21), atol=1e-15)


def test_moving_is_adding() -> None:
    origin = models.build("resnet8", 4, 1, width=0.25)
    module = deepcopy(origin)
    generator = torch.Generator().manual_seed(0)
    one, two = (filter_normalised(origin, generator) for _ in range(2))
    for _ in range(2):  # from the origin each time, wherever the last move ended
        move(module, origin, [(0.5, one), (-2.0, two)])
        for weight, start, a, b in zip(module.parameters(), origin.parameters(), one, two, strict=True):
            torch.testing.assert_close(weight, start + 0.5 * a - 2 * b)
    move(module, origin, [(0.0, one)])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), origin.parameters(), strict=True))


# values


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_middle_is_the_run(number: int, subjects: list[Subject]) -> None:
    """On all images: test loss and accuracy as recorded, and the training accuracies that memorisation implies."""
    subject = subjects[number]
    found = surface(subject, 10**6, 0, [[0.0]])
    recorded, noisy = subject.record["results"], subject.problem.noisy.take(subject.problem.train)
    flips = noisy.flip_rate
    together = recorded.get("test_accuracy_ensemble", recorded["last"])
    assert found["test"]["accuracy"][0] == pytest.approx(together, abs=1e-6)
    if len(subject.modules) > 1:  # of these the record has the mean of the networks
        return
    assert found["test"]["loss"][0] == pytest.approx(recorded["nll"], rel=1e-5)
    right = (1 - flips) * recorded["clean_accuracy"]
    assert found["noisy"]["accuracy"][0] == pytest.approx(right + flips * recorded["memorised"], abs=1e-6)
    assert found["clean"]["accuracy"][0] == pytest.approx(right + flips * recorded["recovered"], abs=1e-6)


def test_a_point_is_the_loss_at_moved_weights(subjects: list[Subject]) -> None:
    subject = subjects[0]
    found = surface(subject, 20, 7, [[-0.3, 0.4], [0.2]])
    generator = torch.Generator().manual_seed(7)
    one, two = (filter_normalised(subject.modules[0], generator) for _ in range(2))
    module = deepcopy(subject.modules[0])
    with torch.no_grad():
        for p, a, b in zip(module.parameters(), one, two, strict=True):
            p += 0.4 * a + 0.2 * b
        for part in PARTS:
            inputs, labels = subject.part(part, 20)
            logits = module(inputs)
            assert found[part]["loss"][1][0] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
            assert found[part]["accuracy"][1][0] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_the_line_is_the_first_axis_of_the_plane(subjects: list[Subject]) -> None:
    for subject in subjects[::2]:
        line = surface(subject, 20, 1, [[-1.0, 0.0, 1.0]])
        plane = surface(subject, 20, 1, [[-1.0, 0.0, 1.0], [-0.5, 0.0, 0.5]])
        for part in PARTS:
            assert [row[1] for row in plane[part]["loss"]] == pytest.approx(line[part]["loss"], rel=1e-6)
            assert plane[part]["loss"][1][0] != plane[part]["loss"][1][2]


def test_networks_move_along_directions_of_their_own(subjects: list[Subject]) -> None:
    """Two networks: a point of the reported outputs is made of both moved ones."""
    subject = subjects[2]
    found = surface(subject, 20, 0, [[1.0]])
    generator = torch.Generator().manual_seed(0)
    inputs, labels = subject.part("test", 20)
    moved = [deepcopy(module) for module in subject.modules]
    for module, origin in zip(moved, subject.modules, strict=True):
        move(module, origin, [(1.0, filter_normalised(origin, generator))])
    with torch.no_grad():
        mean = torch.stack([module(inputs).softmax(1) for module in moved]).mean(0)
    assert found["test"]["loss"][0] == pytest.approx(float(F.nll_loss(mean.log(), labels)), rel=1e-4)


def test_batch_norm_keeps_its_running_statistics(subjects: list[Subject]) -> None:
    """A part's mean loss is that of its rows one by one, also where the weights have moved."""
    subject = subjects[0]
    found = surface(subject, 12, 0, [[0.5]])["test"]["loss"][0]
    module = deepcopy(subject.modules[0])
    move(module, subject.modules[0], [(0.5, filter_normalised(module, torch.Generator().manual_seed(0)))])
    inputs, labels = subject.part("test", 12)
    with torch.no_grad():
        alone = [float(F.cross_entropy(module(inputs[i : i + 1]), labels[i : i + 1])) for i in range(12)]
    assert found == pytest.approx(np.mean(alone), rel=1e-5)


# the probe


def test_a_run_is_left_as_it_was_and_drawn_in_fixed_bytes(subjects: list[Subject], tmp_path: Path) -> None:
    subject = subjects[2]
    before = [v.numpy().tobytes() for m in subject.modules for v in m.state_dict().values()]
    found = Landscape(OPTIONS).run(subject)
    assert [v.numpy().tobytes() for m in subject.modules for v in m.state_dict().values()] == before
    assert found["line"]["coordinates"] == [[-1.0, -0.5, 0.0, 0.5, 1.0]]
    assert np.shape(found["plane"]["test"]["loss"]) == (3, 3)
    assert found["plane"]["noisy"]["loss"][1][1] == found["line"]["noisy"]["loss"][2]
    assert Landscape(OPTIONS).run(subject) == found
    places = [tmp_path / name for name in "ab"]
    first, again = ([path.read_bytes() for path in write("landscape", {"run": found}, place)] for place in places)
    assert first == again
    assert {path.name for path in places[0].iterdir()} == {
        f"landscape-{kind}.{form}" for kind in ("line", "plane") for form in ("png", "svg")
    }


@pytest.mark.slow
def test_runs_side_by_side(tmp_path: Path) -> None:
    """Each run has its line; a plane is drawn of the runs that have one."""
    flat = results(0.5)
    del flat["plane"]
    found = {picture.name: (figure, shown, there) for picture, figure, shown, there in draw(
        "landscape", {"one": results(0.5), "two": results(1.5), "three": flat})}  # fmt: skip
    assert [found[name][1:] for name in ("line", "plane")] == [(3, 3), (2, 2)]
    assert [text.get_text() for text in found["line"][0].legends[0].get_texts()] == ["one", "two", "three"]
    many = {f"run {n}": results(0.5) for n in range(6)}
    assert [(shown, there) for _, _, shown, there in draw("landscape", many)] == [(6, 6), (4, 6)]
    assert write("counting", many, tmp_path / "none") == []


def results(loss: float | None) -> dict[str, Any]:
    part = {"loss": [loss, 1.0, 2.0], "accuracy": [0.1, 0.5, 0.9]}
    square = {"loss": [[loss, 1.0, 2.0]] * 3, "accuracy": [[0.1] * 3] * 3}
    axis = [-1.0, 0.0, 1.0]
    return {
        "line": {"coordinates": [axis], **dict.fromkeys(PARTS, part)},
        "plane": {"coordinates": [axis, axis], **dict.fromkeys(PARTS, square)},
    }


def test_figures_stand_anything(tmp_path: Path) -> None:
    """Losses of zero and without bound, and names that matplotlib would read as formulas or hide."""
    named = {"$\\frac{": results(0.0), "_hidden": results(float("inf")), "x" * 80: results(float("nan"))}
    named |= {"from a file": results(None)}
    for figure in (lines(named), planes(named)):
        figure.savefig(tmp_path / "figure.png")
    figure = lines(named)
    figure.draw_without_rendering()
    texts = [
        text.get_text().strip().replace("\\$", "$").replace("\\\\", "\\") for text in figure.legends[0].get_texts()
    ]
    assert texts == list(named)


def test_a_level_plane_is_drawn(tmp_path: Path) -> None:
    flat = results(1.0)
    flat["plane"] |= {part: {"loss": [[1.0] * 3] * 3, "accuracy": [[0.1] * 3] * 3} for part in PARTS}
    planes({"flat": flat}).savefig(tmp_path / "figure.png")
