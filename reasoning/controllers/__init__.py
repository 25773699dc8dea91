"""Controllers: policies that `reasoning.pool` and `reasoning.search` carry out."""

from __future__ import annotations

from typing import Any

from reasoning.controllers.adaptive_consistency import AdaptiveConsistency
from reasoning.controllers.beam import Beam
from reasoning.controllers.best_first import BestFirst
from reasoning.controllers.best_of_n import BestOfN
from reasoning.controllers.certaindex import Certaindex
from reasoning.controllers.deepconf import DeepConf
from reasoning.controllers.dfs import DepthFirst
from reasoning.controllers.dvts import Dvts
from reasoning.controllers.esc import EarlyStopping
from reasoning.controllers.ets import Ets
from reasoning.controllers.hyper import HyPER
from reasoning.controllers.mcts import Mcts
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.rest_mcts import RestMcts
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.controllers.slim_sc import SlimSC

CONTROLLERS: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (
        SelfConsistency, BestOfN, AdaptiveConsistency, EarlyStopping, Certaindex, DeepConf, SlimSC,
        HyPER, Beam, Dvts, Rebase, Ets, Mcts, RestMcts, DepthFirst, BestFirst,
    )
}  # fmt: skip
"""By the name that a command line or a request uses; their settings are the class's fields."""
