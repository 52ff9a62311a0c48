from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedserve_engine.config import SMALL_MODEL, EngineConfig, build_parser, read_termination_path
from pagedserve_engine.errors import ConfigError

FIELDS = {field.name: field for field in dataclasses.fields(EngineConfig)}
BOUNDED = {name: field for name, field in FIELDS.items() if field.metadata["low"] is not None}


def read(*arguments: str, **environ: str) -> EngineConfig:
    return EngineConfig.read(arguments, environ)


def test_nothing_given_means_the_defaults() -> None:
    config = read()
    assert config == EngineConfig()
    assert config.model == SMALL_MODEL
    assert (config.num_blocks, config.max_batch_tokens, config.block_size) == (1024, 2048, 32)


def test_flags_win_over_variables_and_variables_over_defaults() -> None:
    assert read(BLOCK_SIZE="16").block_size == 16
    assert read("--block-size", "64", BLOCK_SIZE="16").block_size == 64
    assert read("--block-size=64").block_size == 64


def test_the_process_environment_is_read_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCK_SIZE", "8")
    assert EngineConfig.read().block_size == 8


def test_foreign_variables_are_left_alone() -> None:
    assert read(PATH="/bin", block_size="8") == EngineConfig()


def test_an_empty_variable_counts_as_absent() -> None:
    assert read(**{name.upper(): "" for name in FIELDS}) == EngineConfig()


ACCEPTED = {
    "a number": ("NUM_BLOCKS", "77", 77),
    "auto for a number": ("NUM_BLOCKS", "auto", "auto"),
    "a fraction": ("SAFETY_MARGIN", "0.5", 0.5),
    "a whole number for a fraction": ("DRAIN_SECONDS", "3", 3.0),
    "a choice": ("SCHEDULER", "prefill_first", "prefill_first"),
    "true": ("USE_CUDA_GRAPH", "true", True),
    "yes": ("USE_CUDA_GRAPH", "Yes", True),
    "1": ("USE_CUDA_GRAPH", "1", True),
    "off": ("PREFIX_CACHE", "OFF", False),
    "0": ("PREFIX_CACHE", "0", False),
    "a path": ("API_KEY_FILE", "/run/keys", Path("/run/keys")),
    "text": ("MODEL", "hf://org/name", "hf://org/name"),
    "text where there was none": ("MODEL_REVISION", "main", "main"),
    "the lowest port": ("PORT", "0", 0),
    "the highest port": ("PORT", "65535", 65535),
}


@pytest.mark.parametrize(("variable", "text", "value"), ACCEPTED.values(), ids=ACCEPTED)
def test_text_becomes_a_value_of_the_fields_type(variable: str, text: str, value: object) -> None:
    got = getattr(read(**{variable: text}), variable.lower())
    assert (got, type(got) if not isinstance(got, Path) else Path) == (
        value,
        type(value) if not isinstance(value, Path) else Path,
    )


REFUSED = {
    "words for a number": ("NUM_BLOCKS", "many", "NUM_BLOCKS is 'many': give a whole number or 'auto'"),
    "a fraction for a whole number": ("BLOCK_SIZE", "1.5", "BLOCK_SIZE is '1.5': give a whole number"),
    "auto where nothing is measured": ("BLOCK_SIZE", "auto", "BLOCK_SIZE is 'auto': give a whole number"),
    "an unknown choice": ("SCHEDULER", "lifo", "SCHEDULER is 'lifo': give 'fifo' or 'prefill_first'"),
    "a choice in capitals": ("SCHEDULER", "FIFO", "SCHEDULER is 'FIFO': give 'fifo' or 'prefill_first'"),
    "half a truth": ("USE_CUDA_GRAPH", "maybe", "USE_CUDA_GRAPH is 'maybe': give true or false"),
    "not a number at all": ("SAFETY_MARGIN", "nan", "SAFETY_MARGIN is nan: give a number from 0.0 to 0.99"),
    "too much": ("MAX_MEMORY_PERCENT", "90", "MAX_MEMORY_PERCENT is 90.0: give a number from 0.01 to 1.0"),
    "too little": ("MAX_NUM_SEQS", "0", "MAX_NUM_SEQS is 0: give a number at least 1"),
    "less than nothing": ("DRAIN_SECONDS", "-1", "DRAIN_SECONDS is -1.0: give a number at least 0.0"),
    "a port that can't be": ("PORT", "65536", "PORT is 65536: give a number from 0 to 65535"),
}


