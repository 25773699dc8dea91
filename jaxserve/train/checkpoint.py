"""What a run needs to go on after a crash, in Orbax checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxserve.errors import CheckpointError


class Checkpoints:
    """Numbered checkpoints of one run. One appears whole or not at all.

    Args:
        keep: how many stay.
        about: what the run is; a checkpoint of another run is refused.
    """

    def __init__(self, folder: Path, keep: int, about: dict[str, Any]):
        self.folder = folder.absolute()
        self._about = json.loads(json.dumps(about))  # as it comes back: a tuple is a list there
        try:
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            )
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {self.folder}: {error}") from error

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, cursor: int) -> None:
        """Copies the state to the host, and writes it while training goes on.

        The copy is made here: the next update is given the state's buffers to reuse.

        Raises:
            CheckpointError: this one or the one before could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(np.array, state)),
            about=ocp.args.JsonSave({**self._about, "cursor": cursor}),
        )
        self._attempt(lambda: self._manager.save(step, args=items), step)

    def wait(self) -> None:
        """Returns when everything has been written.

        Raises:
            CheckpointError: it could not be.
        """
        self._attempt(self._manager.wait_until_finished, None)

    def _attempt(self, action: Any, step: int | None) -> None:
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise what they like
            name = "the last checkpoint" if step is None else f"the checkpoint of step {step}"
            last = self.latest
            left = "there is none yet" if last is None else f"step {last} can be loaded"
            raise CheckpointError(
                f"{name} could not be written to {self.folder}: {error}. Of the earlier ones "
                f"{left}; make room and start again"
            ) from error

    def restore(self, abstract: Any) -> tuple[Any, int] | None:
        """The newest state, and where the data stood; None if there is none.

        Args:
            abstract: a tree of `jax.ShapeDtypeStruct` like the state that is expected.

        Raises:
            CheckpointError: it belongs to another model or another run, or is damaged.
        """
        if (step := self.latest) is None:
            return None
        where = f"the checkpoint of step {step} in {self.folder}"
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )
        except Exception as error:
            raise CheckpointError(f"{where} is damaged: {error}") from error
        for key, value in self._about.items():
            if (seen := found["about"].get(key)) != value:
                raise CheckpointError(
                    f"{where} has {key}={seen!r}, but this run {value!r}; use another [save] folder"
                )
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=items)["state"], found["about"]["cursor"]
        except Exception as error:
            raise CheckpointError(f"{where} does not fit: {error}") from error

    def close(self) -> None:
        self._manager.close()
