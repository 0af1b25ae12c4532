"""Did the adapter help, and what did it cost? One page: a table, a picture, and every number as JSON.

    python compare.py --model M --adapter DIR --data held-out.jsonl --out FOLDER
    python compare.py --model M --adapter a=DIR --adapter b=DIR --data held-out.jsonl --out FOLDER --exact-match
    python train.py ... --compare                       a run ends with it, on its held-out examples, in its own folder

docs/compare.md says what each number means. The measuring is in run/comparison.py, the statistics in run/intervals.py. Here
is what surrounds them: the options, loading, and the page.

Several LoRA adapters share one model. An adapter that cannot share (DoRA, another method, --lora-init loftq or pissa) is
given alone: the base is measured first, then the adapter is put on it. Without --adapter, the base is compared with itself:
every difference must be exactly 0.
"""
import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
    import terminal
    terminal.start()

import torch

import data
import generate
import memory
from errors import UserError
from files import conversations, peft_files, rows, weights, writing
from files.hub import ASSETS
from files.json_files import show
from run import comparison
from run.evaluate import spread
from run.record import printable
from techniques.device import usable_device

GENERAL = ASSETS / "plain.txt"


def read_data(path, tokenizer, template: str, max_length: int, columns: dict | None = None) -> data.Dataset:
    """All examples of the files that `path` names. Raises UserError."""
    found = [data.read_tokens(s.path, tokenizer, template, columns) for s in rows.sources(str(path))]
    return data.Dataset([data.Examples(tokens, max_length).part() for tokens in found], name=str(path))


def compare(model: str, adapters: dict[str | None, str], bits: int, device: str, tokenizer, examples: data.Dataset,
            general: data.Dataset, max_examples: int | None = None, batch_size: int = 8, extract=None,
            max_new_tokens: int = 128) -> dict:
    """Measure the model and the adapters, as generate.named gives them; returns what compare.json holds. Raises UserError.

    extract: text -> the answer in it or None, to compare replies with references; without it there are no replies.
    """
    base, numbers = Path(model).name, spread(len(examples), max_examples)
    folders = {name or Path(folder).resolve().name: folder for name, folder in adapters.items()}
    if base in folders:
        raise UserError(f"the model and an adapter are both named {base}; give another name: --adapter NAME={folders[base]}")
    alone = len(folders) == 1 and not peft_files.can_share(*folders.values())
    net = weights.load(model, bits, device)
    sizes, routes, measured, on_general = {base: 0}, {base: None}, {}, {}
    weight_bytes = memory.count(net)["bytes"]
    asked = extract and comparison.questions(examples, numbers, tokenizer, extract, net.config.n_positions)

    def measure(routes: comparison.Routes):
        found = comparison.measure(net, routes, examples, numbers, batch_size)
        for label, m in found.items():
            m.peak -= sum(size for other, size in sizes.items() if other != label)  # adapters that only wait
        on_general.update(comparison.measure(net, routes, general, torch.arange(len(general)), batch_size))
        if asked:
            comparison.answer(net, routes, asked, extract, tokenizer, batch_size, max_new_tokens, found)
        measured.update(found)

    def put(label: str, place, *where):
        place(net, *where)
        sizes[label] = memory.count(net)["bytes"] - weight_bytes - sum(sizes.values())

    for (label, folder), name in zip(folders.items(), adapters) if not alone else ():
        routes[label] = name or "adapter"
        put(label, peft_files.add, routes[label], folder)
    if not folders:
        routes[f"{base} again"], sizes[f"{base} again"] = None, 0
    measure(routes)
    for label, folder in folders.items() if alone else ():
        put(label, peft_files.load, folder)
        measure({label: None})
    states = {label: {**comparison.about(m, on_general[label]), "adapter_bytes": sizes[label],
                      **(comparison.against(measured[base], m) if label != base else {})} for label, m in measured.items()}
    texts = comparison.starts_of(examples, numbers, tokenizer)
    each = [{"text": text, "losses": {label: m.losses[i].item() for label, m in measured.items()}}
            for i, text in enumerate(texts)]
    for i, q in enumerate(asked or ()):
        q.replies = {label: {"reply": m.replies[i], "right": m.right[i]} for label, m in measured.items()}
    return {"model": model, "adapters": folders, "bits": bits, "device": device, "base": base, "weight_bytes": weight_bytes,
            "labels": int(examples.labels[numbers].sum()), "general_labels": general.n_labels, "states": states,
            "examples": each, "questions": [{"answer": q.answer, "replies": q.replies} for q in asked or ()]}


