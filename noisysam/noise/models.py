"""Noise models: clean labels in, noisy labels out, with the facts that identify, measure and reproduce them.

Noisy labels depend on the kind, the clean labels, the rate, the draw and the seed alone. Selection and new label come
from two fixed words of random bits per sample, so with one seed the samples selected at a low rate are selected at
every higher rate too.
"""

import math
from typing import Any, ClassVar

import numpy as np
from scipy.special import ndtr, ndtri

from noisysam.core.errors import UserError
from noisysam.core.rng import random_normals, random_uniforms
from noisysam.noise.base import NOISE, Noise, Request, _cumulative
from noisysam.noise.labels import Matrix, NoisyLabels


class MatrixNoise(Noise):
    """Noise that depends on the class alone: a share ``rate`` of each class is selected and labelled anew."""

    def conditional(self, request: Request) -> Matrix:
        """The matrix (K, K) of P(new label = j | clean label = i, selected)."""
        raise NotImplementedError

    def make(self, request: Request) -> NoisyLabels:
        """Select in each class (exact: the round(rate * n_c) smallest keys; bernoulli: keys below rate), then draw."""
        r, conditional = request, self.conditional(request)
        keys = random_uniforms(len(r.clean), "noise", self.name, r.seed, "select")
        values = random_uniforms(len(r.clean), "noise", self.name, r.seed, "label")
        labels = r.clean.copy()
        for label in range(r.classes):
            members = np.flatnonzero(r.clean == label)
            if r.draw == "exact":
                selected = members[np.argsort(keys[members], kind="stable")[: round(r.rate * len(members))]]
            else:
                selected = members[keys[members] < r.rate]
            labels[selected] = np.searchsorted(_cumulative(conditional[label]), values[selected], side="right")
        transition = (1 - r.rate) * np.eye(r.classes) + r.rate * conditional
        return NoisyLabels(labels, r.clean, r.classes, self.definition(r, **self.facts(r)), transition)

    def facts(self, request: Request) -> dict[str, Any]:
        """What else of the request the conditional matrix depends on."""
        return {}


@NOISE.register("symmetric", source="uniform over all K classes, as in DivideMix (arXiv 2002.07394), ELR (2007.00151)")
class Symmetric(MatrixNoise):
    """Selected samples get a label uniform over all K classes: the true flip rate is r(K-1)/K."""

    def conditional(self, request: Request) -> Matrix:
        """1/K everywhere."""
        return np.full((request.classes, request.classes), 1 / request.classes)


@NOISE.register("symmetric-exclusive", source="uniform over the others, as in Co-teaching (arXiv 1804.06872)")
class SymmetricExclusive(MatrixNoise):
    """Selected samples get a label uniform over the K-1 other classes: the true flip rate is r."""

    def conditional(self, request: Request) -> Matrix:
        """1/(K-1) off the diagonal."""
        return (1 - np.eye(request.classes)) / (request.classes - 1)


@NOISE.register("asymmetric", source="Patrini et al. 2017, arXiv 1609.03683, section 5")
class Asymmetric(MatrixNoise):
    """Selected samples get the class theirs is mistaken for (10 classes: CIFAR-10's map; else within superclasses).

    CIFAR-10: truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog; the other five classes keep their
    labels, so the true flip rate is r/2. CIFAR-100: the next class of the same superclass, the last to the first, as in
    the code of GJS (asymmetric-blocks: the code of two others).
    """

    CIFAR10: ClassVar[dict[int, int]] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}

    def conditional(self, request: Request) -> Matrix:
        """One entry of 1 in each row; ``UserError`` where the classes have no published map."""
        if request.superclasses is not None:
            groups = np.asarray(request.superclasses)
            if len(groups) != request.classes:
                raise UserError(f"{len(groups)} superclass labels were given for {request.classes} classes")
            target = np.arange(request.classes)
            for group in np.unique(groups):
                members = np.flatnonzero(groups == group)
                target[members] = np.roll(members, -1)
        elif request.classes == 10:
            target = np.array([self.CIFAR10.get(label, label) for label in range(10)])
        else:
            raise UserError(
                f"asymmetric noise needs 10 classes or superclasses, not {request.classes} classes: use pair noise"
            )
        return np.eye(request.classes)[target]

    def facts(self, request: Request) -> dict[str, Any]:
        """The superclasses, where there are any."""
        return {} if request.superclasses is None else {"superclasses": [int(group) for group in request.superclasses]}


