"""From the bench's numbers to Markdown tables: medians, ratios of paired runs, fitted laws.

A table is a list of (column title, function from a row to its cell), and a list of notes that are made from the numbers.
A row is {"name", "model", "program", "options", "runs": [what summary.json holds, ...], "median": the same with medians}.
A row that did not run has "failed" instead of "median": the last line of its process.
"""
import shlex
import statistics
from pathlib import Path

import numpy as np

PEER = "transformers_peft"  # the program of a row that is the same job in transformers + PEFT
LIMIT = "matrix_limit"  # the program of the row that measures the machine


def median(runs: list):
    """The runs' medians, number by number, in the shape of one run. None where a run has None."""
    if any(r is None for r in runs):
        return None
    if isinstance(runs[0], dict):
        return {k: median([r[k] for r in runs]) for k in runs[0]}
    if isinstance(runs[0], (int, float)):
        return runs[0] if len(set(runs)) == 1 else statistics.median(runs)
    return runs[0]


def mb(n: float | None, missing: str = "not measured") -> str:
    return missing if n is None else f"{n / 1e6:,.1f}"


def number(x: float | None, form: str = ",.2f") -> str:
    return "not measured" if x is None else format(x, form)


def peak(row: dict) -> float | None:
    return row["median"]["memory"]["measured_peak"]


def ratios(a: dict, b: dict, *keys: str) -> list[float]:
    """a / b in each repetition, whose runs are close in time. keys: the path to the number, such as "memory", "rss_peak"."""
    def value(run):
        for k in keys:
            run = run[k]
        return run
    pairs = [(value(x), value(y)) for x, y in zip(a["runs"], b["runs"])]
    return [x / y for x, y in pairs] if all(x and y for x, y in pairs) else []


def ratio(a: dict, b: dict, *keys: str) -> float | None:
    """The median of `ratios`, or None."""
    return statistics.median(values) if (values := ratios(a, b, *keys)) else None


def error(row: dict) -> float | None:
    """The error of the predicted peak, in % of the measured peak."""
    predicted = row["median"]["memory"]["predicted_peak"]
    return 100 * (predicted / peak(row) - 1) if predicted is not None and peak(row) else None


def epoch_s(row: dict) -> float | None:
    speed = row["median"]["examples_per_s"]
    return row["median"]["examples"] / speed if speed else None


def line_fit(xs, ys) -> tuple[float, float, float]:
    """(a, b, the worst deviation in %) for y = a + b x, by least squares."""
    b, a = np.polyfit(xs, ys, 1)
    return a, b, max(100 * abs((a + b * x) / y - 1) for x, y in zip(xs, ys))


def exponent(xs, ys) -> float:
    """k in y ~ x^k, by least squares over the logarithms."""
    return np.polyfit(np.log(xs), np.log(ys), 1)[0]


NAME = ("row", lambda r: r["name"])
MODEL = ("model", lambda r: Path(r["model"]).name)
OPTIONS = ("options", lambda r: f"`{r['options']}`" if r["options"] else "(none)")
PLAIN = [NAME[1], MODEL[1], OPTIONS[1]]  # these cells need no run, so a row that failed has them too
PREDICTED = ("predicted peak, MB", lambda r: mb(r["median"]["memory"]["predicted_peak"], "not predicted"))
MEASURED = ("measured peak, MB", lambda r: mb(peak(r)))
RSS = ("peak RSS, MB", lambda r: mb(r["median"]["memory"]["rss_peak"]))
STEP = ("s a step", lambda r: number(r["median"]["step_s"], ",.3f"))
TOKENS = ("tokens/s", lambda r: number(r["median"]["tokens_per_s"], ",.0f"))
LOSS = ("held-out loss", lambda r: number(r["median"]["loss"]["val_after"], ".4f"))
TRAINABLE = ("trainable parameters", lambda r: f"{r['median']['params']['trainable']:,}")


def ladder(rows, good):
    notes = []
    if len(good) > 1 and all(peak(r) for r in good):
        a, b = good[0], good[-1]
        notes = [f"From *{a['name']}* to *{b['name']}* the peak goes from {mb(peak(a))} to {mb(peak(b))} MB "
                 f"({100 * peak(b) / peak(a):.1f} %), the speed to {number(ratio(b, a, 'tokens_per_s'))} of the first."]
    return [NAME, OPTIONS, PREDICTED, MEASURED, TOKENS, LOSS, TRAINABLE], notes


