"""Networks of other libraries, timm:NAME and torchvision:NAME, for images of any size and number of channels."""

import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noisysam.core.errors import UserError
from noisysam.core.text import one_line

SMALL = 64  # pixels, below which a stem that halves the image is replaced by one that keeps its resolution


class External(nn.Module):
    """A network of another library, divided into what gives features and the linear head."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def features(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> penultimate features (n, d)."""
        found: Tensor = self.body(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> logits (n, classes)."""
        logits: Tensor = self.head(self.body(x))
        return logits


class Library(ABC):
    """A network of a library by its name there; built by ``__call__`` as any registered model."""

    library = ""
    source = ""
    revision = 1

    def __init__(self, name: str) -> None:
        self.of_library, self.name = name, f"{self.library}:{name}"
        known = self.known()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f", did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"unknown {self.library} model {name!r}{hint}")

    @abstractmethod
    def known(self) -> Sequence[str]:
        """The names of the library."""

    @abstractmethod
    def create(self, classes: int, channels: int, size: int, weights: Path | None) -> nn.Module:
        """The library's network."""

    def __call__(self, classes: int, channels: int, size: int, weights: Path | None = None) -> nn.Module:
        """The network for images of ``size`` x ``size`` pixels. ``weights``: a file in the library's own format."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                network = self.create(classes, channels, size, weights)
                if size < SMALL and weights is None:
                    keep_resolution(network)
                return divided(network, self.name, classes, channels, size)
        except UserError:
            raise
        except Exception as error:  # of networks that are made for one size, or for other files
            with_weights = f" with the weights {weights}" if weights else ""
            raise UserError(
                f"model {self.name} does not take images of {size} x {size} x {channels}{with_weights} "
                f"({one_line(error)}): try another --image-size or model"
            ) from None


class Timm(Library):
    """A network of timm (PyTorch Image Models)."""

    library, source = "timm", "https://github.com/huggingface/pytorch-image-models"

    def known(self) -> Sequence[str]:
        try:
            import timm
        except ImportError:
            raise UserError("timm:NAME needs timm: pip install 'noisysam[timm]'") from None
        return timm.list_models()

    def create(self, classes: int, channels: int, size: int, weights: Path | None) -> nn.Module:
        import timm

        options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
        if weights is not None:
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
        try:
            made: nn.Module = timm.create_model(self.of_library, img_size=size, **options)
        except TypeError:  # convolutional networks take any size
            made = timm.create_model(self.of_library, **options)
        return made

    def cached(self) -> Path:
        """The file of the published weights in the local cache; ``UserError`` if it is not there."""
        import timm
        from huggingface_hub import try_to_load_from_cache

        hub = (timm.get_pretrained_cfg(self.of_library).to_dict() or {}).get("hf_hub_id")
        names = ("model.safetensors", "pytorch_model.bin")
        found = [try_to_load_from_cache(hub, name) for name in names] if hub else []
        paths = [Path(path) for path in found if isinstance(path, str)]
        if not paths:
            raise UserError(
                f"--pretrained cache: the weights of {self.name} ({hub or 'not published'}) are not in the local "
                "cache of huggingface_hub: download them there first, or give a file"
            )
        return paths[0]


class Torchvision(Library):
    """A network of torchvision."""

    library, source = "torchvision", "https://github.com/pytorch/vision"
    SEVERAL = ("googlenet", "inception_v3")  # which give several outputs in training

    def known(self) -> Sequence[str]:
        import torchvision.models

        return [n for n in torchvision.models.list_models(torchvision.models) if n not in self.SEVERAL]

    def create(self, classes: int, channels: int, size: int, weights: Path | None) -> nn.Module:
        import torchvision.models

        options = {"image_size": size} if self.of_library.startswith("vit_") else {}
        made: nn.Module = torchvision.models.get_model(self.of_library, weights=None, num_classes=classes, **options)
        if weights is not None:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            own = made.state_dict()
            made.load_state_dict({n: v for n, v in state.items() if own[n].shape == v.shape}, strict=False)
        if channels != 3:
            name, first = next((n, m) for n, m in made.named_modules() if isinstance(m, nn.Conv2d))
            replaced = _like(first, in_channels=channels)
            if weights is not None:  # as timm: a grey image stands for three equal channels
                replaced.weight.data = first.weight.data.sum(1, keepdim=True).expand_as(replaced.weight) / channels
            _replace(made, name, replaced)
        return made


LIBRARIES: dict[str, type[Library]] = {"timm": Timm, "torchvision": Torchvision}


def keep_resolution(network: nn.Module) -> None:
    """Give a network the stem of the CIFAR networks: of a ResNet a 3x3 convolution and no pooling (He et al. 2015,
    section 4.2); of others a first 3x3 convolution without a stride. Other stems stay as they are."""
    name, first = next(((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if first is None or first.stride == (1, 1):
        return
    if name == "conv1" and isinstance(getattr(network, "maxpool", None), nn.Module):
        replaced = _like(first, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        nn.init.kaiming_normal_(replaced.weight, mode="fan_out", nonlinearity="relu")
        _replace(network, name, replaced)
        _replace(network, "maxpool", nn.Identity())
    elif first.kernel_size == (3, 3) and first.padding == (1, 1):
        first.stride = (1, 1)


def _like(layer: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    """A convolution with other settings."""
    same = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    settings = {name: getattr(layer, name) for name in same} | {"bias": layer.bias is not None}
    return nn.Conv2d(**{**settings, **changes})


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    place, _, last = name.rpartition(".")
    setattr(network.get_submodule(place), last, module)


@torch.no_grad()
def divided(network: nn.Module, name: str, classes: int, channels: int, size: int) -> nn.Module:
    """The network after a trial: one forward must give logits. It is divided into features and head where its last
    layer is linear. Warns where little is left of a small image."""
    sides: list[int] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        sides.append(output.shape[-1])

    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_hook(look) for m in convolutions if m.kernel_size != (1, 1)]
    trial = torch.linspace(-1, 1, channels * size * size).reshape(1, channels, size, size)
    network.eval()
    found = network(trial)
    for hook in hooks:
        hook.remove()
    if not isinstance(found, Tensor) or found.shape != (1, classes):
        raise UserError(f"model {name} does not give one logit for each class")
    if sides and sides[-1] == 1 and size > 1:
        warnings.warn(
            f"{name} shrinks images of {size} pixels to 1 x 1 before its last layers: --image-size 64 or larger keeps "
            "more of them, and timm:resnet18 and the like get a stem for small images",
            stacklevel=2,
        )
    heads = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if heads:
        place, head = heads[-1]
        _replace(network, place, nn.Identity())
        try:
            features = network(trial)
            if features.shape == (1, head.in_features) and torch.equal(head(features), found):
                return External(network, head).train()
        except (RuntimeError, AttributeError, TypeError):  # of heads that are used in another way
            pass
        _replace(network, place, head)
    return network.train()
