"""Validation losses of a mixture's sources and their mean."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from moda_jax.data.loader import Source


class Validation(NamedTuple):
    """Losses of one state, nats a target token."""

    loss: float
    """Mean of the sources' losses, weighted as the mixture is: the loss of its rows."""
    by_source: dict[str, float]
    """By name; one entry for a run without a mixture."""

    @classmethod
    def of(cls, sources: Sequence[Source], losses: Sequence[float]) -> "Validation":
        total = sum(source.weight for source in sources)
        pairs = list(zip(sources, losses, strict=True))
        mean = losses[0]
        if len(losses) > 1:  # a division and a product would round
            mean = sum(source.weight / total * loss for source, loss in pairs)
        return cls(mean, {source.name: loss for source, loss in pairs})

    def metrics(self) -> dict[str, float]:
        """Loss and perplexity, and with a mixture those of each source."""
        found = {"validation_loss": self.loss, "validation_perplexity": perplexity(self.loss)}
        if len(self.by_source) > 1:
            for name, loss in self.by_source.items():
                found[f"validation_loss/{name}"] = loss
                found[f"validation_perplexity/{name}"] = perplexity(loss)
        return found

    def __str__(self) -> str:
        text = f"validation loss {self.loss:.4f}, perplexity {perplexity(self.loss):.3f}"
        if len(self.by_source) == 1:
            return text
        return f"{text}; " + ", ".join(f"{name} {x:.4f}" for name, x in self.by_source.items())


def perplexity(loss: float) -> float:
    """e^loss, finite for every finite loss."""
    return math.exp(min(loss, 700.0))  # exp(710) overflows
