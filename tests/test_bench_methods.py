"""python -m bench methods: intervals, the table's numbers, and that no finished run is made again."""
import json
import re
from pathlib import Path

import matplotlib.image
import pytest
from conftest import make_data

import bench.__main__ as bench
import train
from bench import methods
from errors import UserError


def test_an_interval_is_the_hand_calculation():
    mean, half = methods.interval([1.0, 2.0, 3.0, 4.0, 5.0])  # s^2 = 10 / 4
    assert mean == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5) == pytest.approx(1.96293, abs=1e-5)
    assert methods.interval([0.0, 2.0])[1] == pytest.approx(12.706 * 2**0.5 / 2**0.5)  # n = 2: t for 1, s = sqrt(2)
    assert methods.interval([7.0] * 10) == (7.0, 0.0) and len(methods.T) == 9


@pytest.fixture
def two(monkeypatch):
    """Two methods, and the runs of train.main that are made."""
    monkeypatch.setattr(methods, "METHODS", {name: methods.METHODS[name] for name in ("lora", "ia3")})
    started, real = [], train.main

    def main(cfg, **own):
        started.append(cfg)
        return real(cfg, **own)
    monkeypatch.setattr(train, "main", main)
    return started


def table(text: str) -> dict:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[1:3]}


def test_two_methods_two_seeds_stopped_and_continued(two, tmp_path, capsys, monkeypatch):
    data, text = make_data(tmp_path / "rows.jsonl", 40), tmp_path / "plain text.txt"
    text.write_text("A quiet street at noon, and nobody was there to see it. " * 40)
    command = ["methods", "--data", str(data), "--text", str(text), "--steps", "3", "--seeds", "2", "--device", "cpu",
               "--out", str(tmp_path / "out")]
    real = methods.one_run

    def until_the_third(*args):
        if len(two) == 3:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(methods, "one_run", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        bench.main(command)
    path = tmp_path / "out" / "methods.jsonl"
    first = path.read_text()
    assert len(first.splitlines()) == 1 + 3 and not (tmp_path / "out" / "methods.md").exists()
    monkeypatch.setattr(methods, "one_run", real)
    assert bench.main(command) and [(c.method, c.seed) for c in two] == [("lora", 0), ("ia3", 0), ("lora", 1), ("ia3", 1)]
    assert path.read_text().startswith(first)
    assert len({c.lr for c in two}) == 2 and two[0].lr == two[2].lr == methods.rate("lora", 256)

    settings, *runs = map(json.loads, path.read_text().splitlines())
    assert settings["data"] == "rows.jsonl" and str(tmp_path) not in path.read_text()
    loss, minus, forgotten = {}, {}, {}
    for name in ("lora", "ia3"):
        mine, base = ([r for r in runs if r["method"] == m] for m in (name, "lora"))
        loss[name], minus[name], forgotten[name] = (methods.interval(values) for values in (
            [r["loss"] for r in mine], [r["loss"] - b["loss"] for r, b in zip(mine, base)],
            [r["text"] - b["text_before"] for r, b in zip(mine, base)]))
    page = (tmp_path / "out" / "methods.md").read_text()
    cells = table(page)
    for name in ("lora", "ia3"):
        assert cells[name]["held-out loss"] == "{:.4f} ± {:.4f}".format(*loss[name])
        assert cells[name]["forgetting"] == "{:+.4f} ± {:.4f}".format(*forgotten[name])
    assert cells["ia3"]["minus lora's"] == "{:+.4f} ± {:.4f}".format(*minus["ia3"]) and not cells["lora"]["minus lora's"]
    assert loss["lora"][1] > 0 and loss["ia3"][0] != loss["lora"][0] and forgotten["lora"][0] != 0
    assert int(cells["lora"]["file, bytes"].replace(",", "")) > int(cells["ia3"]["file, bytes"].replace(",", "")) > 1000
    assert cells["ia3"]["trainable parameters"] == "6,144" and float(cells["lora"]["measured peak, MB"]) > 15
    assert re.search(r"\| LoRA \| 47.8 \| 1.4 \| 48.2 \|", page) and "less than one standard error" in page
    assert matplotlib.image.imread(tmp_path / "out" / "methods.png").std() > 0.05
    assert "held-out loss" in capsys.readouterr().out

    with pytest.raises(UserError, match="methods.jsonl was made with steps 3, now 4; choose another --out, or delete it"):
        bench.main([*command, "--steps", "4"])
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "ia3": ({"method": "ia3"}, 5.0)})  # another rate
    two.clear()
    assert bench.main(command) and [(c.method, c.seed) for c in two] == [("ia3", 0), ("ia3", 1)]


