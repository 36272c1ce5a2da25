"""What a user sees: MLflow's pages and the report, in a real browser."""

import contextlib
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from noisysam.runs.record import find_run
from noisysam.tracking import pages, server
from noisysam.tracking.client import default_uri

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.services, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]

STUDY = """
base: {dataset: digits, model: resnet8, width: 0.25, epochs: 2}
grid: {noise: [0.4, 0.8]}
rows:
  SGD: {}
  SAM: {opt: sam, sam_m: batch}
seeds: [0]
"""


def noisysam(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "noisysam", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished runs of a study with their report."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "small.yaml").write_text(STUDY)
    noisysam(folder, "sweep", "small.yaml")
    noisysam(folder, "report", "small")
    return folder


@pytest.fixture(scope="module")
def root(folder: Path) -> Iterator[str]:
    """The address of ``noisysam ui``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "noisysam", "ui", "small", "--port", str(port), "--no-open"]
    with subprocess.Popen(command, cwd=folder, start_new_session=True, stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        deadline = time.time() + 120
        while time.time() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(0.5)
        yield address
        os.killpg(server.pid, signal.SIGTERM)


@pytest.fixture
def seen(tmp_path: Path) -> Callable[[str], str]:
    """The text of a page once its scripts have run; tags are left out, drawings kept as <svg>."""

    def dump(address: str) -> str:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=4200,6000",
            f"--user-data-dir={tmp_path}",
        ]
        command = [str(BROWSER), *options, "--virtual-time-budget=60000", "--dump-dom", address]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=240).stdout
        dom = re.sub(r"<(script|style)\b.*?</\1>", " ", dom, flags=re.DOTALL)
        return html.unescape(re.sub(r"<(?!svg|path|canvas)[^>]*>", " ", dom))

    return dump


def test_list_of_runs_shows_what_matters(folder: Path, root: str, seen: Callable[[str], str]) -> None:
    uri = default_uri(f"sqlite:///{folder}/mlflow.db")
    page = seen(root + server.pages(uri, "small")["small, runs"])
    for column in ("noisysam.row", "noise", "final/last", "final/memorised"):
        assert column in page
    runs = [json.loads(path.read_text()) for path in (folder / "runs").glob("*/record.json")]
    assert len(runs) == 4
    for title in ("SGD 40 % #0", "SGD 80 % #0", "SAM 40 % #0", "SAM 80 % #0"):
        assert title in page


def test_rows_with_a_column_for_each_rate(folder: Path, root: str, seen: Callable[[str], str]) -> None:
    uri = default_uri(f"sqlite:///{folder}/mlflow.db")
    page = seen(root + server.pages(uri, "small")["small, rows"])
    records = [json.loads(path.read_text()) for path in (folder / "runs").glob("*/record.json")]
    for words in ("last at 40", "last at 80", "SGD", "SAM"):
        assert words in page
    for record in records:
        assert f"{round(100 * record['results']['last'], 2):g}" in page


def test_rows_as_curves(folder: Path, root: str, seen: Callable[[str], str]) -> None:
    uri = default_uri(f"sqlite:///{folder}/mlflow.db")
    page = seen(root + server.pages(uri, "small")["small, accuracy against noise"])
    for words in ("mean/last", "mean/memorised", "SGD", "SAM"):
        assert words in page
    assert "<svg" in page


def test_the_experiment_opens_on_the_rows(folder: Path, root: str, seen: Callable[[str], str]) -> None:
    """Without a view in the address, in model training: the study's run is expanded."""
    client = MlflowClient(tracking_uri=default_uri(f"sqlite:///{folder}/mlflow.db"))
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    page = seen(f"{root}/#/experiments/{experiment.experiment_id}?{pages.TRAINING}")
    for words in ("Model training", "SGD", "SAM"):
        assert words in page


def test_charts_by_row_and_rate(folder: Path, root: str, seen: Callable[[str], str]) -> None:
    uri = default_uri(f"sqlite:///{folder}/mlflow.db")
    page = seen(root + server.pages(uri, "small")["small, charts by row and noise rate"])
    for word in ("SGD", "SAM", *pages.CHARTS):
        assert word in page
    assert "gradient_norm" not in page  # the charts that matter, of dozens
    assert "<svg" in page


def test_two_runs_side_by_side(folder: Path, root: str, seen: Callable[[str], str]) -> None:
    records = [json.loads(path.read_text()) for path in (folder / "runs").glob("*/record.json")]
    sam, sgd = sorted((r for r in records if r["config"]["noise"] == 0.8), key=lambda r: r["config"]["opt"])
    address = pages.comparison([find_run(folder / "runs", run["key"]) for run in (sgd, sam)])
    assert address is not None
    page = seen(root + address)
    # the figures are in a box that scrolls: the first of them are there
    for words in ("Comparing 2 Runs", "SGD 80 % #0", "SAM 80 % #0", "final/auroc"):
        assert words in page


def test_the_report_opens_from_the_run_of_the_study(folder: Path, root: str, seen: Callable[[str], str]) -> None:
    client = MlflowClient(tracking_uri=default_uri(f"sqlite:///{folder}/mlflow.db"))
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`noisysam.kind` = 'study'")
    run = f"{root}/#/experiments/{experiment.experiment_id}/runs/{parent.info.run_id}"
    assert "The whole report" in seen(run)
    page = seen(f"{run}/artifacts/report.html")
    assert "report.html" in page


def test_the_report_renders_offline(folder: Path, seen: Callable[[str], str]) -> None:
    path = folder / "reports" / "small" / "report.html"
    assert not re.search(r"""(src|href)=["'](https?:)?//""", path.read_text())
    page = seen(path.as_uri())
    for words in (
        "Study small",
        "Test accuracy at the last epoch",
        "noise rate",
        "gradient evaluations",
        "SGD",
        "SAM",
    ):
        assert words in page
    assert page.count("<svg") >= 4


def browse(page: str, script: str, tmp_path: Path, width: int) -> Any:
    """What a script says, which is run in a page at a window of this width."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    copy = tmp_path / "page.html"
    copy.write_text(page.replace("</body>", f"<script>document.title = JSON.stringify({script})</script></body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        f"--user-data-dir={tmp_path}",
    ]
    command = [str(BROWSER), *options, "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(dom.split("<title>")[1].split("</title>")[0]))


REPORTS = Path(__file__).parents[1] / "reports"
BEYOND = """[...document.querySelectorAll("table, figure svg, li, p, h2")].filter(e =>
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    || e.getBoundingClientRect().left < 0).map(e => e.textContent.slice(0, 60))"""


@pytest.mark.parametrize(("paper", "width"), [("A4", 718), ("letter", 740)])
@pytest.mark.parametrize("page", ["cpu-small-claim/report.html", "leaderboard.html"])
def test_a_printed_page_loses_nothing(page: str, paper: str, width: int, tmp_path: Path) -> None:
    """With the rules for print, on the width between a browser's margins, nothing reaches beyond the paper."""
    text = (REPORTS / page).read_text().replace("@media print", "@media all")
    assert browse(text, BEYOND, tmp_path, width) == []


def test_the_leaderboard_is_sorted_and_filtered(tmp_path: Path) -> None:
    text = (REPORTS / "leaderboard.html").read_text()
    column = "(() => { const t = document.querySelector('table'), h = [...t.tHead.rows[0].cells], i = h.findIndex(c => \
        c.textContent.startsWith('symmetric 80')); h[i].querySelector('button').click(); PRESS; \
        return [...t.tBodies[0].rows].map(r => r.cells[i].dataset.value) })()"
    down = browse(text, column.replace("PRESS", ""), tmp_path, 1200)
    up = browse(text, column.replace("PRESS", "h[i].querySelector('button').click()"), tmp_path, 1200)
    numbers = [float(value) for value in down if value]
    assert len(numbers) > 10
    assert numbers == sorted(numbers, reverse=True)
    assert [float(value) for value in up if value] == numbers[::-1]
    assert down[len(numbers) :] == up[len(numbers) :] == [""] * (len(down) - len(numbers))
    asked = "(() => { words.value = 'DivideMix'; words.dispatchEvent(new Event('input')); \
        const shown = [...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.textContent); \
        blind.checked = true; blind.dispatchEvent(new Event('input')); \
        return [shown, document.querySelectorAll('tbody tr:not([hidden])').length] })()"
    shown, blind = browse(text, asked, tmp_path, 1200)
    assert shown
    assert all("dividemix" in line.lower() for line in shown)
    assert blind == sum("blind" in line and "oracle:" not in line for line in shown)
