"""Stop strings must be found however the text is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from moekit.engine.stops import StopStrings

TEXT = st.text("abX", max_size=30)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


def character_by_character(text: str, stop: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        completed = [s for s in stop if text[:end].endswith(s)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


@given(TEXT, st.lists(st.integers(0, 4), max_size=20), st.lists(st.text("abX", min_size=1, max_size=5), max_size=3))
def test_any_cut_gives_the_text_before_the_first_stop(text, sizes, stop):
    stops, out = StopStrings(stop), ""
    for piece in cut(text, sizes):
        out += stops.push(piece)
        if stops.found:
            break
    out += stops.end()
    assert (out, stops.found) == character_by_character(text, stop)


@given(TEXT, st.lists(st.integers(0, 4), max_size=20))
def test_only_possible_beginnings_are_held_back(text, sizes):
    stops, seen, out = StopStrings(["XXb"]), "", ""
    for piece in cut(text, sizes):
        seen += piece
        out += stops.push(piece)
        if stops.found:
            return
        held = seen[len(out) :]
        assert out + held == seen
        assert "XXb".startswith(held)
