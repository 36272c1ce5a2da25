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
from torch import Tensor, nn

from noisysam import fit
from noisysam.core.network import Net, WithFeatures
from noisysam.data.datasets import Dataset
from noisysam.data.loader import Loader
from noisysam.methods import RunInfo
from noisysam.methods.rog import ABSENT, RoG, nearest
from noisysam.methods.ssr import SSR, balanced, balanced_votes
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


@pytest.mark.parametrize(
    ("selected", "counts"),
    [
        ([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 5]),  # five of class 0, one of class 1: each five times
        ([1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 5]),  # nothing: all samples
    ],
)
def test_batches_are_even_over_the_selected_classes(selected: list[int], counts: list[int], tiny: Dataset) -> None:
    """A turn holds each class as often as the largest; the second half of a batch is the plain epoch's."""
    facts = RunInfo(samples=6, classes=3, epochs=10, device=torch.device("cpu"), features=5)
    made = SSR(SSR.Options(), facts)
    made.generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    made.on_stage(labels)
    made.selected = torch.tensor(selected).float()
    even = balanced(*places(made), made.generator)
    assert torch.bincount(even, minlength=6).tolist() == counts
    loader = Loader(tiny, torch.arange(6), labels, rows=2, policy="none", device=torch.device("cpu"), seed=0)
    batches = list(made.batches(loader.epoch(0, 0)))
    plain = torch.cat([batch.index for batch in loader.epoch(0, 0)])
    assert torch.equal(torch.cat([batch.index[2:] for batch in batches]), plain)
    assert set(torch.cat([batch.index[:2] for batch in batches]).tolist()) <= set(even.tolist())


def places(made: SSR) -> tuple[Tensor, Tensor]:
    """What SSR draws evenly from, and its labels."""
    chosen = made.selected.nonzero().flatten()
    chosen = chosen if len(chosen) else torch.arange(6)
    return chosen, made.relabelled[chosen]


def test_balanced_repeats_and_shuffles() -> None:
    """Of 3 and 7 samples: 7 each; none of the 3 more than thrice, and another choice with another seed."""
    labels = torch.tensor([0] * 3 + [4] * 7)
    turns = [balanced(10 + torch.arange(10), labels, torch.Generator().manual_seed(s)) for s in range(20)]
    for turn in turns:
        counts = torch.bincount(turn - 10, minlength=10)
        assert counts[3:].tolist() == [1] * 7
        assert int(counts[:3].sum()) == 7
        assert int(counts[:3].max()) <= 3
    assert len({tuple(turn.tolist()) for turn in turns}) > 1


class Watched(nn.Module):
    """A network with batch norm that says how many images each forward had."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.seen = nn.BatchNorm2d(1), nn.Linear(4, 3), []  # type: ignore[var-annotated]

    def features(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        out: Tensor = self.norm(x).flatten(1)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


def test_groups_of_views_have_a_forward_each() -> None:
    """Batch norm sees the mixed images, the first and the second views apart; its running statistics move once, by
    the mean of the three."""
    module = Watched()
    net = Net(module, forward=WithFeatures(module))
    images = torch.randn(6, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 5).view(
        4, 1, 1, 1
    )
    net.statistics.begin()
    logits = net.logits(images, grad=True, forwards=(2, 1, 1))
    net.statistics.absorb(0, 1.0)
    net.statistics.commit()
    assert module.seen == [12, 6, 6]
    groups = [images[:, :2].flatten(0, 1), images[:, 2], images[:, 3]]
    plain = nn.BatchNorm2d(1)
    expected = [module.head(plain(x).flatten(1)) for x in groups]
    torch.testing.assert_close(logits[:, :2], expected[0].unflatten(0, (6, 2)))
    torch.testing.assert_close(logits[:, 2:], torch.stack(expected[1:], 1))
    assert net.features is not None
    assert net.features.shape == (6, 4, 4)
    means = torch.stack([x.mean() for x in groups])
    torch.testing.assert_close(module.norm.running_mean, 0.1 * means.mean().reshape(1))


def clouds(seed: int, wrong: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of three Gaussians with one covariance; labels, some of them wrong; true classes."""
    draws = np.random.default_rng(seed)
    true = np.repeat(np.arange(3), 200)
    x = 3 * np.eye(3)[true] @ draws.normal(size=(3, 5)) + draws.normal(size=(600, 5)) @ (np.eye(5) + 0.3)
    given_labels = np.where(draws.random(600) < wrong, draws.integers(0, 3, 600), true)
    return x, given_labels, true


def rog(x: np.ndarray, labels: np.ndarray, share: float) -> Tensor:
    made = RoG(RoG.Options(share=share), RunInfo(samples=len(x), classes=3, epochs=1, device=torch.device("cpu")))
    made.on_stage(torch.from_numpy(labels))
    made.on_evaluation(lambda k, features=False: torch.from_numpy(x))
    return made.outputs([torch.from_numpy(x)])


def test_rog_of_all_samples_is_linear_discriminant_analysis() -> None:
    x, labels, _ = clouds(0, 0.3)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(3, 1 / 3)).fit(x, labels)
    found = rog(x, labels, 1.0).log_softmax(1).numpy()
    # its covariance is weighted by the priors, ours by the size of the classes
    np.testing.assert_allclose(found, oracle.predict_log_proba(x), atol=0.05)


def test_rog_leaves_outliers_out() -> None:
    """Of 30 points near the origin and 20 far away the far ones are not kept; wrong labels are outliers of a class."""
    generator = torch.Generator().manual_seed(0)
    near, far = (torch.randn(n, 2, generator=generator).double() for n in (30, 20))
    kept = nearest(torch.cat([near, 9 + 0.1 * far]), near.mean(0), torch.eye(2).double(), 0.5)
    assert len(kept) == 25
    assert (kept.norm(dim=1) < 5).all()
    x, labels, true = clouds(3, 0.6)
    accuracy = [float((rog(x, labels, share).argmax(1).numpy() == true).mean()) for share in (1.0, 0.5)]
    assert accuracy[1] >= accuracy[0]


def test_rog_never_predicts_a_class_without_samples() -> None:
    x, labels, _ = clouds(1, 0.0)
    scores = rog(x[labels < 2], labels[labels < 2], 0.5)
    assert scores.isfinite().all()
    assert (scores[:, 2] < ABSENT / 2).all()


@pytest.mark.parametrize(
    ("method", "options"),
    [("ssr", {"k": 5}), ("ssr", {"k": 500, "theta_r": 0.0}), ("rog", {}), ("rog", {"share": 1.0})],
)
def test_trains(method: str, options: dict[str, float], digits: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = digits(method=method, method_option=options, opt="sam", sam_m="batch", epochs=2, noise=0.4, lr=0.1)
    result = fit(config, store=tmp_path)
    assert result.record["status"] == "finished"
    assert 0 <= result.last <= 1
