"""stock: upstream's way of computing gives the engine's tokens, with all that it wastes."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from packcache.bench.baselines import TorchFull
from packcache.bench.candidates import make_model
from packcache.bench.parts import Workload
from packcache.bench.probes import cut
from packcache.bench.stock import GrowingCache, LateStock, Stock
from packcache.errors import GenerationError
from packcache.lumos.config import SIZES, LumosConfig
from packcache.lumos.schedule import Sampling, philox_draws
from tests.bench.test_baselines import SAMPLINGS, Counting, clip, engine_tokens, own_tokens
from tests.tools import ROOT

GUIDED = [name for name, sampling in SAMPLINGS.items() if sampling.branches == 2]
GREEDY = Sampling(steps=4, guidance=3.0, greedy=True, temperature=0.0)
SMALL = Sampling(steps=3, guidance=3.0)


def with_our_draws(model, work: Workload) -> Stock:
    draws = philox_draws([work.seed], work.sampling.steps, work.layout.content)
    return Stock(model, work, draws=draws)


def lists(tokens: list[torch.Tensor]) -> list[list[int]]:
    return [t.tolist() for t in tokens]


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("name", GUIDED)
def test_the_tokens_are_the_engines(tiny, task, name):
    work = clip(tiny.config, task, SAMPLINGS[name])
    got = own_tokens(with_our_draws(tiny, work), work)
    assert lists(got) == lists(engine_tokens(tiny, work))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_greedy_tokens_are_the_engines_whatever_is_drawn(tiny, task):
    """Upstream's own noise has no weight at temperature 0."""
    work = clip(tiny.config, task, GREEDY)
    assert lists(own_tokens(Stock(tiny, work), work)) == lists(engine_tokens(tiny, work))


def test_swin_norm_is_computed_as_the_engine_does():
    config = LumosConfig(**{**vars(SIZES["toy"]), "swin_norm": True})
    work = clip(config, "i2v", SMALL)
    model = make_model(work)
    assert lists(own_tokens(with_our_draws(model, work), work)) == lists(engine_tokens(model, work))


def test_upstreams_draw_is_over_all_ids_and_gives_visual_ones(tiny, monkeypatch):
    """The same seed draws the same, another one differently."""
    shapes = []
    multinomial = torch.multinomial

    def seen(probs, *arguments, **options):
        shapes.append(tuple(probs.shape))
        return multinomial(probs, *arguments, **options)

    monkeypatch.setattr(torch, "multinomial", seen)
    ids = tiny.config.token_ids
    clips = []
    for seed in (5, 5, 6):
        work = clip(tiny.config, "t2v", SMALL, seed=seed)
        clips.append(own_tokens(Stock(tiny, work), work))
        content = TorchFull(tiny, work).content
        for tokens in clips[-1]:
            assert ids.video_lo <= tokens[content].min() and tokens[content].max() < ids.video_hi
    assert set(shapes) == {(32, tiny.config.vocab_size)} and len(shapes) == 3 * 3 * 3
    assert lists(clips[0]) == lists(clips[1]) != lists(clips[2])


def test_advancing_holds_what_torch_full_holds(tiny):
    work = clip(tiny.config, "i2v", SMALL)
    stock, full = Stock(tiny, work), TorchFull(tiny, work)
    for engine in (stock, full):
        engine.prefill()
        for _ in range(work.latents):
            assert engine.advance() == 0.0
    for branch, cache in enumerate(stock.caches):
        for layer, pair in enumerate(cache.layers):
            held = full.cache[branch][:, layer, :, : full.held[branch]]
            for ours, theirs in zip(pair, held, strict=True):
                assert torch.allclose(ours[0], theirs, atol=2e-5)
    assert stock.statistics() == full.statistics()


# --- what it wastes -----------------------------------------------------------------------------


def seen_lengths(work: Workload) -> tuple[int, int]:
    """Prefix tokens of both branches."""
    return work.text_tokens, 3


