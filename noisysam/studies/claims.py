"""Claims that a study can test."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from noisysam.core.errors import UnknownName, UserError
from noisysam.core.registry import Registry, call_fault
from noisysam.core.validation import explain
from noisysam.runs import measures

LEVEL = 0.05  # one-sided


def _both(value: Any) -> Any:
    return (value, value) if isinstance(value, str) else value


def _known(name: str) -> str:
    names = [measure.name for measure in measures.shown("table")]
    if name not in names:
        raise ValueError(f"should be one of {', '.join(names)}")
    return name


Test = Callable[[Sequence[float], float], tuple[float, float]]

CLAIM_KINDS: Registry[Test] = Registry("claim kind", lambda item: call_fault(item, ("gains", "margin"), "the function"))
"""Kinds of claims of one's own, about two rows: a function from the paired differences A - B of the seeds at one noise
rate (percentage points; B - A where lower is better) and the claim's margin to two p values: of what is claimed, and of
its opposite. A claim holds if it is shown at every rate (``rates: some``: at one)."""

KINDS = ("greater", "not_worse", "equal", "grows", "some_beats", "correlates", "knife_edge")
MANY = ("some_beats", "correlates", "knife_edge")  # kinds of claims about more than two rows


def _kind(name: str) -> str:
    if name not in KINDS:
        try:
            CLAIM_KINDS[name]
        except UnknownName:
            known = ", ".join(map(repr, (*KINDS, *CLAIM_KINDS)))
            raise ValueError(f"should be one of {known} (or of a file that --plugin names)") from None
    return name


Measure = Annotated[str, AfterValidator(_known)]


class Claim(BaseModel):
    """A sentence that a study can test. The fields are the keys under ``claims`` of a study file.

    With d the mean difference A - B at a rate (B - A where ``direction`` is lower), ``margin`` m, and one-sided tests:

    - greater (rows A, B): d > m at every rate. Contradicted: d < m at one rate at least.
    - not_worse (rows A, B): d > -m at every rate. Contradicted: d < -m at one rate at least.
    - equal (rows A, B): -m < d < m at every rate. Contradicted: d < -m or d > m at one rate at least.
    - grows (rows A, B): the slope of d over the noise rate is above 0. Contradicted: it is below 0.
    - some_beats (rows A1, A2, ..., B): one Ai at least has d > m at every rate. Contradicted: each has d < m at one
      rate at least. With ``against`` B1, B2, ... all rows are candidates, and one must beat every Bj.
    - correlates (rows A1, A2, ..., ``against`` B1, B2, ...; four pairs or more): over the pairs, the gain Ai - Bi goes
      up with Bi's second ``measure``: the rank correlation (Spearman) of their means over seeds is above 0 at every
      rate, tested by permuting the pairs. Contradicted: it is below 0 at one rate at least.
    - knife_edge (rows in the order of a setting, or one as "SAM, rho": its variants "SAM, rho=0.05", ..., in order): a
      row inside the list is ahead of every other row, on both sides, by more than m, at every rate. Contradicted: at
      one rate at least, each row inside the list has another less than m behind it, or ahead.

    Kinds of one's own are registered in ``CLAIM_KINDS``. With ``rates`` some, "at every rate" is "at one rate at
    least", and "at one rate at least" is "at every rate".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    text: str = Field(min_length=1, description="the sentence that is tested")
    kind: Annotated[str, AfterValidator(_kind)]
    rows: tuple[str, ...] = Field(min_length=1, description="rows of the report by name; the last is compared with")
    against: tuple[str, ...] = Field(default=(), description="rows that those of some_beats or correlates face")
    measure: Annotated[tuple[Measure, Measure], BeforeValidator(_both)] = Field(
        default=("last", "last"),
        description="the figure compared, or two: of A and of B; of correlates the gain's and B's",
    )
    direction: Literal["higher", "lower"] = Field(default="higher", description="which way of the measure is better")
    margin: float = Field(default=0.0, ge=0, description="percentage points")
    rates: Literal["all", "some"] = Field(default="all", description="whether it must hold at all rates or at some")
    noise: tuple[float, ...] | None = Field(default=None, min_length=1, description="nominal rates (else the study's)")
    noise_type: str | None = Field(default=None, description="noise type (else the study's)")
    level: float = Field(default=LEVEL, gt=0, lt=0.5, description="of each one-sided test")

    @model_validator(mode="after")
    def _check(self) -> Self:
        """What the fields say together."""
        if self.kind not in MANY and len(self.rows) != 2:
            raise ValueError(f"rows: {self.kind} compares two")
        if self.against and self.kind not in ("some_beats", "correlates"):
            raise ValueError(f"against: {self.kind} has none")
        if self.kind == "some_beats" and len(self.rows) < 2 and not self.against:
            raise ValueError("rows: some_beats needs candidates and, last, the row they are compared with")
        if self.kind == "correlates" and not 4 <= len(self.rows) == len(self.against):
            raise ValueError("against: correlates needs four rows or more, and as many that they are compared with")
        if set(self.rows) & set(self.against):
            raise ValueError("against: a row is compared with itself")
        if self.kind == "knife_edge" and len(self.rows) == 2:
            raise ValueError("rows: knife_edge needs three or more in order, or one whose variants are meant")
        if self.kind == "knife_edge" and self.measure[0] != self.measure[1]:
            raise ValueError("measure: knife_edge compares rows by one")
        if len(set(self.rows)) < len(self.rows) and (len(self.rows) > 2 or self.measure[0] == self.measure[1]):
            raise ValueError("rows: a row is compared with itself")
        if self.kind in ("not_worse", "equal", "knife_edge") and not self.margin:
            raise ValueError(f"margin: {self.kind} needs one above 0")
        if self.kind in ("grows", "correlates") and self.margin:
            raise ValueError(f"margin: {self.kind} has none")
        if self.kind == "grows" and self.rates == "some":
            raise ValueError("rates: grows has none, it is about the slope")
        return self


