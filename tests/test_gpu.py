"""What needs a CUDA device: skipped where there is none."""

from pathlib import Path

import pytest
import torch

import noisysam
from noisysam.core.errors import RunFailed
from noisysam.methods import Stage
from noisysam.optim import OPTIMIZERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SMALL = {"dataset": "digits", "model": "resnet8", "epochs": 3, "noise": 0.4, "batch": 64, "device": "cuda"}


AT_ONCE: dict[str, dict[str, object]] = {  # so that an epoch shows what a member does
    "ncsam": {"warmup": 0},
    "saner": {"warmup": 1},
    "saf": {"start": 0, "past": 1},
    "mesa": {"start": 0, "decay": 0.9},
}


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_every_optimizer_trains_on_cuda(tmp_path: Path, opt: str) -> None:
    lr = {"lr": 1e-3} if opt == "adamw" else {}
    config = noisysam.RunConfig(**SMALL, **lr, opt=opt, opt_option=AT_ONCE.get(opt, {}))
    record = noisysam.fit(config, store=tmp_path).record
    assert record["status"] == "finished"
    assert record["results"]["last"] > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "opt"), [("ce", "sgd"), ("ce", "sam"), ("elr", "sam"), ("co-teaching", "esam"), ("dividemix", "j-sam")]
)
def test_trains_on_cuda(tmp_path: Path, method: str, opt: str, precision: str) -> None:
    options = {"warmup": 1} if method == "dividemix" else {}
    config = noisysam.RunConfig(**SMALL, method=method, method_option=options, opt=opt, precision=precision)
    result = noisysam.fit(config, store=tmp_path)
    assert result.last > 0.2
    assert result.record["resolved"]["device"] == "cuda"


def test_resume_is_bit_equal_with_deterministic_kernels(tmp_path: Path) -> None:
    class Stop:
        def step(self, *_: object) -> None: ...

        def epoch(self, stage: int, number: int, of: int, line: dict[str, object]) -> None:
            if number == 1:
                raise RunFailed("stopped by the test")

    config = noisysam.RunConfig(**SMALL, opt="sam", deterministic=True)
    whole = noisysam.fit(config, store=tmp_path / "whole")
    with pytest.raises(RunFailed):
        noisysam.fit(config, store=tmp_path / "parts", progress=Stop())
    parts = noisysam.fit(config, store=tmp_path / "parts")
    weights = [(r.folder / "weights.safetensors").read_bytes() for r in (whole, parts)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_epoch_does_not_synchronise(tmp_path: Path, opt: str) -> None:
    """A step enqueues work and reads nothing back: torch's own detector raises where it does."""
    from noisysam.runs.problem import prepare
    from noisysam.training import devices
    from noisysam.training.trainer import Trainer

    config = noisysam.RunConfig(**SMALL, opt=opt, opt_option=AT_ONCE.get(opt, {}))
    problem = prepare(config)
    trainer = Trainer(config, problem, devices.resolve(config, 0))
    trainer.begin_stage(0, Stage())
    trainer.train_epoch(0)  # kernels are loaded, workspaces allocated
    batches = list(trainer.loader.epoch(0, 1))
    sums = torch.zeros(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            trainer.step(batch, 0.1, sums)
    finally:
        torch.cuda.set_sync_debug_mode("default")