# ---------------------------------------------------------------------------------------------- the page

def table(found: dict) -> list[list[str]]:
    """The numbers as text: a column for each state, the base first. Lines without a number are left out."""
    n, asked, states = len(found["examples"]), len(found["questions"]), found["states"]
    base = states[found["base"]]
    lines = [
        ("held-out loss, nats a token", lambda s: f"{s['loss']:.4f}"),
        ("perplexity", lambda s: f"{s['perplexity']:,.2f}" if s["perplexity"] else "not finite"),
        ("mean loss of an example", lambda s: f"{s['mean_loss']:.4f}"),
        ("... minus the base's", lambda s: f"{s['difference'][0]:+.4f}"),
        ("... its 95 % interval", lambda s: "{:+.4f} to {:+.4f}".format(*s["difference"][1:])),
        ("examples improved", lambda s: f"{s['improved']} of {n} ({100 * s['improved'] / n:.1f} %)"),
        ("loss on the general text", lambda s: f"{s['general_loss']:.4f}"),
        ("... minus the base's", lambda s: "difference" in s and f"{s['general_loss'] - base['general_loss']:+.4f}"),
        ("right answers", lambda s: f"{s['right']} of {asked} ({100 * s['right'] / asked:.1f} %)"),
        ("... only the base, only this one", lambda s: f"{s['only_base']}, {s['only_this']}"),
        ("... McNemar's p", lambda s: f"{s['p']:.4g}"),
        ("losses, tokens/s", lambda s: f"{s['tokens_per_s']:,.0f}"),
        ("replies, tokens/s", lambda s: f"{s['reply_tokens_per_s']:,.0f}"),
        ("weights", lambda s: memory.human(found["weight_bytes"])),
        ("adapter", lambda s: s["adapter_bytes"] and memory.human(s["adapter_bytes"])),
        ("peak of the largest batch", lambda s: memory.human(s["peak"]))]
    made = [["", *states]]
    for title, form in lines:
        cells = []
        for s in states.values():
            try:
                cells.append(form(s) or "")
            except KeyError:  # the base has no difference, and without a --match there are no answers
                cells.append("")
        made += [[title, *cells]] * any(cells)
    return made


def verdict(label: str, s: dict) -> str:
    mean, low, high = s["difference"]
    interval = f"95 % interval {low:+.4f} to {high:+.4f}"
    if low == high == 0:
        return f"{label} changes nothing: every example has exactly the base's loss."
    if low <= 0 <= high:
        return (f"These examples do not show whether {label} helped: the mean loss of an example changes by {mean:+.4f} "
                f"nats a token, and the {interval} contains 0.")
    how = "helped" if mean < 0 else "did harm"
    return f"{label} {how}: the mean loss of an example changes by {mean:+.4f} nats a token ({interval})."


def vote_line(v: dict) -> str:
    line = f"{v['a']} against {v['b']}: {v['wins_a']} to {v['wins_b']}, and {v['ties']} ties"
    if v["share_a"] is None:
        return line
    share, low, high = (100 * x for x in (v["share_a"], *v["interval"]))
    return f"{line}; of the others {v['a']} won {share:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"


def aligned(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
                     for line in cells)


