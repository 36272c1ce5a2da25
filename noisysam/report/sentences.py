"""What a study found, in a few sentences: generated from its means and verdicts, at the top of its report."""

from collections.abc import Sequence

from noisysam.report.claims import FEWEST, Verdict
from noisysam.report.tables import ReportCell, Summary, column_name, finished, joined, runs

NAMED = 5  # rows, places or claims that are listed by name; of more some are left out


def sentences(cells: Sequence[ReportCell], summaries: Sequence[Summary], verdicts: Sequence[Verdict]) -> list[str]:
    """What was compared, on what, what was found, and what this does not show: three to six sentences."""
    found = [_best(summaries)]
    for name in ("supported", "contradicted", "undecided"):
        texts = [f"{_within(verdict.text)}{_effect(verdict)}" for verdict in verdicts if verdict.verdict == name]
        if texts:
            found.append(f"{name.capitalize()}{_why(verdicts) if name == 'undecided' else ''}: {_listed(texts)}.")
    types = {str(cell["noise_type"]) for cell in finished(cells)}
    if len(types) == 1:  # the first sentence names it
        found = [sentence.replace(f"{next(iter(types))} ", "") for sentence in found]
    return [_compared(cells), *filter(None, found), _scope(cells)]


def _compared(cells: Sequence[ReportCell]) -> str:
    done = finished(cells)
    rows = list(dict.fromkeys(cell["row"] for cell in done))
    named = f" ({'; '.join(rows)})" if 1 < len(rows) <= NAMED else ""
    what = f"{len(rows)} training recipes{named} are compared" if len(rows) > 1 else f"{rows[0]} is measured"
    noises = joined(column_name(cell) for cell in sorted(done, key=lambda c: (c["noise_type"], c["noise"])))
    seeds = len({cell["seed"] for cell in done})
    images = joined(format(cell["train"], ",") for cell in done if cell["train"])
    length = joined(c["epochs"] for c in done)
    network = f"{joined(c['model'] for c in done)} for {length} epoch{'s' * (length != '1')}"
    return (
        f"{what} by clean test accuracy at the last epoch: {images} training images of"
        f" {joined(c['dataset'] for c in done)} with label noise ({noises}), {network},"
        f" {f'{seeds} seeds' if seeds > 1 else 'one seed'}."
    )


def _best(summaries: Sequence[Summary]) -> str:
    """The best row at each noise, or several that are equal, beside the first row of the study."""
    parts, first = [], summaries[0]["row"]
    for column in dict.fromkeys(column_name(s) for s in summaries):
        here = {s["row"]: s["mean"] for s in summaries if column_name(s) == column and s["mean"] is not None}
        if len(here) > 1:
            highest = max(here.values())
            top = [row for row in here if here[row] == highest]
            beside = f" ({first} {100 * here[first]:.1f} %)" if first in here and first not in top else ""
            named = " and ".join(top) if len(top) <= NAMED else f"{len(top)} recipes"
            parts.append(f"{column}: {named} {100 * highest:.1f} %{beside}")
    return f"Highest mean at {'; at '.join(parts)}." if parts else ""


def _effect(verdict: Verdict) -> str:
    """The effects at each place of a claim that compares two rows; else the one that decides."""
    paired = verdict.claim.kind in ("greater", "not_worse", "equal")
    effects = verdict.effects if paired else [verdict.deciding]
    found = [(effect, effect.planned.mean) for effect in effects if effect is not None and effect.planned is not None]
    if not found or len(found) > NAMED:
        return ""
    effect, mean = found[0]
    if not paired:
        return f" ({mean:+.1f} {effect.unit}{'' if verdict.claim.kind == 'grows' else f', {effect.what}'})"
    said = [f"{mean:+.1f} points at {effect.what}", *(f"{mean:+.1f} at {effect.what}" for effect, mean in found[1:])]
    return f" ({'it depends on the rate: ' if verdict.depends else ''}{', '.join(said)})"


def _within(text: str) -> str:
    """A claim's text within a sentence."""
    return text[0].lower() + text[1:] if text.startswith(("The ", "At ")) else text


def _listed(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return "; ".join(texts[:NAMED]) + more


def _why(verdicts: Sequence[Verdict]) -> str:
    """That no claim could be decided, where seeds are too few."""
    numbers = [effect.planned.n if effect.planned else 0 for v in verdicts for effect in v.effects]
    return "" if max(numbers, default=FEWEST) >= FEWEST else f", as {FEWEST} seeds are needed"


def _scope(cells: Sequence[ReportCell]) -> str:
    """What the study does not show."""
    done = finished(cells)
    types = dict.fromkeys(str(cell["noise_type"]).partition(":")[0] for cell in done)
    planned, trained = len(runs(cells)), len(runs(done))
    missing = f" {planned - trained} of {planned} runs are missing or failed." if trained < planned else ""
    oracle = list(dict.fromkeys(cell["row"] for cell in done if cell["oracle"]))
    known = f" Rows that knew the noise (oracle): {_listed(oracle)}." if oracle else ""
    return (
        "This does not show what happens on other data, networks or training lengths, or with noise that is not"
        f" {' or '.join(types)}.{known}{missing}"
    )
