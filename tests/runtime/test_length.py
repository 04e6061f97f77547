from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_slm_runtime.answer import Answer
from edge_slm_runtime.command import Command, count_words
from edge_slm_runtime.length import LengthKeeper, tolerance
from edge_slm_runtime.plan import Plan
from edge_slm_runtime.sampling import Sampling
from edge_slm_runtime.text import TextCodec


@pytest.mark.parametrize(
    ("words", "window"),
    [(1, (1, 3)), (2, (1, 4)), (3, (1, 5)), (20, (18, 22)), (29, (27, 31)), (30, (27, 33))],
)
def test_tolerance(words: int, window: tuple[int, int]) -> None:
    assert tolerance(words) == window


def plan(words: int | None, budget: int = 400, stop: tuple[str, ...] = ()) -> Plan:
    command = Command(words=words)
    return Plan("x", command, command, (), (1, 2), budget, "max_tokens", words, stop, Sampling())


def write(answer: Answer, codec: TextCodec, wishes: list[int]) -> str:
    """Lets a model that wants `wishes` write `answer`; returns what was streamed."""
    shown = ""
    for wish in wishes:
        logits = np.zeros(codec.size + 5, np.float32)
        logits[codec.size - 1] = 5  # the second choice: a token with letters
        logits[wish] = 10
        step = answer.accept(answer.choose(logits))
        shown += step.text
        assert answer.text.startswith(shown), "nothing that was shown is taken back"
        if step.done:
            break
    return shown


def tokens(codec: TextCodec) -> st.SearchStrategy[int]:
    """Any id that a model can want, words and ends more often than chance."""
    starts = [i for i in range(codec.size) if codec.bytes_of(i)[:1] in (b" ", b"\n", b",", b".")]
    return st.one_of(
        st.integers(0, codec.size + 4), st.sampled_from(starts), st.just(codec.ends[0])
    )