def safe(text: str) -> str:
    """Text of the data in a cell: no HTML and no Markdown of it is shown as such."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else ""


def page(found: dict) -> str:
    """compare.md."""
    head, *body = table(found)
    base, lines = found["base"], [f"# {found['base']}: did the adapter help, and what did it cost?", ""]
    adapted = {label: s for label, s in found["states"].items() if label != base}
    lines += [f"* {verdict(label, s)}" for label, s in adapted.items()] + ["", f"| {' | '.join(head)} |"]
    lines += ["|---|" + "---:|" * len(found["states"]), *(f"| {' | '.join(line)} |" for line in body), ""]
    lines += ["![The difference of each adapter, and of each example](compare.png)", ""]
    for label, s in adapted.items():
        lines += [f"## The worst examples of {label}", "", f"| {base} | {label} | difference | the text begins |",
                  "|---:|---:|---:|---|"]
        for e in (found["examples"][i] for i in s["worst"]):
            before, after = e["losses"][base], e["losses"][label]
            lines.append(f"| {before:.4f} | {after:.4f} | {after - before:+.4f} | {safe(e['text'])} |")
        lines.append("")
    if found["votes"]:
        lines += ["## Blind votes", "", *(f"* {vote_line(v)}" for v in found["votes"]), ""]
    lines += ["## How it was measured", "",
              f"{len(found['examples']):,} examples with {found['labels']:,} labelled tokens of {safe(found['data'])}. "
              f"General text: {found['general_labels']:,} tokens of {safe(Path(found['general']).name)}. "
              f"Weights in {found['bits']} bits, on {found['device']}. Intervals: 10,000 resamples of the examples. They "
              "say how much other held-out examples would change the result, not how much another training would. The "
              "losses of all examples are in compare.json.", "",
              f"    {found['command']}", ""]
    return "\n".join(lines)


def plot(found: dict, path: Path):
    """compare.png: the mean difference of each adapter with its interval; the difference of each example, sorted."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    base, n = found["base"], len(found["examples"])
    adapted = {label: s for label, s in found["states"].items() if label != base}
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.3")
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.25), layout="constrained")
    for y, (label, s) in enumerate(adapted.items()):
        colour, (mean, low, high) = colours[y % len(colours)], s["difference"]
        left.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, markersize=4, capsize=8, lw=2)
        left.annotate(f"{mean:+.4f}\n({low:+.4f} to {high:+.4f})", (mean, y), (0, 12), textcoords="offset points",
                      ha="center", fontsize=9, bbox={"color": "white", "pad": 1})
        each = sorted(e["losses"][label] - e["losses"][base] for e in found["examples"])
        share = [100 * (i + 0.5) / n for i in range(n)]
        right.plot(share, each, "o" if n < 2000 else "-", color=colour, markersize=3, label=label)
    left.set_yticks(range(len(adapted)), adapted, parse_math=False)
    left.set(ylim=(len(adapted) - 0.4, -0.6), xlabel=f"mean loss minus {base}'s, nats a token; bar: 95 % interval")
    right.set(xlabel=f"share of the {n:,} examples, the most improved first, %", xlim=(0, 100),
              ylabel=f"loss minus {base}'s, nats a token")
    left.axvline(0, color="0.2", linewidth=1)
    right.axhline(0, color="0.2", linewidth=1)
    left.margins(x=0.3)
    if len(adapted) > 1:
        right.legend()
    for ax in (left, right):
        ax.grid(alpha=0.3)
    fig.suptitle(f"{base}: below 0 an adapter helped", parse_math=False)
    with writing.atomic(path) as tmp:
        fig.savefig(tmp, format="png", dpi=120)
    plt.close(fig)


def write(found: dict, folder: Path):
    """The three files. Prints the table."""
    writing.write_text(folder / "compare.json", json.dumps(found, indent=1) + "\n")
    writing.write_text(folder / "compare.md", page(found))
    plot(found, folder / "compare.png")
    print(aligned(table(found)))
    for label, s in found["states"].items():
        if label != found["base"]:
            print(verdict(label, s))
    for v in found["votes"]:
        print(vote_line(v))


def end_of_run(cfg, out: Path, tokenizer, template: str, examples: data.Dataset):
    """train.py --compare: the base against the run's best adapter on its held-out examples, in `out`/compare."""
    adapter = str(out / "best")
    shutil.rmtree(out / "compare", ignore_errors=True)  # a resumed run makes it anew
    with writing.new_folder(out / "compare") as tmp:
        general = read_data(GENERAL, tokenizer, template, examples.parts[0].file.max_length)
        found = compare(cfg.model, {None: adapter}, cfg.bits, cfg.device, tokenizer, examples, general, cfg.eval_examples,
                        cfg.batch_size)
        write({**found, "data": cfg.val_data or f"the held-out rows of {cfg.data}", "general": str(GENERAL), "votes": [],
               "command": f"python train.py --compare (the run in {printable(str(out))})"}, tmp)
    print(f"written       compare.json, compare.md, compare.png in {out / 'compare'}")


