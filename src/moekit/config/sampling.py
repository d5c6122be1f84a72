"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.config.base import check, positive

__all__ = ["SamplingConfig"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen: penalties, then temperature, top-k, top-p and min-p in this order, then a draw."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens that are at least this share as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens in prompt or answer by this; 1 changes nothing."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens in the answer so far."""
    frequency_penalty: float = 0.0
    """Subtract this from the logit of a token for each time it is in the answer so far."""
    seed: int | None = None
    """Same seed, same text; None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not returned."""

    def __post_init__(self) -> None:
        positive(self, "max_new_tokens")
        check(self.temperature >= 0, f"temperature must be at least 0, not {self.temperature}")
        check(self.top_k >= 0, f"top_k must be at least 0, not {self.top_k}")
        check(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        check(0 <= self.min_p <= 1, f"min_p must lie in [0, 1], not {self.min_p}")
        factor = self.repetition_penalty
        check(0 < factor < float("inf"), f"repetition_penalty must be above 0 and finite, not {factor}")
        for name in ("presence_penalty", "frequency_penalty"):
            check(-2 <= getattr(self, name) <= 2, f"{name} must lie in [-2, 2], not {getattr(self, name)}")
        check(all(self.stop), "stop strings must not be empty")

    @property
    def has_penalties(self) -> bool:
        """Whether what was said so far changes what is said next beyond the model's own view."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