@given(data=st.data(), words=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_the_promise_holds_for_any_tokens(
    codec: TextCodec, data: st.DataObject, words: int
) -> None:
    low, high = tolerance(words)
    wishes = data.draw(st.lists(tokens(codec), min_size=4, max_size=60))
    answer = Answer(plan(words, budget=len(wishes)), codec, 0.0)
    shown = write(answer, codec, wishes)
    assert answer.finish
    assert shown == answer.text == answer.text.strip()
    assert answer.words <= high
    if answer.finish != "max_tokens":
        assert low <= answer.words
        assert answer.finish in ("stop", "length")
    assert not set(answer.ids) & {*codec.controls, *range(codec.size, codec.size + 5)}


@given(data=st.data(), stop=st.lists(st.text(" abe,.\n", min_size=1, max_size=3), max_size=2))
@settings(max_examples=100, deadline=None)
def test_streamed_pieces_are_the_text(
    codec: TextCodec, data: st.DataObject, stop: list[str]
) -> None:
    wishes = data.draw(st.lists(tokens(codec), min_size=1, max_size=40))
    words = data.draw(st.none() | st.integers(1, 6))
    answer = Answer(plan(words, len(wishes), tuple(stop)), codec, 0.0)
    assert write(answer, codec, wishes) == answer.text
    assert not any(text in answer.text for text in stop)
    assert words is None or answer.words <= tolerance(words)[1]


def run(codec: TextCodec, text: str, words: int) -> Answer:
    answer = Answer(plan(words), codec, 0.0)
    write(answer, codec, codec.encode(text))
    return answer


def test_cut_prefers_a_sentence_and_without_a_likely_end_a_clause(codec: TextCodec) -> None:
    answer = run(codec, "one two three. four five, six seven eight nine", words=5)
    assert (answer.text, answer.finish) == ("one two three.", "length")
    answer = run(codec, "one two three, four five six seven eight nine", words=5)
    assert answer.text == "one two three"


def test_cut_avoids_a_dangling_word(codec: TextCodec) -> None:
    keeper = LengthKeeper(5)
    assert keeper.cut("a b c and the of with more") == "a b c"


def test_cut_goes_where_the_model_wanted_to_end() -> None:
    keeper = LengthKeeper(5)
    text = "aa bb cc dd ee ff gg hh"
    for position, log_prob in ((8, -3.0), (11, -1.0), (14, -2.0)):
        keeper.note(text[:position], log_prob)
    assert keeper.cut(text) == "aa bb cc dd"


@pytest.mark.parametrize(
    ("notes", "kept"),
    [
        ({"aa bb cc": -4.0, "aa bb cc, dd ee": -0.5}, "aa bb cc, dd ee"),
        ({"aa bb cc": -0.2, "aa bb cc,": -9.0, "aa bb cc, dd ee": -0.5}, "aa bb cc"),
        ({"aa bb cc, dd ee": -3.0, "aa bb cc, dd ee the": -0.1}, "aa bb cc, dd ee"),
    ],
)
def test_a_likely_end_counts_more_than_a_comma(notes: dict[str, float], kept: str) -> None:
    keeper = LengthKeeper(5)
    for text, log_prob in notes.items():
        keeper.note(text, log_prob)
    assert keeper.cut("aa bb cc, dd ee the gg hh") == kept


def test_ends_that_are_unlikely_or_were_taken_back_do_not_count() -> None:
    keeper = LengthKeeper(5)
    keeper.note("aa bb cc dd", -0.1)
    keeper.note("aa bb cc", -9.0)
    keeper.note("aa bb cc dx", -8.0)
    assert keeper.cut("aa bb cc, dx ee ff gg hh") == "aa bb cc"
    assert LengthKeeper(5).cut("aa bb cc with, dd the of and gg hh") == "aa bb cc with, dd"


def test_it_is_cut_where_a_full_stop_was_likely(codec: TextCodec) -> None:
    answer = Answer(plan(5), codec, 0.0)
    for wish in codec.encode("one two three, four five six seven eight"):
        logits = np.zeros(codec.size, np.float32)
        logits[wish] = 10
        if answer.text == "one two three, four":
            logits[codec.full_stop] = 9
        if answer.accept(answer.choose(logits)).done:
            break
    assert answer.text == "one two three, four"


def test_cut_without_any_sign_goes_by_nearness() -> None:
    assert LengthKeeper(5).cut("aa bb cc dd ee ff gg hh") == "aa bb cc dd ee"


def test_a_lone_comma_counts_as_the_word_that_it_is() -> None:
    text = "aa bb , dd ee ff gg hh"
    cut = LengthKeeper(5).cut(text)
    assert 3 <= count_words(cut) <= 7


def test_torn_last_word_is_left_out_when_the_budget_ends() -> None:
    keeper = LengthKeeper(5)
    assert keeper.cut("aa bb cc dd e", finished=False) == "aa bb cc dd"
    assert keeper.cut("aa bb c", finished=False) == "aa bb c", "rather torn than too short"


def test_a_stop_sequence_behind_the_maximum(codec: TextCodec) -> None:
    tokens = [codec.bytes_of(i) for i in range(codec.size)]
    last = next(i for i, t in enumerate(tokens) if t[:1] == b" " and t[1:].isalpha() and t[3:])
    stop = tokens[last].decode()[2:]  # the sixth word begins in the token that completes it
    answer = Answer(plan(3, stop=(stop,)), codec, 0.0)
    shown = write(answer, codec, [*codec.encode("aa bb cc dd ee"), last])
    assert shown == answer.text
    assert 1 <= answer.words <= 5


def test_timings_end_with_the_answer_and_leave_the_reader_out(codec: TextCodec) -> None:
    answer = Answer(plan(None, budget=2), codec, perf_counter())
    token = codec.size - 1
    answer.accept(token)
    answer.away = 100.0
    answer.accept(token)
    assert answer.last == answer.ended
    assert -100 < answer.ended - answer.started < -99


def test_an_early_end_is_held_back(codec: TextCodec) -> None:
    answer = Answer(plan(3), codec, 0.0)
    assert not answer.may_end()
    write(answer, codec, [codec.ends[0]])
    assert answer.finish is None
    assert answer.ids == [codec.size - 1]


def test_without_words_the_model_alone_decides(codec: TextCodec) -> None:
    answer = Answer(plan(None), codec, 0.0)
    write(answer, codec, [codec.ends[0]])
    assert (answer.text, answer.finish) == ("", "stop")


def ended(codec: TextCodec, words: int, text: str, *wishes: str) -> tuple[str, str | None, int]:
    """Of an answer whose model writes `text`, then always wants to end, and next best `wishes`
    one after the other: the text, why it ended, and the tokens after `text`."""
    answer = Answer(plan(words), codec, 0.0)
    ids = codec.encode(text)
    for i in (*ids, *(codec.encode(wish)[0] for wish in wishes)):
        logits = np.zeros(codec.size, np.float32)
        logits[i] = 20
        if len(answer.ids) >= len(ids):
            logits[codec.ends[0]] = 21
        if answer.accept(answer.choose(logits)).done:
            break
    return answer.text, answer.finish, len(answer.ids) - len(ids)


def test_the_end_within_a_sentence_gets_its_full_stop(codec: TextCodec) -> None:
    nine = "a b c d e f g h i"
    assert ended(codec, 10, nine, ".") == (f"{nine}.", "stop", 1)
    assert ended(codec, 10, f"{nine}.", " ") == (f"{nine}.", "stop", 0)
    assert ended(codec, 10, nine, ",", ".") == (nine, "stop", 0)  # perhaps a list
    assert ended(codec, 9, nine, ".") == (nine, "stop", 0)  # perhaps a title
    prose = "a b. c d e f g h i"
    assert ended(codec, 10, prose, ",", " ", "j", ".") == (f"{prose}, j.", "stop", 4)
    # A letter would make the last word another one; at the maximum the best end is looked for.
    assert ended(codec, 10, prose, "x", ".")[0].startswith(prose)
    long = " a" * 5
    text, finish, _ = ended(codec, 10, "a b c d. e f g h i. j", *long)
    assert (text, finish) == ("a b c d. e f g h i.", "length")


def test_no_sentence_ends_behind_a_word_that_must_go_on(codec: TextCodec) -> None:
    stop, word = codec.encode(".")[0], codec.encode(" x")[0]
    for text, allowed in {"x with": False, "x of the": False, "x behind": True, "x": True}.items():
        answer = Answer(plan(10), codec, 0.0)
        for i in codec.encode(text):
            answer.accept(i)
        logits = np.zeros(codec.size, np.float32)
        logits[stop], logits[word] = 3, 2
        assert answer.choose(logits) == (stop if allowed else word)


def test_an_end_that_is_held_back_is_not_glued_to_the_next_word(codec: TextCodec) -> None:
    letter, word = codec.encode("x")[0], codec.encode(" x")[0]
    for end, wanted in ((5, word), (1, letter)):
        answer = Answer(plan(10), codec, 0.0)
        for i in codec.encode("a b."):
            answer.accept(i)
        logits = np.zeros(codec.size, np.float32)
        logits[letter], logits[word], logits[codec.ends[0]] = 3, 2, end
        assert answer.choose(logits) == wanted


def test_words_are_whole_again_behind_an_end_that_was_held_back(codec: TextCodec) -> None:
    """Also where the next word reaches the least length, from which the answer may end."""
    letter, (first, *rest) = codec.encode("x")[0], codec.encode(" y")
    answer = Answer(plan(4), codec, 0.0)  # 2 … 6 words
    for i in codec.encode("a."):
        answer.accept(i)
    logits = np.zeros(codec.size, np.float32)
    logits[codec.ends[0]], logits[letter], logits[first] = 5, 4, 3
    assert answer.choose(logits) == first
    for i in (first, *rest):
        answer.accept(i)
    logits = np.zeros(codec.size, np.float32)
    logits[letter] = 5
    assert answer.choose(logits) == letter


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("A fox. Its eyes scan the snow", True),
        ("A fox. Its eyes scan the snow.", False),
        ("A fox. Its eyes scan the", False),  # within a phrase
        ("A fox. Its eyes, bright,", False),
        ('A fox. A sign reads "Fox', False),
        ("fox, snow, winter", False),  # no prose
    ],
)
def test_prose_that_is_cut_may_lack_its_full_stop(text: str, lacks: bool) -> None:
    assert LengthKeeper(20).lacks_stop(text) is lacks