def grid(rows, good):
    notes, good = [], [r for r in good if epoch_s(r) and peak(r)]
    if len(good) > 1:
        by_time = sorted(good, key=epoch_s)
        fast, slow = by_time[0], by_time[-1]
        a, b, _ = line_fit([int(r["name"].split()[0]) for r in good], [peak(r) for r in good])
        why = {"8": "one product over 8 examples reads each weight once, 8 small products read it 8 times",
               "1": "a micro-batch of one example has no padding, and one example already keeps this processor busy; where "
                    "it does not (a GPU), expect the opposite order"}
        why = why.get(fast["name"][0], "large micro-batches are padded more, small ones make more and smaller products")
        times = ratios(slow, fast, "examples_per_s")
        settled = len(times) > 2 and all(x < 1 for x in times)  # in every repetition, not only in the median
        end = f"; a likely reason, not measured here: {why}." if settled else ", but these runs do not settle the order."
        notes = [f"Time: {' < '.join(r['name'] for r in by_time)}. {fast['name']} takes {number(statistics.median(times))} "
                 f"of the time of {slow['name']}{end}",
                 f"Memory: {' < '.join(r['name'] for r in sorted(good, key=peak))}; {mb(a)} MB + {mb(b)} MB for each "
                 f"example of a micro-batch (least squares). Accumulation itself costs only the gradients, which are kept "
                 f"from one micro-batch to the next; each backward frees its graph."]
    epoch = ("seconds an epoch", lambda r: number(epoch_s(r), ",.1f"))
    return [("batch x accumulation", NAME[1]), OPTIONS, epoch, MEASURED, RSS, TOKENS, LOSS], notes


def techniques(rows, good):
    base = rows[0] if rows[0] in good else None
    share = ("of the baseline's", lambda r: number(ratio(r, base, "memory", "measured_peak") if base else None))
    times = ("times the baseline's", lambda r: number(ratio(r, base, "step_s") if base else None))
    return [NAME, OPTIONS, PREDICTED, MEASURED, share, RSS, STEP, times, LOSS], [
        "Number 4 keeps float32 masters, their gradients and AdamW's states in host memory, and 16-bit weights on the "
        "device. In a run on the CPU these are one memory: the peak counts both, and nothing is saved."]


def predict(rows, good):
    errors = sorted(((error(r), r) for r in good if error(r) is not None), key=lambda x: -abs(x[0]))
    notes = []
    if errors:
        worst, row = errors[0]
        notes = [f"{len(errors)} combinations. Worst: {MODEL[1](row)}, {OPTIONS[1](row)}: {worst:+.2f} %. Median of the "
                 f"absolute errors: {statistics.median(abs(e) for e, _ in errors):.2f} %."]
    return [MODEL, OPTIONS, PREDICTED, MEASURED, ("error, %", lambda r: number(error(r), "+.2f"))], notes


def peers(rows, good):
    notes = ["Every second row is the same job in transformers + PEFT (bench/transformers_peft.py), the peer. A ratio is "
             "here / peer, the median over the pairs of neighbouring runs. Examples/s leave out the first step, and here "
             "also the steps that the ledger follows. 16 bit is bfloat16 autocast: over 16-bit weights here, over float32 "
             "weights in the peer, as its documentation shows it."]
    for ours, theirs in zip(rows[::2], rows[1::2]):
        if ours not in good or theirs not in good:
            continue
        pairs = " ".join(map(number, ratios(ours, theirs, "examples_per_s")))
        job, speed = ours["name"].split(",")[0], number(ratio(ours, theirs, "examples_per_s"))
        note = (f"{job}: {speed} times the examples/s ({pairs}), {number(ratio(ours, theirs, 'memory', 'rss_peak'))} of the "
                f"peak RSS")
        on_gpu = peak(theirs) and f", {number(ratio(ours, theirs, 'memory', 'measured_peak'))} of the peak allocated"
        notes.append(note + (on_gpu or "") + ".")
    gpu = any(r["program"] == PEER and peak(r) for r in good)
    allocated = [("peak allocated, MB", MEASURED[1])] if gpu else []
    return [NAME, ("examples/s", lambda r: number(r["median"]["examples_per_s"])), RSS, *allocated, LOSS, TRAINABLE], notes


def axes(good) -> dict[str, list[dict]]:
    """scaling's rows by the size that varies in them: {"length": rows in rising order, "batch": ..., "layers": ...}.

    The base configuration is in all three. A size with fewer than three rows is left out, because a law needs three points.
    """
    good = [r for r in good if peak(r)]
    sizes = ("length", "batch", "layers") if good else ()
    base = {k: statistics.mode(r["sizes"][k] for r in good) for k in sizes}
    varied = {k: [r for r in good if all(r["sizes"][j] == base[j] for j in base if j != k)] for k in base}
    return {k: sorted(rows, key=lambda r: r["sizes"][k]) for k, rows in varied.items() if len(rows) > 2}


def scaling(rows, good):
    notes = []
    for size, varied in axes(good).items():
        xs, peaks = [r["sizes"][size] for r in varied], [peak(r) for r in varied]
        a, b, worst = line_fit(xs, peaks)
        notes.append(f"Peak against {size}: {mb(a)} MB + {b / 1e6:,.3f} MB x {size} (worst deviation {worst:.2f} %); as a "
                     f"power, {size}^{exponent(xs, peaks):.2f}.")
        if all(times := [r["median"]["step_s"] for r in varied]):
            a, b, worst = line_fit(xs, times)
            notes.append(f"Time a step against {size}: {a:,.3f} s + {b:,.5f} s x {size} (worst deviation {worst:.1f} %); as "
                         f"a power, {size}^{exponent(xs, times):.2f}.")
    return [NAME, PREDICTED, MEASURED, RSS, STEP, TOKENS], notes


