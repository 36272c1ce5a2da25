import json
import random
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from noisysam import noise
from noisysam.core import rng
from noisysam.core.errors import UserError
from noisysam.noise import models

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_cifar = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared copy of CIFAR-10")

MATRIX_KINDS = ("symmetric", "symmetric-exclusive", "asymmetric", "asymmetric-blocks", "pair")
BALANCED = np.tile(np.arange(10), 100)
SUPERCLASSES = (0, 1, 0, 1, 0, 1)  # 0 -> 2 -> 4 -> 0, 1 -> 3 -> 5 -> 1


@pytest.fixture(scope="module")
def cifar_labels():
    with np.load(SHARED / "cifar10n.npz") as archive:
        return archive["clean"].astype(np.int64)


def images(n, size=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def quiet_make(*args, **options):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return noise.make(*args, **options)


# What each kind draws


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("symmetric", "f2b80dda7f32535b"),
        ("symmetric-exclusive", "9e831bbcd2225891"),
        ("asymmetric", "02b29eafb0d35ecc"),
        ("pair", "092803b24fbd436b"),
    ],
)
def test_digests_are_pinned(kind, labels):
    assert noise.make(kind, BALANCED, 10, rate=0.4, seed=3).digest[:16] == labels


@needs_cifar
@pytest.mark.parametrize(
    ("kind", "labels", "flip_rate"),
    [
        ("symmetric", "6b43e254e95d431b", 0.36052),
        ("symmetric-exclusive", "dd650ee254666b7a", 0.4),
        ("asymmetric", "7bd6a4614f8eb140", 0.2),
        ("pair", "735a98e26365f519", 0.4),
    ],
)
def test_digests_on_cifar10_are_pinned(cifar_labels, kind, labels, flip_rate):
    noisy = noise.make(kind, cifar_labels, 10, rate=0.4)
    assert noisy.digest[:16] == labels
    assert noisy.flip_rate == pytest.approx(flip_rate, abs=1e-12)


kinds = st.sampled_from(MATRIX_KINDS)
rates = st.floats(0, 1)
seeds = st.integers(0, 2**31)
clean_labels = st.lists(st.integers(0, 9), min_size=1, max_size=300).map(np.array)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kind=kinds, clean=clean_labels, rate=rates, seed=seeds)
def test_exact_draw_counts_and_ranges(kind, clean, rate, seed):
    noisy = quiet_make(kind, clean, 10, rate=rate, seed=seed)
    counts = np.bincount(clean, minlength=10)
    flips = np.bincount(clean[noisy.flipped], minlength=10)
    selected = [round(rate * int(count)) for count in counts]
    assert ((noisy.labels >= 0) & (noisy.labels < 10)).all()
    if kind == "symmetric":  # a selected sample may draw its own label
        assert (flips <= selected).all()
    else:
        sources = [2, 3, 4, 5, 9] if kind == "asymmetric" else range(10)
        assert flips.tolist() == [selected[label] if label in sources else 0 for label in range(10)]
    assert noisy.clean.tolist() == clean.tolist()


@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("kind", ["symmetric-exclusive", "pair"])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_extreme_random_numbers_keep_no_selected_label(monkeypatch, extreme, kind, classes):
    monkeypatch.setattr(models, "random_uniforms", lambda n, *name: np.full(n, extreme))
    noisy = quiet_make(kind, np.arange(classes), classes, rate=1)
    assert noisy.flipped.all()
    assert noisy.labels.max() < classes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kind=kinds, clean=clean_labels, rate=rates, seed=seeds, draw=st.sampled_from(noise.DRAWS))
def test_matrices_are_stochastic_and_consistent(kind, clean, rate, seed, draw):
    noisy = quiet_make(kind, clean, 10, rate=rate, seed=seed, draw=draw)
    for matrix in (noisy.matrix, noisy.transition):
        assert matrix.shape == (10, 10)
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(1), 1)
    counts = np.bincount(clean, minlength=10)
    for label in np.flatnonzero(counts == 0):
        assert noisy.matrix[label].tolist() == np.eye(10)[label].tolist()
    assert (noisy.per_class_flip_rate * counts).sum() / len(clean) == pytest.approx(noisy.flip_rate)
    assert (noisy.transition[clean, noisy.labels] > 0).all()  # nothing that the model excludes


