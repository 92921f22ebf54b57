"""The report of `train_lm.py`: two runs, whether they agree, a table, a plot, a JSON file."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastloss._cli.info import machine

WARM_UP = 10  # steps left out of the medians
# How far apart the curves may be, relative, up to which step. At the first step rounding is all that differs;
# training amplifies it, so that after step MEAN_OF means over as many steps are compared, not single steps.
# Seen on a CPU: at most 1e-7, 3e-5 and 3e-5.
MEAN_OF = 50
TOLERANCES = {1: 1e-5, MEAN_OF: 1e-3, sys.maxsize: 1e-2}


@dataclass(frozen=True)
class Settings:
    steps: int
    batch: int
    context: int
    vocab: int
    layers: int
    width: int
    threads: int
    seed: int
    device: str
    learning_rate: float = 1e-3


@dataclass
class Step:
    loss: float
    seconds: float
    loss_seconds: float


@dataclass
class Run:
    steps: list[Step]
    threads: int
    peak_bytes: int = 0

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    def median(self, what: str) -> float:
        """Return the median over the steps after warm-up (over all, in a very short run), in seconds."""
        return statistics.median(getattr(s, what) for s in self.steps[WARM_UP:] or self.steps)


def differences(runs: dict[str, Run]) -> list[float]:
    """Return the differences of the two loss curves by step, relative to torch's."""

    def curve(losses: list[float]) -> list[float]:
        ends = range(MEAN_OF + 1, len(losses) + 1)
        return losses[:MEAN_OF] + [statistics.fmean(losses[end - MEAN_OF : end]) for end in ends]

    pairs = zip(curve(runs["torch"].losses), curve(runs["fastloss"].losses), strict=True)
    return [abs(ours - theirs) / abs(theirs) for theirs, ours in pairs]


def tolerance(step: int) -> float:
    return next(bound for last, bound in TOLERANCES.items() if step <= last)


def machine_name(device: str) -> str:
    return machine()["gpus"][0]["name"] if device == "cuda" else machine()["cpu"]


def table(runs: dict[str, Run], settings: Settings) -> Table:
    where = machine_name(settings.device)
    if settings.device == "cpu":
        where += f", {runs['torch'].threads} threads"
    counted = max(len(runs["torch"].steps) - WARM_UP, 1)
    result = Table(
        title=f"{settings.batch * settings.context} x {settings.vocab} logits, float32, {where}",
        caption=f"medians of {counted} steps; memory: what training adds",
    )
    result.add_column("")
    for name in [*runs, "torch / fastloss"]:
        result.add_column(name, justify="right")

    def add(label: str, values: list[float], form: str, compare: bool = True) -> None:
        ratio = f"{values[0] / values[1]:.2f}" if compare and values[1] > 0 else ""
        result.add_row(label, *(form.format(v) for v in values), ratio)

    both = list(runs.values())
    shares = [100 * r.median("loss_seconds") / r.median("seconds") for r in both]
    add("time per step", [1e3 * r.median("seconds") for r in both], "{:.1f} ms")
    add("time in the loss", [1e3 * r.median("loss_seconds") for r in both], "{:.1f} ms")
    add("the loss's share", shares, "{:.0f} %", compare=False)
    add("peak memory", [r.peak_bytes / 2**20 for r in both], "{:.0f} MiB")
    add("loss at the end", [r.losses[-1] for r in both], "{:.4f}", compare=False)
    return result


def draw(runs: dict[str, Run], settings: Settings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["curves", "time"], ["difference", "memory"]],
        figsize=(11, 6),
        width_ratios=[3, 2],
        height_ratios=[3, 2],
        layout="constrained",
    )
    figure.suptitle(
        f"One model trained twice: {settings.batch * settings.context} x {settings.vocab} logits, "
        f"{machine_name(settings.device)}"
    )
    steps = range(1, len(runs["torch"].steps) + 1)
    axes["curves"].plot(
        steps, runs["torch"].losses, color="tab:orange", linewidth=4, alpha=0.5, label="torch"
    )
    axes["curves"].plot(steps, runs["fastloss"].losses, color="tab:blue", linewidth=1, label="fastloss")
    axes["curves"].set(ylabel="loss (nats per token)", title="loss curves")
    axes["curves"].legend()
    axes["difference"].semilogy(steps, [max(d, 1e-9) for d in differences(runs)], color="tab:gray")
    axes["difference"].semilogy(
        steps, [tolerance(s) for s in steps], "--", color="tab:red", drawstyle="steps-post", label="tolerance"
    )
    axes["difference"].set(xlabel="step", ylabel="relative difference")
    axes["difference"].legend()

    names = list(runs)
    loss = [1e3 * run.median("loss_seconds") for run in runs.values()]
    others = [1e3 * run.median("seconds") - t for run, t in zip(runs.values(), loss, strict=True)]
    axes["time"].barh(names, loss, color="tab:blue", label="loss, forward + backward")
    top = axes["time"].barh(names, others, left=loss, color="lightgray", label="rest of the step")
    sums = [f"{a:.0f} + {b:.0f}" for a, b in zip(loss, others, strict=True)]
    axes["time"].bar_label(top, sums, label_type="center")
    axes["time"].set(title="time per step (ms, median)", ylim=(2.3, -0.6))
    axes["time"].legend(loc="lower right", frameon=False)
    memory = axes["memory"].barh(names, [run.peak_bytes / 2**20 for run in runs.values()], color="tab:green")
    axes["memory"].bar_label(memory, fmt="%.0f", label_type="center", color="white")
    axes["memory"].set(title="peak memory of training (MiB)", ylim=(1.6, -0.6))
    figure.savefig(path, dpi=150)


def save(runs: dict[str, Run], settings: Settings, path: Path) -> None:
    report = {"settings": asdict(settings), "machine": machine(), "runs": {}}
    for name, run in runs.items():
        medians = {f"median_{what}": run.median(what) for what in ("seconds", "loss_seconds")}
        report["runs"][name] = asdict(run) | medians
    path.write_text(json.dumps(report, indent=1) + "\n")


def agree(runs: dict[str, Run], console: Console) -> bool:
    apart = differences(runs)
    # "not <=" so that NaN is a difference, too
    wrong = [step for step, d in enumerate(apart, 1) if not d <= tolerance(step)]
    verdict = (
        f"[red]The loss curves differ from step {wrong[0]} on" if wrong else "[green]The loss curves agree"
    )
    console.print(f"{verdict}[/]. Largest relative difference up to a step (allowed):")
    for last in sorted({min(last, len(apart)) for last in TOLERANCES}):
        console.print(f"  step {last:>4}: {max(apart[:last]):.1e}  ({tolerance(last):g})")
    return not wrong
