"""Experts in slots: everybody has one, copies go where the load is, and misfits are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.placement import ExpertLayout, PlacementError

EP320 = ExpertLayout(256, 320, 1, shared_block=10)


@st.composite
def layouts(draw):
    nodes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    devices = nodes * draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 6))
    block = draw(st.sampled_from([0, devices]))
    least = -(-(experts + (block > 0)) // devices)
    slots = draw(st.integers(least, least + 2))
    return ExpertLayout(experts, devices, slots, block, groups, nodes)


@st.composite
def loaded(draw):
    layout = draw(layouts())
    number = st.one_of(st.just(0), st.integers(0, 10), st.integers(0, 10**6))
    load = draw(st.lists(number, min_size=layout.num_experts, max_size=layout.num_experts))
    return layout, np.asarray(load)


@given(loaded())
@settings(max_examples=60, deadline=None)
def test_every_expert_has_a_slot_and_every_slot_an_expert(case):
    layout, load = case
    for placement in (layout.initial(), layout.rebalance(load)):
        E = layout.num_experts + layout.num_shared
        assert placement.num_replicas.sum() == layout.num_slots
        assert placement.num_replicas.min() >= 1
        counts = np.bincount(placement.expert_of, minlength=E)
        np.testing.assert_array_equal(counts, placement.num_replicas)
        for e, (slots, n) in enumerate(
            zip(placement.slots_of, placement.num_replicas, strict=True)
        ):
            assert sorted(slots[:n]) == list(np.flatnonzero(placement.expert_of == e))
            np.testing.assert_array_equal(slots, np.resize(slots[:n], slots.shape))


@given(loaded())
@settings(max_examples=60, deadline=None)
def test_rebalancing_never_makes_the_fullest_device_fuller(case):
    layout, load = case
    old, new = layout.initial(), layout.rebalance(load)
    before, after = (layout.device_load(load, p.expert_of).max() for p in (old, new))
    assert after <= before
    again = layout.rebalance(load)
    np.testing.assert_array_equal(new.expert_of, again.expert_of)  # no chance in it
    settled = layout.rebalance(load, new)
    np.testing.assert_array_equal(new.expert_of, settled.expert_of)  # nothing moves for nothing
    assert [a.shape for a in (new.slots_of, new.num_replicas)] == [
        a.shape for a in (old.slots_of, old.num_replicas)
    ]


def test_a_popular_expert_is_copied_until_it_is_no_worse_than_the_rest():
    layout = ExpertLayout(8, 12, 1)
    placement = layout.rebalance(np.array([50, 10, 10, 10, 10, 10, 10, 10]))
    np.testing.assert_array_equal(placement.num_replicas, [5, 1, 1, 1, 1, 1, 1, 1])
    assert layout.device_load(np.full(8, 1.0), placement.expert_of).sum() == 8


def test_copies_of_an_expert_are_on_different_devices():
    layout = ExpertLayout(4, 4, 2)
    placement = layout.rebalance(np.array([90, 1, 1, 1]))
    devices = placement.slots_of[0][: placement.num_replicas[0]] // 2
    assert len(set(devices)) == placement.num_replicas[0] == 4


def test_groups_stay_within_a_node():
    layout = ExpertLayout(16, 8, 3, num_groups=4, num_nodes=2)
    placement = layout.rebalance(np.arange(16) ** 2)
    node = placement.expert_of.reshape(2, -1)
    of_group = [{n for n in range(2) if group in node[n] // 4} for group in range(4)]
    assert all(len(nodes) == 1 for nodes in of_group)


def test_ep320_is_the_papers():
    """32 shared replicas, 256 routed and 32 redundant experts, one for each die (§3)."""
    placement = EP320.initial()
    assert EP320.num_redundant == 32
    shared = placement.slots_of[256][: placement.num_replicas[256]]
    np.testing.assert_array_equal(shared, np.arange(9, 320, 10))
    assert placement.num_replicas[:256].sum() == 288


def test_layers_are_balanced_each_for_itself():
    load = np.random.default_rng(0).zipf(1.5, (3, 256)).clip(0, 1000)
    whole = EP320.rebalance(load)
    for layer in range(3):
        np.testing.assert_array_equal(
            whole.expert_of[layer], EP320.rebalance(load[layer]).expert_of
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((256, 30, 8), "256 experts do not fit 30 devices x 8 slots.*240.*slots_per_device=9"),
        ((256, 320, 1, 1), "320 of them for shared.*leaves 0.*slots_per_device=2"),
        ((256, 320, 1, 9), "shared_block=9 does not divide num_devices=320.*shared_block=8"),
        ((256, 32, 9, 0, 7), "num_groups=7 does not divide num_experts=256.*num_groups=8"),
        ((256, 32, 9, 0, 8, 5), "num_nodes=5 does not divide num_devices=32.*num_nodes=4"),
        ((256, 0, 9), "positive"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(arguments, said):
    with pytest.raises(PlacementError, match=said):
        ExpertLayout(*arguments)


def test_tables_and_loads_that_are_wrong_are_refused():
    layout = ExpertLayout(4, 2, 2)
    with pytest.raises(PlacementError, match=r"without experts \[3\]"):
        layout.placement(np.array([0, 1, 2, 2]))
    with pytest.raises(PlacementError, match="expected 4 finite counts"):
        layout.rebalance(np.array([1, 2, 3]))
    with pytest.raises(PlacementError, match="expected 4 finite counts"):
        layout.rebalance(np.array([1, 2, 3, -1]))