@settings(max_examples=30, deadline=None, derandomize=True)
@given(kind=kinds, rate=st.floats(0.05, 1), seed=seeds, draw=st.sampled_from(noise.DRAWS))
def test_labels_depend_on_the_seed_and_on_no_global_state(kind, rate, seed, draw):
    first = quiet_make(kind, BALANCED, 10, rate=rate, seed=seed, draw=draw)
    np.random.seed(seed % 1000)  # noqa: NPY002
    torch.manual_seed(seed)
    random.seed(seed)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002
    again = quiet_make(kind, BALANCED.astype(np.int32), 10, rate=rate, seed=seed, draw=draw)
    after = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002
    assert before == after
    assert (first.digest, first.definition_digest) == (again.digest, again.definition_digest)
    other = quiet_make(kind, BALANCED, 10, rate=rate, seed=seed + 1, draw=draw)
    if rate < 0.95 or kind.startswith("symmetric"):
        assert other.digest != first.digest
    assert other.definition_digest != first.definition_digest


@settings(max_examples=20, deadline=None, derandomize=True)
@given(kind=kinds, low=rates, high=rates, draw=st.sampled_from(noise.DRAWS))
def test_a_higher_rate_keeps_every_flip(kind, low, high, draw):
    low, high = sorted((low, high))
    fewer, more = (quiet_make(kind, BALANCED, 10, rate=rate, draw=draw) for rate in (low, high))
    assert (fewer.labels == more.labels)[fewer.flipped].all()


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_bernoulli_draw_is_binomial(kind):
    clean = np.tile(np.arange(10), 2000)
    noisy = noise.make(kind, clean, 10, rate=0.3, seed=5, draw="bernoulli")
    flips = np.bincount(clean[noisy.flipped], minlength=10)
    for label in range(10):
        chance = 1 - noisy.transition[label, label]
        assert stats.binomtest(int(flips[label]), 2000, chance).pvalue > 1e-4
    exact = noise.make(kind, clean, 10, rate=0.3, seed=5)
    assert exact.labels.tolist() != noisy.labels.tolist()


@pytest.mark.parametrize("kind", ["symmetric", "symmetric-exclusive"])
def test_new_labels_are_uniform(kind):
    clean = np.tile(np.arange(10), 2000)
    noisy = noise.make(kind, clean, 10, rate=0.5, seed=1)
    observed = np.bincount((noisy.labels - clean) % 10, minlength=10)[1:]
    assert stats.chisquare(observed).pvalue > 1e-3
    assert noisy.flip_rate == pytest.approx(0.5 if kind == "symmetric-exclusive" else 0.45, abs=0.005)
    assert abs(noisy.matrix - noisy.transition).max() < 0.03


def test_nominal_transitions_have_their_closed_form():
    eye, ones = np.eye(10), np.ones((10, 10))
    transition = {kind: noise.make(kind, BALANCED, 10, rate=0.3).transition for kind in MATRIX_KINDS}
    np.testing.assert_allclose(transition["symmetric"], 0.7 * eye + 0.03 * ones)
    np.testing.assert_allclose(transition["symmetric-exclusive"], 0.7 * eye + 0.3 / 9 * (ones - eye))
    expected = eye.copy()
    for source, target in ((9, 1), (2, 0), (4, 7), (3, 5), (5, 3)):
        expected[source, source], expected[source, target] = 0.7, 0.3
    np.testing.assert_allclose(transition["asymmetric"], expected)
    for label in range(10):
        assert transition["pair"][label, (label + 1) % 10] == pytest.approx(0.3)


def test_asymmetric_within_superclasses():
    clean = np.tile(np.arange(6), 10)
    noisy = noise.make("asymmetric", clean, 6, rate=0.4, superclasses=SUPERCLASSES)
    assert noisy.labels[noisy.flipped].tolist() == ((clean[noisy.flipped] + 2) % 6).tolist()
    assert noisy.per_class_flip_rate.tolist() == pytest.approx([0.4] * 6)


def test_asymmetric_in_blocks_of_five_ids():
    """giorgiop/loss-correction@15a79de noise.py build_for_cifar100 and Active-Passive-Losses@04bce53 dataset.py."""
    expected = np.eye(100)
    for start in range(0, 100, 5):
        block = 0.7 * np.eye(5)
        block[range(4), range(1, 5)] = 0.3
        block[4, 0] = 0.3
        expected[start : start + 5, start : start + 5] = block
    noisy = noise.make("asymmetric-blocks", np.tile(np.arange(100), 10), 100, rate=0.3)
    np.testing.assert_allclose(noisy.transition, expected)
    assert noisy.flip_rate == pytest.approx(0.3)