OURS = [
    Claim(text="SAM is better than SGD at every noise rate", kind="greater", rows=("SAM", "SGD")),
    Claim(text="The gain of SAM over SGD grows with the noise rate", kind="grows", rows=("SAM", "SGD")),
    Claim(
        text="SAM at the last epoch is better than SGD at the epoch selected on noisy validation labels",
        kind="greater", rows=("SAM", "SGD"), measure=("last", "selected"),
    ),
    Claim(
        text="Bootstrap + SAM is not worse than SAM by 1 point or more",
        kind="not_worse", rows=("Bootstrap + SAM", "SAM"), margin=1,
    ),
    Claim(
        text="Bootstrap + SGD is equal to SGD within 1 point", kind="equal", rows=("Bootstrap + SGD", "SGD"), margin=1
    ),
    Claim(
        text="SAM's radius is a knife-edge: every other one, larger or smaller, costs more than 5 points",
        kind="knife_edge", rows=("SAM, rho",), margin=5,
    ),
    Claim(text="J-SAM is equal to SAM within 1 point", kind="equal", rows=("J-SAM", "SAM"), margin=1),
    Claim(
        text="L-SAM is without gain: SGD is not worse by 1 point or more",
        kind="not_worse", rows=("SGD", "L-SAM"), margin=1,
    ),
    Claim(
        text="SAM in a random direction is without gain: SGD is not worse by 1 point or more",
        kind="not_worse", rows=("SGD", "SAM (random direction)"), margin=1,
    ),
    Claim(
        text="SAM with one perturbation for every 32 images is better than with one for the batch",
        kind="greater", rows=("SAM", "SAM (m = batch)"),
    ),
]  # fmt: skip


def parse(given: Sequence[Any], where: str) -> list[Claim]:
    """Claims from what a study file lists; ``UserError`` with one line that names the field. ``where`` names the
    list."""
    claims = []
    for number, item in enumerate(given, 1):
        try:
            claims.append(Claim.model_validate(item))
        except ValidationError as error:
            raise UserError(f"{where}, number {number}, {explain(error, prefix='')}") from None
    return claims