def test_the_mask_is_dense_and_follows_the_sequence(tiny):
    """Text is causal, a latent frame sees all before it and itself (lumos1-spec 4)."""
    work = clip(tiny.config, "i2v", SMALL)
    stock = Stock(tiny, work)
    stock.prefill()
    stock.advance()
    mask = stock._open().mask
    tokens, text = work.layout.tokens, work.text_tokens
    end = torch.arange(text + 2 * tokens)
    for start in (text, text + tokens):
        end[start : start + tokens] = start + tokens - 1
    blocked = torch.arange(len(end)) > end[:, None]
    assert mask.shape == (1, 1, len(end), len(end)) and mask.dtype == torch.float32
    assert torch.equal(mask[0, 0], blocked * float(torch.iinfo(torch.int64).min))


def test_two_forwards_a_step_repeated_heads_and_all_that_is_held(tiny):
    work = clip(tiny.config, "i2v", SMALL)
    stock = Stock(tiny, work)
    stock.prefill()
    stock.advance()
    with Counting("scaled_dot_product_attention") as calls:
        stock.rehearse()
    config, tokens, layers = work.config, work.layout.tokens, work.config.num_hidden_layers
    heads, size = config.num_attention_heads, config.head_dim
    expected = []
    for number in range(3 + 1):
        for length in seen_lengths(work):
            held = length + 2 * tokens
            rows = held if number == 0 else tokens  # the first step runs all there is
            expected += [((1, heads, rows, size), (1, heads, held, size))] * layers
    assert calls.shapes == expected


def test_the_head_sees_every_row_and_makes_all_logits(tiny):
    """In the steps and in the commit; float32, whatever the weights."""
    work = clip(tiny.config, "t2v", SMALL)
    stock, rows = Stock(tiny, work), []
    hook = tiny.lm_head.register_forward_hook(lambda _, x, out: rows.append(tuple(out.shape)))
    try:
        stock.prefill()
        stock.rehearse()
    finally:
        hook.remove()
    lengths = [n + work.layout.tokens for n in seen_lengths(work)]
    expected = [*lengths, *[work.layout.tokens] * 6]
    assert rows == [(1, n, work.config.vocab_size) for n in expected]


def test_a_growing_cache_copies_all_of_itself():
    cache = GrowingCache()
    first, more = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
    assert cache.length == 0
    cache.update(0, first, first)
    before = cache.update(0, more, more)[0]
    assert cache.length == 8 and torch.equal(before, torch.cat((first, more), dim=2))
    cache.crop(5)
    cropped = cache.layers[0][0]
    assert cropped.data_ptr() == before.data_ptr() and torch.equal(cropped, first)
    twin = cache.copy()
    after = cache.update(0, more, more)[0]
    assert after.data_ptr() != before.data_ptr() and torch.equal(after, before)
    assert twin.length == 5 and cache.length == 8


def test_statistics_tell_held_from_allocated(tiny):
    """A cropped cache keeps the memory of the draft until it is copied again."""
    work = clip(tiny.config, "t2v", SMALL)
    stock = Stock(tiny, work)
    stock.prefill()
    assert stock.statistics() == {"kv_bytes": 0, "capacity_bytes": 0, "held": 0}
    stock.advance()
    steps = stock.making()
    next(steps)
    next(steps)
    stats = stock.statistics()
    tokens, (long, short) = work.layout.tokens, seen_lengths(work)
    held, drafted = long + short + 2 * tokens, long + short + 4 * tokens
    assert stats["held"] == long + tokens
    assert stats["capacity_bytes"] * held == stats["kv_bytes"] * drafted
    steps.close()


