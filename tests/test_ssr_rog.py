"""SSR+: relabelling, votes, selection, the loss. RoG: robust Gaussians on the features."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from noisysam import fit
from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods import RunInfo
from noisysam.methods.rog import RoG, concentrated
from noisysam.methods.ssr import SSR, balanced_votes
from noisysam.runs.config import RunConfig

FACTS = RunInfo(samples=6, classes=3, epochs=10, device=torch.device("cpu"), features=5)


def ssr(**options: float) -> SSR:
    made = SSR(SSR.Options(**options), FACTS)
    made.generator, made.rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    made.on_stage(torch.tensor([0, 0, 0, 1, 1, 2]))
    return made


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(2, 4))
def test_votes_by_hand(seed: int, k: int, classes: int) -> None:
    """Neighbours by cosine, itself among them; counts over the classes' shares, normalised."""
    draws = np.random.default_rng(seed)
    x, y = draws.normal(size=(9, 4)), draws.integers(0, classes, 9)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.zeros((9, classes))
    for i in range(9):
        nearest = np.argsort(-(unit @ unit[i]), kind="stable")[: min(k, 9)]
        for c in range(classes):
            share = (y == c).mean()
            expected[i, c] = (y[nearest] == c).mean() / share if share else 0
    expected /= expected.sum(1, keepdims=True)
    votes = balanced_votes(torch.from_numpy(x), torch.from_numpy(y), classes, k)
    np.testing.assert_allclose(votes.numpy(), expected, rtol=1e-6)


def test_relabels_the_confident_and_selects_by_votes() -> None:
    made = ssr(theta_r=0.8, k=2)
    confident = torch.tensor([[9.0, 0, 0], [0, 0, 9.0], [0.1, 0, 0], [0, 0.1, 0], [9.0, 0, 0], [0, 0, 0.1]])
    # pairs of neighbours: 0-1, 2-3, 4-5
    places = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1], [0.1, 0, 1]])
    made.on_epoch(1, lambda k, features=False: F.pad(places, (0, 2)) if features else confident)
    assert made.relabelled.tolist() == [0, 2, 0, 1, 0, 2]  # 1 and 4 are sure of another class
    # shares of the classes 1/2, 1/6, 1/3: of two neighbours with different labels the rarer class has the larger vote
    assert made.selected.tolist() == [0, 1, 0, 1, 0, 1]


def test_loss_by_numpy() -> None:
    made, draws = ssr(consistency=0.7), np.random.default_rng(1)
    z, f = torch.from_numpy(draws.normal(size=(4, 4, 3))), torch.from_numpy(draws.normal(size=(4, 4, 5))).float()
    labels = torch.from_numpy(draws.dirichlet(np.ones(3), (4, 2)))
    task = Task(0, f, labels.mean(1), plan={"labels": labels}, features=f)
    p = np.exp(z.numpy()) / np.exp(z.numpy()).sum(2, keepdims=True)
    ce = -(labels.numpy() * np.log(p[:, :2])).sum(2).mean(1)
    first, second = made.project(f[:, 2]), made.predict(made.project(f[:, 3]))
    a, b = first.detach().numpy(), second.detach().numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(made.loss(z, task).detach().numpy(), ce - 0.7 * cosine, rtol=1e-5)


def test_batches_are_even_over_the_selected_classes(make_dataset: Callable[..., object]) -> None:
    """Selected: five of class 0, one of class 1; each class is drawn about as often. Nothing selected: all are."""
    facts = RunInfo(samples=6, classes=3, epochs=10, device=torch.device("cpu"), features=5)
    made = SSR(SSR.Options(), facts)
    made.generator = torch.Generator().manual_seed(0)
    made.on_stage(torch.tensor([0, 0, 0, 0, 0, 1]))

    class One:
        """An epoch of one batch."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            yield Batch(torch.zeros(400, 1), torch.zeros(400), torch.zeros(400, dtype=torch.long), 0)

        def batch(self, index: Tensor, views: int) -> Tensor:
            assert views == 2
            return index

    for selected, expected in (([1, 1, 1, 1, 1, 1], 0.5), ([1, 1, 0, 0, 0, 0], 0.0), ([0, 0, 0, 0, 0, 0], 1 / 6)):
        made.selected = torch.tensor(selected).float()
        (index,) = made.batches(One())  # type: ignore[arg-type]
        assert float((index[:400] == 5).float().mean()) == pytest.approx(expected, abs=0.08)
        assert (index[400:] == 0).all()


def clouds(seed: int, wrong: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of three Gaussians with one covariance; labels, some of them wrong; true classes."""
    draws = np.random.default_rng(seed)
    true = np.repeat(np.arange(3), 200)
    x = 3 * np.eye(3)[true] @ draws.normal(size=(3, 5)) + draws.normal(size=(600, 5)) @ (np.eye(5) + 0.3)
    given_labels = np.where(draws.random(600) < wrong, draws.integers(0, 3, 600), true)
    return x, given_labels, true


def rog(x: np.ndarray, labels: np.ndarray, share: float) -> Tensor:
    made = RoG(RoG.Options(share=share), RunInfo(samples=600, classes=3, epochs=1, device=torch.device("cpu")))
    made.on_stage(torch.from_numpy(labels))
    made.on_evaluation(lambda k, features=False: torch.from_numpy(x))
    return made.outputs([torch.from_numpy(x)])


def test_rog_of_all_samples_is_linear_discriminant_analysis() -> None:
    x, labels, _ = clouds(0, 0.3)
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(x, labels)
    found = rog(x, labels, 1.0).log_softmax(1).numpy()
    np.testing.assert_allclose(found, oracle.predict_log_proba(x), atol=0.02)


def test_rog_leaves_outliers_out() -> None:
    """A class of 30 near the origin and 20 far away: the far ones are not kept, and do not move the mean."""
    generator = torch.Generator().manual_seed(0)
    near, far = (torch.randn(n, 2, generator=generator).double() for n in (30, 20))
    far = 9 + 0.1 * far
    kept = concentrated(torch.cat([near, far]), 0.5)
    assert len(kept) == 25
    assert (kept.norm(dim=1) < 5).all()
    x, labels, true = clouds(3, 0.6)
    accuracy = [float((rog(x, labels, share).argmax(1).numpy() == true).mean()) for share in (1.0, 0.5)]
    assert accuracy[1] >= accuracy[0]


@pytest.mark.parametrize(
    ("method", "options"),
    [("ssr", {"k": 5}), ("ssr", {"k": 500, "theta_r": 0.0}), ("rog", {}), ("rog", {"share": 1.0})],
)
def test_trains(method: str, options: dict[str, float], digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = digits(method=method, method_option=options, opt="sam", sam_m="batch", epochs=2, noise=0.4, lr=0.1)
    result = fit(config, store=tmp_path)
    assert result.record["status"] == "finished"
    assert 0 <= result.last <= 1
