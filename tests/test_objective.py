"""What optimizers evaluate: running statistics, repeated masks, counted passes, parts of a batch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noisysam import fit, optim
from noisysam.core.network import Net
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.data.datasets import Dataset
from noisysam.runs.config import RunConfig

RHO = 0.5


def cross_entropy(logits: Tensor, task: Task) -> Tensor:
    return F.cross_entropy(logits, task.labels, reduction="none")


def weighted(logits: Tensor, task: Task) -> Tensor:
    return task.plan["weight"] * task.plan["scale"] * cross_entropy(logits, task)


def normed_network() -> nn.Sequential:
    """Batch norm behind a linear layer, so that its statistics depend on the weights; two momenta."""
    torch.manual_seed(0)
    second = nn.BatchNorm1d(4, momentum=0.3)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), second, nn.Linear(4, 2))


def task(rows: int = 12, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, generator=generator)
    x, y = torch.randn(rows, 3, generator=generator), torch.randint(2, (rows,), generator=generator)
    return Task(0, x, y, torch.arange(100, 100 + rows), {"weight": weight, "scale": 3.0})


def statistics(module: nn.Module) -> list[Tensor]:
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    return [b.clone() for m in layers for b in (m.running_mean, m.running_var)]


def batch_statistics(module: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Mean and unbiased variance of what each batch norm is given, by hand."""
    found = []
    with torch.no_grad():
        for layer in module:
            if isinstance(layer, nn.BatchNorm1d):
                found += [x.mean(0), x.var(0)]
                x = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + layer.eps) * layer.weight + layer.bias
            else:
                x = layer(x)
    return found


