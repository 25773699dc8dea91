"""Which of its four actions HyPER takes: scores by fixed weights, and a phase that shifts them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from reasoning.pool import Path, PoolView
from reasoning.signals import agreement, groups, mean_and_spread, redundancy, spikes

ACTIONS = ("none", "branch", "multi", "single")


@dataclass(frozen=True)
class Scores:
    """Weights of section 2.3. Signals without a natural scale are compared to this search's own.

    Attributes:
        hysteresis: an action goes on until another one's score is higher by this.
        gate: nats above which a token is a spike of entropy.
        recent: tokens that signals look back on.
        most: live paths from which on branching is held back.
    """

    hysteresis: float = 0.1
    gate: float = 2.0
    recent: int = 16
    most: int = 80

    def choose(self, view: PoolView, scores: Mapping[str, float]) -> str:
        """The best action, or the last one again while that is nearly as good."""
        best = max((a for a in ACTIONS if a in scores), key=lambda a: scores[a])
        last = ACTIONS[int(view.memory.get("action", 0))]
        if last in scores and scores[best] < scores[last] + self.hysteresis:
            best = last
        view.memory["action"] = ACTIONS.index(best)
        return best

    def of(
        self,
        view: PoolView,
        live: Sequence[Path],
        floor: float,
        window: int,
        width: int,
        allowed: Container[str] = ACTIONS,
    ) -> dict[str, float]:
        """Of the actions that are allowed."""
        agreed = agreement(Counter(p.answer for p in view.finished if p.answer is not None))
        phase = self.phase(view, agreed)
        sure, spread = mean_and_spread([p.stats.conf_group(self.recent) for p in live])
        alike = redundancy([p.stats for p in live], self.recent)
        spread, sure = self._scaled(view, "spread", spread), self._scaled(view, "sure", sure)
        crowded = 0.4 * (len(live) >= self.most)
        free = max(1 - len(live) / width, 0.0)
        scores = {
            "none": 0.25 + 0.5 * agreed * sure,
            "branch": (1 - phase) * (0.5 * (1 - alike) + 0.3 * spread + 0.2 * free) - crowded,
        }
        if "multi" in allowed:
            low = self._low(live, floor, window)
            scores["multi"] = 4 * phase * (1 - phase) * (0.6 * low + 0.4 * (1 - agreed))
        if "single" in allowed:
            scores["single"] = phase * (0.7 * self._jumps(live) + 0.3 * (1 - agreed))
        return {action: score for action, score in scores.items() if action in allowed}

    def _low(self, live: Sequence[Path], floor: float, window: int) -> float:
        """How often paths have lately been hardly surer than they must be."""
        recent = [groups(p.stats.confidences[-self.recent :], window) for p in live]
        return mean_and_spread([spikes([-g for g in gs], -1.25 * floor) for gs in recent])[0]

    def _jumps(self, live: Sequence[Path]) -> float:
        """How often their entropy has lately been high."""
        recent = [p.stats.entropies[-self.recent :] for p in live]
        return mean_and_spread([spikes(entropies, self.gate) for entropies in recent])[0]

    def phase(self, view: PoolView, agreed: float) -> float:
        """0 where a search begins, towards 1 as it has spent, agreed and finished."""
        spent = view.spent / view.budget.tokens
        finished = len(view.finished) / max(len(view.paths), 1)
        return min(max(0.5 * spent + 0.3 * agreed + 0.2 * finished, 0.0), 1.0)

    def _scaled(self, view: PoolView, name: str, value: float) -> float:
        """In (0, 1), by its z-score among the values that this search has seen so far."""
        m = view.memory
        n = m[f"{name}_n"] = m.get(f"{name}_n", 0.0) + 1
        total = m[f"{name}_sum"] = m.get(f"{name}_sum", 0.0) + value
        squares = m[f"{name}_squares"] = m.get(f"{name}_squares", 0.0) + value * value
        spread = math.sqrt(max(squares / n - (total / n) ** 2, 0.0))
        z = (value - total / n) / spread if spread > 1e-9 else 0.0
        return 1 / (1 + math.exp(-z))
