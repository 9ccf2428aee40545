"""The state of a trajectory: in device memory of its own between two evaluations, or in the buffers of a call that was computed as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np

from scm_runtime.engines.cuda.blocks import TensorBlock
from scm_runtime.engines.cuda.thread import CudaContext
from scm_runtime.engines.cuda.whole_call import WholeResult
from scm_runtime.engines.engine import Trajectory
from scm_runtime.ort.session import DeviceTensor

_serial_numbers = count(1)


class DeviceState:
    """The seeds, conditioning, state and finite flags of one trajectory in device memory."""

    def __init__(self, context: CudaContext, trajectory: Trajectory, shape: tuple[int, ...]) -> None:
        """Allocate the memory, and upload the seeds and the conditioning. Raises OutOfMemoryError."""
        call = trajectory.call
        n, evaluations = len(trajectory), call.evaluations
        state = (np.float32, (n, *shape))
        conditioning = {f"conditioning {name}": value for name, value in call.conditioning.items()}
        self.block = TensorBlock(
            context,
            {
                "seeds": (np.int64, (n,)),
                **{name: (value.dtype.type, value.shape) for name, value in conditioning.items()},
                "finite": (np.float32, (len(evaluations), n)),
                "x": state,
                **({"base": state} if any(one.weights is not None for one in evaluations) else {}),
            },
        )
        self.block.upload({"seeds": call.seeds, **conditioning})
        self.serial = next(_serial_numbers)
        self.flags_written = 0
        """Number of evaluations whose flags are in ``finite``."""


@dataclass(eq=False)
class FinishedState:
    """The result of a trajectory whose call was computed as a whole. The next call of its shape overwrites what is on the device."""

    block: TensorBlock
    """Holds the memory of the call."""
    state: DeviceTensor
    """The last state, ``[n, *sample]``."""
    decoded: DeviceTensor | None
    """The decoder's output, ``[n, ...]``."""
    result: WholeResult
    """What is on the host."""
