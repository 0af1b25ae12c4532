"""What README.md says about the files and the options is true."""
import dataclasses
import re

import pytest
from conftest import ROOT

from files import hub
from train import TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_reading_order_lists_every_file_with_its_lines():
    listed = {}
    for row in re.findall(r"^\| (\[\w+\.py\].*)\|$", README, re.M):
        files, _, lines = (cell.strip() for cell in row.split("|"))
        listed.update(zip(re.findall(r"\]\((\w+\.py)\)", files), map(int, lines.split(", ")), strict=True))
    assert listed == {f.name: len(f.read_text(encoding="utf-8").splitlines()) for f in ROOT.glob("*.py")}


def test_every_option_named_exists():
    options = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)}
    others = {"--index-url", "--adapter", "--prompt", "--fit", "--repeat"}  # of pip, generate.py, memory.py, bench.py
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - options <= others


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_short_names_exist():
    sentence = re.search(r"takes a short name \(([^)]*)\)", README)[1]
    assert set(re.findall(r"`([^`]+)`", sentence)) <= set(hub.SHORT_NAMES)
    assert set(re.findall(r"--model ([a-z][\w.-]+)", README)) <= set(hub.SHORT_NAMES)
