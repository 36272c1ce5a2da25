"""Learning rates, and momenta, over a training."""

import math

from noisysam.core.settings import share
from noisysam.runs.config import RunConfig

ROUNDING = 1e-9  # of epochs that are divided and multiplied again


def learning_rate(config: RunConfig, progress: float, step: float, run_epochs: int | None = None) -> float:
    """The rate at ``progress`` epochs; ``step`` is the length of a step in epochs.

    Linear warm-up, then one of: half a cosine to ``lr_min``; x 0.1 at 50 % and 75 %; constant; x ``lr_factor`` at each
    milestone; linear to 0 from ``decay_from`` on (Co-teaching's main.py); cosines of ``period`` that start again
    (arXiv 1608.03983). Cosine and step are over what follows the warm-up, the others over the whole training.

    ``run_epochs``: those of the run, where ``config`` is that of a stage of another length: points that are given in
    epochs of the run keep their share of the stage.
    """
    if progress < config.warmup:
        return config.lr * min(1.0, (progress + step) / config.warmup)
    done = (progress - config.warmup) / max(config.epochs - config.warmup, step)
    if config.schedule == "cosine":
        return cosine(config, min(1.0, done))
    if config.schedule == "step":
        return config.lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    of, done = run_epochs or config.epochs, progress / config.epochs
    if config.schedule == "milestones":
        return config.lr * config.lr_factor ** sum(reached(done, share(m, of)) for m in config.milestones)
    if config.schedule == "linear":
        begin = share(config.decay_from, of)
        return config.lr * min(1.0, max(0.0, 1 - done) / (1 - begin)) if begin < 1 else config.lr
    if config.schedule == "restarts":
        cycles = done / share(config.period, of)
        return cosine(config, cycles - math.floor(cycles + ROUNDING))
    return config.lr


def cosine(config: RunConfig, done: float) -> float:
    """Half a cosine from ``lr`` to ``lr_min``."""
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * done))


def momentum(config: RunConfig, progress: float, run_epochs: int | None = None) -> float:
    """The momentum at ``progress`` epochs: ``final_momentum``, where there is one, from ``decay_from`` on."""
    of = run_epochs or config.epochs
    late = config.final_momentum is not None and reached(progress / config.epochs, share(config.decay_from, of))
    return config.final_momentum if late else config.momentum  # type: ignore[return-value]


def reached(done: float, point: float) -> bool:
    """Whether a share of the training is over."""
    return done >= point - ROUNDING
