"""What a config.json must say, what it may leave out, and what we may say instead of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcache.errors import InputFileError, InvalidSetting
from packcache.lumos.config import OWN_FIELDS, SIZES, UPSTREAM, LumosConfig, TokenIds, read_config

SMALL = {
    "vocab_size": 129536,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}

COUNTS = [name for name in SMALL if name not in ("rope_theta", "rms_norm_eps")]


def written(folder: Path, data: object) -> Path:
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def refused(words: str, change: dict, **overrides: object) -> None:
    """The config is refused with these words, in one line."""
    with pytest.raises(InvalidSetting) as caught:
        LumosConfig.from_dict({**SMALL, **change}, **overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes_are_required_and_behaviour_is_not():
    config = LumosConfig.from_dict({**SMALL, "architectures": ["x"], "vocabulary_map": {}})
    assert (config.head_dim, config.swin_norm, config.model_parallel_size) == (32, False, 1)
    assert (config.trained_latent_frames, config.compression) == (7, (4, 8, 8))
    assert (config.token_ids.mask, config.token_ids.num_codes) == (9003, 64000)
    assert config.max_position_embeddings == 65536


@pytest.mark.parametrize(
    "name, words",
    [
        ("vocab_size", "number of token ids (inferred: 129536 for 1B, 129536 for 3B)"),
        ("hidden_size", "width of the network (inferred: 2048 for 1B, 3072 for 3B)"),
        ("intermediate_size", "width inside the MLP (inferred: 8192 for 1B, 8192 for 3B)"),
        ("num_hidden_layers", "number of layers (inferred: 16 for 1B, 28 for 3B)"),
        ("num_attention_heads", "number of query heads (inferred: 32 for 1B, 24 for 3B)"),
        ("num_key_value_heads", "number of key/value heads (inferred: 8 for 1B, 8 for 3B)"),
        (
            "rope_theta",
            "base of the rotary frequencies (not known for the released weights; upstream's "
            "class default is 10000)",
        ),
        ("rms_norm_eps", "epsilon of the norms (not known for the released weights; "),
    ],
)
def test_a_missing_size_is_named_with_what_it_is(name, words):
    rest = {k: v for k, v in SMALL.items() if k != name}
    with pytest.raises(InvalidSetting) as caught:
        LumosConfig.from_dict(rest)
    text = str(caught.value)
    assert text.startswith(f"config lacks {name}: expected {name} = the {words}")
    assert text.endswith("found none; take the config.json that travels with the checkpoint")


def test_all_missing_sizes_are_named_at_once():
    with pytest.raises(InvalidSetting, match=r"config lacks vocab_size, hidden_size, .*rms_norm"):
        LumosConfig.from_dict({})


@pytest.mark.parametrize("name", [*COUNTS, "model_parallel_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -2, 2.0, "64", None, True, [64]])
def test_a_size_is_a_positive_integer(name, value):
    refused(f"{name} is {value!r}, expected a positive integer", {name: value})


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("value", [0, -1e-5, "10000", None, True, float("nan"), float("inf")])
def test_theta_and_eps_are_positive_numbers(name, value):
    refused(f"{name} is {value!r}, expected a positive number", {name: value})


def test_a_whole_theta_is_the_same_theta():
    config = LumosConfig.from_dict({**SMALL, "rope_theta": 10000})
    assert config == LumosConfig.from_dict(SMALL)
    assert isinstance(config.rope_theta, float)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"num_attention_heads": 3},
            "hidden_size is 64, expected a multiple of num_attention_heads",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads is 2, expected a multiple of num_key"),
        ({"hidden_size": 32}, "head size is 16, expected a multiple of 32"),
        ({"model_parallel_size": 2}, "model_parallel_size is 2, expected a divisor of 2 and 1"),
        ({"vocab_size": 1000}, "vocab_size is 1000, expected at least video_hi 129536"),
        ({"head_dim": 64}, "head_dim is 64, expected hidden_size / num_attention_heads = 32"),
        ({"swin_norm": 1}, "swin_norm is 1, expected true or false"),
    ],
)
def test_sizes_that_do_not_fit_together(change, words):
    refused(words, change)


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_type", "llama"),
        ("mm_rope", False),
        ("mm_rope", 1),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
    ],
)
def test_what_this_engine_does_not_run(name, value):
    words = f"{name} is {value!r}, expected {UPSTREAM[name]!r}, the only kind this engine runs"
    refused(words, {name: value})


def test_upstream_s_own_fields_are_fine():
    assert LumosConfig.from_dict({**SMALL, **UPSTREAM, "head_dim": 32}) == LumosConfig.from_dict(
        SMALL
    )


@pytest.mark.parametrize("name", SIZES)
def test_a_config_writes_and_reads_back(name):
    data = json.loads(json.dumps(SIZES[name].to_dict()))
    assert LumosConfig.from_dict(data) == SIZES[name]


@given(
    st.dictionaries(
        st.sampled_from([*SMALL, *UPSTREAM, *OWN_FIELDS, "head_dim", "swin_norm"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=3)
        | st.lists(st.integers(), max_size=4)
        | st.dictionaries(st.sampled_from(["mask", "video_hi", "x"]), st.integers(), max_size=2),
        max_size=3,
    )
)
def test_any_value_is_taken_or_refused_in_one_line(change):
    try:
        config = LumosConfig.from_dict({**SMALL, **change})
    except InvalidSetting as error:
        assert "\n" not in str(error)
    else:
        assert hash(config) == hash(dataclasses.replace(config))


# --- our own fields ------------------------------------------------------------------------------


def test_overrides_win_over_the_file():
    data = {**SMALL, "trained_latent_frames": 13, "token_ids": {"mask": 77}}
    config = LumosConfig.from_dict(data, trained_latent_frames=None, token_ids={"sep": 78})
    assert config.trained_latent_frames is None
    assert (config.token_ids.mask, config.token_ids.sep, config.token_ids.bos) == (77, 78, 0)
    whole = LumosConfig.from_dict(data, token_ids=TokenIds(mask=79), compression=[8, 8, 8])
    assert whole.token_ids == TokenIds(mask=79)
    assert whole.compression == (8, 8, 8)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            {"hidden_size": 128},
            "hidden_size cannot be set, expected trained_latent_frames, token_ids, compression, "
            "fsq_levels: everything else comes from the checkpoint's config.json",
        ),
        ({"theta": 1.0}, "theta cannot be set, expected trained_latent_frames, "),
        ({"token_ids": {"eos": 3}}, "eos cannot be set, expected bos, image_end, "),
        ({"token_ids": 5}, "token_ids is 5, expected token ids by name"),
        ({"trained_latent_frames": 0}, "trained_latent_frames is 0, expected a positive integer"),
        ({"compression": 4}, "compression is 4, expected three positive integers"),
        ({"compression": [4, 8]}, "compression is (4, 8), expected three positive integers"),
        ({"compression": [4, 8, True]}, "compression is (4, 8, True), expected three positive"),
        ({"fsq_levels": []}, "fsq_levels is (), expected a list of integers from 2 on"),
        ({"fsq_levels": [8, 1]}, "fsq_levels is (8, 1), expected a list of integers from 2 on"),
        ({"token_ids": {"mask": 9004}}, "token_ids.video_start is 9004, expected another id than"),
        ({"token_ids": {"mask": 70000}}, "token_ids.mask is 70000, expected an id outside the"),
        ({"token_ids": {"mask": -1}}, "token_ids.mask is -1, expected an integer from 0 on"),
        ({"token_ids": {"mask": True}}, "token_ids.mask is True, expected an integer from 0 on"),
        ({"token_ids": {"mask": 200000}}, "token_ids.mask is 200000, expected an id below vocab"),
        ({"token_ids": {"video_hi": 65536}}, "token_ids.video_hi is 65536, expected more than"),
        (
            {"token_ids": {"size_zero": 129600}},
            "token_ids.size_zero is 129600, expected an id below another one: numbers run from it",
        ),
    ],
)
def test_wrong_overrides_are_wrong_use(tmp_path, overrides, words):
    refused(words, {}, **overrides)
    with pytest.raises(InvalidSetting) as caught:
        read_config(written(tmp_path, SMALL), **overrides)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "ids, numbers",
    [
        (TokenIds(), range(8804, 9003)),
        (SIZES["toy"].token_ids, range(110, 144)),
        (dataclasses.replace(SIZES["toy"].token_ids, sep=120), range(110, 120)),
        (dataclasses.replace(SIZES["toy"].token_ids, bos=111), range(110, 111)),
    ],
)
def test_numbers_end_at_the_next_id_that_has_a_name(ids, numbers):
    assert ids.numbers == numbers


# --- files ---------------------------------------------------------------------------------------


def test_a_file_is_read_whatever_else_it_says(tmp_path):
    names = {f"<reserved{n:05d}>": n + 4 for n in range(65536)}
    folder = written(tmp_path, {**SMALL, **UPSTREAM, "vocabulary_map": names})
    assert (folder / "config.json").stat().st_size > 1_500_000
    assert read_config(folder) == LumosConfig.from_dict(SMALL)
    assert read_config(str(folder), trained_latent_frames=13).trained_latent_frames == 13


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", "config.json is not JSON (Expecting property name"),
        (b"\xff\xfe", "config.json is not JSON ('utf-8' codec can't decode"),
        (b"[" * 100_000, "config.json is not JSON ("),
        (b"[1]", "config.json holds a list, expected an object: download it again"),
        (b"", "config.json is not JSON (Expecting value"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputFileError) as caught:
        read_config(tmp_path)
    assert f"{tmp_path}/{words}" in str(caught.value)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(InputFileError, match=r"config\.json does not exist: expected the folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputFileError, match=r"config\.json cannot be read \(Is a directory\)"):
        read_config(tmp_path)


@pytest.mark.parametrize("overrides", [{}, {"trained_latent_frames": 13}])
def test_what_a_file_says_wrongly_is_a_bad_file(tmp_path, overrides):
    folder = written(tmp_path, {**SMALL, "hidden_size": -1})
    words = rf"^{folder}/config\.json: hidden_size is -1, expected a positive integer: check"
    with pytest.raises(InputFileError, match=words) as caught:
        read_config(folder, **overrides)
    assert caught.value.exit_code == 1


def test_levels_that_are_not_the_codes_are_refused_of_a_file(tmp_path):
    folder = written(tmp_path, {**SMALL, "fsq_levels": [8, 8, 5, 5]})
    words = r"config\.json: fsq_levels is \(8, 8, 5, 5\), expected a product of video_hi - video_lo"
    with pytest.raises(InputFileError, match=words + r" = 64000 codes, not 1600"):
        read_config(folder)
    assert read_config(folder, fsq_levels=(8, 8, 8, 5, 5, 5)).fsq_levels[2] == 8


def test_an_override_that_spoils_a_good_file_is_wrong_use(tmp_path):
    with pytest.raises(InvalidSetting, match=r"fsq_levels is \(8, 8\), expected a product"):
        read_config(written(tmp_path, SMALL), fsq_levels=[8, 8])