def perturbed(module: nn.Sequential, x: Tensor, y: Tensor) -> nn.Sequential:
    """A copy of the network at w + rho g / |g|."""
    there = copy.deepcopy(module)
    grads = torch.autograd.grad(F.cross_entropy(there(x), y), list(there.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(there.parameters(), grads, strict=True):
            p.add_(RHO * g / norm)
    return there


def blend(old: list[Tensor], *updates: list[Tensor]) -> list[Tensor]:
    rates = [0.1, 0.1, 0.3, 0.3]
    for update in updates:
        old = [(1 - rate) * a + rate * b for rate, a, b in zip(rates, old, update, strict=True)]
    return old


def close(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def step(net: Net, optimizer: optim.SharpnessAware, objective: Objective) -> None:
    """A step as the training loop makes it."""
    net.statistics.begin()
    optimizer.step(objective)
    net.statistics.commit(optimizer.found_inf)


def sam(net: Net, **options: Any) -> optim.SAM:
    return optim.SAM(net.params, lr=0.1, **{"rho": RHO, "m": "batch", **options})


# running statistics


@pytest.mark.parametrize("policy", ["first", "last", "both"])
def test_policies_by_hand(policy: Any) -> None:
    """SAM at m='batch', two steps: the statistics at w, those at w + e, or first the ones and then the others."""
    module = normed_network()
    old, reference = statistics(module), copy.deepcopy(module)
    net = Net(module, policy=policy)
    optimizer = sam(net)
    for seed in range(2):
        t = task(seed=seed)
        for p, q in zip(reference.parameters(), module.parameters(), strict=True):
            p.data.copy_(q)
        here = batch_statistics(reference, t.inputs)
        there = batch_statistics(perturbed(reference, t.inputs, t.labels), t.inputs)
        step(net, optimizer, Objective(net, t, cross_entropy))
        old = blend(old, *{"first": [here], "last": [there], "both": [here, there]}[policy])
        close(statistics(module), old)
        assert max(float((a - b).abs().max()) for a, b in zip(here, there, strict=True)) > 0.01


@pytest.mark.parametrize("name", ["sgd", "sam", "esam", "j-sam"])
def test_a_step_leaves_the_statistics_of_one_clean_forward(name: str) -> None:
    module = normed_network()
    clean = copy.deepcopy(module).train()
    clean(task().inputs)  # torch's own update
    net = Net(module)
    settings = {} if name == "sgd" else {"rho": RHO, "m": "batch"}
    step(net, optim.OPTIMIZERS[name](net.params, lr=0.1, **settings), Objective(net, task(), cross_entropy))
    close(statistics(module), statistics(clean))


def test_msam_leaves_the_statistics_of_its_one_evaluation() -> None:
    """At w + rho v / |v|, the only forward there is; in the first step v is zero."""
    module = normed_network()
    clean = copy.deepcopy(module).train()
    clean(task().inputs)
    net = Net(module)
    step(net, optim.MSAM(net.params, lr=0.1, rho=RHO), Objective(net, task(), cross_entropy))
    close(statistics(module), statistics(clean))


@pytest.mark.parametrize(("name", "policy"), [("sam", "first"), ("sam", "last"), ("esam", "first"), ("j-sam", "first")])
def test_chunks_are_averaged_into_one_update(name: str, policy: Any) -> None:
    """m=5 of 12 rows: chunk statistics by their share of the rows, blended in once."""
    module = normed_network()
    old, t = statistics(module), task()
    chunks = [slice(0, 5), slice(5, 10), slice(10, 12)]
    average = [torch.zeros_like(b) for b in old]
    for chunk in chunks:
        x, y = t.inputs[chunk], t.labels[chunk]
        at = perturbed(module, x, y) if policy == "last" else module
        average = [a + b * (len(x) / 12) for a, b in zip(average, batch_statistics(at, x), strict=True)]
    net = Net(module, policy=policy)
    selects = {"gamma": 0.75} if name == "esam" else {}  # of the last chunk's two rows, both
    optimizer = optim.OPTIMIZERS[name](net.params, lr=0.1, rho=RHO, m=5, **selects)
    step(net, optimizer, Objective(net, t, cross_entropy))
    close(statistics(module), blend(old, average))


@pytest.mark.parametrize("policy", ["first", "last", "both"])
@pytest.mark.parametrize("evaluation", [0, 1])
def test_a_step_that_is_not_finite_leaves_them_alone(policy: Any, evaluation: int) -> None:
    module = normed_network()
    before, calls = statistics(module), []

    def loss(logits: Tensor, t: Task) -> Tensor:
        calls.append(1)
        return cross_entropy(logits, t) * (torch.nan if len(calls) == evaluation + 1 else 1.0)

    net = Net(module, policy=policy)
    optimizer = sam(net)
    step(net, optimizer, Objective(net, task(), loss))
    assert float(optimizer.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(statistics(module), before, strict=True))
    step(net, optimizer, Objective(net, task(), loss))  # and the next step counts again
    assert not torch.equal(statistics(module)[0], before[0])


def test_inputs_that_are_not_finite_leave_them_alone() -> None:
    """Without an optimizer's word, too: the statistics themselves are checked."""
    module = normed_network()
    before, t = statistics(module), task()
    t.inputs[3, 1] = torch.inf
    net = Net(module)
    net.statistics.begin()
    Objective(net, t, cross_entropy).output()
    net.statistics.commit()
    assert all(torch.equal(a, b) for a, b in zip(statistics(module), before, strict=True))


def test_forwards_without_gradient_leave_them_alone() -> None:
    """A method's looks and the planning forward of a chunked step: the outcome is that of the step without them."""
    results = []
    for looks in (False, True):
        module = normed_network()
        net = Net(module)
        net.statistics.begin()
        if looks:
            net.logits(task(seed=5).inputs, grad=False)
            net.logits(task().inputs, grad=False)
        optimizer = sam(net, m=5)
        optimizer.step(Objective(net, task(), cross_entropy))
        if looks:
            net.logits(task(seed=6).inputs, grad=False)
        net.statistics.commit(optimizer.found_inf)
        results.append(statistics(module))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_network_that_only_looked_on_keeps_them() -> None:
    module = normed_network()
    before = statistics(module)
    net = Net(module)
    net.statistics.begin()
    net.logits(task().inputs, grad=False)
    net.statistics.commit()
    assert all(torch.equal(a, b) for a, b in zip(statistics(module), before, strict=True))


def test_cumulative_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum=None"):
        Net(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None)))


def test_batch_norm_without_statistics_is_left_out() -> None:
    net = Net(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)))
    optimizer = sam(net)
    step(net, optimizer, Objective(net, task(), cross_entropy))
    assert float(optimizer.found_inf) == 0


# dropout


