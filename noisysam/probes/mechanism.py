"""How a network treats correct and wrong labels: norms, Jacobians, and the gradient of each group."""

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from noisysam.core.errors import UserError
from noisysam.optim.base import global_norm, inner, plus, scaled
from noisysam.probes.base import PROBES, Options, Probe, Subject

ROWS = 128  # of one forward with gradient

Weights = dict[str, Tensor]

STATEMENT = (
    "training samples with the labels as given; mean cross-entropy of one network, float32; batch norm in evaluation "
    "mode; Jacobians exact, one backward pass for each logit of each sample"
)


class MechanismOptions(Options):
    limit: int = Field(500, ge=1, description="training samples for norms and gradients")
    jacobian_limit: int = Field(64, ge=1, description="training samples for the Jacobians, which cost more")
    rho: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="radius of SAM's perturbation (L2, over all weights)"
    )
    network: int = Field(0, ge=0, description="which of the method's networks")


@PROBES.register("mechanism", source="Baek et al. 2024, arXiv 2405.03676; SANER, arXiv 2411.17132")
class Mechanism(Probe):
    """Norms of head, features and Jacobians; gradients of clean and flipped samples; weights that SANER shrinks.

    Over the run's snapshots and its final weights, on training samples with the labels as given (clean: correct,
    flipped: wrong), under cross-entropy, whatever the loss of the method.

    Equation: with f the logits, r = softmax(f) - y, J = df/dw, l cross-entropy, g = mean l', e = rho g / |g|:
    |head|_F; mean |features|; mean |J|_F and |df/dx|_F; g = (1 - p) g_clean + p g_flipped with p the flipped share,
    of which clean samples bring (1 - p) <g_clean, g> / |g|^2; the ratio of sum |r| over clean samples to that over
    flipped ones at w, at w + e, and each at its own w + rho l_i' / |l_i'|; the share of weights with g_SAM = g(w + e)
    of the same sign as g and smaller. Jacobians are exact: one backward pass for each logit of each sample.
    Code: none public.
    Deviation: Baek's full text could not be read, so which norm a figure of it shows is not known. SANER's share is
    of a batch in training mode; here it is of all samples at once in evaluation mode.
    Checked: torch.func.jacrev on a network with batch norm; gradients, ratios and masks in numpy on a linear network;
    the weights stay as they are, bit for bit.
    """

    Options = MechanismOptions
    options: MechanismOptions

    def run(self, subject: Subject) -> dict[str, Any]:
        """``moments``: what was measured at each snapshot and at the end, None where there are no flipped samples;
        ``note`` says which weights those are."""
        o = self.options
        if o.network >= len(subject.modules):
            raise UserError(f"option network={o.network}: this run has {len(subject.modules)} networks, from 0 on")
        inputs, labels = subject.part("noisy", o.limit)
        flipped = labels != subject.part("clean", o.limit)[1]
        few, few_labels = subject.part("noisy", o.jacobian_limit)
        few_flipped = few_labels != subject.part("clean", o.jacobian_limit)[1]
        moments = []
        for stage, epoch, modules in _moments(subject):
            module = modules[o.network]
            found: dict[str, Any] = {"stage": stage, "epoch": epoch, "last_layer_norm": last_layer_norm(module)}
            found |= _by_group("feature_norm", feature_norms(module, inputs), flipped)
            found |= _by_group("parameter_jacobian", parameter_jacobian_norms(module, few), few_flipped)
            found |= _by_group("input_jacobian", input_jacobian_norms(module, few), few_flipped)
            moments.append(found | gradient_figures(module, inputs, labels, flipped, o.rho))
        alone = "the final weights alone: the run kept no others (--snapshots)"
        return {
            "statement": STATEMENT,
            "note": "snapshots and the final weights" if subject.snapshots() else alone,
            "networks": len(subject.modules),
            "rows": len(labels),
            "flipped": int(flipped.sum()),
            "jacobian_rows": len(few_labels),
            "jacobian_flipped": int(few_flipped.sum()),
            "moments": moments,
        }


