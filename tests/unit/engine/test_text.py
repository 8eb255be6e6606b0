"""Text as it comes: the same as all at once, cut at the same stop strings, whatever was drafted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Case, Knowing, Right, Sometimes, plugin, prompt, run
from outrider import LLM, Piece, RequestOutput, SamplingParams
from outrider.engine.stream import Stream

DRAFTINGS = {
    "none": None,
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1},
    "right": plugin(Right, 5),
    "sometimes": plugin(Sometimes, 4),
}
CLEAN = [65, 66, 67, 68]
"""Tokens of one printable character each: a prompt that ends with them ends with a whole character."""


@pytest.fixture(scope="module")
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3")


def text_case(salt: int, **sampling: Any) -> Case:
    given = {"temperature": 0.8, "max_tokens": 40, "seed": salt, "ignore_eos": True, **sampling}
    return Case([*prompt(9, salt), *CLEAN], SamplingParams(**given))


def serve(path: Path, drafting: str = "none") -> LLM:
    return LLM(str(path), max_model_len=96, max_num_seqs=8, speculative_config=DRAFTINGS[drafting])


def start(llm: LLM, case: Case) -> Stream:
    return llm.stream({"prompt_token_ids": list(case.prompt)}, case.sampling)


def pieces(llm: LLM, case: Case) -> tuple[list[Piece], RequestOutput]:
    stream = start(llm, case)
    return list(stream), stream.output


@pytest.fixture(scope="module")
def plain(path: Path) -> list[tuple[list[int], str]]:
    """Tokens and text of some cases with no stop string at all."""
    with serve(path) as llm:
        return [run(llm, [text_case(salt)])[0][0][:2] for salt in range(8)]


@pytest.fixture(autouse=True)
def known(plain: list[tuple[list[int], str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Knowing, "known", [[*text_case(salt).prompt, *tokens] for salt, (tokens, _) in enumerate(plain)]
    )


def test_text_is_what_decoding_all_tokens_at_once_gives(path: Path, plain: list[tuple[list[int], str]]) -> None:
    with serve(path) as llm:
        assert [text for _, text in plain] == [llm.tokenizer.decode(tokens) for tokens, _ in plain]
    assert any("�" in text for _, text in plain), "these random bytes were to be no clean text"


@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text_at_the_same_place_whatever_is_drafted(
    path: Path, plain: list[tuple[list[int], str]], drafting: str, include: bool
) -> None:
    cases, expected = [], []
    for salt, (_, text) in enumerate(plain):
        for at, length in ((0, 1), (7, 3), (20, 2)):
            stop = text[at : at + length]
            end = text.index(stop)
            cases.append(text_case(salt, stop=[stop, "never there"], include_stop_str_in_output=include))
            expected.append((text[: end + (length if include else 0)], "stop", stop))
    with serve(path, drafting) as llm:
        found = [ones[0] for ones in run(llm, cases)]
        assert [one[1:] for one in found] == expected
        for (tokens, *_), case in zip(found, cases, strict=True):
            salt = case.sampling.seed
            assert tokens == plain[salt][0][: len(tokens)], "tokens up to the one that completed the stop string"
            assert len(tokens) < 40
        llm.engine._scheduler.check_idle()


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_a_stream_adds_up_to_what_generate_returns(path: Path, plain: Any, drafting: str) -> None:
    cases = [text_case(salt) for salt in range(4)]
    cases += [text_case(salt, stop=[plain[salt][1][12:15]]) for salt in range(8)]
    cases += [
        text_case(5, stop_token_ids=plain[5][0][6:7]),
        text_case(6, n=3, stop=["a", "b"]),
        text_case(7, max_tokens=1),
    ]
    with serve(path) as llm:
        expected = run(llm, cases)
    with serve(path, drafting) as llm:
        for case, completions in zip(cases, expected, strict=True):
            streamed, output = pieces(llm, case)
            for index, (tokens, text, finish, stop) in enumerate(completions):
                own = [piece for piece in streamed if piece.index == index]
                one = output.outputs[index]
                assert [piece.token_id for piece in own] == tokens == one.token_ids
                assert "".join(piece.text for piece in own) == text == one.text
                assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [finish]
                assert (one.finish_reason, one.stop_reason) == (finish, stop)


def test_pieces_tell_accepted_drafts_by_their_position(path: Path, plain: Any) -> None:
    case = text_case(3, max_tokens=13)
    with serve(path, "right") as llm:
        streamed, output = pieces(llm, case)
        assert [piece.draft_position for piece in streamed] == [0, *([1, 2, 3, 4, 5, 0] * 2)]
        assert output.acceptance.per_position == (2, 2, 2, 2, 2)
    with serve(path) as llm:
        assert {piece.draft_position for piece in pieces(llm, case)[0]} == {0}


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_a_stop_string_before_a_stop_token_of_the_same_step_is_the_reason(
    path: Path, plain: list[tuple[list[int], str]], drafting: str
) -> None:
    cases, expected = [], []
    with serve(path) as llm:
        for salt, (tokens, text) in enumerate(plain):
            ended = run(llm, [text_case(salt, stop=text[9:11])])[0]
            after = tokens[len(ended[0][0])]
            if after not in ended[0][0]:
                cases.append(text_case(salt, stop=text[9:11], stop_token_ids=[after]))
                expected.append(ended)
    assert len(cases) > 3
    with serve(path, drafting) as llm:
        assert run(llm, cases) == expected


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_a_stop_string_before_min_tokens_ends_nothing_and_stays_in_the_text(
    path: Path, plain: Any, drafting: str
) -> None:
    tokens, text = plain[2]
    case = text_case(2, stop=[text[1]], min_tokens=39)
    with serve(path, drafting) as llm:
        assert run(llm, [case])[0] == [(tokens, text, "length", None)]


@pytest.mark.parametrize("drafting", DRAFTINGS)
def test_streams_side_by_side_and_beside_generate_lose_nothing(path: Path, plain: Any, drafting: str) -> None:
    with serve(path, drafting) as llm:
        steps, step = 0, llm.engine.step

        def counted() -> Any:
            nonlocal steps
            steps += 1
            assert steps < 500, "a stream waits for tokens that somebody else took"
            return step()

        llm.engine.step = counted  # type: ignore[method-assign]
        first, second = (start(llm, text_case(salt)) for salt in (0, 1))
        one = [next(first).token_id]
        two = [next(second).token_id]
        assert run(llm, [text_case(2)])[0][0][0] == plain[2][0]
        one += [piece.token_id for piece in first]
        two += [piece.token_id for piece in second]
        assert (one, two) == (plain[0][0], plain[1][0])


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_dropped_stream_leaves_the_engine_idle(path: Path, plain: Any, taken: int) -> None:
    with serve(path, "right") as llm:
        stream = start(llm, text_case(1))
        for _ in range(taken):
            next(stream)
        del stream
        assert not llm.engine.has_work
        llm.engine._scheduler.check_idle()
        assert run(llm, [text_case(2)])[0][0][0] == plain[2][0]


def test_end_of_text_is_a_token_but_no_text(path: Path, plain: Any) -> None:
    tokens, _ = plain[4]
    stop = tokens[10]
    first = tokens.index(stop)
    with serve(path, "right") as llm:
        object.__setattr__(llm.engine.resolved, "eos_token_ids", (stop,))
        case = text_case(4, ignore_eos=False)
        ended = run(llm, [case])[0][0]
        assert ended == (tokens[: first + 1], llm.tokenizer.decode(tokens[:first]), "stop", None)
        case = Case(case.prompt, SamplingParams(temperature=0.8, max_tokens=40, seed=4, ignore_eos=True))
        assert run(llm, [case])[0][0][0] == tokens


@pytest.mark.parametrize("drafting", DRAFTINGS)
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_s_text_is_kept_where_stop_strings_are(
    path: Path, plain: Any, drafting: str, include: bool
) -> None:
    cases, expected = [], []
    for salt, (tokens, _) in enumerate(plain):
        first = tokens.index(tokens[12])
        cases.append(text_case(salt, stop_token_ids=[tokens[12]], include_stop_str_in_output=include))
        expected.append((tokens[: first + 1], first + include, tokens[12]))
    with serve(path, drafting) as llm:
        for (one,), (tokens, length, stop) in zip(run(llm, cases), expected, strict=True):
            assert one == (tokens, llm.tokenizer.decode(tokens[:length]), "stop", stop)
        for case, (one,) in zip(cases, run(llm, cases), strict=True):
            assert "".join(piece.text for piece in pieces(llm, case)[0]) == one[1]
