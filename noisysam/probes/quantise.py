"""Quantisation: accuracy with weights of few bits, by rounding and after zero-shot training without data."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from noisysam import optim
from noisysam.optim.sam_sga import SAMSGA
from noisysam.probes.base import PROBES, Options, Probe, Subject
from noisysam.training import metrics

LATENT, WIDTH = 64, 32  # the generator's noise, and its channels
CLIP = 1.0  # of the student's gradient: at few bits the first ones are large, and a large step moves most weights

STATEMENT = (
    "reported outputs on test images; weights of convolutions and linear layers on 2^bits - 1 levels, symmetric, one "
    "scale for each output channel; biases, norms and activations in float32"
)


def _split(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


Bits = Annotated[tuple[Annotated[int, Field(ge=2, le=8)], ...], BeforeValidator(_split), Field(min_length=1)]


class QuantiseOptions(Options):
    bits: Bits = Field((8, 4, 3, 2), description="bits of a weight, as 8,4,3,2")
    test_limit: int = Field(2000, ge=0, description="test images; 0: all")
    iterations: int = Field(50, ge=0, description="steps of each player; 0: plain rounding alone")
    batch: int = Field(32, ge=2, description="generated images in a step")
    student_lr: float = Field(
        0.01, gt=0, description="learning rate of SGD at 2 bits; less at more, as levels are closer"
    )
    student_rho: float = Field(0.05, ge=0, allow_inf_nan=False, description="radius of SAM's perturbation")
    generator_lr: float = Field(1e-3, gt=0, description="Adam's learning rate of the generator")
    statistics: float = Field(10.0, ge=0, description="weight of batch norm's statistics in the generator's aim")
    seed: int = Field(0, ge=0, description="seed of the generator's weights and noise")


@PROBES.register("quantise", source="ZSAQ, Zhu et al. 2023, arXiv 2310.13315; batch statistics: arXiv 2003.03603")
class Quantise(Probe):
    """Accuracy with weights of few bits: rounded to the nearest level, and after ZSAQ's zero-shot SAM-SGA.

    Zero-shot: the quantised network learns to agree with the full one on images that a generator makes from
    noise and that maximise their difference. Neither images nor labels of the run are used.

    Equation: q(w) = s round(w / s), s = max |w| / (2^(bits-1) - 1) over an output channel. min over theta, max over
    phi of KL(f(x) | f_q(theta)(x)) - statistics sum_l (|mu_l - m_l|^2 + |sigma_l - s_l|^2) / channels, x = G_phi(z);
    theta by a SAM step, rounding passed straight through; phi by ascent (noisysam.optim.SAMSGA). f is the full
    network; mu, sigma the moments of its batch norms' inputs, m, s the running ones.
    Code: none public.
    Deviation: the paper is on language models and its full text could not be read: the divergence, the base rules (SGD
    with momentum and clipping, its learning rate in proportion to the distance of the levels; Adam) and all settings
    are ours, set on digits and on one CIFAR-10 network for minutes on a CPU. So few steps recover agreement, less of
    the accuracy, and at 2 bits little of either. Its generator is a language model; here it is a small convolutional
    one. The statistics, which language models have none of, are those of GDFQ, here as means over the channels.
    Activations stay in float32 (the paper: 8 bits).
    Checked: the grid in numpy; on a trained network, more agreement at 2 bits than by plain rounding, same bits from
    the same seed, and the full network as it was, bit for bit.
    """

    Options = QuantiseOptions
    options: QuantiseOptions

    def run(self, subject: Subject) -> dict[str, Any]:
        """``accuracy`` of the full network(s); for each of ``bits``, accuracy and agreement (the share of test images
        that get the full network's class), plain and zero-shot."""
        o = self.options
        inputs, labels = subject.part("test", o.test_limit or None)
        full = subject.logits(inputs)
        found: dict[str, Any] = {"accuracy": float(metrics.accuracy(full, labels)), "bits": {}}
        for bits in o.bits:
            rounded = [round_weights(m, bits) for m in subject.modules]
            figures = _figures("plain", subject.logits(inputs, rounded), full, labels)
            if o.iterations:
                learnt = [zero_shot(m, bits, inputs.shape[1:], o) for m in subject.modules]
                figures |= _figures("zero_shot", subject.logits(inputs, learnt), full, labels)
            found["bits"][str(bits)] = figures
        return {"statement": STATEMENT, "rows": len(labels), **found}


def _figures(name: str, logits: Tensor, full: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        f"{name}_accuracy": float(metrics.accuracy(logits, labels)),
        f"{name}_agreement": float(metrics.accuracy(logits, full.argmax(1))),
    }


# rounding


def quantise(weight: Tensor, bits: int) -> Tensor:
    """The weight (channels first) with each channel on its 2^bits - 1 levels: whole multiples of the largest |w| /
    (2^(bits-1) - 1). Differentiable: the rounding passes gradients straight through, the scale is a constant."""
    top = levels(bits)
    scale = weight.detach().abs().flatten(1).amax(1).float() / top
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a channel of zeros
    zero = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -top, top)


