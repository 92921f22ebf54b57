"""Plots of the measurements of `bench` and `profile` against their ceilings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from fastloss._cli.gpu_report import Record, candidate
from fastloss._cli.report import CEILINGS, Row, measurements, number, title

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]  # an SVG repeats the list at every word


SHORT = {"copy": "copy", "product": "GEMM"}
"""The ceilings of `make gpu` as labels."""


def save(figure: Figure, path: Path) -> None:
    """Write the figure; an SVG keeps its text as text and is the same whenever it is drawn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastloss"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    if path.suffix == ".svg":  # positions: a tenth of a pixel is enough, and two thirds of the size
        path.write_text(re.sub(r"\d+\.\d{4,}", lambda m: f"{float(m[0]):.1f}", path.read_text()))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel per measurement: a bar for every candidate and allocator regime, a line at the ceiling."""
    timed = [m for m in measurements(rows) if any("times" in row for row in m)]
    columns = min(len(timed), 2)
    lines = [timed[i : i + columns] for i in range(0, len(timed), columns)]
    heights = [0.7 + 0.35 * max(sum("times" in row for row in m) for m in line) for line in lines]
    figure, grid = plt.subplots(
        len(lines),
        columns,
        figsize=(7.5 * columns, sum(heights)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axes in grid.flat[len(timed) :]:
        axes.axis("off")
    for axes, measurement in zip(grid.flat, timed):
        panel(axes, measurement)
    save(figure, path)


def panel(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw one measurement."""
    timed = [row for row in rows if "times" in row]
    ceiling = next(row for row in timed if row["candidate"] in CEILINGS)
    bars = [row for row in timed if row is not ceiling]
    regimes = list(ceiling["times"])
    thickness = 0.8 / len(regimes)
    longest = max(row["times"][regime]["ms"] for row in timed for regime in regimes)
    for i, regime in enumerate(regimes):
        ours = ("tab:orange", "moccasin")[i % 2]
        other = ("tab:gray", "lightgray")[i % 2]
        for at, row in enumerate(bars):
            found, name = row["times"][regime], row["candidate"]
            y = at + (i - (len(regimes) - 1) / 2) * thickness
            axes.barh(
                y, found["ms"], thickness, color=ours if name.startswith("fastloss") else other, clip_on=False
            )
            ratio = found.get("x_eager")
            label = f"{number(found['ms'])} ms" + (
                "" if name == "eager" or ratio is None else f", {number(ratio)}x"
            )
            axes.text(found["ms"] + 0.01 * longest, y, label, va="center", fontsize=7)
        best = ceiling["times"][regime]["ms"]
        axes.axvline(best, color="black", linestyle=("--", ":")[i % 2], linewidth=1, clip_on=False)
    axes.set(xlim=(0, 1.35 * longest), ylim=(len(bars) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(bars)), [row["candidate"] for row in bars], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    what = CEILINGS[ceiling["candidate"]].what
    order = f"; upper bar {regimes[0]}, lower {regimes[1]}" if len(regimes) > 1 else ""
    limits = " / ".join(number(ceiling["times"][regime]["ms"]) for regime in regimes)
    axes.set_title(f"{title(ceiling)}\ndashed: {what}, {limits} ms{order}", fontsize=8, loc="left")


def draw_gpu(rows: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Draw the rows of `make gpu`: a dot at every candidate's time, a line at the ceiling's; bars of its share."""
    names = sorted({candidate(r) for group in rows.values() for r in group}, key=order_of)
    lines = sum(map(len, rows.values())) + 0.5 * len(rows)
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(12.0, 1.2 + 0.17 * lines), width_ratios=(3, 2), layout="constrained"
    )
    ticks, y = [], 0.0
    for group in rows.values():
        ticks.append(y + (len(group) - 1) / 2)
        for r in sorted(group, key=lambda r: order_of(candidate(r))):
            who = candidate(r)
            color = color_of(names.index(who), who)
            left.plot(r["ms"], y, "o", color=color, markersize=5, clip_on=False)
            label = f"{number(r['ms'])}  {who}" if len(names) > 1 else number(r["ms"])
            left.annotate(label, (r["ms"], y), (6, 0), textcoords="offset points", va="center", fontsize=7)
            if "of_ceiling" in r:
                best = r["ms"] * r["of_ceiling"]
                left.plot([best, r["ms"]], [y, y], color=color, linewidth=1, zorder=1)
                left.plot(best, y, "|", color="black", markersize=8)
                right.barh(y, 100 * r["of_ceiling"], 0.8, color=color)
                text = f"{100 * r['of_ceiling']:.0f}% of {SHORT.get(r['ceiling'], r['ceiling'])}"
                right.annotate(text, (100 * r["of_ceiling"], y), (3, 0), textcoords="offset points",
                               va="center", fontsize=7)  # fmt: skip
            y += 1.0
        y += 0.5
    left.set_yticks(ticks, list(rows), fontsize=8)
    left.set(xscale="log", ylim=(y - 0.5, -1.0))
    left.set_title("ms, and the ceiling's time as a line", fontsize=9, loc="left")
    right.set_title("% of the ceiling", fontsize=9, loc="left")
    most = max((100 * r.get("of_ceiling", 0.0) for group in rows.values() for r in group), default=0.0)
    right.set(xlim=(0, max(118.0, 1.18 * most)), xticks=range(0, 101, 20))
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    save(figure, path)


def order_of(who: str) -> tuple[bool, bool, str]:
    """Sort fastloss before others, its tree "beside" after "this"."""
    return not who.startswith("fastloss"), "beside" in who, who


def color_of(i: int, who: str) -> str:
    """Return orange for fastloss, a paler one for the tree beside it, grey for eager, others by number."""
    if who.startswith("fastloss"):
        return "moccasin" if "beside" in who else "tab:orange"
    return "tab:gray" if who == "eager" else f"C{(i + 2) % 10}"


def roofline(groups: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float], path: Path) -> None:
    """Draw a point for each group of equal calls and a line for each device's copy, both in GB/s."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, g in enumerate(groups):
        label = f"{g['loss']} {'x'.join(map(str, g['shape']))} {g['dtype']}"
        axes.plot(g["bytes"] / 2**20, g["GB_per_s"], "o" if i < 10 else "s", color=f"C{i % 10}", label=label)
    for device, ceiling in ceilings.items():
        axes.axhline(ceiling, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"copy on {device}, {number(ceiling)} GB/s", (0.01, ceiling), (0, 3),
                      xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="MiB moved, forward and backward", ylabel="GB/s")
    axes.grid(which="both", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if groups:
        axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    save(figure, path)
