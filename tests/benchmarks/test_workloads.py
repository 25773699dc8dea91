"""What every contestant is asked is the same, and is what the documentation says."""

import pytest

from benchmarks.workloads import FIRST_ID, MAX_LEN, NAMES, build


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_reproducible_fresh_each_round_and_fit(name):
    a, again, later = build(name, 320), build(name, 320), build(name, 320, round=1)
    assert a == again
    assert a.prompts != later.prompts
    assert a.lengths == later.lengths
    assert [len(p) for p in a.prompts] == [len(p) for p in later.prompts]
    assert all(FIRST_ID <= i < 320 for prompt in a.prompts for i in prompt)
    assert max(len(p) + n for p, n in zip(a.prompts, a.lengths, strict=True)) <= MAX_LEN


def test_only_one_workload_shares_a_prefix():
    shared = {name: len({tuple(p[:16]) for p in build(name, 320).prompts}) for name in NAMES}
    assert shared.pop("prefix_32") == 1
    assert shared == {name: len(build(name, 320).prompts) for name in shared}


def test_scores_count_what_the_workload_is_about():
    assert build("single_decode", 320).score(2.0) == 64.0
    assert build("prefill_8x256", 320).score(2.0) == 1024.0
    ttft = build("ttft_32", 320)
    assert (ttft.score(0.5), ttft.unit) == (0.5, "s")
    mixed = build("mixed_64", 320)
    assert (sum(map(len, mixed.prompts)), sum(mixed.lengths)) == (18034, 9413)