def levels(bits: int) -> int:
    """Number of levels on either side of 0."""
    return 2 ** (bits - 1) - 1


def quantised_names(module: nn.Module) -> list[str]:
    """The parameters that are quantised: weights of convolutions and linear layers."""
    return [f"{n}.weight".lstrip(".") for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@torch.no_grad()
def round_weights(module: nn.Module, bits: int) -> nn.Module:
    """A copy of the network with its weights on the levels."""
    rounded = copy.deepcopy(module)
    for name in quantised_names(rounded):
        weight = rounded.get_parameter(name)
        weight.copy_(quantise(weight, bits))
    return rounded


# zero-shot training


class Quantised(nn.Module):
    """A network that quantises its weights in every forward, so that it can be trained."""

    def __init__(self, module: nn.Module, bits: int) -> None:
        super().__init__()
        self.module, self.bits, self.names = module, bits, quantised_names(module)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K)."""
        weights = {name: quantise(self.module.get_parameter(name), self.bits) for name in self.names}
        logits: Tensor = functional_call(self.module, weights, (x,))
        return logits


class Generator(nn.Module):
    """Images (n, C, H, W) of mean 0 and variance 1 in each channel of a batch, as inputs are, from noise (n, LATENT):
    a linear layer, then twice the size by repetition and a convolution."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.sizes = [(-(-height // part), -(-width // part)) for part in (4, 2, 1)]
        rows, columns = self.sizes[0]
        self.start = nn.Sequential(nn.Linear(LATENT, WIDTH * rows * columns), nn.Unflatten(1, (WIDTH, rows, columns)))
        self.middle = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH))
        self.end = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(WIDTH, channels, 3, padding=1), nn.Tanh())
        self.scale = nn.BatchNorm2d(channels, affine=False)

    def forward(self, noise: Tensor) -> Tensor:
        """(n, LATENT) -> (n, C, H, W); batch statistics, so n > 1."""
        x = self.middle(F.interpolate(self.start(noise), self.sizes[1]))
        images: Tensor = self.scale(self.end(F.interpolate(x, self.sizes[2])))
        return images


def zero_shot(teacher: nn.Module, bits: int, shape: torch.Size, options: QuantiseOptions) -> nn.Module:
    """A copy of the network with its weights on the levels, trained by SAM-SGA to agree with it on generated images.

    ``shape``: (C, H, W) of an input. The network is in evaluation mode and is not changed; trained are the
    copy's weights before rounding, its biases and norms. A step that is not finite is skipped.
    """
    o = options
    device = next(teacher.parameters()).device
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(o.seed)  # the CPU's alone: torch.manual_seed would reseed CUDA too
        generator = Generator(*shape)
    generator.to(device)
    random = torch.Generator().manual_seed(o.seed)
    student = Quantised(copy.deepcopy(teacher), bits)
    rate = o.student_lr / levels(bits)  # steps as long, in distances between levels, at any number of bits
    learner = optim.SAM(student.parameters(), lr=rate, rho=o.student_rho, m="batch", clip=CLIP)
    players = SAMSGA(learner, torch.optim.Adam(generator.parameters(), lr=o.generator_lr, maximize=True))
    for step in range(o.iterations):
        for group in learner.param_groups:
            group["lr"] = rate * (1 - step / o.iterations)
        with _statistics(teacher) as distances:
            images = generator(torch.randn(o.batch, LATENT, generator=random).to(device))
            target = teacher(images).log_softmax(1)
        penalty = o.statistics * sum(distances, torch.zeros((), device=device))
        players.step(partial(discrepancy, student, images, target, penalty))
    return round_weights(student.module, bits)


def discrepancy(student: nn.Module, images: Tensor, target: Tensor, penalty: Tensor) -> Tensor:
    """The loss that the student minimises and the generator maximises: the mean KL(target | student) over ``images``,
    less what only the generator moves. ``target``: the teacher's log-probabilities (n, K), with their graph."""
    divergence = F.kl_div(student(images).log_softmax(1), target, reduction="batchmean", log_target=True)
    return divergence - penalty


@contextmanager
def _statistics(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects, in a forward within the block, how far the moments of each batch norm's input are from its running
    ones: the squared differences of means and deviations, each averaged over the channels (GDFQ, arXiv 2003.03603)."""
    distances: list[Tensor] = []

    def look(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        deviation = (variance + layer.eps).sqrt() - (layer.running_var + layer.eps).sqrt()
        distances.append((mean - layer.running_mean).square().mean() + deviation.square().mean())

    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    hooks = [m.register_forward_pre_hook(look) for m in norms]
    try:
        yield distances
    finally:
        for hook in hooks:
            hook.remove()
