"""Networks by name: the registered ones and those of other libraries, with new or with given weights."""

import math
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from noisysam.core.errors import UserError
from noisysam.core.text import one_line
from noisysam.core.untrusted import check_file
from noisysam.models import cnn  # noqa: F401  (it registers)
from noisysam.models.blocks import NORMS
from noisysam.models.external import LIBRARIES, Library, Timm
from noisysam.models.resnet import MODELS, Scalable, check_size, scaled


class Model(Protocol):
    """What a name stands for."""

    name: str
    source: str
    revision: int


def find(name: str) -> Model:
    """The registered model of this name, or timm:NAME or torchvision:NAME; ``UserError`` where there is none."""
    library, colon, of_library = name.partition(":")
    if colon and library in LIBRARIES:
        return LIBRARIES[library](of_library)
    return MODELS[name]  # type: ignore[return-value]


def check(name: str, width: float, norm: str) -> None:
    """``UserError`` for a model, width or norm that do not go together."""
    model = find(name)
    if norm not in NORMS:
        raise UserError(f"unknown norm {norm!r}: use one of {', '.join(NORMS)}")
    if not (math.isfinite(width) and width > 0):
        raise UserError(f"width is {width}: give a positive factor for the channel counts, such as 0.5")
    if isinstance(model, Scalable):
        check_size(name, 10, 3, width, norm)
    elif width != 1 or norm != "batch":
        raise UserError(
            f"model {name} has no --{'width' if width != 1 else 'norm'}: only the networks of noisysam have"
        )


def build(
    name: str,
    classes: int,
    channels: int = 3,
    *,
    size: int = 32,
    width: float = 1.0,
    norm: str = "batch",
    seed: int = 0,
    weights: Path | None = None,
) -> nn.Module:
    """The network ``name`` for images of ``size`` x ``size`` pixels and ``channels`` channels, on the CPU, in
    channels_last memory format.

    ``width`` multiplies all channel counts of a network of this package (rounded, at least 1; with group norm to a
    multiple of its 8 groups, at least 16). ``norm``: "batch", "group", or "none" (convolutions with biases, residual
    branches that start at zero). ``weights``: a file to begin with, a run's or the library's; a head for other classes
    stays new. New weights depend on ``seed`` alone; the global random state is left as it was. ``UserError`` for an
    unknown name or norm, a width that is not a positive number, or weights that do not fit.
    """
    check(name, width, norm)
    model = find(name)
    of_a_run = weights is not None and _of_a_run(weights)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would reseed CUDA too
        network: nn.Module
        if isinstance(model, Scalable):
            network = scaled(model, classes, channels, width, norm)
        elif isinstance(model, Library):
            network = model(classes, channels, size, None if of_a_run else weights)
        else:
            network = _own(name, MODELS[name](classes, channels, size))
    if weights is not None and (of_a_run or not isinstance(model, Library)):
        _begin_with(network, weights)
    return network.to(memory_format=torch.channels_last)


def _own(name: str, network: object) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise UserError(f"model {name} gave a {type(network).__name__}, not a torch.nn.Module")
    return network


def weights_file(name: str, pretrained: str | None) -> Path | None:
    """The file that ``--pretrained`` names; ``UserError`` where there is none."""
    if pretrained is None:
        return None
    if pretrained == "cache":
        model = find(name)
        if not isinstance(model, Timm):
            raise UserError(f"--pretrained cache is for timm:NAME, not for {name}: give a file")
        return model.cached()
    check_file(Path(pretrained))
    return Path(pretrained)


def _of_a_run(path: Path) -> bool:
    """Whether a file is what a run wrote: the number of the network stands before each name."""
    try:
        with safe_open(path, "pt") as file:
            return all(name.partition(".")[0].isdigit() for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return False


def _begin_with(network: nn.Module, path: Path) -> None:
    """Load weights, all but a head for other classes."""
    try:
        state = _read(path)
    except Exception as error:  # of safetensors and of torch, for any kind of file
        raise UserError(f"--pretrained {path}: cannot be read as weights ({one_line(error)})") from None
    own = network.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    lacking = [name for name in own if name not in fitting and not name.startswith("head.")]
    if lacking:
        raise UserError(f"--pretrained {path}: {lacking[0]} is not in it, or in another shape: it is another network's")
    network.load_state_dict(fitting, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _of_a_run(path):  # of several networks the first one
        found = {name.partition(".")[2]: value for name, value in found.items() if name.startswith("0.")}
    return found