def test_a_run_that_fails_costs_no_other_and_is_tried_again(two, tmp_path, monkeypatch):
    fails, names = {("ia3", 0)}, []

    def one_run(name, seed, lr, *rest):
        names.append((name, seed))
        if (name, seed) in fails:
            raise UserError(f"{name}, seed {seed}: a nan")
        return {"method": name, "seed": seed, "lr": lr, "options": methods.METHODS[name][0], "loss": 2.0 + seed, "text": 3.5,
                "text_before": 3.0, "trainable": 5, "predicted_peak": None, "measured_peak": 10**6, "tokens_per_s": 1.0,
                "wall_s": 1.0, "bytes": 10}
    monkeypatch.setattr(methods, "one_run", one_run)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **kw: open(path, "w").close())
    command = ["methods", "--seeds", "2", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="1 of 4 runs failed, the others are in .*; the same command .* ia3, seed 0: a nan"):
        bench.main(command)
    assert len(names) == 4 and not (tmp_path / "methods.md").exists()
    fails.clear()
    assert bench.main(command) and names[4:] == [("ia3", 0)]
    cells = table((tmp_path / "methods.md").read_text())
    assert cells["ia3"]["minus lora's"] == "+0.0000 ± 0.0000" and cells["ia3"]["forgetting"] == "+0.5000 ± 0.0000"
    assert cells["ia3"]["held-out loss"] == "2.5000 ± 6.3530"  # t = 12.706, s = 1 / sqrt(2), n = 2


def test_equal_seeds_see_equal_rows_and_other_seeds_others(two, tmp_path, monkeypatch):
    seen = []

    def main(cfg, **own):
        lines = [Path(f).read_text() for f in (cfg.data, cfg.val_data.split(",")[0])]
        seen.append((cfg.seed, *lines))
        raise UserError("enough")
    monkeypatch.setattr(train, "main", main)
    data = make_data(tmp_path / "rows.jsonl", 40)
    for seed in (0, 1):
        with pytest.raises(UserError, match=f"lora, seed {seed}, --lr 0.01: enough"):
            args = type("A", (), {"data": str(data), "text": str(methods.ASSETS / "plain.txt"), "model": "gpt2-nano",
                                  "device": "cpu", "steps": 2})
            methods.one_run("lora", seed, 0.01, args, methods.files_of(args, tmp_path / "f"), tmp_path / "run")
    assert seen[0][1:] == seen[1][1:] and seen[0][0] != seen[1][0]
    whole, held = seen[0][1].splitlines(), seen[0][2].splitlines()
    assert (len(whole), len(held)) == (36, 4)
    assert sorted(map(json.loads, whole + held), key=str) == sorted(map(json.loads, data.read_text().splitlines()), key=str)


def test_rates_prints_three_for_each_method(two, tmp_path, capsys, monkeypatch):
    def one_run(name, seed, lr, *rest):
        if lr > methods.rate("ia3", 256):
            raise UserError("training diverged")
        assert seed == methods.RATES_SEED >= 10
        return {"loss": lr, "wall_s": 2.0}
    monkeypatch.setattr(methods, "one_run", one_run)
    assert bench.main(["methods", "--rates", "--data", str(make_data(tmp_path / "r.jsonl")), "--out", str(tmp_path / "o")])
    out = capsys.readouterr().out
    assert out.count("--lr") == 6 and out.count("failed (training diverged)") == 1 and not (tmp_path / "o").exists()


@pytest.mark.parametrize(("words", "said"), [
    (["--seeds", "1"], "--seeds 1: must be from 2 to 10"), (["--steps", "0"], "--steps 0: must be from 1"),
    (["--text", "none.txt"], "--text none.txt: must be a .txt file"), (["--data", "none.jsonl"], "none.jsonl"),
    (["--model", "gpt3-nano"], "gpt3-nano"), (["--data", "few.jsonl"], "few.jsonl: 9 rows")])
def test_wrong_options_are_one_line(words, said, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_data("few.jsonl", 9)
    with pytest.raises(UserError, match=said) as e:
        bench.main(["methods", "--out", str(tmp_path / "out"), *words])
    assert "\n" not in str(e.value) and not two