@NOISE.register("asymmetric-blocks", source="giorgiop/loss-correction@15a79de noise.py; Active-Passive-Losses@04bce53")
class AsymmetricBlocks(MatrixNoise):
    """Selected samples of class i get label i + 1 within blocks of five ids (0-4, 5-9, ...), the last the first.

    The CIFAR-100 noise of two released codes; the true flip rate is r. CIFAR-100's ids are in the order of the names,
    so these blocks are not its superclasses, within which ``asymmetric`` shifts, as the paper describes it.
    """

    BLOCK = 5

    def conditional(self, request: Request) -> Matrix:
        """One entry of 1 in each row; ``UserError`` where the classes do not make up whole blocks."""
        if request.classes % self.BLOCK:
            raise UserError(
                f"asymmetric-blocks noise needs blocks of {self.BLOCK} classes, not {request.classes} classes"
            )
        labels = np.arange(request.classes)
        return np.eye(request.classes)[labels - labels % self.BLOCK + (labels + 1) % self.BLOCK]


@NOISE.register("pair", source="pair flipping, Han et al. 2018 (Co-teaching), arXiv 1804.06872, section 4")
class Pair(MatrixNoise):
    """Selected samples of class i get label i + 1, those of the last class label 0: the true flip rate is r."""

    def conditional(self, request: Request) -> Matrix:
        """1 on the circular superdiagonal."""
        return np.roll(np.eye(request.classes), 1, axis=1)


@NOISE.register("instance", source="Xia et al. 2020, arXiv 2006.07836, Algorithm 2")
class Instance(Noise):
    """Each image has its own flip rate and its own favoured wrong classes.

    q_i ~ N(rate, 0.1^2) cut to [0, 1]; W_c ~ N(0, 1) of shape (S, K) for each class c; the label stays with probability
    1 - q_i, else follows softmax(x_i W_{y_i}) over the other classes, x_i being the S pixel values from 0 to 255 (the
    scale of the authors' release; its softmax is close to an argmax). Each sample is always drawn by itself, whatever
    ``draw`` says, and near 0 and 1 the cut moves the mean of q_i away from ``rate``. Rate 0 gives the clean labels.
    """

    SPREAD = 0.1

    def make(self, request: Request) -> NoisyLabels:
        """The noisy labels; ``UserError`` without one uint8 image for each label."""
        r = request
        labels = r.clean.copy()
        definition = {**self.definition(r), "draw": "bernoulli"}
        if r.rate == 0:
            return NoisyLabels(labels, r.clean, r.classes, definition)
        if r.images is None or len(r.images) != len(r.clean) or r.images.dtype != np.uint8:
            raise UserError(f"instance noise needs the uint8 images of all {len(r.clean)} samples")
        low, high = ndtr((0 - r.rate) / self.SPREAD), ndtr((1 - r.rate) / self.SPREAD)
        quantile = low + (high - low) * random_uniforms(len(labels), "noise", self.name, r.seed, "rate")
        flip_rates = np.clip(r.rate + self.SPREAD * ndtri(quantile), 0, 1)
        keys = random_uniforms(len(labels), "noise", self.name, r.seed, "select")
        values = random_uniforms(len(labels), "noise", self.name, r.seed, "label")
        images = r.images.reshape(len(r.images), -1)
        for label in range(r.classes):
            selected = np.flatnonzero((r.clean == label) & (keys < flip_rates))
            pixels = images[selected].astype(np.float64)
            size = (pixels.shape[1], r.classes)
            projection = random_normals(math.prod(size), "noise", self.name, r.seed, "projection", label).reshape(size)
            logits = pixels @ projection  # float64, so that a label does not hang on the order of a sum
            logits[:, label] = -np.inf
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            labels[selected] = (values[selected, None] >= _cumulative(weights)).sum(axis=1)
        return NoisyLabels(labels, r.clean, r.classes, definition)
