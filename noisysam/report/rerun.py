"""How the runs of a study are repeated: commit, versions, commands."""

import re
from collections import Counter
from collections.abc import Sequence

from noisysam.core.environment import PACKAGES
from noisysam.report import tables
from noisysam.report.document import Section
from noisysam.report.tables import ReportCell, finished
from noisysam.runs.schema import StudyPlan


def section(cells: Sequence[ReportCell], study: str, plan: StudyPlan) -> Section:
    """The commands that train the study again, from a checkout of this project."""
    commits = Counter(cell["commit"] for cell in _runs(cells) if cell["commit"])
    lines = []
    if commits:
        commit, count = commits.most_common(1)[0]
        others = f"; others: {', '.join(sorted(set(commits) - {commit}))}" if len(commits) > 1 else ""
        changed = ", with changes that were not committed" if commit.endswith("+") else ""
        lines.append(
            f"`git checkout {commit.rstrip('+')}`, the commit of {count} of {commits.total()} runs{changed}{others}"
        )
    included = re.search(r"(?m)^include:\s*(\S+)", plan["file"])
    beside = f"; it includes {included[1]}, which has to lie beside it" if included else ""
    lines += [
        "`pip install -c constraints.txt .` with the versions that the runs were trained with (`constraints.txt` is"
        " written beside this page)",
        f"`noisysam sweep {study}.yaml`, the study's file (written beside this page{beside}); finished runs are not"
        " trained again, so give another `--store`",
        f"`noisysam report {study}`",
    ]
    text = (
        "On the same kind of machine, with as many threads, a run ends with the same bits. Elsewhere rounding differs,"
        " and with it the course of the training: results agree as those of other seeds do."
    )
    return Section("How to repeat this study", text, lines=lines)


def constraints(cells: Sequence[ReportCell]) -> str:
    """The versions of the runs as a constraints file for pip; where they differ, those of most runs."""
    environments = [cell["environment"] for cell in _runs(cells)]
    lines = ["# Versions that the runs of this study were trained with."]
    for name in ("python", *(package for package in PACKAGES if package != "noisysam")):
        found = Counter(environment[name] for environment in environments if environment.get(name))
        if not found:
            continue
        (version, _), *others = found.most_common()
        version = version.partition("+")[0]  # a local version, such as +cpu, is not on every index
        also = f"  # also {', '.join(other for other, _ in others)}" if others else ""
        lines.append((f"# {name} {version}" if name == "python" else f"{name}=={version}") + also)
    return "\n".join(lines) + "\n"


def _runs(cells: Sequence[ReportCell]) -> list[ReportCell]:
    return tables.runs(finished(cells))
