"""No operator that a ``.pt2`` file may use crashes the process, for any tensors and numbers that its schema allows."""

from __future__ import annotations

import os
import random
import resource
import signal
from typing import Any

import pytest
import torch

from scm_export.checkpoints import program_cost
from scm_export.checkpoints.operator_graph import Call, OperatorGraph, ParsedProgram, Ref, Weight
from scm_export.checkpoints.operator_list import OPERATORS
from scm_export.checkpoints.operators import ATEN, SUBSTITUTES, check_arguments, find_operator

CALLS = int(os.environ.get("SCM_FUZZ_CALLS", "3"))  # calls of each operator
SEED = os.environ.get("SCM_FUZZ_SEED", "0")
DTYPES = (*[torch.float32] * 6, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
TEXTS = (
    "tanh",
    "none",
    "floor",
    "trunc",
    "reflect",
    "constant",
    "circular",
    "same",
    "valid",
    "ij",
    "xy",
    "ortho",
    "",
    "ij,jk->ik",
    "...i,i",
    "i,j->",
    "ii",
    "->",
)
HUGE = (2**31 - 1, 2**31, 2**33, 2**62, 2**63 - 1, -(2**31), -(2**63), 100_000)
MEMORY = 6 << 30  # bytes of address space: larger allocations fail and do not burden the machine


class Draw:
    """Draws the arguments of one call: any values of the types in an operator's schema, with sizes that often fit each other."""

    def __init__(self, seed: str) -> None:
        self.chance = chance = random.Random(seed)
        self.shape = [chance.choice([0, 1, 2, 3, 3, 4, 4, 6, 8]) for _ in range(chance.choice([1, 2, 2, 3, 3, 4, 4, 4, 5]))]
        self.dtype = chance.choice(DTYPES)

    def value(self, type: str, length: int | None = None) -> Any:
        """Draw a value of a type in torch's schemas."""
        chance = self.chance
        if type.startswith("Optional["):
            return None if chance.random() < 0.5 else self.value(type[9:-1], length)
        if type.startswith("List["):
            count = length if length and chance.random() < 0.7 else chance.choice([0, 1, 1, 2, 2, 2, 3, 4, 5, len(self.shape), max(len(self.shape) - 2, 0)])
            return [self.value(type[5:-1]) for _ in range(count)]
        match type:
            case "Tensor":
                return self.tensor()
            case "int":
                return chance.choice(HUGE) if chance.random() < 0.06 else chance.choice([0, 1, 1, 1, 2, 2, 3, 4, -1, -2, 5, 7, 64, 1000, *self.shape])
            case "float":
                return chance.choice([0.0, 0.5, 1.0, -1.0, 1e-5, float("nan"), float("inf"), -float("inf"), 1e30])
            case "number":
                return chance.choice([0, 1, 2, -1, 7, 0.5, -1.5, float("nan"), float("inf"), 2**31, *HUGE])
            case "bool":
                return chance.random() < 0.4
            case "str":
                return chance.choice(TEXTS)
            case "ScalarType":
                return chance.choice(DTYPES)
        return {"Device": torch.device("cpu"), "Layout": torch.strided, "MemoryFormat": torch.contiguous_format}.get(type)

    def tensor(self) -> torch.Tensor:
        chance, shape = self.chance, self.shape
        own = [chance.choice([0, 1, 1, 2, 3, 3, 4, 5, 8]) for _ in range(chance.choice([0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5]))]
        channels = shape[min(1, len(shape) - 1)]
        kernel = [chance.choice([1, 1, 2, 3]) for _ in shape[2:]]
        matrix = [*shape[:-2], shape[-1], chance.choice([1, 2, 5])]
        fitting = [shape, shape, shape, [channels], [shape[-1]], [channels, channels, *kernel], [channels, 1, *kernel], matrix, shape[:-1], [*shape[:-1], 2]]
        dtype = self.dtype if chance.random() < 0.8 else chance.choice(DTYPES)
        sizes = own if chance.random() < 0.3 else chance.choice(fitting)
        made = torch.rand(sizes).gt(0.5) if dtype == torch.bool else (torch.randn(sizes) * chance.choice([1, 3, 100, 1e9])).to(dtype)
        kind = chance.random()
        if made.ndim > 1 and kind < 0.2:
            return made.transpose(0, -1)
        if made.ndim and kind > 0.9:
            return made.narrow(0, 0, min(1, made.shape[0])).expand(made.shape[0] and chance.choice([made.shape[0], 3]), *made.shape[1:])
        return made


def program(name: str, number: int) -> OperatorGraph:
    """A program with one call of an operator on copies of random tensors."""
    draw = Draw(f"{SEED} {name} {number}")
    torch.manual_seed(number)
    operator: Any = find_operator(ATEN + name)
    parsed, kinds = ParsedProgram(), dict[int, Any]()
    for argument in ("x", "level"):
        parsed.define_input(argument, (None,))

    def given(type: str, length: int | None) -> Any:
        return copied(draw.value(type, length))

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        weight, copy = parsed.define(f"w{len(kinds)}"), parsed.define(f"c{len(kinds)}")
        parsed.weights[weight], kinds[copy] = Weight(f"w{len(kinds)}", value, False), "tensor"
        parsed.calls.append(Call("clone", torch.ops.aten.clone.default, (Ref(weight),), {}, copy))
        return Ref(copy)

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in operator._schema.arguments:
        if parameter.has_default_value() and draw.chance.random() < 0.5:
            if not parameter.kwarg_only:
                break
            continue
        made = given(str(parameter.real_type), parameter.N)
        if parameter.kwarg_only:
            kwargs[parameter.name] = made
        else:
            args.append(made)
    check_arguments(operator, tuple(args), kwargs, kinds, set())
    parsed.output = parsed.define("y")
    parsed.calls.append(Call(name, SUBSTITUTES.get(operator, operator), tuple(args), kwargs, parsed.output))
    return OperatorGraph(parsed, limited=True)


def call(name: str, number: int) -> bool:
    """Call an operator as a program does. An exception is not a failure. Return whether there was none."""
    try:
        with torch.no_grad():
            program(name, number)(torch.zeros(2), torch.zeros(2))
    except Exception:  # noqa: BLE001 - torch may raise any exception
        return False
    return True


def crash(names: list[str]) -> str | None:
    """Return what a child process was doing when a signal ended it; None if it finished."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        program_cost.BYTES_PER_SAMPLE, program_cost.FLOP_PER_SAMPLE = 64 << 20, 1e9
        for name in names:
            for number in range(CALLS):
                os.write(write, f"\n{name} {number}".encode())
                call(name, number)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        last = pipe.read().rpartition(b"\n")[2].decode()
    status = os.waitpid(child, 0)[1]
    return f"{last}: {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else None


@pytest.mark.filterwarnings("ignore")
def test_no_operator_on_the_list_crashes() -> None:
    torch.set_num_threads(1)  # a forked child must not continue the test run
    names, crashes = sorted(OPERATORS), []
    while names:
        found = crash(names)
        if found is None:
            break
        crashes.append(found)
        names = names[names.index(found.partition(" ")[0]) + 1 :]
    assert not crashes


# Calls that crashed torch 2.13 without the replacements.
ATTENTION = "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default"


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (ATTENTION, [torch.zeros(2, 3, 0, 8)] * 3, {}),
        (ATTENTION, [torch.zeros(2, 0, 4, 8)] * 3, {}),
        (ATTENTION, [torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 0, 8), torch.zeros(2, 3, 0, 8)], {}),
        (
            "torch.ops.aten.scaled_dot_product_attention.default",
            [torch.zeros(2, 4, 4, 8), torch.zeros(2, 0, 4, 8), torch.zeros(2, 0, 4, 8)],
            {"enable_gqa": True},
        ),
        (
            "torch.ops.aten._native_batch_norm_legit_no_training.default",
            [torch.zeros(2, 4, 4, 4), None, None, torch.zeros(1), torch.zeros(1), 0.1, 1e-5],
            {},
        ),
    ],
)
def test_sizes_that_crash_torch_are_errors(target: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    operator = find_operator(target)
    check_arguments(operator, tuple(args), kwargs, {}, set())
    with pytest.raises((ValueError, RuntimeError)):
        SUBSTITUTES[operator](*args, **kwargs)


def test_what_stands_in_for_an_operator_computes_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    x, mean, variance = torch.randn(2, 4, 6, 6), torch.randn(4), torch.rand(4) + 0.5
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        (ATTENTION, (q, k, v, 0.0, True), {"scale": 0.3}),
        ("torch.ops.aten.scaled_dot_product_attention.default", (q, k, v, None, 0.0, True), {}),
        ("torch.ops.aten._native_batch_norm_legit_no_training.default", (x, torch.randn(4), None, mean, variance, 0.1, 1e-5), {}),
        ("torch.ops.aten._weight_norm.default", (torch.randn(4, 3, 2), torch.rand(4, 1, 1), 0), {}),
    ]
    for target, args, kwargs in cases:
        operator = find_operator(target)
        ours, theirs = SUBSTITUTES[operator](*args, **kwargs), operator(*args, **kwargs)
        first = (ours, theirs) if isinstance(ours, torch.Tensor) else (ours[0], theirs[0])
        torch.testing.assert_close(*first)
