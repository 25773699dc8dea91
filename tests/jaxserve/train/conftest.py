import pytest

pytest.importorskip("optax", reason="the extra `train` is not installed")
