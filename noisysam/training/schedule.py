"""Learning rates."""

import math

from noisysam.runs.config import RunConfig


def learning_rate(config: RunConfig, progress: float, step: float) -> float:
    """The rate at ``progress`` epochs; ``step`` is the length of a step in epochs.

    Linear warm-up, then a half cosine to 0, or x 0.1 at 50 % and 75 %, or constant.
    """
    if progress < config.warmup:
        return config.lr * min(1.0, (progress + step) / config.warmup)
    done = (progress - config.warmup) / max(config.epochs - config.warmup, step)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "step":
        return config.lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    return config.lr
