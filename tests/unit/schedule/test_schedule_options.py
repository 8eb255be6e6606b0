import pytest

from outrider.errors import CapacityError, OptionError
from workloads import scheduler_options


def test_defaults_are_valid() -> None:
    assert scheduler_options(max_model_len=1024, num_blocks=64).depth == 1


COUNTS = ["max_num_seqs", "max_prefill_tokens_beside_decodes", "block_size", "num_blocks", "depth", "max_model_len"]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_whole_and_positive(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} must be a whole number of . or more: 0"):
        scheduler_options(**({"max_model_len": 8, "num_blocks": 8} | {name: 0}))


@pytest.mark.parametrize("name", ["num_drafts", "lookahead", "rerun"])
def test_numbers_may_be_zero_but_no_less(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} must be a whole number of 0 or more: -1"):
        scheduler_options(max_model_len=8, num_blocks=8, **{name: -1})


def test_one_sequence_must_fit() -> None:
    scheduler_options(max_model_len=32, num_blocks=2)
    with pytest.raises(CapacityError, match=r"holds 32 tokens .* max_model_len is 33: lower max_model_len to 32"):
        scheduler_options(max_model_len=33, num_blocks=2)


def test_every_request_must_find_a_token_in_a_step() -> None:
    with pytest.raises(OptionError, match="max_num_batched_tokens 7 is less than max_num_seqs 8"):
        scheduler_options(max_model_len=8, num_blocks=8, max_num_seqs=8, max_num_batched_tokens=7)
