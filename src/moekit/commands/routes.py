"""What is counted of a routing trace, row by row, and how a person sees it: the same for a model and for a file."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moekit.commands.heat import SHADES, heat_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from moekit.engine import TraceHead, TraceRow
    from moekit.moe.measures import ExpertPair, Specialisation
    from moekit.train import RoutingMonitor

__all__ = ["LISTED_TOKENS", "Routes"]

LISTED_TOKENS = 16_384
"""Tokens of a text that are kept one by one; the counts are of all."""
SHOWN_TOKENS = 24
SHOWN_PAIRS = 12


class Routes:
    """Counts of the rows that were added; memory grows with layers, experts and texts, not with the rows.

    Args:
        head: what holds for all rows.

    Attributes:
        texts: a monitor a text.
        pairs_MEE: int64, tokens that took both experts, of all texts.
        listed: each text's first tokens, as (token id, experts of each MoE layer).
    """

    def __init__(self, head: TraceHead) -> None:
        import torch

        self.head = head
        self.texts = [self._monitor() for _ in head.texts]
        self.pairs_MEE = torch.zeros(len(head.layers), head.num_experts, head.num_experts, dtype=torch.int64)
        self.listed: list[list[tuple[int, list[list[int]]]]] = [[] for _ in head.texts]

    def add(self, row: TraceRow) -> None:
        """Count one row."""
        import torch

        from moekit.moe.measures import pair_counts

        pairs_MEE = torch.stack([pair_counts(ids_TK, self.head.num_experts) for ids_TK in row.experts_TMK.unbind(1)])
        tokens_M = torch.full((len(self.head.layers),), len(row.tokens_T))
        self.texts[row.text].add(pairs_MEE.diagonal(dim1=1, dim2=2), tokens_M=tokens_M)
        self.pairs_MEE += pairs_MEE
        listed = self.listed[row.text]
        room = LISTED_TOKENS - len(listed)
        for token, layers in zip(row.tokens_T[:room].tolist(), row.experts_TMK[:room].tolist(), strict=True):
            listed.append((token, [[expert for expert in experts if expert >= 0] for experts in layers]))

    @cached_property
    def whole(self) -> RoutingMonitor:
        """The counts of all texts together."""
        whole = self._monitor()
        for text in self.texts:
            whole.merge(text)
        return whole

    @cached_property
    def counts_MNE(self) -> Tensor:
        """int64: the counts of each layer, text and expert."""
        import torch

        return torch.stack([text.counts_ME for text in self.texts], dim=1)

    @cached_property
    def specialisation(self) -> list[Specialisation]:
        """How differently the texts use each layer's experts; nothing to say of a single text."""
        from moekit.moe.measures import Specialisation

        if len(self.texts) < 2:
            return []
        return [Specialisation.of(*pair) for pair in zip(self.head.layers, self.counts_MNE, strict=True)]

    @cached_property
    def pairs(self) -> list[ExpertPair]:
        """The pairs of experts that were taken together most beyond what was expected, of all layers."""
        from moekit.moe.measures import expert_pairs

        layers = zip(self.head.layers, self.pairs_MEE, strict=True)
        found = [pair for layer, pairs_EE in layers for pair in expert_pairs(layer, pairs_EE, SHOWN_PAIRS)]
        found = [pair for pair in found if pair.together > pair.expected]
        return sorted(found, key=lambda pair: pair.expected - pair.together)[:SHOWN_PAIRS]

    def as_dict(self, pieces: dict[int, str]) -> dict[str, Any]:
        """All of it for JSON."""
        from moekit.moe.measures import domain_shares

        return {
            "layers": self.whole.as_dict(),
            "texts": [self._text(number, pieces) for number in range(len(self.texts))],
            "specialisation": [
                asdict(one) | {"shares": domain_shares(counts_NE).tolist()}
                for one, counts_NE in zip(self.specialisation, self.counts_MNE, strict=False)
            ],
            "pairs": [asdict(pair) | {"lift": pair.lift} for pair in self.pairs],
            "together": self.pairs_MEE.tolist(),
        }

    def show(self, pieces: dict[int, str], console: Console) -> None:
        """Print heat map, texts beside each other, pairs, and the first tokens."""
        console.print(heat_table(self.whole.counts_ME.tolist(), self.head.layers))
        if self.specialisation:
            console.print(self._text_table())
        if self.pairs:
            console.print(_pair_table(self.pairs))
        for number in range(len(self.texts)):
            console.print(self._token_table(number, pieces))
            self._say_what_is_not_shown(number, console)

    def _monitor(self) -> RoutingMonitor:
        from moekit.train import RoutingMonitor

        return RoutingMonitor(self.head.layers, self.head.num_experts)

    def _tokens(self, number: int) -> int:
        tokens_M = self.texts[number].tokens_M
        assert tokens_M is not None
        return int(tokens_M[0])

    def _text(self, number: int, pieces: dict[int, str]) -> dict[str, Any]:
        listed = self.listed[number]
        return {
            "name": self.head.texts[number],
            "count": self._tokens(number),
            "layers": self.texts[number].as_dict(),
            "tokens": [pieces[token] for token, _ in listed],
            "experts": [experts for _, experts in listed],
            "left_out": self._tokens(number) - len(listed),
        }

    def _text_table(self) -> Table:
        """A row a layer: the score, what chance would give, and for each text the experts it takes more or less."""
        from rich.table import Table
        from rich.text import Text

        from moekit.moe.measures import domain_shares

        table = Table(
            "layer",
            title="texts apart; ▄ takes an expert as all do, █ twice as much",
            title_justify="left",
        )
        table.add_column("bits", justify="right")
        table.add_column("chance", justify="right")
        for name in self.head.texts:
            table.add_column(Text(name))
        for one, counts_NE in zip(self.specialisation, self.counts_MNE, strict=True):
            ratios = (domain_shares(counts_NE) * len(counts_NE)).tolist()
            cells = [Text("".join(map(_shade, row)), style="cyan", overflow="fold") for row in ratios]
            table.add_row(str(one.layer), f"{one.bits:.3f}", f"{one.chance:.3f}", *cells)
        return table

    def _token_table(self, number: int, pieces: dict[int, str]) -> Table:
        """The first tokens and their experts, in the first, middle and last MoE layer."""
        from rich.table import Table
        from rich.text import Text

        layers, last = self.head.layers, len(self.head.layers) - 1
        columns = sorted({0, last // 2, last})
        title = Text(f"experts of each token of {self.head.texts[number]}")
        table = Table("token", *(f"layer {layers[column]}" for column in columns), title=title, title_justify="left")
        for token, experts in self.listed[number][: self._shown_tokens]:
            table.add_row(Text(repr(pieces[token])), *(", ".join(map(str, experts[column])) for column in columns))
        return table

    @property
    def _shown_tokens(self) -> int:
        return max(SHOWN_TOKENS // len(self.texts), 4)

    def _say_what_is_not_shown(self, number: int, console: Console) -> None:
        tokens, listed = self._tokens(number), len(self.listed[number])
        if tokens > self._shown_tokens:
            more = "--json has them all" if listed == tokens else f"--json has {listed:,}, --save-trace all"
            console.print(f"the first {self._shown_tokens} of {tokens:,} tokens; {more}", highlight=False)


def _pair_table(pairs: list[ExpertPair]) -> Table:
    from rich.table import Table

    table = Table("layer", "experts", title="experts taken together beyond expectation", title_justify="left")
    for name in ("tokens", "expected", "times"):
        table.add_column(name, justify="right")
    for pair in pairs:
        first, second = pair.experts
        counted = (f"{pair.together:,}", f"{pair.expected:,.1f}", f"{pair.lift:.2f}")
        table.add_row(str(pair.layer), f"{first} and {second}", *counted)
    return table


def _shade(ratio: float) -> str:
    """Half full for 1, full for 2 and more, blank for nothing at all, and something visible for any."""
    most = len(SHADES) - 1
    return SHADES[min(max(round(ratio * most / 2), 1), most)] if ratio else SHADES[0]
