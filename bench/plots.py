"""The bench's pictures. Each one is readable in black and white: bars differ in hatch and grey too, and carry their values.

Most of the colours are Okabe and Ito's (2008), which colour-blind readers can tell apart. In their order here, light and
dark alternate.
"""
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

import memory  # noqa: E402
from bench import tables  # noqa: E402
from files import writing  # noqa: E402

COLOURS = ("#0072B2", "#F0E442", "#D55E00", "#CCCCCC", "#56B4E9", "#FFFFFF", "#009E73", "#E69F00", "#CC79A7")
HATCHES = ("", "", "//", "..", "\\\\", "xx", "--", "++", "oo")
INK = "0.15"


def save(fig, title: str, command: str, path):
    """Write the figure as PNG, with its title above and the command that made it below."""
    fig.suptitle(title, fontsize=11)
    fig.supxlabel(textwrap.fill(command, 130), fontsize=6.5, color="0.35", family="monospace")
    with writing.atomic(path) as tmp:
        fig.savefig(tmp, format="png", dpi=140)
    plt.close(fig)


def scale(values) -> tuple[float, str]:
    """(the unit in bytes, its name) in which to draw `values` bytes."""
    return (1e9, "GB") if max(values) >= 2e9 else (1e6, "MB")


def digits(x: float) -> str:
    """x with three digits: 4.66, 46.6, 466."""
    return f"{x:,.{0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2}f}"


def amount(n: float) -> str:
    return f"{digits(n / 1e9)} GB" if n >= 1e9 else f"{digits(n / 1e6)} MB"