def test_narrow_weights_run_under_autocast():
    work = clip(SIZES["toy"], "i2v", SMALL, dtype=torch.bfloat16)
    stock = Stock(make_model(work), work)
    tokens = own_tokens(stock, work)
    assert len(tokens) == 2
    assert {t.dtype for cache in stock.caches for t in cache.layers[0]} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_keys_are_float32():
    """lumos1-spec 2.4."""
    work = clip(SIZES["toy"], "i2v", SMALL, dtype=torch.bfloat16, device=torch.device("cuda"))
    stock = Stock(make_model(work), work)
    assert len(own_tokens(stock, work)) == 2
    assert [t.dtype for t in stock.caches[0].layers[0]] == [torch.float32, torch.bfloat16]


# --- as a candidate -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_rehearsal_leaves_no_trace(tiny, task):
    work = clip(tiny.config, task, SMALL)
    plain = own_tokens(with_our_draws(tiny, work), work)
    stock, got = with_our_draws(tiny, work), []
    stock.prefill()
    for _ in range(work.given):
        stock.advance()
    for steps in (None, [1, 2], [0])[work.given :]:
        before = stock.statistics()
        assert all(s > 0 for s in stock.rehearse(steps))
        assert stock.statistics() == before and not stock.outlived
        got.append(stock.generate())
    assert lists(got) == lists(plain)


def test_named_steps_of_the_first_frame_are_steps_like_others(tiny):
    """Text and given frame are then run once, by themselves."""
    work = clip(tiny.config, "i2v", SMALL)
    stock = Stock(tiny, work)
    stock.prefill()
    stock.advance()
    with Counting("scaled_dot_product_attention") as calls:
        stock.rehearse([0, 2])
    tokens, layers = work.layout.tokens, work.config.num_hidden_layers
    rows = [queries[2] for queries, _ in calls.shapes][::layers]
    before = [n + tokens for n in seen_lengths(work)]
    assert rows == [*before, *[tokens] * 6]


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_late_one_does_what_one_that_came_there_does(tiny, task):
    """Given the same ids, keys and values it makes the same tokens, with a mask of its own rows."""
    work = clip(tiny.config, task, GREEDY)
    stock = Stock(tiny, work)
    stock.prefill()
    for _ in range(work.given):
        stock.advance()
    stock.generate()
    late = LateStock(tiny, work, work.given + 1)
    shapes = [[k.shape for k, _ in cache.layers] for cache in late.caches]
    assert shapes == [[k.shape for k, _ in cache.layers] for cache in stock.caches]
    assert len(late.ids) == len(stock.ids) and late.generated == stock.generated
    late.ids, late.caches = stock.ids, [cache.copy() for cache in stock.caches]
    assert late.generate().tolist() == stock.generate().tolist()
    for ours, theirs in zip(late.caches, stock.caches, strict=True):
        for own, other in zip(ours.layers, theirs.layers, strict=True):
            assert all(map(torch.equal, own, other))


def test_a_late_one_without_layers_still_has_ends(tiny, monkeypatch):
    work = clip(tiny.config, "t2v", SMALL)
    bare = LateStock(cut(tiny, 1), work, 1)
    monkeypatch.setattr(bare.model.model, "layers", torch.nn.ModuleList())
    bare = LateStock(bare.model, work, 1)
    before = len(bare.ids), [cache.length for cache in bare.caches]
    with Counting("scaled_dot_product_attention") as calls:
        assert bare.step_seconds() > 0
    assert not calls.shapes
    assert before == (len(bare.ids), [cache.length for cache in bare.caches])
    assert before[1] == [n + work.layout.tokens for n in seen_lengths(work)]


def test_shares_say_what_is_done(tiny):
    work = clip(tiny.config, "i2v", SMALL)
    stock = Stock(tiny, work)
    stock.prefill()
    stock.advance()
    before = stock.statistics()
    shares = stock.shares()
    assert set(shares) == {
        "mask", "positions", "commit", "check", "rotary", "concat", "repeat", "attention", "head",
        "sampling", "linear",
    }  # fmt: skip
    assert all(seconds > 0 for seconds in shares.values())
    assert stock.statistics() == before and not stock.outlived


