"""Training images whose labels are most probably wrong, found with a trained network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from noisysam.core.errors import UserError
from noisysam.data.augmentation import normalise
from noisysam.data.loader import PLAIN_ROWS
from noisysam.methods.dividemix import probability_clean, scaled
from noisysam.probes.base import Subject, load
from noisysam.training import metrics

By = Literal["loss", "confident-learning"]
PROBABLE = 0.5  # probability of a wrong label above which an image is a suspect


@dataclass(frozen=True)
class Suspects:
    """What was found in a run. ``table``: a line for each suspect, the most suspicious first; ``figures``: numbers of
    images and suspects, and where the true labels are known precision, recall (shares of 1) and AUROC."""

    table: pd.DataFrame
    figures: Mapping[str, Any]
    subject: Subject

    def images(self, count: int) -> npt.NDArray[np.uint8]:
        """The first ``count`` suspects' images (n, H, W, C)."""
        first = torch.tensor(self.table["index"].tolist()[:count], dtype=torch.int64)
        found: npt.NDArray[np.uint8] = self.subject.problem.dataset.train_images[first].numpy()
        return found


def suspects(
    run: str,
    store: Path | str = "runs",
    *,
    count: int | None = None,
    by: By = "loss",
    data_dir: Path | None = None,
    device: str = "auto",
    plugin: Path | None = None,
) -> Suspects:
    """The training images of a finished run, its held-out ones too, whose labels are most probably wrong.

    ``by`` loss: the cross-entropy of the given label on the plain image, averaged over the run's snapshots
    (``--snapshots``) and its final weights, and divided by a mixture of two Gaussians, as in DivideMix (arXiv
    2002.07394); for held-out images, which the network did not fit, by one of their own. ``by`` confident-learning:
    cleanlab's (arXiv 1911.00068), from the predicted probabilities averaged in the same way. ``count``: so many images,
    the most suspicious; default: those above a probability of 1/2 (loss), or what cleanlab finds. ``UserError`` where
    the run cannot be loaded, see ``noisysam.probes.load``.
    """
    if count is not None and count < 1:
        raise UserError(f"--count {count}: give 1 or more")
    subject = load(Path(store), run, data_dir, device, plugin)
    problem = subject.problem
    losses, probabilities = _look(subject)
    held_out = np.zeros(len(problem.chosen), np.bool_)
    held_out[problem.val] = True
    given = problem.noisy.labels
    if by == "loss":
        wrong = _wrong(losses, held_out)
        order = np.lexsort((-losses, -wrong))
        chosen = order[: count if count is not None else int((wrong > PROBABLE).sum())]
    else:
        ranked = _confident_learning(given, probabilities)
        chosen, wrong = ranked[:count], 1 - probabilities[np.arange(len(given)), given].astype(np.float64)
    table = _table(subject, chosen, losses, wrong, probabilities, held_out)
    known = problem.noisy.clean is not None
    figures = {"images": len(given), "suspects": len(chosen), "moments": 1 + len(subject.snapshots())}
    return Suspects(table, figures | (_measured(problem.noisy.flipped, losses, chosen) if known else {}), subject)


@torch.no_grad()
def _look(subject: Subject) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Loss of the given label (n,) and class probabilities (n, K) of each training image, averaged over the weights
    that the run has kept."""
    problem, loader = subject.problem, subject.loader
    moments = [subject.at(*moment) for moment in subject.snapshots()] + [subject.modules]
    labels = torch.from_numpy(problem.noisy.labels).to(subject.device)
    losses, probabilities = [], []
    for rows in torch.arange(len(labels)).split(PLAIN_ROWS):
        images = problem.dataset.train_images[torch.from_numpy(problem.chosen)[rows]].to(subject.device)
        inputs = normalise(images, loader.mean, loader.std)
        each = [subject.logits(inputs, modules) for modules in moments]
        losses.append(torch.stack([metrics.per_sample_loss(z, labels[rows]) for z in each]).mean(0).cpu())
        probabilities.append(torch.stack([z.float().softmax(1) for z in each]).mean(0).cpu())
    return torch.cat(losses).double().numpy(), torch.cat(probabilities).numpy()


def _wrong(losses: npt.NDArray[np.float64], held_out: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Probability that each label is wrong, by mixtures of the losses of trained and of held-out images."""
    found = np.zeros(len(losses))
    for part in (held_out, ~held_out):
        own = torch.from_numpy(losses[part])
        if len(own) > 1:
            found[part] = 1 - _clean(own).numpy()
    return found


def _clean(losses: Tensor) -> Tensor:
    return probability_clean(scaled(losses) if losses.max() > losses.min() else losses, seed=0)


def _confident_learning(given: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """What cleanlab takes for wrong labels, the most suspicious first."""
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise UserError(
            "--by confident-learning needs cleanlab, whose licence is AGPL: pip install 'noisysam[cleanlab]'"
        ) from None
    found: npt.NDArray[np.int64] = find_label_issues(
        given, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    return found


def _table(
    subject: Subject,
    chosen: npt.NDArray[np.int64],
    losses: npt.NDArray[np.float64],
    wrong: npt.NDArray[np.float64],
    probabilities: npt.NDArray[np.float32],
    held_out: npt.NDArray[np.bool_],
) -> pd.DataFrame:
    problem, names = subject.problem, np.array(subject.problem.dataset.class_names)
    noisy, index = problem.noisy, problem.chosen[chosen]
    columns: dict[str, Any] = {"index": index}
    if problem.dataset.files is not None:
        columns["file"] = np.array(problem.dataset.files)[index]
    given, likely = noisy.labels[chosen], probabilities[chosen]
    others = likely.copy()
    others[np.arange(len(given)), given] = -1  # a network predicts the wrong labels that it has memorised
    columns |= {"given": names[given], "predicted": names[likely.argmax(1)], "suggested": names[others.argmax(1)]}
    columns |= {"loss": losses[chosen], "probability_wrong": wrong[chosen], "held_out": held_out[chosen]}
    if noisy.clean is not None:
        columns |= {"true": names[noisy.clean[chosen]], "wrong": noisy.flipped[chosen]}
    return pd.DataFrame(columns)


def _measured(
    flipped: npt.NDArray[np.bool_], losses: npt.NDArray[np.float64], chosen: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """How good the choice is."""
    hits, all_wrong = int(flipped[chosen].sum()), int(flipped.sum())
    return {
        "wrong labels": all_wrong,
        "precision": hits / len(chosen) if len(chosen) else None,
        "recall": hits / all_wrong if all_wrong else None,
        "auroc": metrics.detection_auroc(torch.from_numpy(losses), torch.from_numpy(flipped)),
    }
