"""Train a class-conditional sCM on digits: a TrigFlow diffusion teacher, then its consistency student.

    python examples/digits/train.py                    # sCD: distil the teacher
    python examples/digits/train.py --method sct       # sCT: no teacher in the student's loss, only its weights as a start

The student of sCD first learns the end points of the teacher's trajectories (trajectories.py), which saves most of its training. Then Algorithm 1 of the
sCM paper (arXiv 2410.11081) is a part of its loss; for sCT it is the whole loss. The weights of sCD are the mean of those before and after the last stage.
Every stage can be stopped and resumed.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from data import LABEL_NAMES, PIXEL_MEAN, PIXEL_STD, SIGMA_DATA, load_digits, to_model, to_pixels
from judge import assess, load_judge
from losses import Consistency, Diffusion, Distilling, Following
from metrics import frechet_distance
from samplers import TWO_STEPS, Network, autoguided, ddim, sample_consistency, torch_noise
from scm_export.checkpoints import Checkpoint, SamplerSpec, save_checkpoint
from scm_export.networks.edm2 import UNet, UNetConfig
from trajectories import Trajectories, draw_trajectories

CONFIG = UNetConfig(
    img_resolution=28,
    img_channels=1,
    label_dim=10,
    model_channels=48,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(),  # the first decoder block has attention in any case
    channels_per_head=32,
    patch_size=2,
    time_scale=4.0,
)


def save(value: object, path: Path) -> None:
    """Write to a temporary file and rename it: an interrupted save keeps the earlier file."""
    beside = path.with_name(path.name + ".part")
    torch.save(value, beside)
    beside.replace(path)


def batches(x0: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for index in torch.randperm(len(x0), device=x0.device).split(size):
            if len(index) == size:
                yield x0[index], labels[index]


def train_stage(
    name: str,
    folder: Path,
    stage: Diffusion | Following | Consistency | Distilling,
    steps: int,
    learning_rate: float,
    batch_size: int,
    ema_decay: float,
    evaluate: Callable[[UNet], dict[str, float]],
    compile: Callable[..., Any],
    snapshot_at: float = 0.0,
) -> UNet:
    """Run one stage from its last saved state, or from the start, and return the exponential moving average of its network."""
    state_path, log_path = folder / f"{name}.state.pt", folder / f"{name}.jsonl"
    net, parameters = stage.net, stage.parameters()
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    step, average = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location="cpu")
        step, average = state["step"], state.get("average", 0.0)
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for parameter, stored in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(stored)
        torch.set_rng_state(state["rng"])
    device = parameters[0].device
    (images, labels), _ = load_digits()
    data = batches(to_model(images).to(device), labels.to(device), batch_size)
    loss_function = compile(stage.loss) if isinstance(stage, Diffusion) else stage.loss
    saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=steps, completed=step)
        while step < steps:
            warm = min(1.0, (step + 1) / 100)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = loss_function(*next(data), 0.0 if isinstance(stage, Diffusion) else step / steps)
            optimizer.zero_grad()
            loss.backward()
            for parameter in parameters:
                if parameter.grad is not None:  # ignore a step that overflows in half precision
                    torch.nan_to_num_(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
            optimizer.step()
            net.normalize_weights_()
            step += 1
            decay = min(ema_decay, step / (step + 9))
            with torch.no_grad():
                for mean, parameter in zip(ema.parameters(), net.parameters(), strict=True):
                    mean.lerp_(parameter, 1 - decay)
            average = loss.item() if average == 0.0 else 0.99 * average + 0.01 * loss.item()
            progress.update(task, completed=step, description=f"{name} loss {average:.4f}")
            if snapshot_at and step == max(1, round(snapshot_at * steps)):
                save(ema.state_dict(), folder / f"{name}.snapshot.pt")
            if step % 500 == 0 or step == steps:
                record = {"step": step, "loss": average, **evaluate(ema)}
                progress.console.print(record)
                with log_path.open("a") as log:
                    log.write(json.dumps(record) + "\n")
            if time.monotonic() - saved > 60 or step % 500 == 0 or step == steps:
                state = {"step": step, "average": average, "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
                save({**state, "parameters": [p.detach() for p in parameters], "rng": torch.get_rng_state()}, state_path)
                saved = time.monotonic()
    return ema


def load_trajectories(path: Path, velocity: Network, count: int, device: torch.device) -> Trajectories:
    """Load the trajectories at ``path``; compute and save them if there are none."""
    if not path.exists():
        (images, labels), _ = load_digits()
        save(draw_trajectories(velocity, to_model(images), labels, count, device)._asdict(), path)
    return Trajectories(**torch.load(path, weights_only=True))


def new_network(device: torch.device, weights: dict[str, Tensor] | None = None) -> UNet:
    net = UNet(CONFIG).to(device)
    net.compute_dtype = torch.bfloat16
    if weights is not None:
        net.load_state_dict(weights)
    return net


def as_checkpoint(net: UNet) -> Checkpoint:
    """Return the network as a checkpoint for scm-export, with half-precision weights."""
    trained = {name for name, _ in net.named_parameters()}
    return Checkpoint(
        family="edm2",
        config=asdict(CONFIG),
        sampler=SamplerSpec(sigma_data=SIGMA_DATA, pixel_scale=PIXEL_STD / SIGMA_DATA, pixel_offset=PIXEL_MEAN),
        label_names=LABEL_NAMES,
        licence="Apache-2.0",
        weights={name: tensor.half() if name in trained else tensor for name, tensor in net.state_dict().items()},
    )


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/digits"), show_default=True)
@click.option("--method", type=click.Choice(["scd", "sct"]), default="scd", show_default=True)
@click.option("--teacher-steps", type=click.IntRange(1), default=3700, show_default=True)
@click.option(
    "--trajectories", type=click.IntRange(1), default=20_000, show_default=True, help="Number of the teacher's trajectories, for sCD: half a gigabyte."
)
@click.option("--following-steps", type=click.IntRange(1), default=16_000, show_default=True, help="Steps on the trajectories.")
@click.option("--student-steps", type=click.IntRange(1), default=500, show_default=True, help="Steps of sCD or sCT.")
@click.option("--batch-size", type=click.IntRange(1, 4000), default=128, show_default=True)
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), help="For sCD (default 4e-4) or sCT (1e-3). The teacher uses 8e-3, the trajectories 2e-3."
)
@click.option("--guidance", type=float, default=2.5, show_default=True, help="Weight of the teacher's autoguidance.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--compile/--no-compile", default=True, show_default=True, help="torch.compile the losses: starts minutes later, a third faster.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    folder: Path,
    method: str,
    teacher_steps: int,
    trajectories: int,
    following_steps: int,
    student_steps: int,
    batch_size: int,
    learning_rate: float | None,
    guidance: float,
    device: str,
    compile: bool,
    seed: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    compiler: Callable[..., Any] = torch.compile if compile else lambda function: function
    torch_device = torch.device(device)
    judge = load_judge()
    (images, _), _ = load_digits()
    real, _ = assess(judge, images)
    labels = torch.arange(10).repeat(50)

    def two_steps(net: UNet, labels: Tensor) -> Tensor:
        return sample_consistency(net, labels, TWO_STEPS, torch_noise(len(labels), 1, labels.device))

    def evaluate(sampler: Callable[[UNet, Tensor], Tensor]) -> Callable[[UNet], dict[str, float]]:
        def run(net: UNet) -> dict[str, float]:
            features, found = assess(judge, to_pixels(sampler(net, labels.to(torch_device)).cpu()))
            return {"accuracy": (found == labels).float().mean().item(), "frechet_500": frechet_distance(features, real)}

        return run

    teacher = train_stage(
        "teacher",
        folder,
        Diffusion(new_network(torch_device)),
        teacher_steps,
        learning_rate=8e-3,
        batch_size=batch_size,
        ema_decay=0.998,
        evaluate=evaluate(lambda net, labels: ddim(net, labels, 16, torch_noise(len(labels), 1, labels.device))),
        compile=compiler,
        snapshot_at=1 / 8,
    )
    student = follower = new_network(torch_device, teacher.state_dict())
    stage: Consistency | Distilling
    if method == "scd":
        snapshot = new_network(torch_device, torch.load(folder / "teacher.snapshot.pt", weights_only=True)).requires_grad_(False)
        velocity = compiler(autoguided(teacher, snapshot, guidance))
        trajectory_set = load_trajectories(folder / "trajectories.pt", velocity, trajectories, torch_device)
        following = Following(student, trajectory_set, compiler)
        follower = train_stage(
            "following", folder, following, following_steps, 2e-3, batch_size, ema_decay=0.999, evaluate=evaluate(two_steps), compile=compiler
        )
        student.load_state_dict(follower.state_dict())
        stage = Distilling(following, Consistency(student, velocity, compiler, warmup=0))
    else:
        stage = Consistency(student, None, compiler)
    ema = train_stage(
        method,
        folder,
        stage,
        student_steps,
        learning_rate=learning_rate or {"scd": 4e-4, "sct": 1e-3}[method],
        batch_size=batch_size,
        ema_decay=0.998,
        evaluate=evaluate(two_steps),
        compile=compiler,
    )
    if method == "scd":  # two steps are better before, one step is better after; the mean keeps most of both
        with torch.no_grad():
            for after, before in zip(ema.parameters(), follower.parameters(), strict=True):
                after.lerp_(before, 0.5)
    checkpoint = folder / ("digits.pt" if method == "scd" else "digits-sct.pt")
    save_checkpoint(as_checkpoint(ema), checkpoint)
    click.echo(f"wrote {checkpoint}; export it with: scm-export {checkpoint} --dtype fp16")


if __name__ == "__main__":
    main()
