"""Where experts live: several copies of those that are much asked for, none of them crowded.

A *slot* is a place for one expert's weights. Slot s is on device s // slots_per_device, and which
expert it holds is data: tables that travel to devices beside the weights. Changing them moves
experts and compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sharding.tree import pytree


class PlacementError(ValueError):
    """Experts that do not fit the slots there are."""


@pytree
class Placement:
    """Which slots hold which expert; arrays of the host or of devices, for one layer or for L.

    Attributes:
        expert_of: int32 [..., S], the expert of each slot.
        slots_of: int32 [..., E, R], slots of each expert; they repeat from `num_replicas` on.
        num_replicas: int32 [..., E].
    """

    expert_of: Any
    slots_of: Any
    num_replicas: Any


@dataclass(frozen=True)
class ExpertLayout:
    """Slots of a group of devices, and the experts that are to live in them.

    Attributes:
        num_experts: E, routed ones.
        slots_per_device: equal everywhere, so that shapes are.
        shared_block: 0, or every block of so many devices has a replica of a shared expert, in the
            last slot of its last device. It is expert E then. EP320 of CloudMatrix384 (§3) is
            ExpertLayout(256, 320, 1, shared_block=10).
        num_groups, num_nodes: experts of one group (see `Router`) are kept within one of so many
            equal runs of devices, where groups divide evenly among them.

    Raises:
        PlacementError: no placement fits.
    """

    num_experts: int
    num_devices: int
    slots_per_device: int
    shared_block: int = 0
    num_groups: int = 1
    num_nodes: int = 1

    def __post_init__(self):
        counts = (self.num_experts, self.num_devices, self.slots_per_device)
        if min(*counts, self.num_groups, self.num_nodes) < 1 or self.shared_block < 0:
            raise PlacementError(f"{self}: counts must be positive (shared_block may be 0)")
        self._must_divide("shared_block", self.shared_block or 1, "num_devices", self.num_devices)
        self._must_divide("num_nodes", self.num_nodes, "num_devices", self.num_devices)
        self._must_divide("num_groups", self.num_groups, "num_experts", self.num_experts)
        if self.num_experts > self.num_routed_slots:
            shared = self.num_slots - self.num_routed_slots
            enough = -(-(self.num_experts + shared) // self.num_devices)
            raise PlacementError(
                f"{self.num_experts} experts do not fit {self.num_devices} devices x "
                f"{self.slots_per_device} slots, {shared} of them for shared experts: that leaves "
                f"{self.num_routed_slots}. The nearest that fits is slots_per_device={enough}"
            )

    def _must_divide(self, name: str, value: int, whole_name: str, whole: int) -> None:
        if whole % value:
            divisors = [d for d in range(1, whole + 1) if whole % d == 0]
            nearest = min(divisors, key=lambda d: (abs(d - value), d))
            raise PlacementError(
                f"{name}={value} does not divide {whole_name}={whole}: the nearest that does is "
                f"{name}={nearest}"
            )

    @property
    def num_slots(self) -> int:
        return self.num_devices * self.slots_per_device

    @property
    def num_routed_slots(self) -> int:
        return int((~self._is_shared).sum())

    @property
    def num_shared(self) -> int:
        """Experts that every token visits: 0 or 1."""
        return int(self.shared_block > 0)

    @property
    def num_redundant(self) -> int:
        """Slots beyond one for each routed expert."""
        return self.num_routed_slots - self.num_experts

    @cached_property
    def _is_shared(self) -> np.ndarray:  # [S] bool
        device, slot = np.divmod(np.arange(self.num_slots), self.slots_per_device)
        last = slot == self.slots_per_device - 1
        block = self.shared_block
        return last & (device % block == block - 1) if block else np.zeros_like(last)

    @cached_property
    def _devices_of_nodes(self) -> list[range]:
        size = self.num_devices // self.num_nodes
        return [range(n * size, (n + 1) * size) for n in range(self.num_nodes)]

    def room(self, devices: range) -> np.ndarray:
        """Slots for routed experts on each of these devices."""
        free = (~self._is_shared).reshape(self.num_devices, -1).sum(1)
        return free[devices.start : devices.stop]

    def placement(self, expert_of: np.ndarray) -> Placement:
        """The tables for experts by slot, [S] or [L, S].

        Raises:
            PlacementError: an expert has no slot, or a slot no expert.
        """
        expert_of = np.asarray(expert_of, np.int32)
        for row in np.atleast_2d(expert_of):
            self._check(row)
        experts = np.arange(self.num_experts + self.num_shared, dtype=np.int32)
        num_replicas = (expert_of[..., None, :] == experts[:, None]).sum(-1, dtype=np.int32)
        first = np.cumsum(num_replicas, -1) - num_replicas
        max_replicas = max(self.num_redundant + 1, self.num_slots - self.num_routed_slots)
        turn = np.arange(max_replicas) % num_replicas[..., None]
        by_expert = np.argsort(expert_of, -1, kind="stable").astype(np.int32)
        at = (first[..., None] + turn).reshape(*expert_of.shape[:-1], -1)
        slots_of = np.take_along_axis(by_expert, at, -1).reshape(turn.shape)
        return Placement(expert_of, slots_of, num_replicas)

    def _check(self, expert_of: np.ndarray) -> None:
        experts = set(range(self.num_experts + self.num_shared))
        if expert_of.shape != (self.num_slots,) or experts != set(expert_of.tolist()):
            absent = sorted(experts - set(expert_of.tolist()))
            raise PlacementError(
                f"a placement of {len(experts)} experts in {self.num_slots} slots was given "
                f"{len(expert_of)} slots, without experts {absent[:8]}: every one needs a slot"
            )

    def initial(self, num_layers: int | None = None) -> Placement:
        """The placement for experts that are asked for equally often."""
        expert_of = self._place(np.ones(self.num_experts))
        return self.placement(
            expert_of if num_layers is None else np.stack([expert_of] * num_layers)
        )

    def rebalance(self, load: np.ndarray, old: Placement | None = None) -> Placement:
        """A placement for measured loads; layers that gain nothing stay as they are.

        Extra slots go one by one to whichever expert has the largest load per copy; copies are
        then packed on devices, the heaviest first, each on the device with the least to do
        (EPLB; DeepSeek-V3 report, §3.4).

        Args:
            load: [E] or [L, E], tokens that chose each routed expert.
            old: what is there now; None for `initial`.
        """
        load = np.asarray(load, np.float64)
        if load.shape[-1] != self.num_experts or not np.all(np.isfinite(load) & (load >= 0)):
            raise PlacementError(
                f"load of shape {load.shape}: expected {self.num_experts} finite counts a layer"
            )
        before = (old or self.initial(None if load.ndim == 1 else len(load))).expert_of
        rows = zip(np.atleast_2d(load), np.atleast_2d(np.asarray(before)), strict=True)
        after = np.stack([self._better(one, self._place(one), was) for one, was in rows])
        return self.placement(after[0] if load.ndim == 1 else after)

    def device_load(self, load: np.ndarray, expert_of: np.ndarray) -> np.ndarray:
        """Routed tokens by device [num_devices], where copies share an expert's load [E] evenly."""
        copies = np.bincount(expert_of, minlength=self.num_experts + self.num_shared)
        share = np.append(np.asarray(load, np.float64), np.zeros(self.num_shared)) / copies
        return share[expert_of].reshape(self.num_devices, -1).sum(1)

    def _better(self, load: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
        gained = self.device_load(load, new).max() < self.device_load(load, old).max()
        return new if gained else old

    def _place(self, load: np.ndarray) -> np.ndarray:  # [E] -> [S]
        expert_of = np.full(self.num_slots, self.num_experts, np.int32)
        slots = np.flatnonzero(~self._is_shared)
        routed = []
        for devices, experts in self._parts(load):
            copies = _copies(load[experts], int(self.room(devices).sum()), len(devices))
            items = np.repeat(experts, copies)
            bins = _pack(np.repeat(load[experts] / copies, copies), self.room(devices), items)
            routed += [e for held in bins for e in sorted(items[held])]
        expert_of[slots] = routed
        return expert_of

    def _parts(self, load: np.ndarray) -> list[tuple[range, np.ndarray]]:
        """Runs of devices, and the experts [n] that stay within them."""
        whole = [(range(self.num_devices), np.arange(self.num_experts))]
        per_node = self.num_experts // self.num_nodes
        small = any(self.room(devices).sum() < per_node for devices in self._devices_of_nodes)
        if self.num_nodes == 1 or self.num_groups % self.num_nodes or small:
            return whole
        groups = np.arange(self.num_experts).reshape(self.num_groups, -1)
        each = np.full(self.num_nodes, self.num_groups // self.num_nodes)
        bins = _pack(load[groups].sum(1), each, np.arange(self.num_groups))
        experts = [np.sort(groups[held].reshape(-1)) for held in bins]
        return list(zip(self._devices_of_nodes, experts, strict=True))


def _copies(load: np.ndarray, num_slots: int, num_devices: int) -> np.ndarray:
    """How many copies [E] of each expert: the next always to the largest load per copy.

    A second copy on one device would take nothing from it, so it is a last resort.
    """
    copies = np.ones(len(load), int)
    for _ in range(num_slots - len(load)):
        copies[np.lexsort((copies, -load / copies, copies >= num_devices))[0]] += 1
    return copies


def _pack(load: np.ndarray, room: np.ndarray, kind: np.ndarray) -> list[list[int]]:
    """Items for each bin, all of its room filled; equal kinds apart wherever that can be."""
    bins: list[list[int]] = [[] for _ in room]
    left, total = room.copy(), np.zeros(len(room))
    holds = np.zeros((kind.max() + 1, len(room)), bool)
    for item in np.argsort(-load, kind="stable"):
        chosen = np.lexsort((total, holds[kind[item]], left <= 0))[0]
        bins[chosen].append(int(item))
        holds[kind[item], chosen] = True
        left[chosen] -= 1
        total[chosen] += load[item]
    return bins
