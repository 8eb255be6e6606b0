import pytest

from outrider.core.output import AcceptanceReport, AcceptanceTally, FinishReason


def test_counts_as_vllm_counts() -> None:
    """The figures of vLLM's own example: K = 3, rounds that accept 3, 1 and 0 drafts."""
    tally = AcceptanceTally(3)
    for accepted in (3, 1, 0):
        tally.record(3, accepted)
    report = tally.report()
    assert report == AcceptanceReport(drafts=3, drafted=9, accepted=4, per_position=(2, 1, 1))
    assert report.rates == (2 / 3, 1 / 3, 1 / 3)
    assert report.ratios == (1 / 2, 1.0)
    assert report.length == pytest.approx(1 + 4 / 3)


def test_rounds_may_differ_in_width() -> None:
    tally = AcceptanceTally()
    tally.record(1, 1)
    tally.record(4, 2)
    assert tally.report() == AcceptanceReport(2, 5, 3, (2, 1, 0, 0))


def test_nothing_drafted() -> None:
    report = AcceptanceTally(2).report()
    assert report == AcceptanceReport(per_position=(0, 0))
    assert (report.rates, report.ratios, report.length) == ((0.0, 0.0), (0.0,), 1.0)
    assert AcceptanceReport().ratios == ()


def test_a_collapse_after_position_0_shows_in_the_ratios() -> None:
    tally = AcceptanceTally(3)
    for _ in range(10):
        tally.record(3, 1)
    assert tally.report().ratios == (0.0, 0.0)


def test_reports_add_up() -> None:
    first, second = AcceptanceReport(2, 5, 3, (2, 1)), AcceptanceReport(1, 3, 3, (1, 1, 1))
    assert first + second == AcceptanceReport(3, 8, 6, (3, 2, 1)) == second + first
    assert sum([first, second], AcceptanceReport()) == first + second
    with pytest.raises(TypeError):
        first + 1  # type: ignore[operator]


def test_json_shape() -> None:
    shape = AcceptanceReport(2, 4, 3, (2, 1)).to_dict()
    assert shape == {
        "drafts": 2,
        "drafted": 4,
        "accepted": 3,
        "per_position": [2, 1],
        "rates": [1.0, 0.5],
        "ratios": [0.5],
        "acceptance_length": 2.5,
    }
    assert [reason.value for reason in FinishReason] == ["stop", "length", "abort", "error"]


def test_a_tally_crosses_processes_whole() -> None:
    tally = AcceptanceTally(3)
    for num_drafted, num_accepted in ((3, 3), (3, 0), (2, 1)):
        tally.record(num_drafted, num_accepted)
    assert AcceptanceTally.of(*tally.counts).report() == tally.report()
    assert AcceptanceTally.of(*AcceptanceTally(3).counts).report() == AcceptanceReport(0, 0, 0, (0, 0, 0))


def test_what_came_after_an_earlier_report() -> None:
    tally = AcceptanceTally(2)
    tally.record(2, 2)
    earlier = tally.report()
    tally.record(2, 1)
    tally.record(3, 3)
    assert tally.report().since(earlier) == AcceptanceReport(2, 5, 4, (2, 1, 1))
    assert earlier + tally.report().since(earlier) == tally.report()
