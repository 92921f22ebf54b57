"""What `bench` and `profile` measured, against the ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from fastloss._cli.report import CEILINGS, number, title

matplotlib.use("Agg")

from matplotlib import pyplot as plt


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per allocator regime: a bar per candidate, a line where the ceiling stands."""
    timed = [r for r in rows if "times" in r]
    ceiling = next(r for r in timed if r["candidate"] in CEILINGS)
    bars = [r for r in timed if r is not ceiling]
    regimes = list(ceiling["times"])
    figure, panels = plt.subplots(
        1, len(regimes), figsize=(5.5 * len(regimes), 1.2 + 0.5 * len(bars)), sharey=True, squeeze=False
    )
    for panel, regime in zip(panels[0], regimes, strict=True):
        names = [r["candidate"] for r in bars]
        ms = [r["times"][regime]["ms"] for r in bars]
        colors = ["tab:orange" if n.startswith("fastloss") else "tab:gray" for n in names]
        drawn = panel.barh(names, ms, color=colors)
        ratios = [r["times"][regime].get("x_eager") for r in bars]
        labels = [
            f"{number(t)} ms" + ("" if n == "eager" or x is None else f", {number(x)}x")
            for n, t, x in zip(names, ms, ratios, strict=True)
        ]
        panel.bar_label(drawn, labels, padding=3, fontsize=9)
        best = ceiling["times"][regime]["ms"]
        panel.axvline(best, color="black", linestyle="--", linewidth=1)
        panel.set(xlabel="ms", xlim=(0, 1.4 * max([*ms, best])))
        panel.set_title(
            f"{regime} (dashed: {CEILINGS[ceiling['candidate']].what}, {number(best)} ms)", fontsize=9
        )
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    figure.suptitle(title(ceiling), fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def roofline(groups: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float], path: Path) -> None:
    """A point for each group of equal calls, a line for each device's copy, both in GB/s."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