def main(argv=None):
    p = argparse.ArgumentParser(prog="compare.py", description="Did the adapter help, and what did it cost?")
    p.add_argument("--model", default="gpt2-nano", help="short name, hub repository or folder (default: %(default)s)")
    p.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="folder of an adapter; with NAME=, "
                   "several LoRA adapters; without one, the base is compared with itself")
    p.add_argument("--data", required=True, help="held-out rows, as train.py reads them")
    p.add_argument("--columns", help="names of columns: instruction=question,response=answer (KNOWN=YOURS)")
    p.add_argument("--out", required=True, help="the new folder for compare.md, compare.json and compare.png")
    p.add_argument("--general", default=str(GENERAL), help="a text that has nothing to do with the data: is it forgotten? "
                   "(default: the bundled assets/plain.txt)")
    answers = p.add_mutually_exclusive_group()
    answers.add_argument("--exact-match", action="store_true", help="let each reply to the prompts; right is a reply that "
                         "equals the row's own")
    answers.add_argument("--match", metavar="REGEX", help="right is a reply in which this finds the same (its first group, "
                         "or the whole match) as in the row's own")
    p.add_argument("--max-new-tokens", type=int, help="longest reply, in tokens (default: 128)")
    p.add_argument("--votes", metavar="FILE", help="blind votes that serve.py's page wrote")
    p.add_argument("--max-examples", type=int, help="only so many examples, at equal distances (default: all)")
    p.add_argument("--max-length", type=int, help="most positions of an example, the rest is cut off (default: 512, or the "
                   "model's positions if they are fewer)")
    p.add_argument("--batch-size", type=int, default=8, help="examples, or replies, at the same time (default: 8)")
    p.add_argument("--bits", type=int, choices=(32, 16, 8, 4), help="bits of each weight in memory (default: 8 or 4 if "
                   "the checkpoint is stored so or the adapter was trained so, else 32)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    a = p.parse_args(argv)
    for name in ("max_new_tokens", "max_examples", "max_length", "batch_size"):
        if (value := getattr(a, name)) is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1, and below 2147483648")
    if a.max_new_tokens and not (a.exact_match or a.match is not None):
        raise UserError("--max-new-tokens has no effect without --exact-match or --match: there are no replies")
    extract = comparison.exact if a.exact_match else a.match if a.match is None else comparison.extractor(a.match)
    adapters = generate.named(a.adapter)
    with writing.new_folder(a.out) as tmp:
        votes = comparison.read_votes(a.votes) if a.votes is not None else []
        bits = a.bits or weights.stored_bits(weights.find(a.model)) or generate.recorded_bits(adapters) or 32
        virtual = max((peft_files.options(f, a.model).get("virtual_tokens", 0) for f in adapters.values()), default=0)
        positions = weights.config_of(a.model)[0].n_positions - virtual
        if a.max_length and a.max_length > positions:
            raise UserError(f"--max-length {a.max_length}: {a.model} has {positions} positions"
                            + f" after {virtual} virtual tokens" * (virtual > 0))
        tokenizer = data.load_tokenizer(a.model)
        template = generate.saved_template(adapters)
        template = data.load_template("auto", tokenizer) if template is None else template
        max_length = a.max_length or min(512, positions)
        examples = read_data(a.data, tokenizer, template, max_length, conversations.parse_columns(a.columns))
        if a.max_examples and a.max_examples > len(examples):
            raise UserError(f"--max-examples {a.max_examples}: {show(a.data)} has {len(examples)}; leave it out")
        if line := examples.what_is_cut():
            print(line)
        general = read_data(a.general, tokenizer, template, max_length)
        found = compare(a.model, adapters, bits, usable_device(a.device), tokenizer, examples, general, a.max_examples,
                        a.batch_size, extract, a.max_new_tokens or 128)
        words = sys.argv[1:] if argv is None else argv
        write({**found, "data": a.data, "general": a.general, "votes": votes,
               "command": f"python compare.py {shlex.join(map(printable, words))}"}, tmp)
    print(f"written       compare.json, compare.md, compare.png in {a.out}")


if __name__ == "__main__":
    terminal.run(main)
