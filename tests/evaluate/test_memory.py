"""The memory horizon asks the right question, knows chance and certainty, and sees its controls."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from packcache.digits import world
from packcache.digits.codec import DigitsCodec
from packcache.digits.model import SAMPLING, digits_config, text_ids
from packcache.digits.scans import scan_indices
from packcache.errors import GenerationError, InvalidSetting, OutputError
from packcache.evaluate import memory
from packcache.evaluate.memory import (
    ANCHOR_POLICIES,
    CHANCE,
    DEFAULT_POLICIES,
    METRICS,
    horizon,
    memory_scenes,
)
from packcache.evaluate.memory_plot import plot as draw
from packcache.lumos.decode import Decoder
from packcache.lumos.model import Lumos
from packcache.lumos.pipeline import Pipeline
from packcache.policies import FullCache, SlidingWindow
from packcache.testing import oracle
from packcache.timeline import Role

pytest.importorskip("sklearn", reason="the scans come from scikit-learn")

ALL_POLICIES = {**DEFAULT_POLICIES, **ANCHOR_POLICIES}

SETTINGS = {"positions": "rebase", "rebase": "trained"}
P = 160  # tokens of a latent frame: 12 x (12 + 1) + 4


class HashCodec:
    """A codec by hashing: a token is what its own 8 x 8 pixels in its last frame are, exactly."""

    codes = 1600
    overlap = 1

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels = ((video[:, :, ::4] + 1) * 127.5).round()
        patches = (
            levels.unfold(3, 8, 8).unfold(4, 8, 8).movedim(1, -1).flatten(4)
        )  # [B, t, h, w, n]
        # Sums below 2^24 are exact in float32 whatever their order.
        factors = torch.randint(1, 256, (patches.shape[-1],), generator=seeded(1)).float()
        return (patches @ factors).long().mul(7919).remainder(self.codes).int(), patches

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        grey = (indices.float() / (self.codes - 1) * 2 - 1)[:, None]
        video = grey.repeat_interleave(8, 3).repeat_interleave(8, 4).repeat_interleave(4, 2)
        return video[:, :, 3:].expand(-1, 3, -1, -1, -1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    """A very small random network, and a codec that tells everything apart."""
    torch.manual_seed(0)
    config = replace(
        digits_config(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return Pipeline(
        name="random",
        model=Lumos(config).eval().requires_grad_(False),
        codec=HashCodec(),
        tokenize=lambda prompt, header: text_ids(prompt),
        size=(world.SIZE, world.SIZE),
        fps=world.FPS,
        sampling=replace(SAMPLING, steps=2),
        seconds=2,
    )


def cases(pipe: Pipeline, gap: int = 2, count: int = 2, source: str = "anchor") -> list:
    scenes = memory_scenes(count, gap, 0, source)
    return [memory._case(pipe, number, scene, source) for number, scene in enumerate(scenes)]


def ask_with(pipe: Pipeline, monkeypatch, predict, **settings) -> memory.Horizon:
    """A horizon whose model answers `predict(decoder, cases)`, logits `[B, N, codes]`."""
    told = memory._told

    def remember(pipeline, batch, policy, **more):
        decoder = told(pipeline, batch, policy, **more)
        decoder.batch = batch
        return decoder

    monkeypatch.setattr(memory, "_told", remember)
    monkeypatch.setattr(Decoder, "predict", lambda self: predict(self, self.batch))
    settings = {"policies": {"full": "full", "none": "none"}, "gaps": (1, 2), "clips": 6} | settings
    return horizon(pipe, settings.pop("policies"), **settings)


def knowing(decoder: Decoder, batch) -> torch.Tensor:
    """All probability on the true codes."""
    true = torch.stack([case.question.codes[case.question.truth] for case in batch])
    return 60.0 * torch.nn.functional.one_hot(true, decoder.vocab.ids.num_codes)


def made_up(recall: dict[str, list[float]], source: str = "history", clips: int = 60):
    """A horizon of made-up recalls: `recall[spelling]` lists the share of clips, gap by gap."""
    gaps = tuple(range(1, 1 + len(next(iter(recall.values())))))
    shape = (len(recall), len(gaps), clips)
    values = {name: np.full(shape, np.nan) for name in METRICS}
    for name in ("object", "digit", "colour", "told_apart"):
        for p, shares in enumerate(recall.values()):
            for g, share in enumerate(shares):
                values[name][p, g] = np.arange(clips) < round(share * clips)
    values["nll"] = np.ones(shape)
    values["held"] = np.full(shape, 160.0)
    workload = {"gaps": list(gaps), "clips": clips, "source": source, "chance": CHANCE}
    return memory.Horizon(
        policies={text: text for text in recall},
        gaps=gaps,
        values=values,
        bounds={text: None if text == "full" else 160 for text in recall},
        workload={**workload, "tokens_per_frame": 160},
        environment={},
    )


# --- the clips and the question ------------------------------------------------------------------


@pytest.mark.parametrize("source", ["history", "anchor"])
def test_a_clip_is_the_same_at_every_gap_but_for_when_its_curtain_rises(source):
    near, far = (memory_scenes(8, gap, 3, source) for gap in (1, 6))
    for a, b in zip(near, far, strict=True):
        assert a == replace(b, curtain=replace(b.curtain, rises=b.curtain.falls + 1))
        assert (a.curtain.gap, b.curtain.gap) == (1, 6)
        assert a.hidden.scan in scan_indices("test", a.hidden.value)
        assert a.hidden.enters < a.curtain.falls  # it was seen
    assert near[:4] == memory_scenes(4, 1, 3, source) and near != memory_scenes(8, 1, 4, source)
    kinds = {"history": ["hidden", "enters"] * 4, "anchor": ["hidden"] * 8}
    assert [scene.kind for scene in near] == kinds[source]
    if source == "anchor":
        assert {scene.curtain.falls for scene in near} == {1}


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("codec", [HashCodec, DigitsCodec])
def test_the_truth_is_one_of_sixty_candidates(pipe, number, codec):
    scene = memory_scenes(4, 3)[number]
    pipe = replace(pipe, codec=codec())
    found, asked = memory.candidates(scene.hidden), memory.question(pipe, scene)
    assert len(set(found)) == 60 and found[asked.truth] == scene.hidden
    for digit in found:
        same = (digit.x, digit.y, digit.direction, digit.tilt, digit.width, digit.enters)
        hidden = scene.hidden
        assert same == (
            *(hidden.x, hidden.y, hidden.direction),
            *(hidden.tilt, hidden.width, hidden.enters),
        )
        assert digit.scan in scan_indices("test", digit.value)
    rises = scene.curtain.rises
    clip = pipe.encode_video(world.render(scene, 4 * rises + 1)).long()
    assert torch.equal(clip[rises].flatten(), asked.codes[asked.truth])
    assert found == memory.candidates(memory_scenes(4, 1)[number].hidden)  # at every gap


def test_only_tokens_at_the_hidden_digit_are_asked_about(pipe):
    for scene in memory_scenes(6, 2):
        asked = memory.question(pipe, scene)
        left, top, width, height = (n // 8 for n in scene.curtain.box)
        inside = np.zeros((12, 12), dtype=bool)
        inside[top : top + height, left : left + width] = True
        assert 4 <= asked.asked.sum() < inside.sum()
        assert not asked.asked[~inside.ravel()].any() and not asked.object[~inside.ravel()].any()
        assert inside.ravel()[asked.cells].all()


def test_ground_cells_are_apart_from_every_candidate_and_only_on_patterns(pipe):
    scenes = memory_scenes(12, 2)
    questions = [memory.question(pipe, scene) for scene in scenes]
    patterned = [scene.pattern is not None for scene in scenes]
    assert any(patterned) and not all(patterned)
    assert [len(asked.cells) > 0 for asked in questions] == patterned  # no two hashes meet here
    for asked in questions:
        for number, cell in enumerate(asked.cells):
            changed = (asked.codes[60 + number] != asked.codes[asked.truth]).numpy()
            assert len(cell) == 4 and changed[cell].any()
            assert not asked.asked[cell].any() and not asked.object[cell].any()
            assert set(np.flatnonzero(changed)) <= set(cell)


# --- right and wrong -----------------------------------------------------------------------------


def test_who_knows_everything_is_right_everywhere(pipe, monkeypatch):
    curve = ask_with(pipe, monkeypatch, knowing)
    for name in ("object", "digit", "colour", "told_apart"):
        assert (curve.values[name] == 1).all(), name
    assert curve.values["nll"].max() < 1e-6
    ground = curve.values["ground"]
    assert np.isfinite(ground).any() and (ground[np.isfinite(ground)] == 1).all()
    assert all(row["object"]["mean"] == 1 for row in curve.to_json()["results"])


def test_who_knows_nothing_is_never_right_a_tie_is_no_answer(pipe, monkeypatch):
    def shrug(decoder, batch):
        return torch.zeros(len(batch), decoder.layout.content, decoder.vocab.ids.num_codes)

    curve = ask_with(pipe, monkeypatch, shrug)
    for name in ("object", "digit", "colour"):
        assert (curve.values[name] == 0).all()
    assert np.allclose(curve.values["nll"], math.log(1600), rtol=1e-6)
    assert np.nanmax(curve.values["ground"]) == 0


def test_guessing_meets_the_chance_it_says(pipe):
    scene = next(scene for scene in memory_scenes(12, 2) if scene.pattern is not None)
    asked, rng = memory.question(pipe, scene), np.random.default_rng(0)
    answers = [memory.answer(asked, rng.random(asked.codes.shape)) for _ in range(3000)]
    for name, chance in CHANCE.items():
        hits = np.mean([found[name] for found in answers])
        assert hits == pytest.approx(chance, abs=4 * math.sqrt(chance / 3000)), name


def test_a_tie_between_colours_still_knows_the_digit(pipe):
    (case,) = cases(pipe, count=1)
    truth = case.question.truth
    nll = np.ones(case.question.codes.shape)
    nll[[truth, truth // 6 * 6 + (truth + 1) % 6]] = 0.5  # the true digit in two colours
    found = memory.answer(case.question, nll)
    assert (found["object"], found["digit"], found["colour"]) == (0, 1, 0)
    nll = np.ones(case.question.codes.shape)
    nll[[truth, (truth + 6) % 60]] = 0.5  # two digits in the true colour
    found = memory.answer(case.question, nll)
    assert (found["object"], found["digit"], found["colour"]) == (0, 0, 1)


def test_broken_weights_are_told(pipe, monkeypatch):
    def broken(decoder, batch):
        return knowing(decoder, batch) * float("nan")

    with pytest.raises(GenerationError, match="NaN logits after 2 latent frames"):
        ask_with(pipe, monkeypatch, broken, source="anchor", gaps=(1,))


# --- what the model was told ---------------------------------------------------------------------


@pytest.mark.parametrize("source, number", [("history", 0), ("history", 1), ("anchor", 0)])
def test_full_cache_is_one_forward_without_a_cache(pipe, source, number):
    """Prefix, clean image, re-masked history, an all-masked frame: float64, no cache."""
    case = cases(pipe, gap=3, source=source)[number]
    decoder = memory._told(pipe, [case], FullCache(), guidance=1.0, **SETTINGS)
    layout, vocab = decoder.layout, decoder.vocab
    frames = torch.stack([vocab.frame(layout, codes) for codes in case.given])
    first = int(case.image)
    frames[first:] = vocab.remask(layout, frames[first:], decoder.history)
    (prefix,) = decoder.prefixes
    ids = torch.cat((torch.tensor(prefix.ids), frames.flatten(), vocab.frame(layout)))
    lengths = [len(prefix.ids)] + [layout.tokens] * (len(frames) + 1)
    held = [np.arange(sum(lengths[:number]), dtype=np.int32) for number in range(len(lengths))]
    twin = copy.deepcopy(pipe.model).double()
    places = oracle.sequence_positions(twin.config, len(prefix.ids), len(frames) + 1, layout)
    hidden = oracle.masked_forward(twin, ids, places, oracle.seen_mask(lengths, held))
    content, codes = hidden[-layout.tokens :][vocab.content(layout)], vocab.ids
    expected = twin.head(content, codes.video_lo, codes.video_hi)
    assert decoder.generated == len(frames) - first
    assert torch.allclose(decoder.predict()[0].double(), expected.double(), atol=1e-4)


@pytest.mark.parametrize("positions", ["absolute", "rebase"])
def test_dropped_anchors_are_gone(pipe, positions):
    """Neither the picture nor the text can be read from what is left."""
    (case, other) = cases(pipe, gap=3)
    settings = {"guidance": 1.0, "rebase": "trained", "positions": positions}
    assert not torch.equal(case.given[0], other.given[0])
    stranger = replace(case, given=torch.cat((other.given[:1], case.given[1:])))
    policy = memory.memory_policy(memory.DROPPED)
    decoder = memory._told(pipe, [case], policy, **settings)
    (cache,) = decoder.caches
    assert cache.physical_length == 3 + 3 * P
    assert [e.span.role for e in cache.timeline.anchors] == [Role.TEXT]
    again = memory._told(pipe, [stranger], policy, **settings)
    assert torch.equal(decoder.predict(), again.predict())
    whole, mixed = (memory._told(pipe, [c], FullCache(), **settings) for c in (case, stranger))
    assert whole.caches[0].physical_length == len(whole.prefixes[0].ids) + 4 * P
    assert not torch.allclose(whole.predict(), mixed.predict())


def test_a_batch_asks_what_its_clips_ask_alone(pipe):
    policies = {name: ALL_POLICIES[name] for name in ("full", "paper", memory.DROPPED)}
    together, alone = (
        horizon(pipe, policies, gaps=(3,), clips=6, batch=batch) for batch in (16, 1)
    )
    for name in METRICS:
        a, b = together.values[name], alone.values[name]
        assert np.allclose(a, b, atol=1e-4, equal_nan=True), name


def test_some_clips_are_asked_what_they_are_asked_among_all(pipe):
    """And policies may be given as they are, beside those that are spelled."""
    policies = {"full": "full", "window": SlidingWindow(frames=1)}
    whole, some = (
        horizon(pipe, policies, gaps=(2,), clips=4, only=only) for only in (None, (1, 3))
    )
    assert whole.policies == {"full": "full", "window": "SlidingWindow(frames=1)"}
    for name in METRICS:
        a, b = whole.values[name], some.values[name]
        assert np.isnan(b[..., [0, 2]]).all(), name
        assert np.allclose(a[..., [1, 3]], b[..., [1, 3]], atol=1e-4, equal_nan=True), name


def test_tokens_held_are_what_the_policy_keeps_of_history(pipe):
    names = ("full", "window 1", "paper", "novelty x 2", "sink 1 + 3", "none", memory.DROPPED)
    policies = {name: ALL_POLICIES[name] for name in names}
    curve = horizon(pipe, policies, gaps=(6,), clips=2, source="anchor")
    held = dict(zip(names, curve.values["held"][:, 0, 0].tolist(), strict=True))
    assert held == {
        "full": 6 * P,
        "window 1": P,
        "paper": P,
        "novelty x 2": 2 * P,
        "sink 1 + 3": 4 * P,
        "none": 0,
        memory.DROPPED: 6 * P,
    }
    assert curve.bounds["full"] is None and curve.bounds["sink 1 + 3"] == 4 * P


def test_every_policy_is_full_until_it_evicts(pipe):
    policies = {"full": "full", "window": "window:frames=3", "pack": "packcache:budget=3,window=5"}
    curve = horizon(pipe, policies, gaps=(2,), clips=2, source="anchor")
    for name in ("object", "nll", "held"):
        assert (curve.values[name] == curve.values[name][:1]).all()


# --- what the pipeline makes of it ---------------------------------------------------------------


def test_the_judge_sees_the_true_clip_and_then_what_was_made(pipe, monkeypatch):
    told, seen = memory._told, []

    def remember(pipeline, batch, policy, **settings):
        decoder = told(pipeline, batch, policy, **settings)
        true = torch.stack([case.question.codes[case.question.truth] for case in batch])
        decoder.true = true.unflatten(1, (12, 12))
        if "guidance" not in settings:
            assert decoder.branches == 2 and decoder.sampling == pipe.sampling
        return decoder

    monkeypatch.setattr(memory, "_told", remember)
    monkeypatch.setattr(Decoder, "generate", lambda self: SimpleNamespace(codes=self.true))

    def judge(frames, scene):
        first = 4 * scene.curtain.rises - 3
        truth = world.render(scene, first + 4)
        made = pipe.pixels(pipe.encode_video(truth))
        assert np.array_equal(frames[:first], truth[:first])
        assert np.array_equal(frames[first:], made[first:]) and len(frames) == first + 4
        seen.append(scene)
        return SimpleNamespace(digit=True, colour=scene.kind == "hidden", both=False)

    curve = horizon(pipe, {"full": "full"}, gaps=(1, 2), clips=4, judge=judge, judged=3)
    assert len(seen) == 6
    nan = np.nan
    for name, values in (
        ("returned_digit", [1, 1, 1, nan]),
        ("returned_colour", [1, 0, 1, nan]),
        ("returned_object", [0, 0, 0, nan]),
    ):
        assert np.array_equal(curve.values[name][0], [values] * 2, equal_nan=True)
    row = curve.to_json()["results"][0]
    assert row["returned_colour"]["mean"] == pytest.approx(2 / 3)
    assert row["returned_colour"]["clips"] == 3


def test_what_the_pipeline_makes_depends_on_seed_and_clip_alone(pipe):
    def judged(**settings):
        made = {}

        def judge(frames, scene):
            made[scene] = frames[-4:]
            return SimpleNamespace(digit=True, colour=True, both=True)

        horizon(pipe, {"paper": "packcache"}, gaps=(2,), judge=judge, **settings)
        return made

    one, two = judged(clips=4, judged=4), judged(clips=2, judged=1, batch=1)
    assert len(one) == 4 and len(two) == 1
    for scene, frames in two.items():
        assert np.array_equal(frames, one[scene])


# --- results -------------------------------------------------------------------------------------


def test_a_result_is_plain_and_complete(pipe):
    steps = []
    policies = {"full": "full", "window 1": "window:frames=1", "none": "none"}
    curve = horizon(
        pipe, policies, gaps=(1, 2), clips=6, seed=5, on_step=lambda *step: steps.append(step)
    )
    result = curve.to_json()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["schema"] == "packcache.memory/1" and "torch" in result["environment"]
    assert result["workload"]["seed"] == 5 and result["workload"]["sampling"]["steps"] == 2
    assert steps[-1] == (36, 36) and [done for done, _ in steps] == sorted({d for d, _ in steps})
    assert len(result["results"]) == 6 and len(result["power"]) == 1
    for row in result["results"]:
        p, g = list(policies).index(row["policy"]), curve.gaps.index(row["gap"])
        assert row["object_by_clip"] == "".join(f"{x:.0f}" for x in curve.values["object"][p, g])
        assert row["nll"]["low"] <= row["nll"]["mean"] <= row["nll"]["high"]
        assert row["returned_object"] is None
        assert (row["versus_full"] is None) == (row["policy"] == "full")
    again = horizon(pipe, policies, gaps=(1, 2), clips=6, seed=5).to_json()
    assert again["results"] == result["results"]


def test_without_full_nothing_is_compared_with_it(pipe):
    result = horizon(pipe, {"none": "none"}, gaps=(2,), clips=2, source="anchor").to_json()
    assert result["power"] == [] and result["results"][0]["versus_full"] is None


def test_differences_are_paired_and_corrected():
    curve = made_up({"full": [1, 0.9], "window:frames=1": [1, 0.1], "none": [0.5, 0.1]})
    rows = {(row["policy"], row["gap"]): row["versus_full"] for row in curve.to_json()["results"]}
    same, worse = rows["window:frames=1", 1], rows["window:frames=1", 2]
    assert (same["gained"], same["lost"], same["p"]) == (0, 0, 1)
    assert worse["lost"] == 48 and worse["object"]["mean"] == pytest.approx(-0.8)
    assert worse["p"] == pytest.approx(2 / 2**48) and worse["p_holm"] == 2 * worse["p"]


def test_power_needs_controls_that_surely_fail():
    failing = {"full": [1, 0.9], "random": [1, 0.1], "window:frames=1": [0, 0.8], "none": [0, 0]}
    verdicts = made_up(failing).to_json()["power"]
    assert [(v["control"], v["gap"], v["separated"]) for v in verdicts] == [
        ("random", 2, True),
        ("window:frames=1", 2, bool(2 / 2**6 < 0.01)),
    ]
    assert verdicts[0]["difference"] == pytest.approx(-0.8)
    better = made_up({"full": [1, 0.1], "random": [1, 0.9]})
    assert [v["separated"] for v in memory.power(better)] == [False]
    anchor = made_up({"full": [1, 1], "random": [0, 0], memory.DROPPED: [0, 0]}, source="anchor")
    assert [(v["control"], v["separated"]) for v in memory.power(anchor)] == [
        (memory.DROPPED, True)
    ]


def test_the_default_policies_can_be_read_and_hold_what_they_say():
    for label, text in ALL_POLICIES.items():
        policy = memory.memory_policy(text)
        equal = policy.max_history(P, policy.budget_for(P, 51))
        expected = {"full": None, memory.DROPPED: None, "none": 0, "paper visible": 3 * 51}
        expected |= {"novelty x 2": 2 * P, "window 3": 3 * P, "sink 1 + 3": 4 * P}
        assert equal == expected.get(label, 3 * P if label == "budget 3, window 5" else P), label


# --- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["curve.png", "curve.svg"])
def test_a_picture_is_drawn_from_the_file_alone(tmp_path, name):
    pytest.importorskip("matplotlib", reason="pictures come with the extra [plot]")
    curve = made_up({"full": [1, 0.9, 0.8], "window:frames=1": [1, 0.1, 0], "none": [0, 0, 0]})
    result = json.loads(json.dumps(curve.to_json()))
    path = draw(result, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name] and path.stat().st_size > 10_000
    first = path.read_bytes()[:5]
    assert first == (b"\x89PNG\r" if name.endswith("png") else b"<?xml")


def test_one_gap_and_other_metrics_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures come with the extra [plot]")
    result = made_up({"full": [1], "none": [0]}).to_json()
    for metric in ("object", "nll", "digit"):
        assert draw(result, tmp_path / f"{metric}.png", metric=metric).exists()
    with pytest.raises(InvalidSetting, match="holds no 'ground'"):
        draw(result, tmp_path / "ground.png", metric="ground")
    assert not (tmp_path / "ground.png").exists()


def test_what_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    result = made_up({"full": [1], "none": [0]}).to_json()
    with pytest.raises(InvalidSetting, match=r"cannot draw 'a.gif': known are .png and .svg"):
        draw(result, tmp_path / "a.gif")
    with pytest.raises(InvalidSetting, match="schema 'other'"):
        draw({"schema": "other"}, tmp_path / "a.png")
    with pytest.raises(InvalidSetting, match="cannot plot 'beauty'"):
        draw(result, tmp_path / "a.png", metric="beauty")
    with pytest.raises(OutputError, match="does not exist"):
        draw(result, tmp_path / "no" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidSetting, match=r"pip install 'packcache\[plot\]'"):
        draw(result, tmp_path / "a.png")


# --- wrong use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"gaps": (0,)}, "gap is 0, expected at least 1"),
        ({"gaps": ()}, "expected at least one"),
        ({"gaps": (2, 2)}, "each once"),
        ({"clips": 0}, "clips is 0, expected at least 1"),
        ({"policies": {}}, "no policy to ask"),
        ({"policies": {"a": "best"}}, "unknown policy 'best'"),
        ({"policies": {"a": "packcache:budget=2tok,window=4"}}, "budget 2tok is 2 tokens"),
        ({"source": "dreams"}, "source is 'dreams', expected history or anchor"),
        ({"batch": 0}, "batch is 0"),
        ({"judged": 1}, "judged is 1 of 2 clips without a judge"),
        ({"judge": print}, "judged is 0 of 2 clips with a judge"),
    ],
)
def test_wrong_use_is_told(pipe, settings, says):
    settings = {"policies": {"full": "full"}, "clips": 2, "gaps": (1,)} | settings
    with pytest.raises(InvalidSetting, match=says):
        horizon(pipe, settings.pop("policies"), **settings)


def test_a_clip_that_hides_nothing_cannot_be_asked(pipe):
    scene = world.sample_scene(np.random.default_rng(0), "test", kind="one")
    with pytest.raises(InvalidSetting, match="kind 'one' hides nothing"):
        memory.question(pipe, scene)
