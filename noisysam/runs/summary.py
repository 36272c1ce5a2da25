"""Results and cost of a run, computed from the lines of its epochs."""

from typing import Any

import numpy as np
import numpy.typing as npt

from noisysam.runs.config import RunConfig
from noisysam.runs.measures import EVALUATED_AT_THE_END, MEASURES

COLLAPSED = 0.9  # share of predictions in one class: on balanced classes at most 10 points above chance
COMMON = 0.5  # share of a class in the test set up to which predicting little else is a fault


def noise_name(noise_type: str, rate: float) -> str:
    """'symmetric 0.4', or 'file:own.csv' of labels that bring their own rate."""
    return noise_type if _brings_labels(noise_type) else f"{noise_type} {rate:g}"


def noise_percent(noise_type: str, rate: float) -> str:
    """'80 %' of symmetric noise, 'pair 40 %' of another type, 'clean', or 'human:worse' of labels that bring their own
    rate."""
    if _brings_labels(noise_type):
        return noise_type
    rate_text = f"{100 * rate:.10g} %"
    return "clean" if not rate else rate_text if noise_type == "symmetric" else f"{noise_type} {rate_text}"


def _brings_labels(noise_type: str) -> bool:
    """Whether a noise type brings its own rate; no for one of a plug-in that is not loaded."""
    from noisysam.noise.base import NOISE  # which takes a while to import, and records need not

    name = noise_type.partition(":")[0]
    return name in NOISE and NOISE[name].brings_labels


def run_name(config: RunConfig, dataset: str | None = None, model: str | None = None) -> str:
    """A short description of a run. ``dataset``, ``model``: what takes the place of the configured ones."""
    rate = f" {config.noise:g}" if config.noise else ""
    recipe = config.opt if config.method == "ce" else f"{config.method} {config.opt}"
    return (
        f"{recipe}, {config.noise_type}{rate}, seed {config.seed}, {dataset or config.dataset} {model or config.model}"
    )


def results(lines: list[dict[str, Any]], stage: int) -> dict[str, Any]:
    """Figures of the final stage: last, mean of the last ten, selected on noisy validation, best on test (oracle)."""
    measured = [line for line in lines if line["stage"] == stage and line.get("test_accuracy") is not None]
    last = measured[-1]
    best = max(measured, key=lambda line: line["test_accuracy"])
    found: dict[str, Any] = {
        "last": last["test_accuracy"],
        "last_ten": float(np.mean([line["test_accuracy"] for line in measured[-EVALUATED_AT_THE_END:]])),
        "best": best["test_accuracy"],
        "best_epoch": best["epoch"],
    }
    if last.get("val_accuracy") is not None:
        selected = max(measured, key=lambda line: line["val_accuracy"])
        found |= {"selected": selected["test_accuracy"], "selected_epoch": selected["epoch"]}
    names = {measure.column: measure.name for measure in MEASURES if measure.column and measure.result}
    return found | {names[column]: value for column, value in last.items() if column in names}


def collapsed(confusion: npt.NDArray[np.int64]) -> bool:
    """Whether the predictions fell to one class: at least ``COLLAPSED`` of the test images are predicted as one class,
    and that class holds at most ``COMMON`` of them. ``confusion``: images by class (rows) and predicted class."""
    predicted, images = confusion.sum(0), confusion.sum()
    most = int(predicted.argmax())
    return bool(predicted[most] >= COLLAPSED * images and confusion[most].sum() <= COMMON * images)


def cost(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Cost of the run over all stages; ``gradient_evaluations``: per image that was drawn."""
    total = {
        name: sum(line.get(name) or 0 for line in lines)
        for name in ("steps", "skipped_steps", "forward_samples", "gradient_samples")
    }
    names = ("train_seconds", "eval_seconds", "log_seconds", "compile_seconds")
    seconds = {name: sum(line.get(name) or 0.0 for line in lines) for name in names}
    images = sum(round(line["images_per_second"] * line["train_seconds"]) for line in lines)
    return {
        **total,
        **seconds,
        "images_per_second": images / seconds["train_seconds"],
        "gradient_evaluations": total["gradient_samples"] / images,
        "forward_evaluations": total["forward_samples"] / images,
    }