@pytest.mark.parametrize("kind", MATRIX_KINDS)
@pytest.mark.parametrize("draw", noise.DRAWS)
def test_rate_zero_and_rate_one(kind, draw):
    assert noise.make(kind, BALANCED, 10, rate=0, draw=draw).labels.tolist() == BALANCED.tolist()
    with pytest.warns(UserWarning, match="not the most probable"):
        noisy = noise.make(kind, BALANCED, 10, rate=1, draw=draw)
    expected = {"symmetric": 0.9, "symmetric-exclusive": 1, "pair": 1, "asymmetric": 0.5, "asymmetric-blocks": 1}
    assert noisy.flip_rate == pytest.approx(expected[kind], abs=0.02 if kind == "symmetric" else 1e-12)


@pytest.mark.parametrize(
    ("kind", "rate", "warned"),
    [
        ("symmetric-exclusive", 0.89, False),
        ("symmetric-exclusive", 0.9, True),
        ("symmetric", 0.99, False),
        ("pair", 0.5, True),
        ("asymmetric", 0.5, True),
        ("asymmetric", 0.45, False),
    ],
)
def test_warning_where_a_class_cannot_be_learnt(recwarn, kind, rate, warned):
    noise.make(kind, BALANCED, 10, rate=rate)
    assert len(recwarn) == warned
    assert not warned or "\n" not in str(recwarn[0].message)


# Instance noise


