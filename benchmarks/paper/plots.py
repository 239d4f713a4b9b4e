"""The figures as PNG files, each with the paper's values where it printed any. Needs matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]

from benchmarks.paper import published
from benchmarks.paper.experiments import SUSTAINED_LATENCY_S

matplotlib.use("Agg")

from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

COLORS = {
    "FasterTransformer": "#7f7f7f",
    "Orca (Max)": "#d62728",
    "Orca (Pow2)": "#ff7f0e",
    "Orca (Oracle)": "#2ca02c",
    "paged": "#1f77b4",
}
MARKERS = dict(zip(COLORS, "vx^so", strict=True))
LABELS = {system: system for system in COLORS} | {"paged": "jpaged"}
PAPER_STYLE: dict[str, Any] = {"color": "none", "edgecolor": "black", "hatch": "///"}


def _figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    size = (4.6 * columns, 3.5 * rows)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Without the version and the date, equal figures are equal files.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _draw_curves(axes: Any, curves: list[dict[str, Any]], title: str) -> None:
    for curve in curves:
        points = [p for p in curve["points"] if p["normalized_latency_s"] is not None]
        system = curve["system"]
        axes.plot(
            [p["rate"] for p in points],
            [p["normalized_latency_s"] for p in points],
            color=COLORS[system],
            marker=MARKERS[system],
            markersize=4,
            label=f"{LABELS[system]}: {curve['sustained_rate']:.3g}",
        )
    axes.axhline(SUSTAINED_LATENCY_S, color="black", linewidth=0.6, linestyle=":")
    axes.set(ylim=(0, 1), xlabel="requests/s", ylabel="normalised latency, s/token", title=title)
    axes.set_xlim(left=0)
    legend = axes.legend(
        fontsize=6, title="sustained requests/s", title_fontsize=6, loc="upper left"
    )
    legend.set_zorder(0)


def _curve_panels(file: Path, ours: list[dict[str, Any]], title: Any, columns: int) -> None:
    rows = -(-len(ours) // columns)
    figure, axes = _figure(columns, rows)
    for panel, entry in zip(axes.flat, ours, strict=False):
        _draw_curves(panel, entry["curves"], title(entry))
    for panel in list(axes.flat)[len(ours) :]:
        panel.axis("off")
    _save(figure, file)


def plot_2(report: dict[str, Any], file: Path) -> None:
    kinds = {
        "tokens": ("#1f77b4", "tokens"),
        "reserved": ("#aec7e8", "reserved"),
        "internal": ("#ff9896", "internal fragmentation"),
        "external": ("#c7c7c7", "external, rounding, free"),
    }
    cases = [e for e in report["ours"] if e["trace"] == "sharegpt" and e["case"] != "paper's rate"]
    bars = []
    for system in published.SYSTEMS[1:]:
        theirs = "vLLM" if system == "paged" else system
        bars.append((f"{theirs}\npaper", published.FIGURE_2[system]))
        for entry in cases:
            if entry["system"] == system:
                bars.append((f"{LABELS[system]}\n{entry['case']}", entry["percent"]))
        if system == "paged":
            for entry in cases:
                if entry["system"] == system:
                    share = entry["tokens_of_allocated_percent"]
                    parts = {"tokens": share, "internal": 100 - share}
                    bars.append((f"jpaged, used blocks\n{entry['case']}", parts))
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for kind, (color, label) in kinds.items():
            width = parts.get(kind, 0.0)
            axes.barh(place, width, left=left, color=color, label=None if place else label)
            if width > 4:
                axes.text(left + width / 2, place, f"{width:.1f}", ha="center", va="center", size=7)
            left += width
    axes.set_yticks(range(len(bars)), [name.replace("\n", ", ") for name, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of the memory for K and V", title="Figure 2: ShareGPT")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
    _save(figure, file)


def plot_12(report: dict[str, Any], file: Path) -> None:
    _curve_panels(
        file,
        report["ours"],
        lambda e: f"{e['trace']}, {e['lengths']}\nsetting: {e['setting']}",
        3,
    )


def plot_13(report: dict[str, Any], file: Path) -> None:
    figure, axes = _figure(2)
    for panel, (name, (rate, values)) in zip(axes[0], published.FIGURE_13.items(), strict=True):
        cases = [entry for entry in report["ours"] if entry["trace"] == name]
        width = 0.8 / (len(cases) + 1)
        systems = published.SYSTEMS[1:]
        groups = [("paper", dict(zip(systems, values, strict=True)))]
        groups += [(f"{e['case']} ({e['rate']:g}/s)", e["mean_batch"]) for e in cases]
        for index, (label, heights) in enumerate(groups):
            places = [i + index * width for i in range(len(systems))]
            style = PAPER_STYLE if index == 0 else {"color": f"C{index - 1}"}
            bars = panel.bar(places, [heights[s] for s in systems], width, label=label, **style)
            panel.bar_label(bars, fmt="%.0f", fontsize=6)
        panel.set_xticks([i + 1.5 * width for i in range(len(systems))])
        panel.set_xticklabels([*systems[:-1], "vLLM, jpaged"], fontsize=7)
        panel.set(ylabel="requests in the batch", title=f"Figure 13: {name} (paper: {rate:g}/s)")
        panel.legend(fontsize=7)
    _save(figure, file)


def plot_14(report: dict[str, Any], file: Path) -> None:
    _curve_panels(
        file,
        report["ours"],
        lambda e: f"alpaca, {e['kind']} {e['width']}, setting: {e['setting']}",
        4,
    )


def plot_15(report: dict[str, Any], file: Path) -> None:
    figure, axes = _figure(4)
    panels = [(name, kind) for name in ("alpaca", "sharegpt") for kind in ("parallel", "beam")]
    for panel, (name, kind) in zip(axes[0], panels, strict=True):
        ours = [e for e in report["ours"] if (e["trace"], e["kind"]) == (name, kind)]
        places = range(len(ours))
        bars = panel.bar(places, [e["saved_percent"] for e in ours], 0.4, label="jpaged")
        panel.bar_label(bars, fmt="%.1f", fontsize=7)
        paper = published.FIGURE_15[name][kind]
        if name == "alpaca":
            theirs = [i + 0.4 for i in places]
            bars = panel.bar(theirs, paper[: len(ours)], 0.4, label="paper", **PAPER_STYLE)
            panel.bar_label(bars, fmt="%.1f", fontsize=7)
        else:
            panel.axhspan(*paper, color="black", alpha=0.12, label="paper's range")
        panel.set_xticks([i + 0.2 for i in places], [str(e["width"]) for e in ours])
        panel.set(xlabel="sequences", ylabel="% of blocks saved", title=f"{name}, {kind}")
        panel.legend(fontsize=7)
    _save(figure, file)


def plot_16(report: dict[str, Any], file: Path) -> None:
    gains = published.FIGURE_16_GAINS
    _curve_panels(
        file,
        report["ours"],
        lambda e: (
            f"{e['prefix']}, setting: {e['setting']}\n"
            f"{e['gain_over']['Orca (Oracle)']:.2f}x Oracle (paper {gains[e['prefix']][1]}x)"
        ),
        2,
    )


def plot_17(report: dict[str, Any], file: Path) -> None:
    _curve_panels(file, report["ours"], lambda e: f"chatbot, setting: {e['setting']}", 2)


def plot_18b(report: dict[str, Any], file: Path) -> None:
    figure, axes = _figure(2)
    for panel, name in zip(axes[0], ("sharegpt", "alpaca"), strict=True):
        for kernel, marker in (("paper's", "o"), ("no effect of block size", "s")):
            entries = [e for e in report["ours"] if (e["trace"], e["kernel"]) == (name, kernel)]
            sizes = [e["block_size"] for e in entries]
            latency = [e["normalized_latency_s"] for e in entries]
            panel.plot(sizes, latency, marker=marker, label=f"kernel: {kernel}")
        rate = next(e["rate"] for e in report["ours"] if e["trace"] == name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(
            xlabel="block size",
            ylabel="normalised latency, s/token",
            title=f"Figure 18b: {name}, {rate:g} requests/s",
        )
        panel.legend(fontsize=7)
    _save(figure, file)


def plot_19(report: dict[str, Any], file: Path) -> None:
    figure, axes = _figure(2)
    micro = report["ours"]["one preemption"]
    sizes = [e["block_size"] for e in micro]
    for key, label in (
        ("recompute_ms", "recompute"),
        ("swap_ms", "swap out and in, a transfer a block and layer"),
        ("fused_swap_ms", "swap out and in, one transfer a direction"),
    ):
        axes[0, 0].plot(sizes, [e[key] for e in micro], marker="o", label=label)
    axes[0, 0].set(ylabel="ms", title="Figure 19a: one preemption of 256 tokens", yscale="log")
    for policy in dict.fromkeys(e["policy"] for e in report["ours"]["loaded"]):
        entries = [e for e in report["ours"]["loaded"] if e["policy"] == policy]
        latency = [e["normalized_latency_s"] for e in entries]
        axes[0, 1].plot([e["block_size"] for e in entries], latency, marker="o", label=policy)
    axes[0, 1].set(ylabel="normalised latency, s/token", title="Figure 19b: ShareGPT, loaded")
    for panel in axes[0]:
        panel.set_xscale("log", base=2)
        panel.set_xlabel("block size")
        panel.legend(fontsize=7)
    _save(figure, file)


def plot_watermark(report: dict[str, Any], file: Path) -> None:
    figure, axes = _figure(2)
    for name in dict.fromkeys(e["trace"] for e in report["ours"]):
        entries = [e for e in report["ours"] if e["trace"] == name]
        shares = [100 * e["watermark"] for e in entries]
        best = max(e["served_per_s"] for e in entries)
        rates = [100 * e["served_per_s"] / best for e in entries]
        axes[0, 0].plot(shares, rates, marker="o", label=name)
        axes[0, 1].plot(shares, [e["recomputed_percent"] for e in entries], marker="o", label=name)
    axes[0, 0].set(ylabel="throughput, % of the best", title="Overloaded")
    axes[0, 1].set(ylabel="tokens computed again, %", title="Overloaded")
    for panel in axes[0]:
        panel.set_xlabel("admission watermark, % of the pool")
        panel.legend(fontsize=7)
    _save(figure, file)


PLOTS = {
    "2": plot_2,
    "12": plot_12,
    "13": plot_13,
    "14": plot_14,
    "15": plot_15,
    "16": plot_16,
    "17": plot_17,
    "18b": plot_18b,
    "19": plot_19,
    "watermark": plot_watermark,
}


def draw(report: dict[str, Any], folder: Path) -> Path | None:
    """Draws a figure's report, if it has a plot; the file."""
    plot = PLOTS.get(report["figure"])
    if plot is None:
        return None
    file = folder / f"figure_{report['figure']}.png"
    plot(report, file)
    return file
