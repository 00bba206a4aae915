"""The config's section `adapter`: what is trained, and where it starts."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from olora_ray.config.field_types import Fraction, PositiveInt
from olora_ray.config.section import Section

METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "nora": ("sigma",),
    "eva": ("rho", "init_tokens"),
    "lora_ga": ("gamma", "init_tokens"),
}
"""Fields of `adapter` that only these methods have: they count for nothing with another."""


class Adapter(Section):
    """The adapter that is trained."""

    method: Literal["olora", "lora", "pissa", "pissa_fast", "milora", "orthogonal", "nora", "eva", "lora_ga"] = "olora"
    """Where the adapter starts; docs/method.md says more of each. olora: Q and R of W (arXiv 2406.01775). lora: random
    A, zero B (2106.09685). pissa: largest singular values and vectors of W, exactly (2404.02948); pissa_fast: by a
    randomised SVD, for large layers. milora: the smallest (2406.09044). orthogonal: random A and B with B A = 0, as in
    PEFT; even rank. nora: random mixtures of the rows of W, zero B (2410.18965). eva: principal components of the
    layer's inputs on the training data, zero B; ranks go to the layers where they explain most (2410.07170).
    lora_ga: singular vectors of the weight's gradient on the training data (2407.05000)."""
    rank: PositiveInt = 16
    """Rank r of the update."""
    alpha: Annotated[float, Field(gt=0.0)] = 16
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input during training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear (language model with experts), or names, dotted suffixes or regexes of layers or experts' weights."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    sigma: Annotated[float, Field(gt=0.0)] | Literal["matched"] = 0.02
    """nora: size of A0 = sigma / scale x noise x W; matched: rows as long as plain LoRA's, so that the direction alone
    differs."""
    rho: Annotated[float, Field(ge=1.0)] = 2.0
    """eva: a layer's rank is at most rho x rank, with the same sum over all layers; 1: the same rank for all."""
    init_tokens: PositiveInt = 1024
    """eva, lora_ga: how many supervised tokens of the training data are looked at, at most."""
    gamma: Annotated[float, Field(gt=0.0)] = 16.0
    """lora_ga: A0 and B0 are as large as 1 / sqrt(gamma)."""

    @field_validator("targets", mode="before")
    @classmethod
    def _single_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) and value != "all-linear" else value

    @model_validator(mode="after")
    def _rank_fits_the_method(self) -> "Adapter":
        if self.method == "orthogonal" and self.rank % 2:
            near = f"{self.rank - 1} or {self.rank + 1}" if self.rank > 1 else "2"
            raise ValueError(f"rank={self.rank} is odd, and orthogonal needs an even rank; use {near}")
        return self

    @model_validator(mode="after")
    def _enough_tokens_for_the_components(self) -> "Adapter":
        if self.method == "eva" and self.init_tokens <= self.largest_rank():
            raise ValueError(
                f"init_tokens={self.init_tokens}: {self.largest_rank()} components (rho x rank) need more tokens; raise"
                " it, or lower rank or rho"
            )
        return self

    def scale(self) -> float:
        """The factor s of the low-rank update."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def largest_rank(self) -> int:
        """The largest that a layer's rank can become; on average layers have `rank`."""
        return round(self.rho * self.rank) if self.method == "eva" else self.rank

    def options(self) -> dict[str, Any]:
        """The settings that the method alone has."""
        return {name: getattr(self, name) for name in METHOD_OPTIONS.get(self.method, ())}

    def identity(self) -> str:
        """The settings as JSON, without those of other methods: the same text for the same adapter."""
        others = {name for names in METHOD_OPTIONS.values() for name in names} - self.options().keys()
        return self.model_dump_json(exclude=others)