def _moments(subject: Subject) -> Iterator[tuple[int, int, list[nn.Module]]]:
    """Stage, epoch and networks of each snapshot, in order, and of the final weights (once, if there is a snapshot)."""
    last = subject.folder.epochs[-1]
    end = (int(last["stage"] or 0), int(last["epoch"] or 0))
    for stage, epoch in subject.snapshots():
        if (stage, epoch) != end:
            yield stage, epoch, subject.at(stage, epoch)
    yield *end, subject.modules


def _by_group(name: str, values: Tensor, flipped: Tensor) -> dict[str, float | None]:
    return {f"{name}_clean": _mean(values[~flipped]), f"{name}_flipped": _mean(values[flipped])}


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _over(value: Tensor, by: Tensor) -> float | None:
    return (value / by).item() if by > 0 else None


# norms


def last_layer_norm(module: nn.Module) -> float:
    """The Frobenius norm of the head's weight, without its bias."""
    return torch.linalg.vector_norm(_head(module).weight.detach()).item()


@torch.no_grad()
def feature_norms(module: nn.Module, inputs: Tensor) -> Tensor:
    """The L2 norm of each row's penultimate features, (n,)."""
    _head(module)
    return torch.cat([module.features(x).norm(dim=1) for x in inputs.split(ROWS)])  # type: ignore[operator]


def _head(module: nn.Module) -> nn.Linear:
    head = getattr(module, "head", None)
    if not (isinstance(head, nn.Linear) and hasattr(module, "features")):
        raise UserError("probe mechanism needs a network with features() and a linear head")
    return head


# Jacobians of the logits


def parameter_jacobian_norms(module: nn.Module, inputs: Tensor) -> Tensor:
    """The Frobenius norm of each row's Jacobian (K, parameters) of the logits by the parameters, (n,); exact."""
    weights = _weights(module)
    params = list(weights.values())
    norms = []
    for x in inputs.split(1):
        logits = functional_call(module, weights, (x,))[0]
        rows = [torch.autograd.grad(z, params, retain_graph=True, materialize_grads=True) for z in logits]
        norms.append(global_norm([g for row in rows for g in row]))
        del logits, rows
    return torch.stack(norms)


def input_jacobian_norms(module: nn.Module, inputs: Tensor) -> Tensor:
    """The Frobenius norm of each row's Jacobian (K, C H W) of the logits by the (normalised) input, (n,); exact.
    Rows must not depend on each other: evaluation mode."""
    parts = []
    for x in inputs.split(ROWS):
        x = x.detach().requires_grad_()
        logits = module(x)
        square = sum(
            torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0].square().flatten(1).sum(1)
            for k in range(logits.shape[1])
        )
        parts.append(torch.as_tensor(square).sqrt())
    return torch.cat(parts)


# gradients of the loss


def gradient_figures(module: nn.Module, inputs: Tensor, labels: Tensor, flipped: Tensor, rho: float) -> dict[str, Any]:
    """Contributions of clean and ``flipped`` (n,) samples to the mean gradient, at w and at SAM's perturbed weights.

    ``gradient_norm``, of all and of each group's mean; ``gradient_share_clean`` (the rest is the flipped samples');
    ``gradient_cosine`` between the groups' means; ``logit_ratio`` of summed residual norms, clean to flipped, at w, at
    the perturbed weights of all (``_perturbed``) and of each sample (``_each``); ``down_weighted``, a share of all
    weights, and of each layer's, as pairs.
    """
    weights = _weights(module)
    p = flipped.to(inputs.dtype).mean()

    def gradients(at: Weights) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        clean, wrong = (mean_gradient(module, at, inputs[of], labels[of]) for of in (~flipped, flipped))
        return clean, wrong, plus(scaled(clean, 1 - p), wrong, p)

    clean, wrong, whole = gradients(weights)
    perturbed = _perturbed(weights, whole, rho)
    share, by_layer = down_weighted(list(weights), whole, gradients(perturbed)[2])
    square = inner(whole, whole)
    both = 0 < p < 1
    return {
        "gradient_norm": global_norm(whole).item(),
        "gradient_norm_clean": global_norm(clean).item() if p < 1 else None,
        "gradient_norm_flipped": global_norm(wrong).item() if p > 0 else None,
        "gradient_share_clean": _over((1 - p) * inner(clean, whole), square),
        "gradient_cosine": _over(inner(clean, wrong), global_norm(clean) * global_norm(wrong)) if both else None,
        "logit_ratio": _ratio(residual_norms(module, weights, inputs, labels), flipped),
        "logit_ratio_perturbed": _ratio(residual_norms(module, perturbed, inputs, labels), flipped),
        "logit_ratio_each": _ratio(residual_norms_each(module, weights, inputs, labels, rho), flipped),
        "down_weighted": share,
        "down_weighted_by_layer": list(by_layer.items()),
    }


