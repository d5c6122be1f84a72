"""The routes of a trace as one picture: work, texts, and experts taken together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.figures import new_figure

if TYPE_CHECKING:
    from moekit.commands.routes import Routes

__all__ = ["draw"]

MOST_MATRICES = 12
MOST_TEXTS = 6
STEPS = (1 / 4, 1 / 2, 1, 2, 4)


def draw(routes: Routes, path: Path) -> None:
    """Write a PNG: the work of each expert; where there are several texts, how far apart they are in each layer and
    what each one's experts are; for at most twelve layers, pairs of experts against independence.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FileError: the file cannot be written.
    """
    from moekit.files import replacing

    layers, texts = len(routes.head.layers), len(routes.texts)
    tall, matrices = min(1.8 + 0.2 * layers, 9), -(-min(layers, MOST_MATRICES) // 6)
    heights = [tall, *([tall] if texts > 1 else []), *([2.6 * matrices] if routes.pairs else [])]
    figure = new_figure(13, sum(heights))
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    _work(routes, parts.pop(0))
    if texts > 1:
        _texts(routes, parts.pop(0))
    if routes.pairs:
        _together(routes, parts.pop(0))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _work(routes: Routes, part: Any) -> None:
    """The heat map, and beside it the score of each layer."""
    if not routes.specialisation:
        routes.whole.draw(part.subplots())
        return
    left, right = part.subplots(1, 2, width_ratios=(3, 2))
    routes.whole.draw(left)
    rows = range(len(routes.specialisation))
    right.barh(rows, [one.bits for one in routes.specialisation], color="#2b6cb0")
    right.plot([one.chance for one in routes.specialisation], rows, color="#d1495b", label="by chance")
    right.set(title="How far apart the texts are in their use of experts", xlabel="bits", ylabel="layer")
    right.set_ylim(len(rows) - 0.5, -0.5)
    right.set_yticks(rows, labels=[str(layer) for layer in routes.head.layers])
    right.legend(loc="lower right")


def _texts(routes: Routes, part: Any) -> None:
    """For each text, each expert's share of it over its share of all texts alike."""
    counts_MNE = routes.counts_MNE.double()
    q_MNE = counts_MNE / counts_MNE.sum(dim=2, keepdim=True).clamp(min=1)
    ratios_MNE = (q_MNE / q_MNE.mean(dim=1, keepdim=True).clamp(min=1e-12)).nan_to_num()
    shown = min(len(routes.texts), MOST_TEXTS)
    every = part.subplots(1, shown, squeeze=False, sharey=True)[0]
    for number, axes in enumerate(every):
        image = _ratios(axes, ratios_MNE[:, number])
        axes.set(title=_plain(routes.head.texts[number]), xlabel="expert")
    every[0].set(ylabel="layer")
    every[0].set_yticks(range(len(routes.head.layers)), labels=[str(layer) for layer in routes.head.layers])
    more = f", the first {shown} of {len(routes.texts)} texts" if shown < len(routes.texts) else ""
    part.suptitle(f"Which experts a text takes more than the others do{more}")
    _bar(part, image, every, "share of the text's work ÷ mean share over the texts")


def _together(routes: Routes, part: Any) -> None:
    """A matrix a layer, evenly spaced layers where there are many."""
    from moekit.moe.measures import expected_pairs

    layers = len(routes.head.layers)
    shown = min(layers, MOST_MATRICES)
    columns = min(shown, 6)
    every = part.subplots(-(-shown // columns), columns, squeeze=False).flatten()
    for place, axes in enumerate(every):
        if place >= shown:
            axes.set_axis_off()
            continue
        index = place * (layers - 1) // max(shown - 1, 1)
        pairs_EE = routes.pairs_MEE[index]
        expected_EE = expected_pairs(pairs_EE)
        lift_EE = (pairs_EE / expected_EE).where(expected_EE > 0, math.nan)  # also the diagonal: grey
        image = _ratios(axes, lift_EE)
        axes.set_title(f"layer {routes.head.layers[index]}", fontsize=10)
        axes.set_aspect("equal")
        if routes.head.num_experts <= 16:
            axes.set_yticks(axes.get_xticks())
    part.suptitle("Pairs of experts taken together")
    _bar(part, image, list(every), "tokens ÷ expected if independent")


def _ratios(axes: Any, ratios: Any) -> Any:
    """Ratios in colours whose middle is 1, from a quarter to four times; what is not a number is grey."""
    from matplotlib.colors import LogNorm

    axes.set_facecolor("#d0d0d0")
    shown = ratios.clamp(min=STEPS[0], max=STEPS[-1]).numpy()
    if ratios.shape[1] <= 16:
        axes.set_xticks(range(ratios.shape[1]))
        axes.tick_params(labelsize=8)
    norm = LogNorm(STEPS[0], STEPS[-1])
    return axes.imshow(shown, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")


def _bar(part: Any, image: Any, every: Any, label: str) -> None:
    from matplotlib.ticker import NullLocator

    bar = part.colorbar(image, ax=every, label=label)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.set_yticks(STEPS, labels=["≤ ¼", "½", "1", "2", "≥ 4"])


def _plain(name: str) -> str:
    """matplotlib would read dollars as mathematics."""
    return name.replace("$", r"\$")
