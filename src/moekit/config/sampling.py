"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.config.base import check, positive

__all__ = ["SamplingConfig"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    seed: int | None = None
    """Same seed, same text; None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not returned."""

    def __post_init__(self) -> None:
        positive(self, "max_new_tokens")
        check(self.temperature >= 0, f"temperature must be at least 0, not {self.temperature}")
        check(self.top_k >= 0, f"top_k must be at least 0, not {self.top_k}")
        check(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        check(all(self.stop), "stop strings must not be empty")
