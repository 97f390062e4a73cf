"""Protocols: the shipped one, what is no protocol, and the control that loses its image."""

from __future__ import annotations

import re

import pytest

from packcache.errors import InputFileError, InvalidSetting
from packcache.evaluate.protocol import REGISTERED, AnchorsDropped, Row, read_protocol
from packcache.policies import PackCache
from packcache.timeline import FrameLayout, Role, Span, Timeline
from tests.tools import ROOT

SHIPPED = ROOT / "benchmarks" / "protocol.toml"


def test_the_shipped_protocol_is_what_the_issue_asks():
    asked = read_protocol(SHIPPED)
    assert asked.reference.label == "full" and len(asked.primaries) == 4
    first, *others = asked.running
    assert (first.frames, first.prompts, first.seeds) == (49, 128, 2)
    assert [(plan.frames, plan.prompts) for plan in others] == [(25, 32), (97, 32), (385, 32)]
    assert {row.label for row in asked.rows_of("control")} == {
        "random drop", "anchors dropped", "rebase off",
    }  # fmt: skip
    last = others[-1]
    assert last.count("full") == 4 and last.count("window 2") == 32
    assert last.count("random drop") == 0 and first.count("random drop") == 128
    assert asked.replay.prompts == 256


def test_rows_hold_equally_many_tokens():
    """Two latent frames, but for the reference, its floors, and the paper's own size."""
    for row in read_protocol(SHIPPED).rows.values():
        policy = row.make()
        most = policy.max_history(100, policy.budget_for(100))
        whole = {"full": None, "window:frames=1": 100, "packcache:budget=1,window=4": 100}
        assert most == whole.get(row.policy, 200), row.label


def test_the_hash_is_of_the_file(tmp_path):
    other = tmp_path / "protocol.toml"
    other.write_text(SHIPPED.read_text())
    assert read_protocol(other).hash == read_protocol(SHIPPED).hash
    other.write_text(SHIPPED.read_text().replace("no_worse = 3.0", "no_worse = 30.0"))
    assert read_protocol(other).hash != read_protocol(SHIPPED).hash


def test_only_the_registered_protocol_decides(tmp_path):
    """Its hash stands in the code; a word that is changed makes it another."""
    assert {read_protocol(ROOT / path).hash: path for path in REGISTERED.values()} == REGISTERED
    asked = read_protocol(SHIPPED)
    assert asked.exploratory is None and asked.cut(8).exploratory == "cut to 8 prompts"
    other = tmp_path / "protocol.toml"
    other.write_text(SHIPPED.read_text() + "# mine\n")
    assert read_protocol(other).exploratory == "not by a registered protocol"
    ablations = read_protocol(ROOT / "benchmarks" / "ablations.toml")
    assert ablations.exploratory == "not by a registered protocol"


def test_controls_are_broken_copies_of_what_is_there():
    asked = read_protocol(SHIPPED)
    intact = {row.label: asked.intact(row) for row in asked.rows_of("control")}
    assert {row and row.label for row in intact.values()} == {"packcache 2"}