def limit_and_flops(good) -> tuple[dict | None, float | None]:
    """(the row of the limit, FLOPs a token of training as matrix_limit.py counts them), for speed. The peer's job is the
    same, so its FLOPs are too."""
    limit = next((r for r in good if r["program"] == LIMIT), None)
    labelled = next((r["median"]["labelled_share"] for r in good if r["program"] == "train.py"), None)
    if limit is None or labelled is None:
        return limit, None
    return limit, limit["median"]["flops"]["token"] + labelled * limit["median"]["flops"]["labelled_token"]


def products(row: dict) -> str:
    return row["median"]["arithmetic"]["products"]


def share(row: dict, good) -> float | None:
    """The share of the limit of its product type that a row reaches, in %: the median over the repetitions."""
    limit, flops = limit_and_flops(good)
    if flops is None:
        return None
    pairs = [(run["tokens_per_s"], at["gflops"].get(products(row))) for run, at in zip(row["runs"], limit["runs"])]
    return statistics.median(100 * flops * x / 1e9 / most for x, most in pairs) if all(x and y for x, y in pairs) else None


def speed(rows, good):
    limit, flops = limit_and_flops(good)
    most = limit["median"]["gflops"] if limit else {}

    def reached(r):
        return number(flops * r["median"]["tokens_per_s"] / 1e9 if flops and r["median"]["tokens_per_s"] else None, ",.1f")

    def of_training(make):
        return lambda r: "" if r["program"] == LIMIT else make(r)
    columns = [NAME, OPTIONS, ("product type", lambda r: " / ".join(most) if r is limit else products(r)),
               ("tokens/s", of_training(TOKENS[1])), ("GFLOP/s", of_training(reached)),
               ("limit, GFLOP/s", lambda r: " / ".join(number(x, ",.1f") for x in most.values()) if r is limit else
                number(most.get(products(r)), ",.1f")),
               ("share, %", of_training(lambda r: number(share(r, good), ",.1f")))]
    notes = ["The limit: x W^T and grad W alone, in the shapes of the model's linear layers, with the tokens of a mean "
             "micro-batch as rows (bench/matrix_limit.py). The share is GFLOP/s / the limit of the row's product type. Each "
             "repetition is divided by its own limit; the share is the median. Compare machines by it, not by tokens/s."]
    if flops:
        blocks = limit["median"]["flops"]["token"]
        notes.append(f"Counted for each token that is not padding: {blocks / 1e6:,.1f} MFLOP, 4 for each weight of the "
                     f"blocks' linear layers, and on average {(flops - blocks) / 1e6:,.1f} MFLOP, 4 for each weight of the "
                     f"head and labelled token. Not counted: adapters, attention, norms, the optimizer, the second forward "
                     f"of --ckpt-every 1, and the peer's products of the head with tokens that have no label.")
    by_name = {r["name"]: r for r in good}
    for a, b in (("float32, here", "float32, peer"), ("AMP, here", "AMP, peer"), ("recomputed, here", "float32, here")):
        if a in by_name and b in by_name and (pairs := ratios(by_name[a], by_name[b], "tokens_per_s")):
            notes.append(f"{a}: {number(statistics.median(pairs))} times the tokens/s of *{b}* "
                         f"({' '.join(map(number, pairs))}).")
    return columns, notes


def markdown(title: str, table, doc: dict, picture: str | None) -> str:
    """The whole page: the command, the machine, the table, its notes, the picture. table: one of the functions above."""
    rows, origin, s = doc["rows"], doc["about"], doc["settings"]
    good = [r for r in rows if "median" in r]
    columns, notes = table(rows, good)
    commits = sorted({str(run["commit"]) for r in rows for run in r["runs"]})
    where = ", ".join([origin["date"], origin["machine"], *(f"{k} {v}" for k, v in origin["versions"].items()),
                       f"commit {' and '.join(commits)}"])
    how = f"{s['steps']} steps a run, " + (f"medians of {s['repeat']} runs" if s["repeat"] > 1 else "one run a row")
    lines = [f"# {title}", "", "```", doc["command"], "```", "", f"{where}. {how}; MB are 10^6 bytes."
             + (f" Every row with `{shlex.join(s['extra'])}`." if s["extra"] else ""), "",
             "| " + " | ".join(name for name, _ in columns) + " |", "|---" * len(columns) + "|"]
    for r in rows:
        cells = [make(r) if r in good or make in PLAIN else "failed" for _, make in columns]
        lines.append("| " + " | ".join(cells) + " |")
    notes += [f"{r['name']} ({Path(r['model']).name}) failed: {r['failed']}" for r in rows if "failed" in r]
    for r in good:
        if len(peaks := {run["memory"]["measured_peak"] for run in r["runs"]}) > 1:
            notes.append(f"{r['name']}: the peak was not the same in every run: {', '.join(map(mb, sorted(peaks)))} MB.")
    lines += ["", *(f"* {note}" for note in notes)] if notes else []
    lines += ["", f"![{title}]({picture})"] if picture else []
    return "\n".join(lines) + "\n"
