"""From tokens to text: whole characters, stop strings, and which token a piece of text came with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts.tiny_chat import END, byte_tokenizer

from swarm.gateway.pieces import TextPieces

TOKENIZER = byte_tokenizer()
TEXTS = st.text(alphabet=st.sampled_from("ab \n\té漢字😀👩\u200d👩\u0301x"), max_size=30)


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True))


def tokens(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]


def all_pieces(text: str, *stops: str, context: str = "q: ") -> tuple[list[str], TextPieces]:
    pieces = TextPieces(decode, tokens(context), stops)
    given = [pieces.add(token) for token in tokens(text)]
    return [*given, pieces.finish()], pieces


@given(text=TEXTS, context=TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_text(text: str, context: str) -> None:
    given, _ = all_pieces(text, context=context)
    assert "".join(given) == text
    assert all("\ufffd" not in piece for piece in given)


def test_a_character_comes_with_its_last_byte() -> None:
    assert len(tokens("é漢😀")) == 9
    given, _ = all_pieces("é漢😀")
    assert given == ["", "é", "", "", "漢", "", "", "", "😀", ""]


def test_bytes_that_are_no_text_are_shown_as_such_and_end_nothing() -> None:
    broken = tokens("漢")[:2]
    pieces = TextPieces(decode, [], ())
    given = [pieces.add(token) for token in broken * 20 + tokens("ab")]
    assert "".join(given).endswith("ab")
    assert "\ufffd" in "".join(given[:30]), "what is no text is not waited for, for ever"
    half = TextPieces(decode, [], ())
    assert [half.add(token) for token in tokens("a漢")[:3]] == ["a", "", ""]
    assert half.finish() == "\ufffd"


@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab é漢", min_size=1, max_size=4), max_size=4))
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    given, pieces = all_pieces(text, *stops)
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert pieces.is_stopped == bool(found)
    shown = "".join(given)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not found:
        assert shown == text


def test_a_stop_string_over_several_tokens_is_never_shown_in_part() -> None:
    given, pieces = all_pieces("one STOPPED two", "STOPPED")
    assert given[:4] == ["o", "n", "e", " "]
    assert "".join(given) == "one "
    assert pieces.is_stopped
    given, pieces = all_pieces("a STOP", "STOPPED")
    assert given[-1] == "STOP", "what could have become one is told at the end"
    assert not pieces.is_stopped


def test_special_tokens_say_nothing() -> None:
    pieces = TextPieces(decode, [], ())
    end = TOKENIZER.convert_tokens_to_ids(END)
    assert [pieces.add(token) for token in (*tokens("a"), end, *tokens("b"))] == ["a", "", "b"]


def test_words_keep_the_space_that_a_decoder_takes_from_the_first() -> None:
    words = ["", " one", " two"]

    def strip(ids: Sequence[int]) -> str:
        return "".join(words[number] for number in ids).lstrip()

    assert TextPieces(strip, [1], ()).add(2) == " two"
    assert TextPieces(strip, [], ()).add(2) == "two"


def test_each_token_is_told_once_with_the_text_that_begins_in_it() -> None:
    pieces = TextPieces(decode, [], ["END"])
    told = []
    for token in tokens("é bEND"):
        if pieces.add(token):
            told += [(place.token, place.start) for place in pieces.told()]
    pieces.finish()
    told += [(place.token, place.start) for place in pieces.told()]
    first, second, space, letter = tokens("é b")
    assert told == [(first, 0), (second, 0), (space, 1), (letter, 2)], "what is behind the stop string is never told"


@pytest.mark.parametrize("stop", ["b", "bc"])
def test_nothing_comes_after_the_stop(stop: str) -> None:
    pieces = TextPieces(decode, [], [stop])
    assert "".join(pieces.add(token) for token in tokens("abcbc")) == "a"
    assert pieces.add(tokens("z")[0]) == ""
    assert pieces.finish() == ""