def categories(title: str, rows: list[dict], command: str, path):
    """One bar for each row: the measured peak stacked by category, the predicted peak as a dashed outline, and the speed."""
    rows = [r for r in rows if tables.peak(r)]
    memories = [r["median"]["memory"] for r in rows]
    unit, name = scale([m["measured_peak"] for m in memories])
    fig, ax = plt.subplots(figsize=(10.5, 1.4 + 0.5 * len(rows)), layout="constrained")
    used = [c for c in memory.CATEGORIES if any((m["by_category"] or {}).get(c) for m in memories)]
    for y, m in enumerate(memories):
        left = 0.0
        if not m["by_category"]:  # --compile on a GPU: no step was followed, so only the allocator's peak is known
            ax.barh(y, m["measured_peak"] / unit, 0.58, color="0.75", edgecolor=INK, linewidth=0.6)
        for i, c in enumerate(memory.CATEGORIES):
            if n := (m["by_category"] or {}).get(c):
                ax.barh(y, n / unit, 0.58, left=left, color=COLOURS[i], hatch=HATCHES[i], edgecolor=INK, linewidth=0.6)
                left += n / unit
        if m["predicted_peak"]:
            ax.barh(y, m["predicted_peak"] / unit, 0.8, fill=False, edgecolor="black", linestyle=(0, (3, 2)), linewidth=0.9)
        speed = rows[y]["median"]["tokens_per_s"]
        ends = max(m["measured_peak"], m["predicted_peak"] or 0) / unit
        ax.annotate(amount(m["measured_peak"]) + (f"   ({speed:,.0f} tokens/s)" if speed else ""), (ends, y),
                    xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set(yticks=range(len(rows)), yticklabels=[r["name"] for r in rows], xlabel=f"peak of live tensor bytes, {name}"
           if used else f"peak allocated, {name}")
    ax.set_xlim(0, 1.26 * max(max(m["measured_peak"], m["predicted_peak"] or 0) for m in memories) / unit)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    keys = [Patch(facecolor=COLOURS[i], hatch=HATCHES[i], edgecolor=INK, label=c)
            for i, c in enumerate(memory.CATEGORIES) if c in used]
    keys.append(Patch(fill=False, edgecolor="black", linestyle="--", label="predicted"))
    fig.legend(handles=keys, loc="outside right upper", fontsize=8, handlelength=2.5)
    save(fig, title, command, path)


def bars(ax, labels, values, ylabel: str, kinds=None):
    """Upright bars with their values. kinds: 0 or 1 for each bar, its colour and hatch."""
    for x, v in enumerate(values):
        if v is not None:
            kind = kinds[x] if kinds else 0
            ax.bar(x, v, 0.7, color=("#0072B2", "#F0E442")[kind], hatch=("", "//")[kind], edgecolor=INK, linewidth=0.6)
            ax.annotate(digits(v), (x, v), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
    ax.set(xticks=range(len(labels)), xticklabels=labels, ylabel=ylabel)
    ax.margins(y=0.12)
    ax.spines[["top", "right"]].set_visible(False)


def grid(title: str, rows: list[dict], command: str, path):
    """Two panels over micro-batch x accumulation: seconds an epoch, peak."""
    fig, axs = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
    names, mb = [r["name"] for r in rows], [tables.peak(r) and tables.peak(r) / 1e6 for r in rows]
    bars(axs[0], names, [tables.epoch_s(r) for r in rows], "seconds an epoch")
    bars(axs[1], names, mb, "peak, MB")
    for ax in axs:
        ax.set_xlabel("examples a micro-batch x micro-batches")
    save(fig, title, command, path)


def peers(title: str, rows: list[dict], command: str, path):
    """Two panels with a pair of bars for each precision: examples a second, and memory (on a GPU allocated, else RSS)."""
    on_gpu = any(r["program"] == tables.PEER and tables.peak(r) for r in rows) and all(tables.peak(r) for r in rows)
    fig, axs = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    names, kinds = [r["name"].split(",")[0] for r in rows], [int(r["program"] == tables.PEER) for r in rows]
    bars(axs[0], names, [r["median"]["examples_per_s"] for r in rows], "examples/s", kinds)
    bars(axs[1], names, [(tables.peak(r) if on_gpu else r["median"]["memory"]["rss_peak"]) / 1e6 for r in rows],
         "peak allocated, MB" if on_gpu else "peak RSS, MB", kinds)
    here_and_peer(fig)
    save(fig, title, command, path)


def here_and_peer(fig):
    fig.legend(handles=[Patch(facecolor="#0072B2", edgecolor=INK, label="here"),
                        Patch(facecolor="#F0E442", hatch="//", edgecolor=INK, label="transformers + PEFT")],
               loc="outside upper right", ncols=2, fontsize=8)


def speed(title: str, rows: list[dict], command: str, path):
    """One bar for each row that trains: its share of the machine's matrix limit, with the type of its products."""
    good, rows = rows, [r for r in rows if r["program"] != tables.LIMIT]
    fig, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
    names = ["\n".join(dict.fromkeys((r["name"].split(",")[0], tables.products(r)))) for r in rows]
    bars(ax, names, [tables.share(r, good) for r in rows], "share of the matrix limit, %",
         [int(r["program"] == tables.PEER) for r in rows])
    here_and_peer(fig)
    save(fig, title, command, path)


def predict(title: str, rows: list[dict], command: str, path):
    """Left: predicted against measured peak; points on the diagonal are exact. Right: the errors, sorted."""
    rows = [r for r in rows if tables.error(r) is not None]
    models = list(dict.fromkeys(r["model"] for r in rows))
    fig, axs = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    peaks = [tables.peak(r) / 1e6 for r in rows]
    ends = [0.8 * min(peaks, default=1), 1.25 * max(peaks, default=1)]
    axs[0].plot(ends, ends, color="0.5", linewidth=1, zorder=1)
    for i, model in enumerate(models):
        mine = [r for r in rows if r["model"] == model]
        axs[0].scatter([tables.peak(r) / 1e6 for r in mine], [r["median"]["memory"]["predicted_peak"] / 1e6 for r in mine],
                       marker="osD^vP*X"[i % 8], s=26, facecolor=COLOURS[i % 9], edgecolor=INK, linewidth=0.7, zorder=2,
                       label=Path(model).name)
    axs[0].set(xscale="log", yscale="log", xlabel="measured peak, MB", ylabel="predicted peak, MB", xlim=ends, ylim=ends)
    for axis in (axs[0].xaxis, axs[0].yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda x, _: f"{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    axs[0].legend(fontsize=8)
    rows = sorted(rows, key=tables.error)
    errors = [tables.error(r) for r in rows]
    axs[1].bar(range(len(rows)), errors, 0.8, color=[COLOURS[models.index(r["model"]) % 9] for r in rows], edgecolor=INK,
               linewidth=0.5)
    axs[1].axhline(0, color=INK, linewidth=0.8)
    axs[1].set(xlabel="combinations, sorted by error", ylabel="predicted / measured - 1, %", xticks=[])
    axs[1].margins(y=0.15)
    for i in {0, len(rows) - 1} if rows else ():
        axs[1].annotate(f"{errors[i]:+.2f} %", (i, errors[i]), xytext=(0, 3 if errors[i] >= 0 else -10), fontsize=8,
                        textcoords="offset points", ha="left" if i == 0 else "right")
    for ax in axs:
        ax.grid(alpha=0.3)
    save(fig, title, command, path)


def scaling(title: str, rows: list[dict], command: str, path):
    """Peak (above) and seconds a step (below) against each size, with the fitted line and power."""
    by_size = tables.axes(rows)
    n = max(1, len(by_size))
    fig, axs = plt.subplots(2, n, figsize=(3.4 * n, 5.6), layout="constrained", squeeze=False)
    for column, (size, mine) in zip(axs.T, by_size.items()):
        xs = [r["sizes"][size] for r in mine]
        for ax, ys, unit in ((column[0], [tables.peak(r) / 1e6 for r in mine], "peak, MB"),
                             (column[1], [r["median"]["step_s"] for r in mine], "seconds a step")):
            if not all(ys):
                continue
            a, b, _ = tables.line_fit(xs, ys)
            between = [xs[0] + (xs[-1] - xs[0]) * i / 50 for i in range(51)]
            ax.plot(between, [a + b * x for x in between], "--", color="0.45", linewidth=1,
                    label=f"{digits(a)} + {b:.3g} x\n~ x^{tables.exponent(xs, ys):.2f}")
            ax.plot(xs, ys, "o", color="#0072B2", markeredgecolor=INK)
            for x, y in zip(xs, ys):
                below = y < 0.99 * (a + b * x)  # away from the line
                ax.annotate(digits(y), (x, y), xytext=(4, -9) if below else (-4, 4), textcoords="offset points",
                            ha="left" if below else "right", fontsize=7)
            ax.margins(x=0.18)
            ax.set(xlabel={"length": "positions", "batch": "examples a batch"}.get(size, size), ylabel=unit,
                   ylim=(0, 1.15 * max(ys)))
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7.5, loc="lower right")
    save(fig, title, command, path)
