"""Methods that learn a transition matrix, or revise it."""

import pytest
import torch
import torch.nn.functional as F
from method_harness import CLASSES, SAMPLES, batch, begin, close, epoch, some_labels, some_logits, stages, visits
from torch import Tensor, nn


def sig_t(w: Tensor) -> Tensor:
    """models.py sig_t: the identity plus sigmoids off the diagonal, rows normalised."""
    off = torch.ones(CLASSES, CLASSES, dtype=torch.float64) - torch.eye(CLASSES, dtype=torch.float64)
    return F.normalize(torch.eye(CLASSES, dtype=torch.float64) + torch.sigmoid(w) * off, p=1, dim=1)


@pytest.mark.parametrize(("start", "rule"), [(2.0, "sgd"), (4.5, "adam")])
def test_volminnet(start: float, rule: str) -> None:
    """Negative log-likelihood of p T with lambda times its volume; T steps by its own optimizer, at 0.01 to 1e-4."""
    labels = some_labels()
    method = begin("volminnet", labels, epochs=80, start=start, rule=rule, volume=0.1)
    w = nn.Parameter(-start * torch.ones(CLASSES, CLASSES, dtype=torch.float64))
    theirs = torch.optim.SGD([w], lr=0.01, momentum=0.9) if rule == "sgd" else torch.optim.Adam([w], lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(theirs, milestones=[30, 60], gamma=0.1)
    ours = method.auxiliary_optimizer()
    for number in range(80):
        epoch(method, number)
        close("volminnet", ours.param_groups[0]["lr"], theirs.param_groups[0]["lr"])
        if number in (0, 1, 29, 30, 65):
            index = visits()[number % 5]
            z = some_logits(len(index), CLASSES, seed=number, scale=3.0)
            y, leaf = labels[index], z.clone().requires_grad_()
            matrix = sig_t(w)
            loss = F.nll_loss((torch.softmax(leaf, 1) @ matrix).log(), y) + 0.1 * matrix.slogdet().logabsdet
            theirs.zero_grad()
            loss.backward()
            mine = z.clone().requires_grad_()
            (task,) = method.tasks(batch(index, labels), None)
            found = method.loss(mine, task).mean()
            ours.zero_grad()
            found.backward()
            close("volminnet", found, loss.detach())
            close("volminnet", mine.grad, leaf.grad)
            close("volminnet", method.weight.grad, w.grad)
            ours.step()
            theirs.step()
            close("volminnet", method.transition(), sig_t(w))
        scheduler.step()


def test_t_revision() -> None:
    """reweight_loss with its weight detached; reweighting_revision_loss with T + correction for every row, the
    correction by Adam at 5e-7 with weight decay 1e-4."""
    labels, estimated = some_labels(), some_logits(SAMPLES, CLASSES, scale=3.0)
    method = begin("t-revision", labels, epochs=200, quantile=1.0)
    trainings = stages(method, lambda which: estimated.float())
    lengths, found_starts = [], []
    p = torch.softmax(estimated, 1)
    matrix = torch.stack([p[p[:, i].argmax()] for i in range(CLASSES)])  # tools.fit without its filter
    for phase, part in enumerate(trainings):
        method.on_stage(labels)
        lengths.append(part.settings.get("epochs", 200))
        found_starts.append(part.start)
        change = nn.Parameter(torch.zeros(CLASSES, CLASSES, dtype=torch.float64))
        adam = torch.optim.Adam([change], lr=5e-7, weight_decay=1e-4)
        own = method.auxiliary_optimizer()
        assert (own is not None) == (phase == 2)
        for visit, index in enumerate(visits()):
            z = some_logits(len(index), CLASSES, seed=visit)
            y, leaf, mine = labels[index], z.clone().requires_grad_(), z.clone().requires_grad_()
            t = torch.eye(CLASSES, dtype=torch.float64) if phase == 0 else matrix + change
            losses = []
            for row in range(len(y)):
                q = torch.softmax(leaf[row], 0)
                weight = q[y[row]] / (t.T @ q)[y[row]]
                weight = weight if phase == 2 else weight.detach()
                losses.append(weight * F.cross_entropy(leaf[row : row + 1], y[row : row + 1]))
            loss = torch.stack(losses).sum() / len(y)
            adam.zero_grad()
            loss.backward()
            (task,) = method.tasks(batch(index, labels), None)
            found = method.loss(mine, task).mean()
            found.backward()
            close("t-revision", found, loss.detach())
            close("t-revision", mine.grad, leaf.grad)
            if own is not None:
                close("t-revision", method.change.grad, change.grad)
                adam.step()
                own.step()
                own.zero_grad()
                moved, expected = method.change.detach() / 5e-7, change.detach() / 5e-7  # in steps of the rate
                torch.testing.assert_close(moved.double(), expected, rtol=1e-3, atol=1e-2)
    assert lengths == [20, 200, 200]
    assert found_starts == ["scratch", "continue", "continue"]
