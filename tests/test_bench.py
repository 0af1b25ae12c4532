"""The bench on tiny models. The processes of the rows are replaced by a stub, except in one real table at the end."""
import argparse
import dataclasses
import importlib
import json
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from conftest import ROOT, make_folder
from torch.utils.flop_counter import FlopCounterMode

import bench.__main__ as bench
import memory
import train
from bench import matrix_limit, plots, tables
from errors import UserError
from files import weights
from files.rows import read_rows
from run import options as options_
from run import prepare
from techniques import lora_init, optim
from techniques.loss import sum_loss


def a_run(peak=100_000_000, speed=500.0, gpu=False, predicted=0.98, **more) -> dict:
    """What run_one returns: summary.json, and the four entries that it adds."""
    parts = {c: peak // len(memory.CATEGORIES) for c in memory.CATEGORIES}
    parts[memory.CATEGORIES[0]] += peak - sum(parts.values())
    return {"params": {"total": 2000, "trainable": 100, "percent": 5.0},
            "memory": {"predicted_peak": predicted and int(predicted * peak), "measured_peak": peak, "reserved": None,
                       "rss_peak": 3 * peak, "by_category": None if gpu else parts,
                       "predicted_by_category": None if gpu else {c: int(0.98 * n) for c, n in parts.items()}},
            "loss": {"first": 3.0, "last": 2.0, "val_before": 3.1, "val_after": 2.1, "val_best": 2.1},
            "tokens_per_s": speed, "examples_per_s": speed / 50, "wall_s": 9.0, "steps": 4, "step_s": 400 / speed,
            "examples": 800, "labelled_share": 0.5, "commit": "abc",
            "arithmetic": {"weights": "float32", "products": "float32", "why": "a test"}, **more}


LIMIT = {"gflops": {"float32": 4.0, "bfloat16": 16.0}, "flops": {"token": 3_000_000, "labelled_token": 2_000_000}}


def peak_of(row) -> int:
    """A peak that depends on the row, so that rows differ in tables and pictures."""
    sizes = row.get("sizes", {"length": len(row["options"]) + 1, "batch": 1, "layers": 1})
    return 20_000_000 + 1000 * sizes["length"] * sizes["batch"] * sizes["layers"]


@pytest.fixture
def started(monkeypatch):
    """The names of the rows that were run, in order. A test may replace started.answer, which makes their results."""
    class Started(list):
        answer = staticmethod(lambda row: a_run(peak_of(row)))
    ran = Started()

    def run_one(row, settings):
        ran.append(row["name"])
        return ran.answer(row)
    monkeypatch.setattr(bench, "run_one", run_one)
    return ran


@pytest.fixture
def no_picture(monkeypatch):
    """Draw no picture: matplotlib takes longer than the rest of these tests together."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **kw: open(path, "w").close())


def document(out, name="grid", model="gpt2-nano") -> dict:
    return json.loads((out / f"{name}-{model}.json").read_text())


def kept(out) -> list[int]:
    return [len(r["runs"]) for r in document(out)["rows"]]


# ------------------------------------------------------------------------------------------------ keep and go on

def test_an_interrupted_bench_keeps_its_runs_and_resume_makes_the_others(started, no_picture, tmp_path, capsys):
    def until_the_sixth(row):
        if len(started) == 6:
            raise KeyboardInterrupt
        return a_run()
    started.answer = until_the_sixth
    command = ["grid", "--repeat", "2", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench.main(command)
    assert kept(tmp_path) == [2, 1, 1, 1] and not document(tmp_path)["finished"]
    assert "grid-gpt2-nano.json: 5; the same command with --resume" in capsys.readouterr().out
    assert not (tmp_path / "grid-gpt2-nano.md").exists()
    with pytest.raises(UserError, match="holds 5 runs of an unfinished bench: --resume"):
        bench.main(command)
    with pytest.raises(UserError, match="made with steps 20, now steps 9; choose another --out, or delete it"):
        bench.main([*command, "--resume", "--steps", "9"])
    assert kept(tmp_path) == [2, 1, 1, 1]

    started.clear()
    started.answer = lambda row: a_run()
    assert bench.main([*command, "--resume"])
    assert started == ["2 x 4", "4 x 2", "8 x 1"]
    assert kept(tmp_path) == [2, 2, 2, 2] and document(tmp_path)["finished"]
    assert "--resume" not in document(tmp_path)["command"]


@pytest.mark.parametrize("change", [["--steps", "5"], ["--data", "x.json"], ["--repeat", "3"], ["--device", "cpu"],
                                    ["--", "--max-length", "64"]])
def test_resume_uses_no_run_of_another_setting(change, started, no_picture, tmp_path, capsys):
    bench.main(["grid", "--repeat", "1", "--out", str(tmp_path)])
    n = len(started)
    bench.main(["grid", "--repeat", "1", "--out", str(tmp_path), "--resume"])
    assert len(started) == n == 4
    bench.main(["grid", *([] if change[0] == "--repeat" else ["--repeat", "1"]), "--out", str(tmp_path), "--resume",
                *change])
    assert len(started) > n and "none of its runs is used" in capsys.readouterr().out


def test_a_row_whose_options_changed_is_run_again(started, no_picture, tmp_path, monkeypatch):
    bench.main(["grid", "--repeat", "1", "--out", str(tmp_path)])
    started.clear()
    changed = bench.BENCHES["grid"]
    monkeypatch.setattr(changed, "rows", bench.named({**bench.GRID, "8 x 1": "--batch-size 8 --lora-r 4"}))
    bench.main(["grid", "--repeat", "1", "--out", str(tmp_path), "--resume"])
    assert started == ["8 x 1"]


def test_rows_take_turns(started, no_picture, tmp_path):
    bench.main(["grid", "--repeat", "2", "--out", str(tmp_path)])
    assert started == 2 * list(bench.GRID)


# ------------------------------------------------------------------------------------------------------ failures

def test_a_failing_row_is_one_line_and_the_others_stay(started, no_picture, tmp_path, capsys):
    def answer(row):
        if row["name"] == "4 x 2":
            raise bench.RunFailed("error: no room on the card")
        return a_run()
    started.answer = answer
    command = ["grid", "--repeat", "2", "--out", str(tmp_path)]
    assert not bench.main(command)
    assert started.count("4 x 2") == 1, "a row that failed is not tried in every repetition"
    text = (tmp_path / "grid-gpt2-nano.md").read_text()
    assert text.count("no room on the card") == 1 and "* 4 x 2 (gpt2-nano) failed: error: no room on the card" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1 and len(rows) == 5
    assert "failed" in rows[3] and "failed" not in rows[4]

    started.clear()
    started.answer = lambda row: a_run()
    assert bench.main([*command, "--resume"]) and started == ["4 x 2", "4 x 2"]


@pytest.mark.parametrize("code, out, err, said", [
    (1, "training: 9 examples\n", "Traceback\n  File x\nerror: --bits 4 needs --amp\n", "error: --bits 4 needs --amp"),
    (-9, "step 1\n", "", "killed by signal 9 .*step 1"), (3, "", "", "exit status 3")])
def test_a_failed_process_is_its_last_line(code, out, err, said, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: subprocess.CompletedProcess(command, code, out, err))
    settings = {"data": None, "steps": 2, "device": None, "extra": []}
    with pytest.raises(bench.RunFailed, match=said) as e:
        bench.run_one({"name": "x", "model": "gpt2-nano", "options": "", "program": "train.py"}, settings)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("command, said", [
    (["grid", "--steps", "0"], "--steps 0: must be at least 1"), (["peers", "--", "--amp"], "same on both sides"),
    (["speed", "--", "--amp"], "same on both sides"), (["speed", "--data", "none.json"], "none.json"),
    (["grid", "--", "--steps=3"], "--steps belongs before the --"), (["grid", "--model", "gpt3-nano"], "no such folder"),
    (["scaling", "--data", "x.txt"], "scaling takes no --data")])
def test_wrong_options_are_one_line(command, said, started, tmp_path):
    with pytest.raises(UserError, match=said):
        bench.main([command[0], "--out", str(tmp_path), *command[1:]])
    assert not started


def test_an_unknown_name_lists_the_names(capsys):
    with pytest.raises(SystemExit):
        bench.main(["ladders"])
    said = capsys.readouterr().err
    assert "ladders" in said and all(name in said for name in bench.BENCHES)


# ------------------------------------------------------------------------------------------------------- numbers

def test_medians_keep_the_shape_and_exact_numbers_stay_exact():
    m = tables.median([a_run(7, 1.0), a_run(7, 9.0), a_run(7, 2.0)])
    assert m["tokens_per_s"] == 2.0 and m["memory"]["measured_peak"] == 7 and isinstance(m["memory"]["measured_peak"], int)
    assert m["memory"]["reserved"] is None and m["commit"] == "abc"
    assert tables.median([a_run(8, gpu=True), a_run(8)])["memory"]["by_category"] is None


def test_a_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_the_medians():
    ours, theirs = ({"runs": [{"speed": x} for x in xs]} for xs in ((10, 20, 90), (5, 4, 30)))
    assert tables.ratio(ours, theirs, "speed") == 3  # the pairs: 2, 5, 3; the medians: 20 / 5
    assert tables.ratio(ours, {"runs": [{"speed": None}] * 3}, "speed") is None


def test_fits_find_the_law_of_synthetic_data():
    xs = [128, 256, 512, 1024]
    assert tables.exponent(xs, [3 * x ** 1.7 for x in xs]) == pytest.approx(1.7)
    a, b, worst = tables.line_fit(xs, [5e8 + 2e5 * x for x in xs])
    assert (a, b) == (pytest.approx(5e8), pytest.approx(2e5)) and worst < 1e-6
    assert tables.line_fit([1, 2, 3], [1, 2, 4])[2] == pytest.approx(100 / 6)  # the line is 5/6 where the point is 1


def test_the_worst_prediction_is_named(started, no_picture, tmp_path):
    started.answer = lambda row: a_run(predicted=0.9 if row["options"] == "--full --amp" else 1.01)
    bench.main(["predict", "--model", "gpt2-nano", "--out", str(tmp_path)])
    text = (tmp_path / "predict-gpt2-nano.md").read_text()
    assert (f"{len(bench.PREDICT)} combinations. Worst: gpt2-nano, `--full --amp`: -10.00 %. Median of the absolute errors: "
            f"1.00 %." in text)


def test_a_peak_that_changes_between_repetitions_is_told(started, no_picture, tmp_path):
    started.answer = lambda row: a_run(50_000_000 + len(started) // 8 * (row["name"] == "8 x 1") * 200_000)
    bench.main(["grid", "--repeat", "2", "--out", str(tmp_path)])
    text = (tmp_path / "grid-gpt2-nano.md").read_text()
    assert "8 x 1: the peak was not the same in every run: 50.0, 50.2 MB." in text and text.count("not the same") == 1


@pytest.mark.parametrize("speeds, said", [((200, 200, 200), "a likely reason"), ((200, 200, 50), "do not settle"),
                                          ((200, 200), "do not settle")])
def test_the_grid_gives_a_reason_only_for_an_order_that_every_repetition_shows(speeds, said, started, no_picture, tmp_path):
    started.answer = lambda row: a_run(100_000_000 + int(row["name"][0]), speeds[(len(started) - 1) // 4]
                                       if row["name"] == "8 x 1" else 100 + int(row["name"][0]))
    bench.main(["grid", "--repeat", str(len(speeds)), "--out", str(tmp_path)])
    text = (tmp_path / "grid-gpt2-nano.md").read_text()
    assert "* Time: 8 x 1 < 4 x 2 < 2 x 4 < 1 x 8. 8 x 1 takes 0.51 of the time of 1 x 8" in text  # 101 / 200
    assert said in text and ("a likely reason" in text) != ("do not settle" in text)
    assert "* Memory: 1 x 8 < 2 x 4 < 4 x 2 < 8 x 1; 100.0 MB" in text


# ---------------------------------------------------------------------------------------------------------- rows

def test_each_rung_of_the_ladder_is_the_one_before_and_one_technique():
    rungs = [dataclasses.asdict(train.parse(options.split())) for options in bench.LADDER.values()]
    changes = [{k for k in a if a[k] != b[k]} for a, b in zip(rungs, rungs[1:])]
    assert changes == [{"full"}, {"amp"}, {"ckpt_every"}, {"ckpt_every"}, {"batch_size", "grad_accum"}, {"bits"}, {"bits"},
                       {"optimizer"}]
    assert rungs[0]["full"] and [r["batch_size"] * r["grad_accum"] for r in rungs] == [8] * 9


def test_every_row_is_a_configuration_that_train_accepts_and_predict_covers_the_toggles():
    for options in (*bench.LADDER.values(), *bench.GRID.values(), *bench.TECHNIQUES.values(), *bench.PREDICT):
        cfg = train.resolve(train.parse(options.split()))
        assert options_.resolve_bits(cfg, None) in (32, 16, 8, 4)
    assert len(set(bench.PREDICT)) == len(bench.PREDICT) >= 24
    seen = [dataclasses.asdict(train.parse(options.split())) for options in bench.PREDICT]
    for name, values in {"bits": (None, 32, 8, 4), "amp": (0, 1), "ckpt_every": (0, 1, 2), "ckpt_offload": (0, 1),
                         "pack": (0, 1), "full": (0, 1), "lora_targets": (None, "all"), "lora_dropout": (0, 0.1),
                         "optimizer": optim.OPTIMIZERS, "lora_init": lora_init.INITS}.items():
        assert {x[name] for x in seen} == set(values), name
    for name in ("batch_size", "max_length", "grad_accum"):
        assert len({x[name] for x in seen}) > 1


def test_the_peer_gets_the_same_job():
    args = argparse.Namespace(data="x.json")
    rows = bench.peers_rows("gpt2-nano", args)
    assert len(rows) == 6
    for ours, theirs in zip(rows[::2], rows[1::2]):
        a, theirs = train.parse(ours["options"].split()), theirs["options"].split()
        assert ("--bits" in theirs) == (a.bits is not None) and a.amp and "--amp" in theirs
        for name in ("--batch-size", "--max-length", "--lr", *(["--bits"] if a.bits else [])):
            assert float(theirs[theirs.index(name) + 1]) == getattr(a, name[2:].replace("-", "_"))


def test_speed_runs_peers_job_with_and_without_amp_after_the_limit():
    limit, *rows = bench.speed_rows("gpt2-nano", argparse.Namespace(data=None))
    cfg = train.resolve(train.parse("--model gpt2-nano --max-length 256 --template alpaca".split()))
    train_set = prepare.read_data(cfg)[2]
    positions = 4 * train_set.n_tokens / len(train_set)  # of a mean micro-batch
    assert limit["program"] == tables.LIMIT and limit["options"] == f"--positions {positions:.0f}" and positions > 100
    ours, theirs = bench.peers_job("gpt2-nano", argparse.Namespace(data=None))
    assert [r["options"] for r in rows] == [ours, theirs, f"--amp {ours}", f"--amp {theirs}", f"--ckpt-every 1 {ours}"]
    assert [r["program"] == tables.PEER for r in rows] == [False, True, False, True, False]


def test_a_command_has_the_options_of_its_program(monkeypatch):
    commands = []

    def run(command, **kw):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "x")
    monkeypatch.setattr(subprocess, "run", run)
    settings = {"data": "d.json", "steps": 7, "device": "cpu", "extra": ["--max-length", "64"]}
    for program in ("train.py", tables.PEER, tables.LIMIT):
        with pytest.raises(bench.RunFailed):
            bench.run_one({"name": "x", "model": "m", "options": "--amp", "program": program}, settings)
    ours, theirs, limit = ([c[0] == sys.executable, *c[1:]] for c in commands)
    same = ["--model", "m", "--amp", "--data", "d.json", "--steps", "7", "--device", "cpu"]
    assert ours[:-1] == [True, str(ROOT / "train.py"), *same, "--samples", "0", "--max-length", "64", "--out"]
    assert theirs == [True, "-m", "bench.transformers_peft", *same]
    assert limit == [True, "-m", "bench.matrix_limit", "--model", "m", "--amp", "--device", "cpu"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_another_depth_and_a_text_that_fills_every_window(family, tmp_path):
    model = str(make_folder(tmp_path / "tiny", family))
    (tmp_path / "deep").mkdir()
    assert bench.other_depth(model, 3, tmp_path) == model
    deep = weights.load(bench.other_depth(model, 5, tmp_path / "deep"))
    assert len(deep.blocks) == deep.config.n_layer == 5
    sizes = {"length": 64, "batch": 4, "layers": 5}
    options = bench.long_text(sizes, {"steps": 3}, tmp_path / "deep")
    tokenizer = train.data.load_tokenizer(str(tmp_path / "deep"))
    built = train.data.build(read_rows(options[1]), tokenizer, "", 64)
    assert int((built.lengths == 64).sum()) >= 3 * 4


def test_scaling_changes_one_size_at_a_time_and_finds_the_axes_again():
    rows = bench.scaling_rows("gpt2-nano", argparse.Namespace(data=None))
    for r in rows:
        r["median"] = a_run(peak_of(r))
    found = tables.axes(rows)
    assert {k: [r["sizes"][k] for r in v] for k, v in found.items()} == {
        "length": [64, 128, 256, 512], "batch": [1, 2, 4, 8], "layers": [1, 2, 3, 4]}
    assert len(rows) == 10  # the base is in all three


# ----------------------------------------------------------------------------------------------- the matrix limit

def config_only(path, family) -> str:
    make_folder(path, family)
    (path / "model.safetensors").unlink()
    return str(path)


def test_flops_by_hand(tmp_path):
    # C = 32, 3 layers, an MLP of 4C, 4,096 words. (out, in), although GPT-2's checkpoints store its layers as (in, out).
    blocks, head = matrix_limit.layers(config_only(tmp_path / "gpt2", "gpt2"))
    assert blocks == {(96, 32): 3, (32, 32): 3, (128, 32): 3, (32, 128): 3} and head == (4096, 32)
    assert matrix_limit.training_flops(blocks, head) == {"token": 4 * 3 * 12 * 32 * 32, "labelled_token": 4 * 4096 * 32}
    # LLaMA: 4 heads of 8, 2 of them for k and v, an MLP of 56. q and o, k and v, gate and up have one shape.
    blocks, head = matrix_limit.layers(config_only(tmp_path / "llama", "llama"))
    assert blocks == {(32, 32): 6, (16, 32): 6, (56, 32): 6, (32, 56): 3} and head == (4096, 32)


def test_a_frozen_models_step_multiplies_as_much_as_is_counted(gpt2_folder):
    model = weights.load(str(gpt2_folder)).requires_grad_(False)
    model.wpe.weight.requires_grad_()  # so that the first block's products have a backward too, and no weight has a gradient
    ids = torch.arange(64).view(2, 32)
    with FlopCounterMode(display=False) as counter:
        sum_loss(model.hidden(ids), model.head, torch.where(ids % 2 == 0, ids, -100)).backward()
    flops = matrix_limit.training_flops(*matrix_limit.layers(str(gpt2_folder)))
    products = {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op)}
    assert sum(products.values()) == 64 * flops["token"] + 32 * flops["labelled_token"], products


def test_the_limit_is_all_flops_in_the_best_times(tmp_path, on_device, monkeypatch, capsys):
    args = argparse.Namespace(model=config_only(tmp_path / "tiny", "gpt2"), positions=200, device="cpu")
    timed = []

    def best_time(shape, rows, dtype, device, tries):
        timed.append((shape, rows, dtype, tries))
        return 0.5 if dtype == torch.bfloat16 else 0.125
    monkeypatch.setattr(matrix_limit, "best_time", best_time)
    on_device(products=torch.bfloat16)
    result = matrix_limit.main(args)
    flops = sum(result["flops"].values())  # 13 layers, 5 shapes
    assert result["gflops"] == {"float32": 200 * flops / (13 * 0.125) / 1e9, "bfloat16": 200 * flops / (13 * 0.5) / 1e9}
    assert len(timed) == 10 and {x[1:] for x in timed} == {(200, torch.float32, 6), (200, torch.bfloat16, 6)}
    on_device(products=torch.float32)  # 16 bit is emulated: few rows, once
    timed.clear()
    assert matrix_limit.main(args)["gflops"]["bfloat16"] == 64 * flops / (13 * 0.5) / 1e9
    assert {x[1:] for x in timed} == {(200, torch.float32, 6), (64, torch.bfloat16, 1)}
    with pytest.raises(UserError, match="--positions 0: must be at least 1"):
        matrix_limit.main(argparse.Namespace(model="gpt2-nano", positions=0, device="cpu"))


def test_a_real_limit_in_the_shape_of_a_run(tmp_path):
    row = {"name": "limit", "model": config_only(tmp_path / "tiny", "gpt2"), "options": "--positions 8",
           "program": tables.LIMIT}
    run = bench.run_one(row, {"data": None, "steps": 3, "device": "cpu", "extra": []})
    assert set(run["gflops"]) == {"float32", "bfloat16"} and all(0 < x < 1e6 for x in run["gflops"].values())
    assert set(run["memory"]) == set(a_run()["memory"]) and run["memory"]["rss_peak"] > 1e7
    assert run["tokens_per_s"] is None and run["memory"]["measured_peak"] is None and run["commit"] == bench.commit()


def test_a_share_is_the_median_over_the_repetitions(started, no_picture, tmp_path):
    speeds, limits = (500.0, 1000.0, 200.0), (4.0, 16.0, 2.0)  # 50, 25 and 40 %; the ratio of the medians is 50

    def answer(row):
        turn = (len(started) - 1) // 6
        if row["program"] == tables.LIMIT:
            gflops = {"float32": limits[turn], "bfloat16": 2 * limits[turn]}
            return {**a_run(**LIMIT), "gflops": gflops, "tokens_per_s": None}
        run = a_run(speed=speeds[turn] / (2 if row["program"] == tables.PEER else 1))
        return {**run, "arithmetic": {"products": "bfloat16" if "--amp" in row["options"] else "float32"}}
    started.answer = answer
    assert bench.main(["speed", "--out", str(tmp_path), "--repeat", "3"])
    text = (tmp_path / "speed-gpt2-nano.md").read_text()
    cells = {line.split(" | ")[0][2:]: line[:-2].split(" | ")[2:] for line in text.splitlines() if line.startswith("| ")}
    assert cells["limit"] == ["float32 / bfloat16", "", "", "4.0 / 8.0", ""]
    assert cells["float32, here"] == ["float32", "500", "2.0", "4.0", "40.0"]  # 3 + 0.5 * 2 MFLOP a token
    assert cells["float32, peer"] == ["float32", "250", "1.0", "4.0", "20.0"]
    assert cells["AMP, here"] == ["bfloat16", "500", "2.0", "8.0", "20.0"]
    assert "* AMP, here: 2.00 times the tokens/s of *AMP, peer* (2.00 2.00 2.00)." in text and "3.0 MFLOP, 4 for" in text

    def without_limit(row):
        if row["program"] == tables.LIMIT:
            raise bench.RunFailed("error: no limit")
        return a_run()
    started.answer = without_limit
    assert not bench.main(["speed", "--out", str(tmp_path), "--repeat", "1"])
    assert "| float32 | 500 | not measured | not measured | not measured |" in (tmp_path / "speed-gpt2-nano.md").read_text()


# ------------------------------------------------------------------------------------------------- whole tables

@pytest.mark.parametrize("name, gpu", [*((name, False) for name in bench.BENCHES), ("ladder", True), ("peers", True),
                                       ("speed", True)])
def test_every_bench_leaves_a_table_a_record_and_a_picture(name, gpu, started, tmp_path):
    started.answer = lambda row: a_run(peak_of(row), gpu=gpu, **LIMIT)
    assert bench.main([name, "--repeat", "2", "--out", str(tmp_path)])
    doc, text = document(tmp_path, name), (tmp_path / f"{name}-gpt2-nano.md").read_text()
    assert doc["finished"] and doc["command"].startswith(f"python -m bench {name} --repeat 2") and doc["command"] in text
    assert doc["about"]["machine"] in text and "cores" in doc["about"]["machine"]
    versions = doc["about"]["versions"]
    assert versions["torch"] == bench.torch.__version__ and ("peft" in versions) == (name in ("peers", "speed"))
    assert doc["about"]["commit"] == bench.commit() and doc["about"]["date"] in text and "commit abc" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(doc["rows"]) and len({line.count("|") for line in rows}) == 1
    assert f"]({name}-gpt2-nano.png)" in text
    grey = matplotlib.image.imread(tmp_path / f"{name}-gpt2-nano.png")[..., :3].mean(-1)
    assert grey.std() > 0.03 and len(set(grey.ravel().round(2))) > 20
    assert not list(tmp_path.glob(".*")), "temporary files"


def test_several_models_are_a_table_each_and_one_in_predict(started, no_picture, tmp_path, gpt2_folder):
    bench.main(["grid", "--model", f"gpt2-nano,{gpt2_folder}", "--repeat", "1", "--out", str(tmp_path)])
    bench.main(["predict", "--model", "gpt2-nano", "--model", str(gpt2_folder), "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.glob("*.md")} == {"grid-gpt2-nano.md", "grid-gpt2-tiny.md",
                                                       "predict-gpt2-nano+gpt2-tiny.md"}
    assert len(document(tmp_path, "predict", "gpt2-nano+gpt2-tiny")["rows"]) == 2 * len(bench.PREDICT)


def test_categories_differ_in_black_and_white():
    assert len(plots.COLOURS) == len(plots.HATCHES) >= max(7, len(memory.CATEGORIES))
    rgb = [matplotlib.colors.to_rgb(c) for c in plots.COLOURS]
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in rgb]
    for i in range(7):
        for j in range(i):
            assert abs(grey[i] - grey[j]) > 0.15 or plots.HATCHES[i] != plots.HATCHES[j], (i, j)


def test_a_real_grid(gpt2_folder, data_file, tmp_path, monkeypatch):
    ends = {name: bench.GRID[name] for name in ("1 x 8", "8 x 1")}
    monkeypatch.setattr(bench.BENCHES["grid"], "rows", bench.named(ends))
    assert bench.main(["grid", "--model", str(gpt2_folder), "--data", str(data_file), "--steps", "3", "--repeat", "1",
                       "--device", "cpu", "--out", str(tmp_path), "--", "--lora-targets", "all"])
    rows = document(tmp_path, "grid", "gpt2-tiny")["rows"]
    peaks = [r["median"]["memory"]["measured_peak"] for r in rows]
    assert 1.5 * peaks[0] < peaks[1], "the peak grows with the micro-batch"
    assert {r["median"]["examples"] for r in rows} == {36} and all(r["median"]["step_s"] > 0 for r in rows)
    cfg = train.resolve(train.parse(["--model", str(gpt2_folder), "--data", str(data_file), "--max-length", "128"]))
    train_set = prepare.read_data(cfg)[2]
    labelled = train_set.n_labels / train_set.n_tokens
    assert {r["median"]["labelled_share"] for r in rows} == {labelled} and 0.1 < labelled < 0.9
    losses = [r["median"]["loss"]["val_after"] for r in rows]  # only the dropout differs
    assert max(losses) - min(losses) < 0.02
    assert (tmp_path / "grid-gpt2-tiny.png").stat().st_size > 5000


def test_the_peer_runs_the_job(gpt2_folder, data_file, monkeypatch):
    pytest.importorskip("peft")
    import runs

    from bench import transformers_peft
    args = argparse.Namespace(model=str(gpt2_folder), data=str(data_file), steps=3, batch_size=4, max_length=128,
                              lr=1e-3, amp=True, bits=None, device="cpu")
    monkeypatch.setattr(train.data, "held_out_rows", lambda n_rows, n, seed: torch.arange(n_rows) < 4)  # 1 % of 40 is none
    result = transformers_peft.main(args)
    assert len(result["losses"]) == 3 and result["losses"][0] == result["loss"]["first"] and result["examples_per_s"] > 0
    assert set(result["memory"]) == set(a_run()["memory"])
    assert result["arithmetic"]["products"] == "bfloat16"
    # The same start and the same held-out rows: before the first step the losses differ by bfloat16's rounding only.
    args.lr, args.steps = 0.0, 1
    mine = runs.options(gpt2_folder.parent / "out", gpt2_folder, data_file, steps=1, template="alpaca", amp=True,
                        lora_targets="c_attn", batch_size=4)
    runs.no_picture(monkeypatch)
    summary = train.main(mine)
    assert transformers_peft.main(args)["loss"]["val_after"] == pytest.approx(summary["loss"]["val_before"], abs=0.02)
    assert result["params"]["trainable"] == summary["params"]["trainable"]


def test_without_the_peers_packages_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "bench.transformers_peft", raising=False)
    with pytest.raises(SystemExit, match="^error: bench/transformers_peft.py needs peft: .*requirements-dev.txt$"):
        importlib.import_module("bench.transformers_peft")
