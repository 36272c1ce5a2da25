"""Memory and time of a report by the number of runs of its study.

The runs are copies of one that was trained, with ``EPOCHS`` epochs each. Every report is written by a process of its
own: the peak of its resident memory is measured (on Linux), imports included, and its processor time.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from noisysam.bench.growth import filled, finished_run
from noisysam.bench.measure import Findings, Row, Settings, rounded
from noisysam.runs.record import RunFolder
from noisysam.training.progress import note

EPOCHS = 200
# not getrusage's: Linux counts in it what the parent had at the time of the fork
CODE = """\
import sys, time
from pathlib import Path
from noisysam.report import report
if len(sys.argv) > 1:
    report(Path(sys.argv[1]), "bench", Path(sys.argv[2]))
(peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(peak, time.process_time())
"""


def measure(settings: Settings) -> Findings:
    """Peak memory and processor time for studies of several sizes."""
    sizes = [4, 8] if settings.quick else [1000, *([10_000] if settings.long else [])]
    with tempfile.TemporaryDirectory() as folder:
        given = finished_run(Path(folder) / "given")
        RunFolder(given.store, "epochs").write_epochs([{**given.epochs[-1], "epoch": n} for n in range(EPOCHS)])
        epochs = (given.store / "epochs" / "epochs.csv").read_text()
        rows = [_row(0, *_cost())]
        for n in sizes:
            note(f"  {n} runs")
            store = filled(Path(folder) / f"store-{n}", n, given)
            for path in store.glob("*/epochs.csv"):
                path.write_text(epochs)
            rows.append(_row(n, *_cost(store, Path(folder) / "reports")))
    return Findings({"A report": rows}, {"epochs": EPOCHS})


def _row(runs: int, memory: float, seconds: float) -> Row:
    return {"runs": runs, "peak memory (MiB)": rounded(memory), "processor seconds": rounded(seconds)}


def _cost(*arguments: Path) -> tuple[float, float]:
    """Peak memory (MiB) and processor seconds of a report; without arguments those of the imports alone."""
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kilobytes, seconds = done.stdout.split()[-2:]
    return int(kilobytes) / 1024, float(seconds)