def test_instance_noise_follows_the_image():
    n = 4000
    clean = np.tile(np.arange(5), n // 5)
    noisy = noise.make("instance", clean, 5, rate=0.4, images=images(n))
    mean = stats.truncnorm.mean(-4, 6, loc=0.4, scale=0.1)
    assert noisy.flip_rate == pytest.approx(mean, abs=0.03)
    assert noisy.transition is None
    assert noisy.definition["draw"] == "bernoulli"
    same = noise.make("instance", clean, 5, rate=0.4, images=images(n), draw="bernoulli")
    assert same.digest == noisy.digest
    assert same.definition_digest == noisy.definition_digest
    other = noise.make("instance", clean, 5, rate=0.4, images=images(n, seed=1))
    assert (other.flipped == noisy.flipped).all()  # the flip rates are the samples', the targets the images'
    assert other.digest != noisy.digest


def test_instance_noise_against_the_formula_of_the_paper():
    """Flips go where softmax(x W_y) without the own class goes, by an independent loop over samples."""
    n, classes = 60, 3
    clean = np.tile(np.arange(classes), n // classes)
    pictures = images(n, size=2) // 128  # small numbers: no softmax near an argmax
    noisy = noise.make("instance", clean, classes, rate=0.5, seed=2, images=pictures)

    def uniforms(what):
        return rng.random_uniforms(n, "noise", "instance", 2, what)

    rates = stats.truncnorm.ppf(uniforms("rate"), -5, 5, loc=0.5, scale=0.1)
    for i in range(n):
        projection = stats.norm.ppf(rng.random_uniforms(36, "noise", "instance", 2, "projection", clean[i]) + 2.0**-54)
        scores = pictures[i].reshape(-1).astype(float) @ projection.reshape(12, classes)
        probability = np.exp(scores) * (np.arange(classes) != clean[i])
        probability /= probability.sum()
        expected = clean[i]
        if uniforms("select")[i] < rates[i]:
            expected = np.argmax(uniforms("label")[i] < np.cumsum(probability))
        assert noisy.labels[i] == expected


def test_instance_noise_at_its_ends():
    clean, pictures = BALANCED, images(1000)
    assert noise.make("instance", clean, 10, rate=0, images=pictures).labels.tolist() == clean.tolist()
    noisy = quiet_make("instance", clean, 10, rate=1, images=pictures)
    assert noisy.flip_rate == pytest.approx(stats.truncnorm.mean(-10, 0, loc=1, scale=0.1), abs=0.03)


def test_instance_noise_where_no_sample_of_a_class_is_selected():
    clean = np.arange(10)  # one of each
    noisy = quiet_make("instance", clean, 10, rate=0.01, images=images(10))
    assert noisy.flipped.sum() < 10


@pytest.mark.parametrize("pictures", [None, images(3), images(1000).astype(np.float32)])
def test_instance_noise_needs_its_images(pictures):
    with pytest.raises(UserError, match="uint8 images of all 1000"):
        noise.make("instance", BALANCED, 10, rate=0.2, images=pictures)


# Human labels


@needs_cifar
@pytest.mark.parametrize(
    ("chosen", "percent"),
    [("aggre", 9.010), ("random1", 17.234), ("random2", 18.122), ("random3", 17.640), ("worse", 40.208)],
)
def test_human_labels_have_their_published_rates(cifar_labels, chosen, percent):
    noisy = noise.make(f"human:{chosen}", cifar_labels, 10, data_dir=SHARED)
    assert 100 * noisy.flip_rate == pytest.approx(percent, abs=5e-4)
    assert noisy.rate == noisy.flip_rate
    assert noisy.definition["type"] == f"human:{chosen}"
    assert noisy.definition["rate"] is None


def released(path, **changes):
    """A file laid out as the authors' release, of 20 samples."""
    clean = np.tile(np.arange(10), 2)
    arrays = {"clean_label": clean, "worse_label": (clean + 1) % 10, "aggre_label": clean} | changes
    torch.save({key: array for key, array in arrays.items() if array is not None}, path)
    return clean


@pytest.mark.parametrize("numpy_name", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_the_authors_file_is_read_whichever_numpy_wrote_it(tmp_path, numpy_name):
    written = tmp_path / "written.pt"
    clean = released(written)
    with (
        zipfile.ZipFile(written) as source,
        zipfile.ZipFile(tmp_path / "CIFAR-10_human.pt", "w", zipfile.ZIP_STORED) as target,
    ):
        for entry in source.namelist():
            content = source.read(entry)
            for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
                content = content.replace(name, numpy_name)
            target.writestr(entry, content)
    noisy = quiet_make("human:worse", clean, 10, data_dir=tmp_path)
    assert noisy.labels.tolist() == ((clean + 1) % 10).tolist()


def test_cifar100n(tmp_path):
    clean = np.arange(100)
    np.savez(tmp_path / "cifar100n.npz", clean=clean.astype(np.uint8), noisy=clean[::-1].astype(np.uint8))
    assert quiet_make("human:noisy", clean, 100, data_dir=tmp_path).labels.tolist() == clean[::-1].tolist()
    torch.save({"clean_label": clean, "noisy_label": clean}, tmp_path / "CIFAR-100_human.pt")  # comes first
    assert noise.make("human:noisy", clean, 100, data_dir=tmp_path).flip_rate == 0


class Payload:
    """A pickle that would write a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["archive", "bare pickle", "object array"])
def test_a_malicious_pickle_is_refused(tmp_path, form):
    trap, path = tmp_path / "trap", tmp_path / "CIFAR-10_human.pt"
    if form == "archive":
        torch.save({"clean_label": Payload(trap)}, path)
    elif form == "bare pickle":
        torch.save(Payload(trap), path, _use_new_zipfile_serialization=False)  # a bare pickle, as of old
    else:
        torch.save({"clean_label": np.array([Payload(trap)], dtype=object)}, path)
    torch.load(path, weights_only=False)
    assert trap.exists()  # the payload does work on a reader that lets it
    trap.unlink()
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(UserError, match="refused") as error:
        noise.make("human:worse", BALANCED, 10, data_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert not trap.exists()
    assert set(torch.serialization.get_safe_globals()) == before  # what was let through is not let through for good


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"worse_label": None}, "lacks the array worse_label"),
        ({"worse_label": [1] * 20}, "lacks the array worse_label"),
        ({"worse_label": np.zeros(19, int)}, "worse has 19 entries for 20"),
        ({"worse_label": np.full(20, 10)}, "worse holds 10"),
        ({"worse_label": np.zeros(20)}, "refused"),
        ({"clean_label": np.arange(20) % 9}, "11 clean labels differ"),
        ({"clean_label": np.arange(10)}, "clean labels"),
    ],
)
def test_faulty_human_labels_are_told_in_one_line(tmp_path, changes, fault):
    clean = released(tmp_path / "CIFAR-10_human.pt", **changes)
    with pytest.raises(UserError, match=fault) as error:
        noise.make("human:worse", clean, 10, data_dir=tmp_path)
    assert "\n" not in str(error.value)


# Bad requests


@pytest.mark.parametrize(
    ("kind", "options", "fault"),
    [
        ("symetric", {}, "did you mean 'symmetric'"),
        ("symmetric", {"rate": 1.01}, "not between 0 and 1"),
        ("symmetric", {"rate": -0.1}, "not between 0 and 1"),
        ("symmetric", {"rate": float("nan")}, "not between 0 and 1"),
        ("symmetric", {"draw": "poisson"}, "unknown noise draw 'poisson'"),
        ("symmetric:worse", {}, "takes nothing after a colon"),
        ("symmetric", {"classes": 9}, "clean labels holds 9"),
        ("symmetric", {"clean": np.zeros((2, 2), int)}, "clean labels must be a 1-D array"),
        ("symmetric", {"clean": np.zeros(3)}, "clean labels must be a 1-D array"),
        ("symmetric", {"clean": np.zeros(0, int)}, "no labels"),
        ("asymmetric", {"classes": 12}, "needs 10 classes or superclasses"),
        ("asymmetric", {"superclasses": (0, 1)}, "2 superclass labels"),
        ("asymmetric-blocks", {"classes": 12}, "blocks of 5 classes, not 12"),
        ("human", {}, "needs a set"),
        ("human:worse", {"rate": 0.2}, "brings its own rate"),
        ("human:best", {}, "unknown set of human labels 'best'"),
        ("human:worse", {"classes": 12}, "not for data of 12 classes"),
        ("human:worse", {"data_dir": Path("nowhere")}, "CIFAR-10_human.pt or cifar10n.npz"),
        ("file", {}, "needs a path"),
        ("file:x.npz", {"rate": 0.2}, "brings its own rate"),
        ("file:nowhere.npz", {}, "no such file"),
        ("file:nowhere.csv", {}, "no such file"),
    ],
)
def test_bad_requests_are_told_in_one_line(kind, options, fault):
    options = {"clean": BALANCED, "classes": 10, "rate": 0.0} | options
    with pytest.raises(UserError, match=fault) as error:
        noise.make(kind, options.pop("clean"), options.pop("classes"), **options)
    assert "\n" not in str(error.value)


# Files


@pytest.mark.parametrize("kind", [*(kind for kind in MATRIX_KINDS if kind != "asymmetric-blocks"), "instance"])
def test_round_trip(tmp_path, kind):
    clean = np.tile(np.arange(6), 20)
    pictures = images(120, size=4)
    noisy = noise.make(kind, clean, 6, rate=0.3, seed=7, images=pictures, superclasses=SUPERCLASSES)
    path = tmp_path / "deep" / "labels.npz"
    noise.save(noisy, path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["labels.csv", "labels.npz"]
    again = noise.load(path)
    assert (again.digest, again.definition) == (noisy.digest, noisy.definition)
    assert (again.rate, again.classes) == (0.3, 6)
    np.testing.assert_array_equal(again.transition, noisy.transition)
    passed = noise.verify(path, clean)
    assert len(passed) == (2 if kind == "instance" else 3)
    assert len(noise.verify(path, None)) == len(passed) - 1

    through_file = noise.make(f"file:{path}", clean, 6)
    assert (through_file.digest, through_file.card()) == (noisy.digest, noisy.card())
    through_csv = noise.make(f"file:{path.with_suffix('.csv')}", clean, 6)
    assert through_csv.digest == noisy.digest
    assert through_csv.definition["type"] == "file"


def test_card_is_json_and_complete():
    noisy = noise.make("symmetric", BALANCED, 10, rate=0.5, seed=np.int64(4))
    card = json.loads(json.dumps(noisy.card()))
    assert {key: card[key] for key in ("type", "rate", "draw", "seed", "n", "classes")} == {
        "type": "symmetric",
        "rate": 0.5,
        "draw": "exact",
        "seed": 4,
        "n": 1000,
        "classes": 10,
    }
    assert card["flip_rate"] == pytest.approx(np.mean(card["per_class_flip_rate"]))
    np.testing.assert_allclose(card["matrix"], noisy.matrix)
    assert card["digest"] == noisy.digest


def test_take_keeps_the_samples_and_says_so(tmp_path):
    noisy = noise.make("symmetric", BALANCED, 10, rate=0.5)
    index = np.array([3, 5, 900])
    part = noisy.take(index)
    assert part.labels.tolist() == noisy.labels[index].tolist()
    assert part.clean.tolist() == noisy.clean[index].tolist()
    assert part.rate == 0.5
    assert part.definition["taken_from"] == noisy.digest
    assert part.definition_digest != noisy.definition_digest
    assert noisy.take(noisy.flipped).flip_rate == 1
    noise.save(part, tmp_path / "part.npz")
    assert len(noise.verify(tmp_path / "part.npz", BALANCED[index])) == 2  # a part is not drawn again


def tampered(path, **changes):
    """The saved file with some arrays replaced, or left out where None."""
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files} | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})


DEFINITION = {"type": "symmetric", "rate": 0.4, "draw": "exact", "seed": 3, "revision": 1, "classes": 10}


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": BALANCED},
        {"labels": BALANCED[:-1]},
        {"labels": BALANCED + 1},
        {"labels": BALANCED.astype(float)},
        {"labels": None},
        {"clean": BALANCED[::-1]},
        {"clean": None},
        {"clean": BALANCED.reshape(10, 100)},
        {"transition": np.eye(10)},
        {"transition": np.eye(9)},
        {"transition": None},
        {"checksum": np.array("0" * 64)},
        {"checksum": None},
        {"definition": np.array("{")},
        {"definition": np.array("[]")},
        {"definition": np.array(b"\xff")},
        {"definition": np.arange(3)},
        {"definition": np.array(json.dumps(DEFINITION | {"seed": 4}))},
        {"definition": np.array(json.dumps(DEFINITION | {"rate": 7}))},
        {"definition": np.array(json.dumps(DEFINITION | {"rate": "high"}))},
        {"definition": np.array(json.dumps(DEFINITION | {"classes": "ten"}))},
        {"definition": np.array(json.dumps({"classes": 10, "rate": 0.4, "type": "symmetric"}))},
        {"definition": np.array({"a": 1}, dtype=object)},
    ],
)
def test_tampering_is_found(tmp_path, changes):
    path = tmp_path / "labels.npz"
    noise.save(noise.make("symmetric", BALANCED, 10, rate=0.4, seed=3), path)
    noise.verify(path, BALANCED)
    tampered(path, **changes)
    for read in (noise.load, noise.verify, lambda path: noise.make(f"file:{path}", BALANCED, 10)):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_verification_draws_again(tmp_path):
    """Labels that fit their checksum, but not the definition that they claim."""
    noisy = noise.make("symmetric", BALANCED, 10, rate=0.4, seed=3)
    labels = noisy.labels.copy()
    labels[:2] = (labels[:2] + 1) % 10
    forged = noise.NoisyLabels(labels, noisy.clean, 10, noisy.definition, noisy.transition)
    noise.save(forged, tmp_path / "forged.npz")
    with pytest.raises(UserError, match="2 labels are not what its definition gives"):
        noise.verify(tmp_path / "forged.npz")
    with pytest.raises(UserError, match="clean labels differ"):
        noise.verify(tmp_path / "forged.npz", BALANCED[::-1])


def test_saved_labels_must_fit_the_data(tmp_path):
    path = tmp_path / "labels.npz"
    noise.save(noise.make("pair", BALANCED, 10, rate=0.4), path)
    with pytest.raises(UserError, match="made for 10 classes, not 11"):
        noise.make(f"file:{path}", BALANCED, 11)
    with pytest.raises(UserError, match="differ from the data set's"):
        noise.make(f"file:{path}", BALANCED[::-1], 10)
    with pytest.raises(UserError, match=r"\(1000,\), the data set \(500,\)"):
        noise.make(f"file:{path}", BALANCED[:500], 10)


def test_saving_refuses_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    noisy = noise.make("pair", BALANCED, 10, rate=0.4)
    with pytest.raises(UserError, match=r"named \.npz"):
        noise.save(noisy, tmp_path / "labels.txt")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        noise.save(noisy, tmp_path / "file" / "labels.npz")

    path = tmp_path / "labels.npz"
    noise.save(noisy, path)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(UserError, match="No space left"):
        noise.save(noisy.take(np.arange(5)), path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "labels.csv", "labels.npz"]


def test_plain_files(tmp_path):
    clean = np.array([0, 1, 2, 0, 1, 2] * 3)
    labels = clean.copy()
    labels[5] = 1
    np.savez(tmp_path / "plain.npz", labels=labels.astype(np.uint8))
    np.savez(tmp_path / "checked.npz", labels=labels, clean=clean)
    rows = [f"{i},{labels[i]}" for i in range(18)]
    (tmp_path / "shuffled.csv").write_text("\n".join(["index,noisy", *rows[::-1]]))
    (tmp_path / "plain.csv").write_text("\r\n".join(["noisy", *map(str, labels)]) + "\r\n")
    for name in ("plain.npz", "checked.npz", "shuffled.csv", "plain.csv"):
        noisy = noise.make(f"file:{tmp_path / name}", clean, 3)
        assert noisy.labels.tolist() == labels.tolist()
        assert noisy.rate == noisy.flip_rate == pytest.approx(1 / 18)
        assert noisy.definition == {
            "type": "file",
            "rate": None,
            "draw": None,
            "seed": None,
            "revision": 1,
            "classes": 3,
        }


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", b"", "first line must name a column noisy"),
        ("a.csv", b"noisy\n0\n1\n", "has 2 entries for 3"),
        ("a.csv", b"noisy\n0\n1\n3\n", "holds 3"),
        ("a.csv", b"noisy\n0\n1\n-1\n", "holds -1"),
        ("a.csv", b"noisy\n0\n1\ncat\n", "column noisy holds something"),
        ("a.csv", b"noisy\n0\n1\n1.5\n", "column noisy holds something"),
        ("a.csv", b"noisy\n0\n1\n99999999999999999999\n", "column noisy holds something"),
        ("a.csv", b"index,noisy\n0,0\n1,1\n1,2\n", "each of 0 to 2 once"),
        ("a.csv", b"index,noisy\n0,0\n1\n2,2\n", "row 1 has 1 fields"),
        ("a.csv", b"clean,noisy\n0,0\n1,1\n1,2\n", "1 clean labels differ"),
        ("a.csv", b"noisy\n\xff\xfe", "cannot be read"),
        ("a.csv", b"noisy\n0\x000\n", "a.csv"),
        ("a.npz", b"", "not an .npz file"),
        ("a.npz", b"PK\x03\x04 cut short", "not an .npz file"),
        ("a.txt", b"0 1 2", "holds something that is no integer label"),
    ],
)
def test_faulty_label_files_are_told_in_one_line(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        noise.make(f"file:{path}", np.array([0, 1, 2]), 3)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"noisy": np.arange(3)}, "lacks labels"),
        ({"labels": np.array([0, 1, "x"], dtype=object)}, "Python objects"),
        ({"labels": np.arange(3.0)}, "labels must be a 1-D array of integers"),
        ({"labels": np.arange(4)}, "labels has 4 entries for 3"),
        ({"labels": np.arange(3), "clean": np.arange(3)[::-1]}, "2 clean labels differ"),
        ({"labels": np.arange(3), "definition": np.array("{}")}, "lacks checksum"),
    ],
)
def test_faulty_label_arrays_are_told_in_one_line(tmp_path, arrays, fault):
    path = tmp_path / "labels.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=fault) as error:
        noise.make(f"file:{path}", np.array([0, 1, 2]), 3)
    assert "\n" not in str(error.value)


# The registry, random numbers, speed


def test_every_kind_has_a_source_and_a_revision():
    assert set(noise.NOISE) == {*MATRIX_KINDS, "instance", "human", "file", "given"}
    for _, kind in noise.NOISE.items():
        assert kind.source
        assert kind.revision >= 1
        assert kind.__doc__


def test_random_numbers_have_their_distribution():
    uniforms = rng.random_uniforms(20000, "test")
    assert (uniforms >= 0).all()
    assert (uniforms < 1).all()
    assert stats.kstest(uniforms, "uniform").pvalue > 1e-3
    normals = rng.random_normals(20000, "test")
    assert np.isfinite(normals).all()
    assert stats.kstest(normals, "norm").pvalue > 1e-3


def test_speed_of_symmetric_noise():
    clean = np.tile(np.arange(10), 5000)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        noise.make("symmetric", clean, 10, rate=0.4)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1  # 6 ms measured; the rest is for a busy machine