class Dropping(nn.Module):
    """A user's network that notes its dropout masks."""

    def __init__(self, seed: int, masks: list[Tensor]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.head, self.drop, self.masks = nn.Linear(64, 16), nn.Linear(16, 4), nn.Dropout(0.5), masks

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1)).tanh()
        if self.training:
            h = self.drop(h + 2)  # never 0 before it is dropped
            self.masks.append(h.detach() != 0)
        logits: Tensor = self.head(h)
        return logits


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        ({"opt": "sam", "sam_m": "batch"}, 2),
        ({"opt": "j-sam", "sam_m": "batch"}, 2),
        ({"opt": "sam", "sam_m": 8}, 4),
        ({"opt": "sam", "sam_m": "batch", "method": "elr"}, 2),
        ({"opt": "sgd"}, 1),
    ],
)
def test_masks_are_repeated_within_a_step_and_new_in_the_next(
    settings: dict[str, Any], each: int, digits: Callable[..., RunConfig], tiny: Dataset, tmp_path: Path
) -> None:
    masks: list[Tensor] = []
    config = digits(train_subset=None, val_fraction=0.0, epochs=2, **settings)  # 3 steps of 16 rows an epoch
    fit(config, dataset=tiny, network=lambda seed: Dropping(seed, masks), store=tmp_path)
    assert len(masks) == 6 * each
    steps = [masks[i : i + each] for i in range(0, len(masks), each)]
    for one in steps:
        assert all(torch.equal(one[0], mask) for mask in one)
    for left in range(6):
        for right in range(left):
            assert not torch.equal(steps[left][0], steps[right][0])


# passes


@pytest.mark.parametrize(
    ("optimizer", "whole", "forwards"),
    [
        (lambda p: optim.SGD(p), True, 12),
        (lambda p: optim.SAM(p, m="batch"), True, 24),
        (lambda p: optim.SAM(p, m=12), True, 24),
        (lambda p: optim.SAM(p, m=32), True, 24),
        (lambda p: optim.JSAM(p, m="batch"), True, 24),
        (lambda p: optim.ESAM(p, m="batch"), True, 30),
        (lambda p: optim.SAM(p, m=5), False, 36),
        (lambda p: optim.MSAM(p), False, 24),
    ],
)
def test_planned_logits_save_a_forward(optimizer: Any, whole: bool, forwards: int) -> None:
    """Where the step begins with the whole batch at w, planning costs nothing; else one forward. Never the outcome."""
    gradients = []
    for plans in (False, True):
        net = Net(normed_network())
        rule, t = optimizer(net.params), task()
        rule.generator = torch.Generator().manual_seed(0)
        net.statistics.begin()
        planned = None
        if plans:
            assert rule.whole(len(t.inputs)) == whole
            logits = net.logits(t.inputs, grad=whole)
            planned = logits if whole else None
        rule.step(Objective(net, t, cross_entropy, planned))
        net.statistics.commit(rule.found_inf)
        gradients.append([p.grad.clone() for p in net.params] + statistics(net.module))
    assert net.forwards == forwards
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_planned_logits_serve_once_and_only_the_whole_batch() -> None:
    net, t = Net(normed_network()), task()
    net.statistics.begin()
    objective = Objective(net, t, cross_entropy, net.logits(t.inputs, grad=True))
    objective.output(slice(0, 4))
    objective.output(grad=False)
    assert objective.planned is not None
    assert net.forwards == 12 + 4 + 12
    objective.output()
    assert net.forwards == 28
    objective.output()
    assert net.forwards == 40


def test_first_loss_is_the_mean_over_first_evaluations() -> None:
    """At w for SAM, whatever the chunks; with a plan it is the loss that the plan made."""
    for m in ("batch", 5):
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        net, t = Net(module), task()
        expected = weighted(module(t.inputs), t).mean().item()
        got = sam(net, m=m).step(Objective(net, t, weighted))
        assert got.item() == pytest.approx(expected, rel=1e-5)


# parts of a batch


def plain_gradient(module: nn.Module, t: Task) -> list[Tensor]:
    return list(torch.autograd.grad(weighted(module(t.inputs), t).mean(), list(module.parameters())))


def smooth() -> tuple[nn.Module, Net]:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return module, Net(module)


