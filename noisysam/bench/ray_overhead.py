"""Overhead of Ray: images per second, from the first command to the last result, of the same cells trained by Ray with
several workers and by as many shell loops of ``noisysam run``, in interleaved rounds.

    python -m noisysam.bench.ray_overhead                          # two workers, five rounds; an hour on two cores
    python -m noisysam.bench.ray_overhead --cells 4 --epochs 2 --rounds 2 --dataset digits
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from noisysam.bench import measure
from noisysam.core.errors import UserError
from noisysam.studies import plan as plans
from noisysam.studies.plan import Cell

STUDY = """\
base: {{dataset: {dataset}, model: resnet8, width: {width}, epochs: {epochs}, train_subset: {subset}, noise: 0.4,
       precision: fp32, device: cpu}}
rows:
  SGD: {{opt: sgd}}
  SAM: {{opt: sam}}
seeds: {seeds}
"""


def flags(cell: Cell) -> list[str]:
    """The cell as options of ``noisysam run``."""
    changed = cell.config.model_dump(mode="json", exclude_unset=True)
    return [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cells", type=int, default=8, help="an even number")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--subset", type=int, default=None, help="training images  [default: 5000; digits: 1000]")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ray-overhead-"))
    subset = asked.subset or (1000 if asked.dataset == "digits" else 5000)
    width = 0.25 if asked.dataset == "digits" else 1.0
    file = work / "overhead.yaml"
    seeds = list(range(asked.cells // 2))
    file.write_text(STUDY.format(**vars(asked) | {"subset": subset}, width=width, seeds=seeds))
    cells = plans.plan(file)
    images = sum(cell.config.epochs * (cell.config.train_subset or 0) for cell in cells)
    here = [sys.executable, "-m", "noisysam"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def run(command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def all_of(commands: list[list[str]]) -> float:
        """Images per second, from the start of the first command to the end of the last."""

        def work_off() -> None:
            started = [run(command) for command in commands]
            codes = [process.wait() for process in started]
            if any(codes):
                raise SystemExit(f"a command failed: {shlex.join(commands[0])}")

        found = images / measure.seconds(work_off)
        finished = sum(1 for cell in cells if study_is_done(work / "store", cell))
        shutil.rmtree(work / "store")
        if finished != len(cells):
            raise SystemExit(f"only {finished} of {len(cells)} cells were trained")
        return found

    kept = ["--store", str(work / "store"), "--no-track"]

    def ray() -> float:
        return all_of([[*here, "sweep", str(file), "--engine", "ray", "--jobs", str(asked.workers), *kept]])

    def plain() -> float:
        loops = []
        for k in range(asked.workers):  # as Ray would assign them: expensive cells spread evenly
            mine = sorted(cells, key=lambda cell: cell.row)[k :: asked.workers]
            loops.append(["sh", "-ec", "\n".join(shlex.join([*here, "run", *kept, *flags(cell)]) for cell in mine)])
        return all_of(loops)

    load = os.getloadavg()[0]
    found = measure.interleaved({"ray": ray, "plain": plain}, asked.rounds)
    shutil.rmtree(work)
    rows: measure.Tables = {
        f"{len(cells)} cells, {asked.workers} at a time": [
            {
                "images/s, Ray": measure.estimate(found["ray"]),
                "images/s, plain processes": measure.estimate(found["plain"]),
                "Ray / plain": measure.ratio(found["ray"], found["plain"]),
            }
        ]
    }
    print(measure.markdown(rows))
    if asked.out is not None:
        settings = {name: value for name, value in vars(asked).items() if name != "out"} | {"subset": subset}
        content = {"machine": measure.machine(load), "settings": settings, "tables": rows}
        asked.out.write_text(json.dumps(content, indent=1) + "\n")


def study_is_done(store: Path, cell: Cell) -> bool:
    """Whether the run of a cell is in the store; the plain commands must train the same runs as the study."""
    path = store / cell.key / "record.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"ray_overhead: {error}") from None
