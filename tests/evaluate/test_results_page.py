"""The page of results: claims by their intervals, nothing typed, tags everywhere."""

from __future__ import annotations

import copy
import json
import re

import pytest

from packcache.errors import InputError, InputFileError
from packcache.evaluate.results_page import CLAIMS, Claim, read_evaluation, render
from tests.test_docs import NUMBER, TAGS, blocks

SUMMARY = {"clips": 8, "mean": 0.5, "low": 0.4, "high": 0.6}
ROW = {
    "row": "packcache 2",
    "true": dict.fromkeys(("identity", "digit", "colour", "count"), SUMMARY),
    "clip": {"flow_motion_top5_dis": SUMMARY, "direction": SUMMARY, "held": SUMMARY},
}
RESULT = {
    "schema": "packcache.evaluate/1",
    "missing": {"run 49": 3},
    "environment": {
        "processor": "a", "cores": 2, "device": "cpu", "torch": "2", "python": "3",
        "packcache": "0", "commit": "c",
    },
    "workload": {
        "protocol": "abc", "exploratory": True, "quick": 8, "model": "digits",
        "primaries": [{"name": "recall"}],
    },
    "primaries": [
        {
            "primary": "recall", "row": "window 2", "reference": 50.0, "mean": 10.0, "lost": 40.0,
            "low": 30.0, "high": 50.0, "p": 0.001, "p_holm": 0.01, "verdict": "worse", "why": "",
        }
    ],
    "power": [
        {"control": "random drop", "on": ["recall"]}, {"control": "rebase off", "on": []},
    ],
    "memory": [{"row": "full", "gap": 1, "recall": {"mean": 90.0, "low": 80.0, "high": 95.0}}],
    "replay": [
        {
            "row": "window 2", "kl": SUMMARY, "agreement": SUMMARY, "nll": SUMMARY,
            "nll_full": SUMMARY, "nll_true": None,
        }
    ],
    "running": [
        {
            "frames": 49, "rows": [ROW],
            "versus": [
                {
                    "row": "packcache 2", "against": "window 2", "metric": "identity", "mean": 0.1,
                    "low": 0.05, "high": 0.15,
                }
            ],
        }
    ],
}  # fmt: skip


def test_a_claim_is_judged_by_the_whole_interval():
    claim = CLAIMS[2]
    up, down, both = ({"low": a, "high": b} for a, b in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1)))
    assert claim.verdict(up) == "holds here"
    assert claim.verdict(down) == "does not hold here"
    assert claim.verdict(both) == "cannot be told"
    assert claim.verdict(None) == "*not run*"
    less = Claim(text="", frames=1, row="", against="", metric="", sign=-1)
    assert less.verdict(up) == "does not hold here" and less.verdict(down) == "holds here"
    near = Claim(text="", frames=1, row="", against="", metric="", least=-0.15)
    assert near.verdict(both) == "holds here"


def test_the_page_says_what_was_found():
    page = render(RESULT, "evaluate.json")
    assert (
        "| 48 frames: better than a sliding window of as many tokens | +0.1 (+0.05 to +0.15) |"
        in page
    )
    assert page.count("*not run*") == len(CLAIMS) - 1
    assert "NOT told from full" in page and "**Exploratory**: cut to 8 prompts" in page
    assert "worse" in page and "90 %" in page
    whole = copy.deepcopy(RESULT)
    whole["workload"]["exploratory"], whole["missing"] = False, {}
    assert "**Not complete**: missing are run 49 3 clips." in page
    told = render(whole, "evaluate.json")
    assert "Exploratory" not in told and "Not complete" not in told


def test_every_number_has_its_tag():
    for block in blocks(render(RESULT, "evaluate.json")):
        if NUMBER.search(re.sub(r"`[^`]*`", "", block)):
            assert any(f"*{tag}*" in block for tag in TAGS), block


def test_what_is_no_evaluation_is_refused(tmp_path):
    path = tmp_path / "evaluate.json"
    path.write_text(json.dumps({"schema": "x"}))
    with pytest.raises(InputError, match=r"has schema .x., expected .packcache\.evaluate"):
        read_evaluation(path)
    with pytest.raises((InputError, InputFileError), match=r"none\.json"):
        read_evaluation(tmp_path / "none.json")
