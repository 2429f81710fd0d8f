"""Text out of tokens as they come, against decoding all of them at once."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llava_jax.inference.detokenization import AnswerStream

WILD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\ufffd\x00"), max_size=30)
WORDS = st.lists(
    st.sampled_from(["red", " blue", "日本", "🦙", "é", "\n", "  ", "#", "##", "###", "end", "."]), max_size=12
)
each_tokenizer = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def pieces_of(stream: AnswerStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.close()]


@each_tokenizer
@given(text=WILD | WORDS.map("".join))
def test_pieces_make_the_decoded_text_without_the_white_space_around_it(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = tokenizer.decode(ids)
    assume("\ufffd" not in decoded)  # SmolLM2 lacks some bytes
    pieces = pieces_of(AnswerStream(tokenizer), ids)
    assert "".join(pieces) == decoded.strip()
    assert "\ufffd" not in "".join(pieces)


@each_tokenizer
@given(before=WORDS.map("".join), after=WORDS.map("".join), stop=st.sampled_from(["###", "\n\n#", "red.", "日本🦙"]))
def test_a_stop_string_ends_the_text_wherever_tokens_end(tokenizer, before, after, stop):
    ids = tokenizer.encode(before + stop + after, add_special_tokens=False)
    stream = AnswerStream(tokenizer, stop_strings=[stop, "never this"])
    pieces = pieces_of(stream, ids)
    decoded = tokenizer.decode(ids)
    assert "".join(pieces) == decoded[: decoded.index(stop)].strip()
    assert stream.finished


def test_only_certain_text_is_given_away(llama_tokenizer):
    ids = llama_tokenizer.encode("a 🦙 b ##", add_special_tokens=False)
    pieces = pieces_of(AnswerStream(llama_tokenizer, stop_strings=["###"]), ids)
    assert pieces[-1].endswith("##")  # the end of the answer is what proves that no third comes
    assert not any("#" in piece for piece in pieces[:-1])
    assert "🦙" in [piece.strip() for piece in pieces]  # four byte tokens, one piece
    assert [piece for piece in pieces if piece != piece.rstrip()] == []


@each_tokenizer
@given(words=st.lists(st.sampled_from(["it", "12", "🦙", "été", "\n"]), min_size=2), data=st.data())
def test_what_a_begun_answer_continues_with_keeps_its_space(tokenizer, words, data):
    cut = data.draw(st.integers(1, len(words) - 1))
    begun, whole = " ".join(words[:cut]), " ".join(words)
    ids = tokenizer.encode(whole, add_special_tokens=False)
    known = tokenizer.encode(begun, add_special_tokens=False)
    assume(ids[: len(known)] == known)
    pieces = pieces_of(AnswerStream(tokenizer, begun=begun), ids[len(known) :])
    assert "".join(pieces) == whole[len(begun) :].rstrip()


def test_an_unfinished_character_at_the_end_is_dropped(tokenizer):
    ids = tokenizer.encode("so 🦙", add_special_tokens=False)
    assert "".join(pieces_of(AnswerStream(tokenizer), ids[:-1])) == "so"


@pytest.mark.parametrize("length", [0, 2])
def test_a_stop_token_ends_the_text_and_is_no_part_of_it(llama_tokenizer, length):
    eos = llama_tokenizer.eos_token_id
    word = llama_tokenizer.encode("word", add_special_tokens=False)
    stream = AnswerStream(llama_tokenizer, stop_ids=[eos])
    assert "".join(pieces_of(stream, word * length + [eos] + word)) == " ".join(["word"] * length)


@pytest.mark.parametrize("verbatim, text", [(True, "x = "), (False, "x =")])
def test_the_text_before_a_stop_string_does_not_depend_on_where_tokens_end(tokenizer, verbatim, text):
    whole = tokenizer.encode("x = ;", add_special_tokens=False)
    parts = [tokenizer.encode(part, add_special_tokens=False) for part in ("x", " =", " ", ";")]
    for ids in (whole, sum(parts, [])):
        if tokenizer.decode(ids) == "x = ;":
            stream = AnswerStream(tokenizer, stop_strings=[";"], verbatim=verbatim)
            assert "".join(pieces_of(stream, ids)).removeprefix(" ") == text  # SentencePiece begins words with it


@pytest.mark.parametrize("text", [" A ", "A", '\n{"a": 1}\n', "  two  spaces"])
def test_verbatim_answers_keep_the_white_space_at_both_ends(tokenizer, text):
    before = tokenizer.encode(":", add_special_tokens=False)
    ids = tokenizer.encode(f":{text}", add_special_tokens=False)
    assert ids[: len(before)] == before
    stream = AnswerStream(tokenizer, verbatim=True)
    assert "".join(map(stream.push, ids[len(before) :])) + stream.close() == text
