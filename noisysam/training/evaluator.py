"""Looking at networks from outside: plain inputs, evaluation mode, unperturbed weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisysam import models
from noisysam.data.augmentation import normalise
from noisysam.data.loader import PLAIN_ROWS, Loader
from noisysam.runs.problem import Problem
from noisysam.training import metrics

SAMPLE = 5000  # training samples, stratified by class and flip, on which memorisation is measured


class Evaluator:
    """Measures networks on test data, noisy validation data and a fixed sample of the training data.

    It alone holds clean labels. Memorisation is against the labels as they were given at first, whatever a method has
    made of them since.
    """

    def __init__(
        self,
        problem: Problem,
        loader: Loader,
        outputs: Callable[[Sequence[Tensor]], Tensor],
        bf16: bool,
        features: bool = False,
        compile: bool = False,
        headline: Literal["ensemble", "mean of networks"] = "ensemble",
    ) -> None:
        """``outputs``: the method's, from the logits (or ``features``) of each network to the reported logits.
        ``compile``: whether networks are compiled for it; ``headline``: whose figures are reported, of the networks
        together or their own, averaged."""
        self.features, self.compile, self.headline = features, compile, headline
        self.compiled: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        dataset, device = problem.dataset, loader.device
        self.loader, self.outputs, self.bf16 = loader, outputs, bf16
        self.test_images, self.test_labels = dataset.test_images.to(device), dataset.test_labels.to(device)
        self.classes = dataset.classes
        held_out = problem.noisy.take(problem.val)
        self.val_images = dataset.train_images[torch.from_numpy(problem.chosen[problem.val])].to(device)
        self.val_labels = torch.from_numpy(held_out.labels).to(device)
        noisy = problem.noisy.take(problem.train)
        sample = metrics.stratified_sample(*noisy.strata, SAMPLE, seed=0)
        self.sample = torch.from_numpy(sample).to(device)
        self.given = torch.from_numpy(noisy.labels[sample]).to(device)
        self.clean = None if noisy.clean is None else torch.from_numpy(noisy.clean[sample]).to(device)

    def measure(self, modules: Sequence[nn.Module]) -> dict[str, float]:
        """All figures of one epoch, as shares of 1; nan where a group is empty. What needs the correct training labels
        is left out where they are not known."""
        each = self._logits(modules, self._images(self.test_images))
        figures = self._mean(self._of_test, each)
        if len(modules) > 1:
            for k, own in enumerate(each, start=1):
                figures[f"test_accuracy_{k}"] = float(metrics.accuracy(own, self.test_labels))
            figures["test_accuracy_ensemble"] = float(metrics.accuracy(self.outputs(each), self.test_labels))
        if len(self.val_labels):
            each = self._logits(modules, self._images(self.val_images))
            figures |= self._mean(lambda z: {"val_accuracy": float(metrics.accuracy(z, self.val_labels))}, each)
        if self.clean is None:
            return figures
        given, clean = self.given, self.clean
        each = self._logits(modules, self.loader.plain(self.sample))
        return figures | self._mean(lambda z: _of_sample(z, given, clean), each)

    def _of_test(self, logits: Tensor) -> dict[str, float]:
        return {
            "test_accuracy": float(metrics.accuracy(logits, self.test_labels)),
            "test_nll": float(metrics.negative_log_likelihood(logits, self.test_labels)),
            "test_ece": float(metrics.expected_calibration_error(logits, self.test_labels)),
        }

    def _mean(self, figures: Callable[[Tensor], dict[str, float]], each: Sequence[Tensor]) -> dict[str, float]:
        """Figures of the reported logits, or the mean of those of each network, whichever is the headline."""
        found = [figures(z) for z in (each if self.headline == "mean of networks" else [self.outputs(each)])]
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    def confusion(self, modules: Sequence[nn.Module]) -> npt.NDArray[np.int64]:
        """Test images by class (rows) and predicted class (columns)."""
        predicted = self.outputs(self._logits(modules, self._images(self.test_images))).argmax(1)
        counts = torch.bincount(self.test_labels * self.classes + predicted, minlength=self.classes**2)
        found: npt.NDArray[np.int64] = counts.reshape(self.classes, self.classes).cpu().numpy()
        return found

    def reported(self, modules: Sequence[nn.Module]) -> Tensor:
        """The reported logits (n, K) for the whole training set."""
        return self.outputs(self._logits(modules, self.loader.plain()))

    def of_training(self, module: nn.Module, features: bool = False, inputs: Iterator[Tensor] | None = None) -> Tensor:
        """Logits (n, K), or features (n, d), of one network for the whole training set, by default on plain inputs."""
        return self._forward(module, self.loader.plain() if inputs is None else inputs, features)

    def _logits(self, modules: Sequence[nn.Module], inputs: Iterator[Tensor]) -> list[Tensor]:
        kept = list(inputs) if len(modules) > 1 else inputs
        return [self._forward(module, kept, self.features) for module in modules]

    @torch.no_grad()
    def _forward(self, module: nn.Module, inputs: Iterator[Tensor] | list[Tensor], features: bool = False) -> Tensor:
        module.eval()
        call = module.features if features else self._compiled(module) if self.compile else module
        with torch.autocast(self.loader.device.type, torch.bfloat16, self.bf16):
            return torch.cat([call(x).float() for x in inputs])  # type: ignore[operator]

    def _compiled(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network in compiled form. It takes rows in one number alone: a smaller part is filled up with zeros."""
        if module not in self.compiled:
            self.compiled[module] = models.compiled(module)
        forward = self.compiled[module]
        return lambda x: forward(F.pad(x, (0, 0, 0, 0, 0, 0, 0, PLAIN_ROWS - len(x))))[: len(x)]

    def _images(self, images: Tensor) -> Iterator[Tensor]:
        for part in images.split(PLAIN_ROWS):
            yield normalise(part, self.loader.mean, self.loader.std)


def _of_sample(logits: Tensor, given: Tensor, clean: Tensor) -> dict[str, float]:
    auroc = float(metrics.detection_auroc(metrics.per_sample_loss(logits, given), given != clean))
    return {**metrics.memorisation(logits, given, clean), "auroc": auroc}
