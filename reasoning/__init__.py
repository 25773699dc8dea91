"""Search over continuations: controllers that decide, and runners that carry them out on a pool of
paths.

A controller of trees (`tree.SearchPolicy`) says which steps it wants and sees them in the order in
which it asked; `search.run_search` may run ahead of it (`speculation`). A controller of pools
(`pool.PoolPolicy`) looks at all its paths after every round and forks, prunes, probes or refines
some. Neither calls an engine nor sees an array: nothing here imports more of jaxserve than
`jaxserve.protocol`, so that the same controller runs on an engine (`LLM.search`), on a simulated
one (`simulated`) or in a test. The names are those of the specification's section 3.
"""

from reasoning.controllers import CONTROLLERS
from reasoning.controllers.hyper import HyPER
from reasoning.controllers.mcts import Mcts
from reasoning.controllers.rebase import Rebase
from reasoning.controllers.self_consistency import SelfConsistency
from reasoning.pool import PoolPolicy, run_pool
from reasoning.questions import question_of
from reasoning.result import Budget, Result
from reasoning.search import run_search
from reasoning.speculation import Coordinator, Speculator
from reasoning.tree import SearchPolicy

__all__ = [
    "CONTROLLERS",
    "Budget",
    "Coordinator",
    "HyPER",
    "Mcts",
    "PoolPolicy",
    "Rebase",
    "Result",
    "SearchPolicy",
    "SelfConsistency",
    "Speculator",
    "question_of",
    "run_pool",
    "run_search",
]
