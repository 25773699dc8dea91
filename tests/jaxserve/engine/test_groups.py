"""Rows that share a prefix stand side by side, whatever comes, forks, is evicted and resumes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.batch import SlotTable, pack_tokens
from jaxserve.engine.groups import Grouping
from jaxserve.engine.runner import Launched
from jaxserve.engine.scheduler import Row, Step
from tests.jaxserve.engine.fake_runner import VOCAB, Bench, FakeRunner, expected


class GroupingPlan:
    """As much of a plan as groups ask for."""

    def __init__(self, bench: Bench, block: int):
        plan = bench.runner.plan
        self.page_size, self.max_num_seqs = plan.page_size, plan.max_num_seqs
        self.pages_per_seq, self.group_pages = plan.num_pages, block


class GroupingRunner(FakeRunner):
    """Groups the rows of every step, and holds the groups against their promises."""

    def __init__(self, bench: Bench, block: int):
        fake = bench.runner
        super().__init__(fake.plan, fake.limits[0], fake.decode_steps)
        self._shape: Any = GroupingPlan(bench, block)
        self.table = SlotTable(self._shape, VOCAB)
        self.grouping = Grouping(self._shape, self.table.tables)
        self.saved = 0
        bench.runner = bench.engine.runner = self

    def launch(self, steps: list[Step]) -> Launched:
        (step,) = steps
        self._scheduled = list(step.rows)
        self.arrange(step)
        self._check(self._scheduled, step)
        self._check_arrays(step)
        self.saved += step.shared_pages
        return super().launch(steps)

    def arrange(self, step: Step) -> None:
        self.grouping.arrange(step, bool(self.table.enter(step.rows)))

    def _check_arrays(self, step: Step) -> None:
        R = len(step.rows)
        x = pack_tokens(step, step.num_tokens, R, self.table).unpack().ragged
        assert step.groups is not None
        if R == 1:
            assert x.groups is None and not step.groups, "two rows make a group"
            return
        groups = list(zip(*(field.tolist() for field in x.groups), strict=True))
        unused = R // 2 - len(step.groups)
        assert groups == [*step.groups, *[(0, 0, 0)] * unused]
        for first, end, pages in groups:
            assert (x.tables[first:end, :pages] == x.tables[first, :pages]).all()
            new = x.row_starts[first + 1 : end + 1] - x.row_starts[first:end]
            assert (pages * self.plan.page_size <= x.kv_lens[first:end] - new).all()

    def _draw(self, step: Step, repeat: int, written: set[tuple[int, int]]) -> list[int]:
        """Layers write before they read; here a row does, so those that write go first."""
        drawn = super()._draw(replace(step, rows=self._scheduled), repeat, written)
        of = {id(row): token for row, token in zip(self._scheduled, drawn, strict=True)}
        return [of[id(row)] for row in step.rows]

    def _check(self, before: list[Row], step: Step) -> None:
        assert step.groups is not None and sorted(map(id, before)) == sorted(map(id, step.rows))
        size, block, at = self.plan.page_size, self._shape.group_pages, 0
        for group in step.groups:
            assert group.first == at and group.end >= at + 2, "the groups come first, in order"
            assert group.pages > 0 and group.pages % block == 0
            members, at = step.rows[group.first : group.end], group.end
            assert len({tuple(row.seq.pages[: group.pages]) for row in members}) == 1
            assert all(group.pages * size <= row.start for row in members), "a member writes there"
        others = [row for row in before if row in step.rows[at:]]
        assert others == step.rows[at:], "the others stay as they were"
        whole = [row.seq.pages[: row.start // (size * block) * block] for row in before]
        assert step.shared_pages == step.repeats * block * most_saved(whole, block, 0)


def most_saved(pages: Sequence[Sequence[int]], block: int, depth: int) -> int:
    """Blocks that the best groups of sequences with `depth` blocks in common save, found anew."""
    following = defaultdict[tuple[int, ...], list[Sequence[int]]](list)
    for each in pages:
        if len(each) > depth * block:
            following[tuple(each[depth * block : (depth + 1) * block])].append(each)
    apart = sum(most_saved(each, block, depth + 1) for each in following.values())
    return max(apart, depth * (len(pages) - 1))


def prompt(length: int, kind: int) -> list[int]:
    """Prompts of kinds 0 to 3 begin alike, those of 0 and 1, and of 2 and 3, for longer."""
    return [(7 * i + (kind // 2 if i >= 9 else 0) + (kind if i >= 25 else 0)) % 40
            for i in range(length)]  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    schedule=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 50), st.integers(0, 3), st.integers(1, 12),
                  st.integers(1, 4)),
        min_size=1, max_size=10,
    ),
    page_size=st.sampled_from([1, 2, 4]),
    block=st.integers(1, 3),
    slack=st.integers(0, 120),
    budget=st.integers(8, 60),
    decode_steps=st.sampled_from([1, 1, 3]),
)  # fmt: skip
def test_groups_are_what_rows_share_and_change_no_text(
    schedule: list[tuple[int, int, int, int, int]],
    page_size: int,
    block: int,
    slack: int,
    budget: int,
    decode_steps: int,
):
    tokens = max(length + count for _, length, _, count, _ in schedule) + slack
    bench = Bench(
        num_pages=-(-tokens // page_size), page_size=page_size, max_num_seqs=8, max_tokens=budget,
        decode_steps=decode_steps,
    )  # fmt: skip
    runner, generations = GroupingRunner(bench, block), []
    for wait, length, kind, count, n in schedule:
        for _ in range(wait):
            bench.engine.step()
        generations.append(bench.add(prompt(length, kind), count, n=n))
    bench.run()
    for generation, (_, length, kind, count, _) in zip(generations, schedule, strict=True):
        for output in bench.outputs(generation):
            assert output.token_ids == expected(prompt(length, kind), count, output.index)
    assert bench.engine.stats().shared_keys_total == runner.saved * page_size


def test_siblings_and_a_prefix_hit_are_one_group():
    bench = Bench(num_pages=64, page_size=4, max_tokens=64)
    runner = GroupingRunner(bench, block=2)
    bench.add(prompt(30, 0), 12, n=3)
    bench.add([99, *prompt(30, 1)], 12)
    for _ in range(3):
        bench.engine.step()
    bench.add(prompt(33, 0), 12)  # 28 tokens of it are cached: 7 pages, of which 6 are whole blocks
    for _ in range(4):
        bench.engine.step()
    (group,) = runner.steps[-1].groups or ()
    assert group == (0, 4, 6)
    members = runner.steps[-1].rows[:4]
    assert [len(row.seq.tokens) - row.seq.num_output for row in members] == [30, 30, 30, 33]
    bench.run()


def test_pools_that_are_too_small_preempt_and_group_again():
    bench = Bench(num_pages=24, page_size=2, max_tokens=64)
    runner = GroupingRunner(bench, block=1)
    generations = [bench.add(prompt(26, kind), 14) for kind in (0, 0, 1, 2, 3, 0)]
    bench.run()
    assert bench.engine.stats().num_preemptions > 0
    assert runner.saved > 0
    for generation, kind in zip(generations, (0, 0, 1, 2, 3, 0), strict=True):
        assert bench.outputs(generation)[0].token_ids == expected(prompt(26, kind), 14)


def test_a_sequence_that_comes_back_to_other_pages_leaves_its_group():
    bench = Bench(num_pages=64, page_size=4, max_tokens=64)
    runner = GroupingRunner(bench, block=2)
    bench.add(prompt(30, 0), 12, n=2)
    for _ in range(3):
        bench.engine.step()
    last = runner.steps[-1]
    assert last.groups == [(0, 2, 6)]
    back = last.rows[1].seq
    back.pages, back.stay = bench.pages.allocate(len(back.pages)), back.stay + 1
    step = Step([replace(row, start=row.start + 1) for row in last.rows], num_tokens=2)
    runner.arrange(step)
    assert step.groups == []
