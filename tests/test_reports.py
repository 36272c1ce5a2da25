"""The committed evidence: its records are sound, its reports follow from them, its keys are still those of today."""

import json
import re
from pathlib import Path

import pytest

from noisysam import cli
from noisysam.core.files import read_json
from noisysam.report import report
from noisysam.runs import transfer
from noisysam.runs.config import RunConfig, key_of
from noisysam.runs.record import RunFolder, load_study, study_names

REPORTS = Path(__file__).resolve().parents[1] / "reports"
ARCHIVE = REPORTS / "records"
STUDIES = study_names(ARCHIVE)
QUICK = ("precision-bf16", "precision-fp32")  # whose reports `make test` writes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    assert transfer.import_study(ARCHIVE, store) > 0
    return store


def test_every_study_has_its_report() -> None:
    assert sorted(path.parent.name for path in REPORTS.glob("*/report.md")) == STUDIES


@pytest.mark.parametrize(
    "study", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STUDIES]
)
def test_report_follows_from_the_committed_records(study: str, store: Path, tmp_path: Path) -> None:
    report(store, study, tmp_path)
    for path in (REPORTS / study).rglob("*"):
        name = path.relative_to(REPORTS)
        if path.suffix in (".md", ".csv"):
            assert (tmp_path / name).read_text() == path.read_text(), "run `make reports`"
        assert path.is_dir() or (tmp_path / name).exists(), f"{name}: no part of today's report"


def test_the_leaderboard_follows_from_the_committed_records(tmp_path: Path) -> None:
    for study in STUDIES:  # it links to the reports that are there
        (tmp_path / study).mkdir()
        (tmp_path / study / "report.md").touch()
    assert cli._run(["leaderboard", str(ARCHIVE), "--out", str(tmp_path / "leaderboard.html")]) == 0
    made = (tmp_path / "leaderboard.html").read_text()
    assert made == (REPORTS / "leaderboard.html").read_text(), "run `make reports`"
    assert len(made) < 1_000_000
    for link in set(re.findall(r'href="([^"]*)"', made)):
        assert (REPORTS / link).is_file()
    keys = {json.loads(line)["key"] for line in (ARCHIVE / "runs.jsonl").read_text().splitlines()}
    assert set(re.findall(r"<code>(\w{16})</code>", made)) == keys


@pytest.mark.parametrize("study", STUDIES)
def test_figures_of_a_report_are_there(study: str) -> None:
    for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (REPORTS / study / "report.md").read_text()):
        assert (REPORTS / study / name).is_file()


@pytest.mark.parametrize("study", STUDIES)
def test_keys_are_still_those_of_the_configurations(study: str, store: Path) -> None:
    """A change of a default or of the key would train every finished cell once more."""
    for key in {cell["key"] for cell in load_study(store, study)["cells"]}:
        record = RunFolder(store, key).record
        if record is not None:  # by the revisions that it was trained with, which may be earlier ones
            found = key_of(RunConfig(**record["config"]), record["revisions"], record["digests"])
            assert found == record["key"] == key


def test_the_archive_holds_each_run_once(store: Path) -> None:
    keys = [json.loads(line)["key"] for line in (ARCHIVE / "runs.jsonl").read_text().splitlines()]
    assert sorted(set(keys)) == keys
    planned = {cell["key"] for study in STUDIES for cell in load_study(store, study)["cells"]}
    assert set(keys) <= planned
    labels = {RunFolder(store, key).record["noise"]["digest"][:16] for key in keys}  # type: ignore[index]
    assert labels == {path.stem for path in (ARCHIVE / "labels").glob("*.npz")}
    listed = set(read_json(ARCHIVE / "MANIFEST.json")["files"])
    assert listed == {p.relative_to(ARCHIVE).as_posix() for p in ARCHIVE.rglob("*") if p.is_file()} - {"MANIFEST.json"}