@pytest.mark.parametrize(("variable", "text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_value_that_cannot_be_is_refused_by_name(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**{variable: text})
    assert caught.value.message == message
    assert (caught.value.param or "").upper() == variable


def test_a_flags_error_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--num-blocks is 'many'"):
        read("--num-blocks", "many", NUM_BLOCKS="5")


def test_a_wrong_variable_is_forgiven_where_a_flag_overrides_it() -> None:
    assert read("--num-blocks", "5", NUM_BLOCKS="many").num_blocks == 5


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--num-block", "5")
    assert "--num-block" in capsys.readouterr().err


def test_a_model_may_be_split_over_devices() -> None:
    assert read(TENSOR_PARALLEL_SIZE="2").tensor_parallel_size == 2
    with pytest.raises(ConfigError, match="TENSOR_PARALLEL_SIZE is 0: give a number at least 1"):
        read(TENSOR_PARALLEL_SIZE="0")


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_are_inclusive_and_hold_for_library_users_too(name: str) -> None:
    metadata = BOUNDED[name].metadata
    for inside in (metadata["low"], metadata["high"]):
        if inside is not None:
            assert getattr(EngineConfig(**{name: inside}), name) == inside
    for outside in (metadata["low"] - 1, None if metadata["high"] is None else metadata["high"] + 1, math.nan):
        if outside is not None:
            with pytest.raises(ConfigError, match=name.upper()):
                EngineConfig(**{name: outside})


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_sentence_and_a_flag(name: str) -> None:
    assert len(FIELDS[name].metadata["help"]) > 5
    flag = "--" + name.replace("_", "-")
    assert flag in build_parser().format_help()


def test_settings_are_read_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().port = 1  # type: ignore[misc]


changes = st.fixed_dictionaries(
    {},
    optional={
        "num_blocks": st.integers(2, 10**6) | st.just("auto"),
        "max_batch_tokens": st.integers(1, 10**6),
        "safety_margin": st.floats(0, 0.99),
        "prefix_cache": st.booleans(),
        "port": st.integers(0, 65535),
        "scheduler": st.sampled_from(["fifo", "prefill_first"]),
        "model_revision": st.none() | st.just("main"),
    },
)


@given(changes, changes)
def test_derive_changes_what_it_is_told_and_nothing_else(first: dict[str, object], second: dict[str, object]) -> None:
    config = EngineConfig().derive(**first)
    before = dataclasses.asdict(config)
    derived = config.derive(**second)
    assert dataclasses.asdict(derived) == {**before, **second}
    assert dataclasses.asdict(config) == before


@given(changes)
def test_what_is_written_as_variables_or_flags_is_read_back(values: dict[str, object]) -> None:
    texts = {name: str(value) for name, value in values.items() if value is not None}
    environ = {name.upper(): text for name, text in texts.items()}
    arguments = [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]
    expected = EngineConfig(**{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]
    assert EngineConfig.read((), environ) == expected
    assert EngineConfig.read(arguments, {}) == expected


def test_derive_checks_bounds_too() -> None:
    with pytest.raises(ConfigError, match="BLOCK_SIZE"):
        EngineConfig().derive(block_size=0)


def test_where_the_reason_goes_is_known_also_when_another_setting_is_wrong() -> None:
    assert read_termination_path(["--dtype", "float99", "--termination-message-path", "/flag"], {}) == Path("/flag")
    assert read_termination_path([], {"TERMINATION_MESSAGE_PATH": "/variable"}) == Path("/variable")
    assert read_termination_path([], {}) == EngineConfig().termination_message_path


def test_what_is_not_served_yet_is_refused_rather_than_ignored() -> None:
    with pytest.raises(ConfigError, match=r"COMPILE is 'inductor'.*unset it"):
        EngineConfig.read([], {"COMPILE": "inductor"})
    assert EngineConfig.read([], {"COMPILE": "none"}) == EngineConfig.read([], {})