@pytest.mark.parametrize("rows", [None, slice(3, 8), torch.tensor([7, 2, 9])])
def test_rows(rows: Any) -> None:
    """A chunk or chosen rows: inputs, labels, index and plan tensors follow; numbers of the plan stay."""
    module, net = smooth()
    t = task()
    part = slice(None) if rows is None else rows
    expected = Task(0, t.inputs[part], t.labels[part], None, {"weight": t.plan["weight"][part], "scale": 3.0})
    close(Objective(net, t, weighted).grad(rows), plain_gradient(module, expected))
    taken = t.take(rows)
    assert torch.equal(taken.index, t.index[part])
    assert taken.plan["scale"] == 3.0
    assert t.plan["weight"].shape == (12,)
    logits, losses = Objective(net, t, weighted).output(rows)
    assert logits.shape == (len(taken.inputs), 2)
    assert losses.shape == (len(taken.inputs),)
    assert net.forwards == 2 * len(taken.inputs)
    assert net.backwards == len(taken.inputs)


def test_labels() -> None:
    """Other labels for one evaluation, hard or soft; the task keeps its own."""
    module, net = smooth()
    t, soft = task(), torch.rand(12, 2).softmax(1)
    given = t.labels.clone()
    for labels in (1 - t.labels, soft):
        expected = plain_gradient(module, Task(0, t.inputs, labels, None, t.plan))
        close(Objective(net, t, weighted).grad(labels=labels), expected)
    close(
        Objective(net, t, weighted).grad(slice(0, 4), labels=soft[:4]),
        plain_gradient(module, Task(0, t.inputs[:4], soft[:4], None, {"weight": t.plan["weight"][:4], "scale": 3.0})),
    )
    assert torch.equal(t.labels, given)


def test_rows_of_several_views() -> None:
    """Inputs (n, v, C, H, W) give logits (n, v, K); each view is a forward, and a backward, of its own."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    net, inputs = Net(module), torch.randn(6, 2, 1, 2, 2)

    def far(logits: torch.Tensor, task: Task) -> torch.Tensor:
        return (logits[:, 0] - logits[:, 1]).square().sum(1)

    objective = Objective(net, Task(0, inputs, torch.zeros(6, dtype=torch.long)), far)
    logits, losses = objective.output(slice(1, 4))
    assert logits.shape == (3, 2, 3)
    for view in range(2):
        close([logits[:, view]], [module(inputs[1:4, view])])
    objective.pull(losses, torch.ones_like(losses))
    assert (net.forwards, net.backwards) == (6, 6)


def test_params() -> None:
    """Gradients for some parameters only; L2 in the loss adds the decay of those."""
    module, net = smooth()
    some = [net.params[2], net.params[1]]
    full = plain_gradient(module, task())
    objective = Objective(net, task(), weighted)
    close(objective.grad(params=some), [full[2], full[1]])
    objective.l2 = 0.5
    close(objective.grad(params=some), [full[2] + 0.5 * some[0].detach(), full[1] + 0.5 * some[1].detach()])


def test_objective_is_torchs_closure() -> None:
    """torch's own SGD takes it as it is; gradients of an earlier step are replaced, not added to."""
    module, net = smooth()
    other = copy.deepcopy(module)
    ours, theirs = torch.optim.SGD(module.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    for seed in range(3):
        t = task(seed=seed)
        loss = ours.step(Objective(net, t, weighted))
        theirs.zero_grad()
        expected = weighted(other(t.inputs), t).mean()
        expected.backward()
        theirs.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    close(list(module.parameters()), list(other.parameters()))


def test_output_without_gradient_counts_its_forward() -> None:
    _, net = smooth()
    objective = Objective(net, task(), weighted)
    logits, losses = objective.output(grad=False)
    assert not logits.requires_grad
    assert not losses.requires_grad
    assert (net.forwards, net.backwards) == (12, 0)
    assert float(objective.first_loss) == 0


def test_bf16_gives_float32_logits_and_its_own_autocast() -> None:
    """bfloat16's rounding is seen, weights stay float32, and no autocast is left open."""
    module, exact = smooth()
    net = Net(module, "bf16")
    t = task()
    logits = net.logits(t.inputs, grad=True)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())
    assert not torch.equal(logits, exact.logits(t.inputs, grad=True))
    assert not torch.is_autocast_enabled("cpu")
    assert all(g.dtype == torch.float32 for g in Objective(net, t, weighted).grad())
