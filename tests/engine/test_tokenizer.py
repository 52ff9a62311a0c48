import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models import gemma3_folder, smollm2_folder
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import ConfigError, InvalidParameterError, RequestError
from pagedserve_engine.model.detokenizer import Detokenizer, Vocabulary
from pagedserve_engine.model.tokenizer import Tokenizer

pytestmark = pytest.mark.real_model
REAL = {"smollm2": smollm2_folder, "gemma3": gemma3_folder}
TEXTS = st.text() | st.sampled_from(
    ["👩‍👩‍👧‍👦🏳️‍🌈", "统一码与表情🎉符号", "naïve café", "  two  spaces\n\n\ttab ", "ไทย བོད་ 한국어 ع"]
)


@functools.cache
def real(name: str) -> Tokenizer:
    tokenizer = Tokenizer.load(REAL[name](), EngineConfig())
    assert tokenizer is not None
    return tokenizer


def llama_like() -> Backend:
    """SentencePiece as Llama writes it: byte tokens, and the first space of a text belongs to nobody."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "▁a",
        "b",
        "é",
        "▁▁",
        "�",
    ]
    backend = Backend(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


def word_piece() -> Backend:
    """A kind of vocabulary that the detokenizer knows nothing about."""
    words = ["[UNK]", "un", "##believ", "##able", "truth", "!", "##s"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    backend.decoder = decoders.WordPiece()  # type: ignore[assignment]
    return backend


def pushed(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> str:
    text, start = "", 0
    for cut in sorted({min(cut, len(ids)) for cut in cuts} | {len(ids)}):
        text, start = text + detokenizer.push(ids[start:cut]), cut
    return text + detokenizer.flush()


@pytest.mark.parametrize("name", REAL)
@settings(deadline=None, max_examples=150)
@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 60)),
    noise=st.lists(st.integers(0, 49151), max_size=20),
    skip=st.booleans(),
)
def test_pushes_add_up_to_the_whole_text(name: str, text: str, cuts: list[int], noise: list[int], skip: bool) -> None:
    tokenizer = real(name)
    ids = tokenizer.encode(text) + noise + tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.transformers_tokenizer.decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
    assert pushed(tokenizer.detokenizer(skip_special_tokens=skip), ids, cuts) == expected


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 270)), cuts=st.lists(st.integers(0, 60)), skip=st.booleans())
@example(ids=[3, 266, 131], cuts=[], skip=False)  # an unknown id within a run of bytes
def test_broken_bytes_of_a_fallback_vocabulary_add_up_too(ids: list[int], cuts: list[int], skip: bool) -> None:
    backend = llama_like()
    detokenizer = Vocabulary(backend).detokenizer(skip_special_tokens=skip, prompt_ids=())
    assert pushed(detokenizer, ids, cuts) == backend.decode(ids, skip_special_tokens=skip)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 6)), cuts=st.lists(st.integers(0, 20)))
def test_an_unknown_kind_of_vocabulary_adds_up_too(ids: list[int], cuts: list[int]) -> None:
    backend = word_piece()
    vocabulary = Vocabulary(backend)
    assert vocabulary.spelling is None
    assert pushed(vocabulary.detokenizer(skip_special_tokens=True, prompt_ids=()), ids, cuts) == backend.decode(ids)


@pytest.mark.parametrize("name", REAL)
@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_encoding_agrees_with_transformers(name: str, text: str) -> None:
    tokenizer = real(name)
    assert tokenizer.encode(text) == tokenizer.transformers_tokenizer(text).input_ids


def test_gemma_texts_begin_with_bos_and_smollm_texts_do_not() -> None:
    assert real("gemma3").encode("a")[0] == 2
    assert real("gemma3").encode("a", add_special_tokens=False)[0] != 2
    assert real("smollm2").encode("a") == real("smollm2").encode("a", add_special_tokens=False)


@pytest.mark.parametrize("name", REAL)
def test_a_character_waits_for_its_last_byte(name: str) -> None:
    tokenizer = real(name)
    ids = tokenizer.encode("\U0001fae8", add_special_tokens=False)  # newer than both vocabularies
    if len(ids) == 1:
        pytest.skip("one token in this vocabulary")
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([token]) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.push(ids[-1:]) + detokenizer.flush() == "\U0001fae8"


def test_a_character_that_the_prompt_began_is_completed() -> None:
    tokenizer = real("smollm2")
    ids = tokenizer.encode("\U0001fae8", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(prompt_ids=ids[:2])
    assert detokenizer.push(ids[2:]) == "\U0001fae8"
    assert tokenizer.detokenizer(prompt_ids=ids[:2]).flush() == ""


def test_the_space_between_prompt_and_output_is_kept() -> None:
    vocabulary = Vocabulary(llama_like())
    the = 260
    assert vocabulary.piece(the) == (b" the", False)
    assert vocabulary.detokenizer(skip_special_tokens=True, prompt_ids=()).push([the]) == "the"
    assert vocabulary.detokenizer(skip_special_tokens=True, prompt_ids=(the,)).push([the]) == " the"


@pytest.mark.parametrize("name", REAL)
def test_token_bytes_spell_the_text(name: str) -> None:
    tokenizer = real(name)
    text = "Unité 統一 \U0001fae8\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in ids).decode() == text
    assert tokenizer.token_bytes(10_000_000) == b""


def test_token_text_shows_broken_bytes_and_special_tokens() -> None:
    tokenizer = real("smollm2")
    first, *_ = tokenizer.encode("\U0001fae8", add_special_tokens=False)
    assert "�" in tokenizer.token_text(first)
    assert tokenizer.token_text(2) == "<|im_end|>"


def test_special_tokens_are_left_out_on_demand() -> None:
    tokenizer = real("smollm2")
    ids = [*tokenizer.encode("a"), 2]
    assert tokenizer.detokenizer(skip_special_tokens=True).push(ids) == "a"
    assert tokenizer.detokenizer(skip_special_tokens=False).push(ids) == "a<|im_end|>"


def test_threads_share_a_tokenizer() -> None:
    tokenizer = real("smollm2")
    texts = [f"{index} words of the {index}th text" * 20 for index in range(64)]
    alone = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == alone
        assert list(pool.map(tokenizer.decode, alone)) == texts


# --- chat templates -------------------------------------------------------------------------------------------------


def with_template(template: str, **special: str) -> Tokenizer:
    backend = Backend.from_file(str(smollm2_folder() / "tokenizer.json"))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special))


PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def test_a_conversation_becomes_what_transformers_makes_of_it() -> None:
    tokenizer = real("smollm2")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🎉"}]
    reference = AutoTokenizer.from_pretrained(smollm2_folder())
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.apply_chat_template(messages) == expected


def test_a_template_that_writes_bos_gets_one_bos() -> None:
    backend = Backend.from_file(str(gemma3_folder() / "tokenizer.json"))
    tokenizer = Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", chat_template="{{ bos_token }}" + PLAIN)
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}]).count(2) == 1


def test_without_a_template_chat_is_a_clear_400() -> None:
    with pytest.raises(RequestError, match="CHAT_TEMPLATE") as caught:
        real("gemma3").apply_chat_template([{"role": "user", "content": "a"}])
    assert caught.value.code == "no_chat_template"
    assert caught.value.status == 400


def test_the_setting_replaces_the_template(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(PLAIN)
    tokenizer = Tokenizer.load(gemma3_folder(), EngineConfig(chat_template=tmp_path / "mine.jinja"))
    assert tokenizer is not None
    assert tokenizer.render_chat([{"role": "user", "content": "a"}]) == "[user]a>"
    with pytest.raises(ConfigError, match="CHAT_TEMPLATE"):
        Tokenizer.load(gemma3_folder(), EngineConfig(chat_template=tmp_path / "absent.jinja"))


@pytest.mark.parametrize(
    ("message", "rendered"),
    [
        pytest.param({"role": "developer", "content": "a"}, "[system]a>", id="developer becomes system"),
        pytest.param(
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            "[user]a\nb>",
            id="parts are joined",
        ),
        pytest.param({"role": "assistant", "content": None}, "[assistant]>", id="no content is empty"),
    ],
)
def test_messages_are_put_as_the_template_knows_them(message: dict[str, Any], rendered: str) -> None:
    assert with_template(PLAIN).render_chat([message]) == rendered


def test_a_template_that_knows_developers_keeps_them() -> None:
    template = PLAIN + "{# developer #}"
    assert with_template(template).render_chat([{"role": "developer", "content": "a"}]) == "[developer]a>"


def test_a_template_that_reads_parts_gets_parts() -> None:
    template = "{% for m in messages %}{% for part in m['content'] %}<{{ part['text'] }}>{% endfor %}{% endfor %}"
    assert with_template(template).render_chat([{"role": "user", "content": "ab"}]) == "<ab>"


def test_an_image_is_refused_by_its_place() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidParameterError, match="image_url") as caught:
        with_template(PLAIN).render_chat([{"role": "user", "content": "a"}, {"role": "user", "content": content}])
    assert caught.value.param == "messages[1].content[1].type"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].absent.deeper }}", "{% if %}", "{{ 1 + 'a' }}"],
)
def test_what_a_template_refuses_is_the_clients_error(template: str) -> None:
    with pytest.raises(InvalidParameterError, match="chat template") as caught:
        with_template(template).render_chat([{"role": "user", "content": "a"}])
    assert caught.value.param == "messages"


def test_tools_reach_a_template_that_reads_them() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    tokenizer = with_template("{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}" + PLAIN)
    assert tokenizer.supports_tools
    assert tokenizer.render_chat([{"role": "user", "content": "a"}], tools=tools) == "f[user]a>"
    assert not with_template(PLAIN).supports_tools


def test_arguments_of_earlier_calls_are_parsed() -> None:
    tokenizer = with_template("{{ messages[0].tool_calls[0].function.arguments['x'] }}")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}
    assert tokenizer.render_chat([{"role": "assistant", "content": None, "tool_calls": [call]}]) == "3"
    call["function"] = {"name": "f", "arguments": "{"}
    with pytest.raises(InvalidParameterError) as caught:
        tokenizer.render_chat([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_a_final_message_is_continued() -> None:
    tokenizer = with_template("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Sure, the"}]
    text = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "[user]a</s>[assistant]Sure, the"
    with pytest.raises(InvalidParameterError):
        tokenizer.render_chat(messages, add_generation_prompt=True, continue_final_message=True)


def test_template_arguments_pass_through_but_ours() -> None:
    tokenizer = with_template("{{ enable_thinking }}")
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.render_chat(messages, template_kwargs={"enable_thinking": "no"}) == "no"
    with pytest.raises(InvalidParameterError) as caught:
        tokenizer.render_chat(messages, template_kwargs={"tokenize": True})
    assert caught.value.param == "chat_template_kwargs"


def test_ends_of_sequence_come_from_model_and_tokenizer() -> None:
    tokenizer = Tokenizer.load(smollm2_folder(), EngineConfig(), model_eos=(7, 2))
    assert tokenizer is not None
    assert tokenizer.eos_token_ids == (7, 2)


def test_a_folder_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path, EngineConfig()) is None