def test_a_quick_one_is_smaller_and_says_so():
    asked = read_protocol(SHIPPED)
    quick = asked.cut(8)
    assert quick.quick == 8 and quick.hash == asked.hash
    assert quick.replay.prompts == quick.replay.true_prompts == quick.memory.clips == 8
    assert [(plan.frames, plan.prompts, plan.seeds) for plan in quick.running] == [
        (49, 8, 1), (25, 8, 1), (97, 8, 1),
    ]  # fmt: skip
    with pytest.raises(InvalidSetting, match="prompts is 1, expected at least 2"):
        asked.cut(1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('schema = "packcache.protocol/1"', 'schema = "x"', "has schema 'x', expected"),
        ("[memory]", "[memories]", "unknown or missing part 'memories'"),
        ("prompts = 256", "promts = 256", "replay has no setting 'promts': known are prompts"),
        ("prompts = 256\n", "", "replay is incomplete"),
        ('role = "control"', 'role = "contol"', "has role 'contol', expected one of reference"),
        ('role = "reference"', 'role = "policy"', "0 rows are the reference, expected one"),
        ('label = "window 2"', 'label = "full"', "two rows have one label"),
        ('policy = "window:frames=2"', 'policy = "windw"', "unknown policy 'windw'"),
        ('policy = "window:frames=2"', 'policy = "no.json"', "'no.json' is a file, which may"),
        ('rows = ["full",', 'rows = ["fll",', "running names row 'fll': known are full"),
        (
            'rows = ["full", "window 2", "p',
            'rows = ["window 2", "p',
            "leaves out 'full', the refer",
        ),
        ("seeds = 2\n", "seeds = 3\n", "running takes 3 seeds of 2"),
        ('positions = "absolute"', 'positions = "absolut"', "has positions 'absolut', expected"),
        ("prompts = 256", 'prompts = "256"', "replay has prompts '256', expected int"),
        ("prompts = 256", "prompts = true", "replay has prompts True, expected int"),
        ("known = [0.0, 0.5]", "known = 0.5", "replay has known 0.5, expected a list"),
        ("gaps = [1, 2", 'gaps = ["1", 2', "memory has gaps '1', expected int"),
        ('"full, other draws" = 32 }', '"full, other draws" = "32" }', "prompts_of '32', expected"),
        ('name = "recall"', 'name = "recal"', "unknown primary 'recal': known are recall"),
        (
            'name = "recall"',
            'name = "replay_kl"',
            "'replay_kl' is from 'memory', expected 'replay'",
        ),
        ('name = "identity_drift"', 'name = "motion_ratio"', "two primaries have one name"),
        ("rules = [", "rule = [", "exclusions has rules None, expected a list of sentences"),
        ('model = "digits"', 'model = "3b"', "clips are of model '3b', whose truth nobody knows"),
    ],
)
def test_what_is_no_protocol_is_one_line(tmp_path, old, new, message):
    text = SHIPPED.read_text()
    assert old in text
    path = tmp_path / "protocol.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InputFileError, match=re.escape(message)) as error:
        read_protocol(path)
    assert str(error.value).count("\n") == 0 and str(path) in str(error.value)


def test_five_primaries_are_too_many(tmp_path):
    path = tmp_path / "protocol.toml"
    more = '\n[[primary]]\nname = "x"\nfrom = "replay"\nbetter = "less"\n'
    path.write_text(SHIPPED.read_text() + more)
    with pytest.raises(InputFileError, match="5 primaries, expected 1 to 4: all else is explor"):
        read_protocol(path)


def test_a_missing_file_and_no_toml(tmp_path):
    with pytest.raises(InputFileError, match=r"cannot be read .* name a protocol such as"):
        read_protocol(tmp_path / "none.toml")
    (tmp_path / "x.toml").write_text("a = = 1")
    with pytest.raises(InputFileError, match=r"x\.toml is no TOML"):
        read_protocol(tmp_path / "x.toml")


def test_dropped_anchors_keep_the_methods_history_and_no_image():
    row = Row(label="x", policy="packcache:budget=2,window=4", drops_image=True)
    policy, plain = row.make(), PackCache(budget=2, window=4)
    assert isinstance(policy, AnchorsDropped) and policy.settings() == plain.settings()
    layout, held = FrameLayout(rows=3, cols=4), []
    for one in (policy, plain):
        timeline = Timeline()
        timeline.append(Span.text(5))
        for frame in range(6):
            span = Span.of_frame(Role.IMAGE if frame == 0 else Role.HISTORY, frame, layout)
            timeline.append(span, one.rank(span, None))
            timeline.keep(one.plan(timeline, one.budget_for(layout.tokens)))
        held.append(timeline)
    assert held[0].counts() == held[1].counts()
    assert [e.span.role for e in held[0].anchors] == [Role.TEXT]
    assert [e.span.role for e in held[1].anchors] == [Role.TEXT, Role.IMAGE]


def test_only_the_method_can_drop_its_image():
    with pytest.raises(InvalidSetting, match="drops the image of 'window', expected packcache"):
        Row(label="x", policy="window", drops_image=True).make()