def test_a_broken_mask_is_one_clear_line(tiny, monkeypatch):
    """And what failed leaves no trace either."""
    work = clip(tiny.config, "t2v", SMALL)
    stock = Stock(tiny, work)
    stock.prefill()
    nothing = torch.full((1, 1, *[work.text_tokens + work.layout.tokens] * 2), -1.0)
    monkeypatch.setattr(stock, "_attention_mask", lambda ids: nothing)
    with pytest.raises(GenerationError, match="no token sees any other: the attention mask is"):
        stock.rehearse()
    assert len(stock.ids) == work.text_tokens and stock.statistics()["held"] == 0


# --- the benchmark beside upstream --------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    source = ROOT / "benchmarks" / "stock_upstream.py"
    spec = importlib.util.spec_from_file_location("stock_upstream", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class FakeStock:
    """Steps that take as many seconds as they were numbered."""

    def making(self, steps):
        yield "open", 0.5
        for step in steps:
            yield "step", float(step)
        yield "commit", 0.25


def test_engines_take_turns(script):
    """Upstream's first pass and two more steps are not counted, nor is stock's first."""
    pairs = 4
    turns = script.Turns(FakeStock(), pairs, torch.device("cpu"))
    with turns.running():
        for _ in range(script.WARM_UP + pairs + 1):  # the steps, and the commit
            turns.before_step()
    assert turns.ours == [1.0, 2.0, 3.0, 4.0] and len(turns.theirs) == pairs
    assert turns.once["stock_open_s"] == 0.5 and turns.once["stock_commit_s"] == 0.25
    assert {"upstream_open_s", "upstream_commit_s"} < set(turns.once)


def test_a_ratio_is_the_median_of_pairs(script):
    row = script.compared([1.0, 2.0, 3.3], [1.0, 2.0, 3.0])
    assert (row["ratio"], row["pairs"], row["as_promised"]) == (1.0, 3, True)
    assert row["ratio_low"] == 1.0 and row["ratio_high"] == pytest.approx(1.1)
    assert row["stock_step_s"] == row["upstream_step_s"] == 2.0
    slow = script.compared([1.2] * 7, [1.0] * 7)
    assert not slow["as_promised"]
    said = script.line({"dtype": "x", "largest_logit_difference": 0.0, **slow})
    assert "stock 1.200 s a step, upstream 1.000 s: 1.200x" in said
    assert "not within 10%" in said and "logits differ by 0" in said


def test_a_folder_without_upstream_is_one_clear_line(script, tmp_path):
    with pytest.raises(SystemExit, match=r"holds no inference_solver_vid\.py: expected a checkout"):
        script.find_upstream(tmp_path)


def test_upstream_is_found_in_its_checkout_and_identified(script, tmp_path):
    folder = tmp_path / script.INSIDE
    for name in script.TIMED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert script.find_upstream(tmp_path) == script.find_upstream(folder) == folder
    prints = script.fingerprint(folder)
    assert set(prints) == set(script.TIMED) and len(set(prints.values())) == len(script.TIMED)


@pytest.mark.parametrize("keeps", [False, True])
def test_the_network_tells_before_each_pair_of_calls(script, keeps):
    def inner(*, x, past_key_values):
        return {"logits": [x]}

    told = []
    network = script.Watched(inner, lambda: told.append(1), keeps=keeps)
    answers = [network(x=x, past_key_values="cache")["logits"] for x in range(4)]
    assert answers == [[0], [1], [2], [3]] and len(told) == 2 and network.cache == "cache"
    assert network.first == ([0, 1] if keeps else [])


def test_upstream_gets_the_same_clip(script):
    """Its prompt: text, the frames held, and the two ids that its loop drops."""
    config = SIZES["toy"]
    words = script.Words(config, [1, 2, 3])
    assert words.process_item({}) == [1, 2, 3]
    assert words.get_n_grids_token(2) == config.token_ids.size_zero + 2
    assert words.token2id(words.mask_token) == config.token_ids.mask
