"""transformers: the kit, generate(), token by token, staged frames, the rest of the protocol."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin

from packcache.adapters.transformers import MODELS, make_cache
from packcache.adapters.transformers_subject import (
    TransformersSubject,
    tiny_chameleon,
    tiny_emu3,
)
from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import FullCache, PackCache, SinkWindow, SlidingWindow
from packcache.testing.conformance import Trial, check
from packcache.testing.subjects import SUBJECTS
from packcache.timeline import FrameLayout, Role

LAYOUT = FrameLayout(rows=2, cols=3, header=0, footer=0, new_line=False)
SIZE, TEXT = LAYOUT.tokens, 5
POLICIES = [FullCache(), SlidingWindow(frames=2), SinkWindow(sinks=1, frames=1), PackCache()]


@pytest.fixture(scope="module")
def model():
    return tiny_emu3()


def text(count: int = TEXT, batch: int = 1) -> Tensor:
    return torch.arange(30, 30 + count * batch).view(batch, count)


def bias(model, policy, frames: int) -> Tensor:
    """What each token of a text and its frames may see, `[1, 1, N, N]`."""
    trial = Trial(TransformersSubject("emu3", model))
    plan = [torch.from_numpy(held) for held in trial.plan(policy, 1 + frames)]
    return trial.bias([torch.zeros(0, dtype=torch.long), *plan[:-1]])[None, None]


@torch.inference_mode()
def forward(model, ids: Tensor, **settings) -> Tensor:
    return model(ids, **settings).logits


# --- the kit and the contract --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emu3", "chameleon"])
def test_they_pass_the_kit(name):
    report = check(SUBJECTS[name]())
    assert report.ok, "\n".join(report.lines())
    assert {found.state for found in report.findings} == {"holds"}


def test_the_kit_finds_physical_positions(model, monkeypatch):
    """The mistake that is nearest: positions that count what is held."""
    from packcache.adapters import transformers as adapter

    monkeypatch.setattr(
        adapter.PackedLayer, "get_seq_length", lambda self: self.owner.physical_length
    )
    failed = check(TransformersSubject("emu3", model)).failed
    assert {"bounded", "positions", "lengths"} <= set(failed)


def test_what_transformers_asks_of_a_layer_is_what_we_wrote():
    assert CacheLayerMixin.__abstractmethods__ == {
        "lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length",
    }  # fmt: skip


def test_all_of_the_named_models_exist():
    import transformers

    assert all(hasattr(transformers, name) for name in MODELS)


# --- token by token ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("make", [tiny_emu3, tiny_chameleon])
def test_generate_is_greedy_under_the_matching_mask(make, policy):
    """Every token that `generate()` chose is the first choice of one uncached, masked forward."""
    model, frames = make(), 5
    cache = make_cache(model, policy, LAYOUT)
    ids = model.generate(
        text(), past_key_values=cache, max_new_tokens=frames * SIZE, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    logits = forward(model, ids, attention_mask=bias(model, policy, frames), use_cache=False)[0]
    assert ids.shape[1] == TEXT + frames * SIZE
    assert torch.equal(ids[0, TEXT:], logits[TEXT - 1 : -1].argmax(dim=-1))
    # the last token was chosen and never forwarded, so the last frame is not whole
    assert cache.get_seq_length() == TEXT + frames * SIZE - 1


def test_the_policy_makes_a_difference(model):
    """Else the test above would be equal for the wrong reason."""
    made = [
        model.generate(
            text(), past_key_values=make_cache(model, policy, LAYOUT), max_new_tokens=60,
            do_sample=False, eos_token_id=None,
        )
        for policy in (FullCache(), SlidingWindow(frames=1))
    ]  # fmt: skip
    assert not torch.equal(*made)


def test_a_full_cache_is_transformers_own(model):
    ids = text(TEXT + 4 * SIZE)
    ours, theirs = make_cache(model, FullCache(), SIZE), DynamicCache(config=model.config)
    cuts = [TEXT, *[1] * SIZE, SIZE, *[2] * (SIZE // 2), SIZE]
    for part in ids.split(cuts, dim=1):
        one, other = (forward(model, part, past_key_values=cache) for cache in (ours, theirs))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert ours.get_seq_length() == theirs.get_seq_length() == TEXT + 4 * SIZE


def test_tokens_leave_only_when_a_frame_is_whole(model):
    cache = make_cache(model, SlidingWindow(frames=1), SIZE)
    forward(model, text(), past_key_values=cache)
    held = []
    for token in range(3 * SIZE):
        forward(model, text(1), past_key_values=cache)
        assert cache.get_seq_length() == TEXT + token + 1
        held.append(cache.physical_length)
    growing = list(range(1, SIZE + 1))
    later = [SIZE + n for n in growing]
    assert held == [TEXT + n for n in [*growing, *later, *later]]
    assert cache.kv_bytes == held[-1] * 2 * 2 * 2 * 8 * 4  # K and V, layers, heads, size
    assert cache.get_mask_sizes(1, 0) == (TEXT + SIZE + 1, 2 * SIZE)


def test_bytes_are_the_policys_prediction(model):
    policy = PackCache(budget=2, window=4)
    cache = make_cache(model, policy, LAYOUT)
    forward(model, text(), past_key_values=cache)
    for _ in range(9):
        forward(model, text(SIZE), past_key_values=cache)
    cache.mask_sizes(1)
    history = policy.max_history(SIZE, policy.budget_for(SIZE))
    assert cache.kv_bytes == (TEXT + history) * 2 * 2 * 2 * 8 * 4  # K and V, layers, heads, size


def test_a_condition_image_stays(model):
    cache = make_cache(model, SlidingWindow(frames=1), SIZE, roles=[Role.IMAGE])
    forward(model, text(TEXT + SIZE), past_key_values=cache)
    for _ in range(4):
        forward(model, text(SIZE), past_key_values=cache)
    cache.mask_sizes(1)
    assert [entry.count for entry in cache.held.timeline.anchors] == [TEXT, SIZE]
    assert cache.held.timeline.counts() == {4: SIZE}


def test_a_prompt_may_come_in_pieces(model):
    whole, pieces = (make_cache(model, PackCache(), SIZE, text_tokens=TEXT) for _ in range(2))
    forward(model, text(), past_key_values=whole)
    for token in text().split(2, dim=1):
        last = forward(model, token, past_key_values=pieces)
    torch.testing.assert_close(last[:, -1], forward(model, text())[:, -1], rtol=1e-5, atol=1e-5)
    one, other = (forward(model, text(SIZE), past_key_values=c) for c in (whole, pieces))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# --- staged --------------------------------------------------------------------------------------


def test_a_frame_that_is_forwarded_often_is_a_crop_and_a_forward(model):
    """Frames see all of themselves; drafts of other tokens leave no trace."""
    ours = make_cache(model, FullCache(), SIZE, staged=True)
    theirs = DynamicCache(config=model.config)
    for cache in (ours, theirs):
        forward(model, text(), past_key_values=cache)
    ours.commit()
    for frame in range(3):
        for step in range(3):
            ids = text(SIZE) + 10 * frame + step
            mask = ours.frame_mask(SIZE)
            one = forward(model, ids, past_key_values=ours, attention_mask=mask)
            other = forward(model, ids, past_key_values=theirs, attention_mask=mask)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            if step < 2:
                theirs.crop(-SIZE)
        assert ours.get_seq_length() == TEXT + frame * SIZE
        ours.commit()


def test_a_frame_never_closed_is_written_over(model):
    cache = make_cache(model, FullCache(), SIZE, staged=True)
    forward(model, text(), past_key_values=cache)
    cache.commit()
    forward(model, text(SIZE), past_key_values=cache)
    assert cache.get_seq_length() == TEXT
    cache.commit()
    with pytest.raises(CacheStateError, match="commit without a forward"):
        cache.commit()
    assert cache.get_seq_length() == TEXT + SIZE


# --- the rest of the protocol --------------------------------------------------------------------


def test_rows_of_a_batch_are_chosen_repeated_and_put_in_another_order(model):
    """As single clips would go on; the beams of a search are such rows."""
    ids, frame = text(TEXT, batch=3), text(SIZE, batch=1)

    def begun(rows: Tensor):
        cache = make_cache(model, SinkWindow(sinks=1, frames=1), SIZE)
        forward(model, rows, past_key_values=cache)
        for _ in range(4):
            forward(model, frame.expand(len(rows), -1), past_key_values=cache)
        return cache

    cache = begun(ids)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    rows = ids[[2, 2, 1, 1]]
    one = forward(model, frame.expand(4, -1), past_key_values=cache)
    other = forward(model, frame.expand(4, -1), past_key_values=begun(rows))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_beam_search_is_the_one_of_transformers_own_cache(model):
    made = [
        model.generate(
            text(), past_key_values=cache, max_new_tokens=3 * SIZE, num_beams=3, do_sample=False,
            eos_token_id=None,
        )
        for cache in (make_cache(model, FullCache(), SIZE), DynamicCache(config=model.config))
    ]  # fmt: skip
    assert torch.equal(*made)


def test_assisted_decoding_is_refused_by_name(model):
    cache = make_cache(model, PackCache(), SIZE)
    with pytest.raises(InvalidSetting, match="assisted decoding takes back tokens"):
        model.generate(
            text(), past_key_values=cache, max_new_tokens=SIZE, assistant_model=tiny_emu3(),
            do_sample=False,
        )  # fmt: skip


def test_the_last_tokens_of_an_open_frame_can_be_taken_back(model):
    cache, straight = (make_cache(model, PackCache(), SIZE) for _ in range(2))
    for one in (cache, straight):
        forward(model, text(), past_key_values=one)
        forward(model, text(2), past_key_values=one)
    forward(model, text(3) + 7, past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == TEXT + 2
    one, other = (forward(model, text(4), past_key_values=c) for c in (cache, straight))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    cache.mask_sizes(1)  # the frame is whole now, and stays
    with pytest.raises(CacheStateError, match="expected at most 0: what was committed stays"):
        cache.crop(-1)


def test_a_reset_is_a_new_clip_of_any_batch(model):
    cache = make_cache(model, PackCache(), SIZE)
    forward(model, text(), past_key_values=cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.kv_bytes) == (0, 0)
    rows = text(TEXT, batch=2)
    one, other = (forward(model, rows, past_key_values=c) for c in (cache, None))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_cache_that_is_gone_leaves_nothing_in_the_model():
    model = tiny_emu3()
    cache = make_cache(model, PackCache(), SIZE)
    assert len(model.model._forward_pre_hooks) == 1
    del cache
    gc.collect()
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks


# --- wrong use -----------------------------------------------------------------------------------


def test_a_model_that_is_not_supported_is_named_with_those_that_are():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=8,
    )  # fmt: skip
    with pytest.raises(InvalidSetting, match=r"LlamaForCausalLM is not supported: .*adapters\.md"):
        make_cache(LlamaForCausalLM(config), PackCache(), SIZE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_frame": 0}, "tokens_per_frame is 0, expected at least 1"),
        ({"text_tokens": 0}, "text_tokens is 0, expected at least 1"),
    ],
)
def test_settings_are_checked(model, settings, message):
    with pytest.raises(InvalidSetting, match=message):
        make_cache(model, PackCache(), **{"tokens_per_frame": SIZE, **settings})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (SIZE + 1, "7 tokens are no whole latent frames of 6"),
        (5, "5 tokens after 2 of 6 cross the end of a latent frame: forward the rest of it first"),
    ],
)
def test_frames_that_do_not_divide_the_sequence(model, tokens, message):
    cache = make_cache(model, PackCache(), SIZE)
    forward(model, text(), past_key_values=cache)
    if tokens == 5:
        forward(model, text(2), past_key_values=cache)
    before = cache.get_seq_length()
    with pytest.raises(InvalidSetting, match=message):
        forward(model, text(tokens), past_key_values=cache)
    assert cache.get_seq_length() == before
    forward(model, text(2), past_key_values=cache)  # and it goes on


def test_a_prompt_that_is_no_text_and_frames(model):
    cache = make_cache(model, PackCache(), SIZE, text_tokens=3)
    with pytest.raises(InvalidSetting, match="a prompt of 8 tokens is no text of 3 tokens and"):
        forward(model, text(8), past_key_values=cache)


def test_another_batch_midway(model):
    cache = make_cache(model, PackCache(), SIZE)
    forward(model, text(), past_key_values=cache)
    with pytest.raises(CacheStateError, match=r"are \(2, 2, 8\) in torch.float32, and were \(1, 2"):
        forward(model, text(SIZE, batch=2), past_key_values=cache)
    assert cache.get_seq_length() == TEXT


def test_left_padding_is_refused_by_name(model):
    cache = make_cache(model, PackCache(), SIZE)
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[1, 0] = 0
    with pytest.raises(InvalidSetting, match=r"left padding: .*prompts of equal length"):
        forward(model, text(batch=2), past_key_values=cache, attention_mask=mask)


def test_one_cache_in_two_models(model):
    cache = make_cache(model, PackCache(), SIZE)
    with pytest.raises(CacheStateError, match="made for another model: make one for each"):
        forward(tiny_emu3(), text(), past_key_values=cache)
    forward(model, text(), past_key_values=cache)


def test_importing_the_package_needs_neither_library():
    """And without transformers the extra is named."""
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['diffusers'] = None\n"
        "import packcache, packcache.cli, packcache.testing.subjects\n"
        "packcache.FrameCache\n"
        "try: import packcache.adapters.transformers\n"
        "except packcache.InvalidSetting as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pip install 'packcache[hf]'" in result.stdout
