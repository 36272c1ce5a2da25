"""How the runs of a study were made, and what its tables show: facts that stand below the results."""

from collections import Counter
from collections.abc import Sequence

from noisysam.core.registry import summary
from noisysam.noise.base import NOISE
from noisysam.report import claims, figures, tables
from noisysam.report.document import Figure, Section, Table
from noisysam.report.tables import INTERVALS, ReportCell, Summary, finished, joined, summary_table
from noisysam.runs.schema import StudyPlan

MATRICES = 4  # heat maps in a figure at most


def sections(cells: Sequence[ReportCell], study: str, plan: StudyPlan, judged: bool) -> list[Section]:
    """Recipe and data, noise, and where claims were judged the rules for that."""
    rules = [Section("How claims are judged", claims.RULES)] if judged else []
    lines = [f"{name}: {value}" for name, value in _facts(cells, study, plan)]
    return [*rules, Section("Recipe and data", lines=lines), _noise(cells)]


def _facts(cells: Sequence[ReportCell], study: str, plan: StudyPlan) -> list[tuple[str, str]]:
    """What the runs have in common, and what the tables show."""
    done = finished(cells)
    dates = sorted(str(cell[name])[:10] for cell in done for name in ("started", "ended"))
    runs = Counter(cell["status"] for cell in tables.runs(cells))
    models = dict.fromkeys(f"{cell['model']} ({cell['parameters']:,} parameters)" for cell in done)
    added = sorted(plan.get("added_seeds", {}))
    return [
        ("Command", f"`noisysam report {study}`"),
        ("Commit", joined((cell["commit"] for cell in done), "unknown")),
        ("Trained", " to ".join(dict.fromkeys((dates[0], dates[-1])))),
        ("Device", joined(cell["device_name"] for cell in done)),
        ("CPU", joined((cell["cpu"] for cell in done), "not recorded")),
        ("Instruction sets", joined((cell["instruction_set"] for cell in done), "not recorded")),
        ("Numerics revision", joined((cell["numerics"] for cell in done), "not recorded")),
        ("PyTorch", joined((cell["torch"] for cell in done), "not recorded")),
        ("Precision", joined(cell["precision"] for cell in done)),
        ("Threads", joined(cell["threads"] for cell in done)),
        ("Data", joined(cell["dataset"] for cell in done)),
        ("Digest of the data", joined((str(cell["data"])[:16] for cell in done if cell["data"]), "not recorded")),
        ("Subset", _subset(done)),
        ("Training images", joined(cell["train"] for cell in done)),
        ("Validation images", f"{joined(cell['val'] for cell in done)}, with noisy labels"),
        ("Test images", f"{joined(cell['test'] for cell in done)}, with clean labels"),
        ("Augmentation", joined(cell["augment"] for cell in done)),
        ("Model", ", ".join(models)),
        ("Batch", joined(cell["batch"] for cell in done)),
        ("Epochs", joined(cell["epochs"] for cell in done)),
        ("Learning rate", joined(cell["lr"] for cell in done)),
        ("Schedule", joined(cell["schedule"] for cell in done)),
        ("Warm-up epochs", joined(cell["warmup"] for cell in done)),
        ("Steps by", joined(cell["base_opt"] for cell in done)),
        ("Momentum", joined(map(_momentum, done))),
        ("Weight decay", joined(cell["weight_decay"] for cell in done)),
        ("Evaluated", _evaluated(done)),
        ("Selection", "none in the main table, which is the last epoch; the other tables name their rule"),
        ("Knowledge", _knowledge(done)),
        (
            "Seeds",
            joined(sorted({cell["seed"] for cell in cells})) + (f" (added later: {joined(added)})" if added else ""),
        ),
        (
            "Runs",
            f"{runs['finished']} finished, {runs['failed']} failed,"
            f" {runs.total() - runs['finished'] - runs['failed']} missing",
        ),
        ("Training", f"{sum(cell['train_seconds'] for cell in tables.runs(done)) / 3600:.2f} hours in all"),
        ("Spread", _spread(summary_table(cells))),
    ]


def _subset(cells: Sequence[ReportCell]) -> str:
    found = {(cell["train_subset"], cell["subset_seed"]) for cell in cells}
    said = [
        "the whole training set" if size is None else f"{size:,} images, as many of each class, drawn by seed {seed}"
        for size, seed in sorted(found, key=str)
    ]
    return "; ".join(said)


def _evaluated(cells: Sequence[ReportCell]) -> str:
    gaps = joined(cell["eval_every"] for cell in cells)
    return "every epoch" if gaps == "1" else f"every {gaps} epochs, and each of the last ten"


def _momentum(cell: ReportCell) -> str:
    return f"{cell['momentum']}" + " (Nesterov)" * (cell["nesterov"] is True and cell["base_opt"] == "sgd")


def _knowledge(cells: Sequence[ReportCell]) -> str:
    oracle = list(dict.fromkeys(cell["row"] for cell in cells if cell["oracle"]))
    return f"oracle: {', '.join(oracle)} (see Rows); all others blind" if oracle else "all rows are blind"


def _spread(summaries: Sequence[Summary]) -> str:
    numbers = {s["n"] for s in summaries}
    said = ["± is the standard deviation over seeds (n - 1)"] if max(numbers) > 1 else []
    said += ["fewer than five seeds are shown one by one"] if numbers & {2, 3, 4} else []
    said += ["[ ] is the 95 % interval of the mean (t on the logit scale)"] if max(numbers) >= INTERVALS else []
    said += ["one seed has no spread"] if 1 in numbers else []
    return "; ".join(said)


def _noise(cells: Sequence[ReportCell]) -> Section:
    """What the noise is, nominal and measured rates; the measured transition matrices of each noise's first label
    file."""
    kinds = dict.fromkeys((str(c["noise_type"]).partition(":")[0], c["noise_draw"]) for c in finished(cells))
    lines = [
        f"{kind}, {draw} draw: {summary(NOISE[kind])} Source: {NOISE[kind].source}."
        for kind, draw in kinds
        if kind in NOISE
    ]
    named = {tables.column_name(c): c["matrix"] for c in reversed(finished(cells)) if c["matrix"]}
    named = dict(list(reversed(named.items()))[:MATRICES])
    caption = "Measured share of the images of each class (rows) that carry each label (columns), in percent."
    drawing = figures.matrices(named, "label given", "class", tables.classes(cells)) if named else None
    drawn = [Figure("transitions", caption, drawing, detail=True)] if drawing else []
    return Section("Noise", lines=lines, tables=[Table("noise", tables.noise_table(cells))], figures=drawn)
