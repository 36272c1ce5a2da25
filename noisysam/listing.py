"""What there is: the components by their registrations, and the machine."""

from pathlib import Path
from typing import Any

from noisysam.registry import summary


def entries(what: str) -> list[dict[str, Any]]:
    """Name, line, source and options of every component of a kind: methods, optimizers, models, datasets, noise."""
    from noisysam import data, methods, models, noise, optim

    registry: Any = {
        "methods": methods.METHODS,
        "optimizers": optim.OPTIMIZERS,
        "models": models.MODELS,
        "datasets": data.DATASETS,
        "noise": noise.NOISE,
    }[what]
    found = []
    for name, item in registry.items():
        entry: dict[str, Any] = {"name": name, "summary": summary(item), "source": item.source}
        if hasattr(item, "Options"):
            entry["options"] = [
                {"name": n, "default": field.default, "description": field.description}
                for n, field in item.Options.model_fields.items()
            ]
        if what == "optimizers":
            entry |= {"passes": item.passes, "null": item.null}
        if what == "methods":
            entry |= {"networks": item.networks, "oracle": list(item.knows(item.Options()))}
        found.append(entry)
    return found


def diagnosis(data_dir: Path | None) -> dict[str, Any]:
    """Versions, devices, precision and threads that ``auto`` takes, and where data are looked for."""
    import torch

    from noisysam import hardware
    from noisysam.data import data_folder
    from noisysam.environment import environment

    device = hardware.resolve_device("auto")
    folder = data_folder(data_dir)
    present = [
        n for n in ("cifar10.npz", "cifar100.npz", "cifar-10-batches-py", "cifar-100-python") if (folder / n).exists()
    ]
    return {
        **environment(),
        "device": f"{device} ({hardware.device_name(device)})",
        "cores": hardware.cores(),
        "threads": torch.get_num_threads(),
        "native bf16": hardware.native_bf16(device),
        "data folder": str(folder),
        "data found": ", ".join(present) or "none (digits needs no file)",
    }