def mean_gradient(module: nn.Module, weights: Weights, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of the mean cross-entropy by the parameters, at ``weights``; zeros where there are no rows."""
    params = [w.detach().requires_grad_() for w in weights.values()]
    at = dict(zip(weights, params, strict=True))
    total = [torch.zeros_like(p) for p in params]
    for x, y in zip(inputs.split(ROWS), labels.split(ROWS), strict=True):
        if len(x):
            loss = F.cross_entropy(functional_call(module, at, (x,)), y, reduction="sum") / len(inputs)
            torch._foreach_add_(total, list(torch.autograd.grad(loss, params, materialize_grads=True)))
    return total


@torch.no_grad()
def residual_norms(module: nn.Module, weights: Weights, inputs: Tensor, labels: Tensor) -> Tensor:
    """The L2 norm of the loss's derivative by the logits, softmax(f) - y, of each row at ``weights``, (n,)."""
    logits = torch.cat([functional_call(module, weights, (x,)) for x in inputs.split(ROWS)])
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)


def residual_norms_each(module: nn.Module, weights: Weights, inputs: Tensor, labels: Tensor, rho: float) -> Tensor:
    """``residual_norms`` of each row at its own perturbed weights, w + rho g_i / |g_i| (1-SAM), (n,)."""
    norms = []
    for x, y in zip(inputs.split(1), labels.split(1), strict=True):
        perturbed = _perturbed(weights, mean_gradient(module, weights, x, y), rho)
        norms.append(residual_norms(module, perturbed, x, y))
    return torch.cat(norms)


def down_weighted(names: list[str], plain: list[Tensor], sam: list[Tensor]) -> tuple[float, dict[str, float]]:
    """The share of weights where SAM's gradient has the plain one's sign and is smaller (arXiv 2411.17132), and the
    share of each layer's own. ``names``: of the parameters, in the gradients' order."""
    layers: dict[str, list[Tensor]] = {}
    for name, a, b in zip(names, plain, sam, strict=True):
        layers.setdefault(name.rpartition(".")[0], []).append(((a.sign() == b.sign()) & (b.abs() < a.abs())).flatten())
    masks = {layer: torch.cat(parts) for layer, parts in layers.items()}
    return _share(torch.cat(list(masks.values()))), {layer: _share(mask) for layer, mask in masks.items()}


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / len(mask)


def _weights(module: nn.Module) -> Weights:
    """Copies of the parameters by name, so that the module's own are never changed."""
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def _perturbed(weights: Weights, direction: list[Tensor], rho: float) -> Weights:
    """Weights at distance ``rho`` along a direction, in the same memory format; unchanged if the direction is zero."""
    norm = global_norm(direction)
    moved = {name: w.detach().clone() for name, w in weights.items()}
    torch._foreach_add_(list(moved.values()), scaled(direction, torch.where(norm > 0, rho / norm, norm)))
    return moved


def _ratio(norms: Tensor, flipped: Tensor) -> float | None:
    """Summed over clean rows to summed over flipped ones."""
    return _over(norms[~flipped].sum(), norms[flipped].sum())
