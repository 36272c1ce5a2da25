"""The committed evidence: its records are sound, its tables follow from them, its keys are still those of today."""

import json
from pathlib import Path

import pytest

from noisysam.report import report
from noisysam.runs import transfer
from noisysam.runs.config import RunConfig

REPORTS = Path(__file__).resolve().parents[1] / "reports"
STUDIES = sorted(path.parent.name for path in REPORTS.glob("*/records"))


@pytest.mark.parametrize("study", STUDIES)
def test_report_follows_from_the_committed_records(study: str, tmp_path: Path) -> None:
    assert transfer.import_study(REPORTS / study / "records", tmp_path / "runs") > 0
    report(tmp_path / "runs", study, tmp_path)
    for name in ("report.md", "results.csv", "table.csv"):
        assert (tmp_path / study / name).read_text() == (REPORTS / study / name).read_text(), (
            f"make the report of {study}"
        )


@pytest.mark.parametrize("study", STUDIES)
def test_keys_are_still_those_of_the_configurations(study: str) -> None:
    """A change of a default or of the key would train every finished cell once more."""
    for path in sorted((REPORTS / study / "records").glob("*/record.json")):
        record = json.loads(path.read_text())
        assert RunConfig(**record["config"]).key(record["digests"]) == record["key"] == path.parent.name
