"""What the names in a configuration stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from noisysam import methods, models, optim
from noisysam.methods import Method
from noisysam.models import Model
from noisysam.noise.base import NOISE, Noise
from noisysam.optim import SharpnessAware


@dataclass(frozen=True)
class Recipe:
    """The components of a run with their checked options, resolved once by ``RunConfig.recipe``.

    ``parts``: the methods that ``method`` is composed of; ``noise_facts``: what of this run's noise the method is told.
    """

    method: type[Method]
    method_options: Any
    parts: tuple[type[Method], ...]
    noise_facts: tuple[str, ...]
    optimizer: type[SharpnessAware]
    optimizer_options: Any
    model: Model
    noise: type[Noise]

    @classmethod
    def resolve(
        cls,
        *,
        method: str,
        method_option: Mapping[str, Any],
        opt: str,
        opt_option: Mapping[str, Any],
        rho: float | None,
        sam_m: int | str | None,
        ascent_steps: int | None,
        model: str,
        noise_type: str,
    ) -> "Recipe":
        """The components of these names; ``UserError`` names what is unknown, or an option that does not fit."""
        options = methods.options(method, method_option)
        return cls(
            method=methods.compose(method),
            method_options=options,
            parts=tuple(methods.METHODS[part] for part in methods.parse(method)),
            noise_facts=methods.noise_facts(method, options),
            optimizer=optim.OPTIMIZERS[opt],
            optimizer_options=optim.options(opt, opt_option, rho, sam_m, ascent_steps),
            model=models.find(model),
            noise=NOISE[noise_type.partition(":")[0]],
        )

    @property
    def revisions(self) -> dict[str, int]:
        """The revision of each component: part of a run's key."""
        named: list[tuple[str, Any]] = [("method", part) for part in self.parts]
        named += [("optimizer", self.optimizer), ("model", self.model), ("noise", self.noise)]
        return {f"{kind} {part.name}": part.revision for kind, part in named}
