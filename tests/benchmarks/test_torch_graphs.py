"""When torch's contestants are recorded on a GPU, with a torch that is not there."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.alternatives import Alternative
from benchmarks.programs import TorchProgram


class Tensor:
    def __init__(self):
        self.value = np.ones(2)

    def detach(self):
        return self

    def zero_(self):
        self.value[:] = 0

    def count_nonzero(self):
        return np.count_nonzero(self.value)


@pytest.fixture
def torch(monkeypatch):
    """Counts what it is asked for. A graph fills `filled` when it is replayed."""
    seen = SimpleNamespace(modes=[], replays=0, filled=[])

    class Graph:
        def replay(self):
            seen.replays += 1
            for tensor in seen.filled:
                tensor.value[:] = 1

    @contextmanager
    def graph(_, capture_error_mode):
        seen.modes.append(capture_error_mode)
        yield

    @contextmanager
    def stream(_):
        yield

    cuda = SimpleNamespace(
        CUDAGraph=Graph, Stream=object, graph=graph, stream=stream, synchronize=lambda: None
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return seen


def program(tensor: Tensor) -> TorchProgram:
    way = Alternative("torch_way", lambda inputs: inputs, lambda _: (tensor,))
    return TorchProgram(way, [((), {})], "gpu")


def test_graphs_are_recorded_when_other_threads_are_done(torch):
    tensor = Tensor()
    torch.filled.append(tensor)
    contestant = program(tensor)
    contestant.first()
    assert not torch.modes, "others may still be compiled"
    launch = contestant.launch()
    assert torch.modes == ["thread_local"] and torch.replays == 1
    launch.start()
    assert torch.replays == 2


def test_a_graph_that_computes_nothing_does_not_race(torch):
    launch = program(tensor := Tensor()).launch()
    assert torch.replays == 1
    assert launch.start() == [(tensor,)] and torch.replays == 1
