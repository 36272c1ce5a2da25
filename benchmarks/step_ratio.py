"""Time of an optimizer's step over SGD's, on one network, interleaved in one process.

    python benchmarks/step_ratio.py --model resnet20 --rounds 30

Prints one JSON object: for each optimizer the median ratio to SGD's step in the same round, with a 95 % bootstrap
interval, and images per second of SGD.
"""

import argparse
import json
import time

import numpy as np
import torch
from scipy.stats import bootstrap

from noisysam import hardware, models, optim
from noisysam.objective import Net, Objective, Task

CASES = {
    "sgd": ("sgd", {}),
    "sam m=batch": ("sam", {"m": "batch"}),
    "sam m=32": ("sam", {"m": 32}),
    "esam m=batch": ("esam", {"m": "batch"}),
    "j-sam m=batch": ("j-sam", {"m": "batch"}),
    "msam": ("msam", {}),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    device = hardware.resolve_device("auto")
    precision = "bf16" if hardware.native_bf16(device) else "fp32"
    inputs = torch.randn(given.batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (given.batch,), device=device)

    def loss(logits: torch.Tensor, task: Task) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, task.labels, reduction="none")

    steps = {}
    for case, (name, options) in CASES.items():
        net = Net(models.build(given.model, 10, width=given.width).to(device), precision)
        optimizer = optim.OPTIMIZERS[name](net.params, lr=0.01, **options)

        def step(net: Net = net, optimizer: optim.SharpnessAware = optimizer) -> float:
            start = time.perf_counter()
            net.statistics.begin()
            optimizer.step(Objective(net, Task(0, inputs, labels), loss))
            net.statistics.commit(optimizer.found_inf)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        steps[case] = step
    for step in steps.values():
        step(), step()
    seconds = {case: [] for case in steps}
    for _ in range(given.rounds):
        for case, step in steps.items():
            seconds[case].append(step())
    ratios = {}
    for case in steps:
        ratio = np.array(seconds[case]) / np.array(seconds["sgd"])
        if case != "sgd":
            interval = bootstrap((ratio,), np.median, rng=0).confidence_interval
            ratios[case] = [round(float(v), 3) for v in (np.median(ratio), interval.low, interval.high)]
    print(json.dumps({
        **vars(given), "device": hardware.device_name(device), "precision": precision, "torch": torch.__version__,
        "sgd_images_per_second": round(given.batch / float(np.median(seconds["sgd"]))), "ratio_to_sgd": ratios,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
