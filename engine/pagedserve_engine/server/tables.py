"""Every field of every request body: what is accepted, its bounds, its default and what it does."""

from __future__ import annotations

from pagedserve_engine.server.containers import Either, ListOf, Opaque
from pagedserve_engine.server.fields import Boolean, Choice, Integer, Number, Text
from pagedserve_engine.server.messages import CONVERSATION
from pagedserve_engine.server.objects import Field, Object, Tagged
from pagedserve_engine.server.prompts import Biases, Prompts, TokenIds

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
_COUNT = Integer(0, 2**31 - 1)
_SCHEMA = Either((Opaque(), Text(1)))
_PATTERN = Text(1, 1 << 16)

MODEL = Field("model", Text(1, 512), "the served model's name; absent: the served model")

STREAM_OPTIONS = Object(
    (
        Field("include_usage", Boolean(), "end with a chunk of token counts"),
        Field("include_obfuscation", Boolean(), "padding against traffic analysis", inert=True),
    ),
    refused=(("continuous_usage_stats", "ask for include_usage, which counts once at the end"),),
)

RESPONSE_FORMAT = Tagged(
    "type",
    (
        ("text", Object(())),
        ("json_object", Object(())),
        (
            "json_schema",
            Object(
                (
                    Field(
                        "json_schema",
                        Object(
                            (
                                Field("name", Text(1, 64)),
                                Field("description", Text()),
                                Field("schema", Opaque(), required=True),
                                Field("strict", Boolean(), inert=True),
                            )
                        ),
                        required=True,
                    ),
                )
            ),
        ),
        ("regex", Object((Field("pattern", _PATTERN, required=True),))),
    ),
)

STRUCTURED_OUTPUTS = Object(
    (
        Field("json", _SCHEMA, "a JSON schema"),
        Field("regex", _PATTERN, "a pattern that the whole output matches"),
        Field("json_object", Boolean(), "any JSON object"),
    )
)

SAMPLING = (
    Field("temperature", Number(0, 2), "0 is greedy", 1.0),
    Field("top_p", Number(0, 1), "the likeliest tokens that together have this probability", 1.0),
    Field("top_k", Integer(-1, 2**31 - 1), "the k likeliest tokens; 0 and -1 are off", 0, extension=True),
    Field("min_p", Number(0, 1), "tokens at least so likely, relative to the likeliest", 0.0, extension=True),
    Field("repetition_penalty", Number(0, 100, above=True), "over prompt and output; 1 is off", 1.0, extension=True),
    Field("frequency_penalty", Number(-2, 2), "for each time that a token was generated", 0.0),
    Field("presence_penalty", Number(-2, 2), "for tokens that were generated", 0.0),
    Field("logit_bias", Biases(), "added to the logits of these token ids"),
    Field("seed", Integer(-(2**63), 2**63 - 1), "the same seed gives the same output, whatever else is served"),
    Field("n", Integer(1, MAX_CHOICES), "choices for each prompt", 1),
)

ENDING = (
    Field("stop", Either((Text(1, 1024), ListOf(Text(1, 1024), high=64))), "strings that end the output"),
    Field("stop_token_ids", ListOf(_COUNT, high=256), "token ids that end the output", extension=True),
    Field("include_stop_str_in_output", Boolean(), "keep the stop string", False, extension=True),
    Field("min_tokens", _COUNT, "no end before so many tokens", 0, extension=True),
    Field("ignore_eos", Boolean(), "go on past the model's end token", False, extension=True),
)

OUTPUT = (
    Field("skip_special_tokens", Boolean(), "leave special tokens out of the text", True, extension=True),
    Field("return_token_ids", Boolean(), "token ids of prompt and output beside the text", False, extension=True),
    Field(
        "prompt_logprobs",
        Integer(0, MAX_TOP_LOGPROBS),
        "likeliest tokens of each prompt position; not streamed",
        extension=True,
    ),
    Field("stream", Boolean(), "server-sent events", False),
    Field("stream_options", STREAM_OPTIONS, "only with stream"),
    Field("response_format", RESPONSE_FORMAT, "what the output conforms to; type regex is an extension"),
    Field("structured_outputs", STRUCTURED_OUTPUTS, "the same under vLLM's name", extension=True),
    Field("guided_json", _SCHEMA, "the same under vLLM's older name", extension=True),
    Field("guided_regex", _PATTERN, "the same under vLLM's older name", extension=True),
    Field("cache_salt", Text(1, 1024), "only requests with the same salt share cached prefixes", extension=True),
)

INERT = (
    Field("user", Text(), "your user", inert=True),
    Field("store", Boolean(), "nothing is stored", inert=True),
    Field("metadata", Opaque(), "your own data", inert=True),
    Field("service_tier", Text(), "there is one tier", inert=True),
    Field("safety_identifier", Text(), "your user", inert=True),
    Field("prompt_cache_key", Text(), "prefixes are found by their content; cache_salt keeps them apart", inert=True),
    Field("prompt_cache_retention", Text(), "least recently used prefixes go first", inert=True),
    Field("prompt_cache_options", Opaque(), "least recently used prefixes go first", inert=True),
)

COMPLETION = Object(
    (
        MODEL,
        Field("prompt", Prompts(), "text or token ids, one or several", required=True),
        Field("max_tokens", _COUNT, "tokens to generate at most; 0 scores the prompt", 16),
        *SAMPLING,
        Field("best_of", Integer(1, MAX_CHOICES), "generate so many, return the n likeliest by mean log probability"),
        *ENDING,
        Field("echo", Boolean(), "the prompt before the output", False),
        Field(
            "logprobs", Integer(0, MAX_TOP_LOGPROBS), "log probabilities of the chosen and of so many likeliest tokens"
        ),
        Field(
            "add_special_tokens",
            Boolean(),
            "such as a beginning-of-sequence token before the prompt",
            True,
            extension=True,
        ),
        *OUTPUT,
        *INERT,
    ),
    name="CompletionRequest",
    refused=(("suffix", "the model doesn't fill in the middle; send the prompt alone"),),
)

TEMPLATE = (
    Field(
        "add_generation_prompt",
        Boolean(),
        "open the assistant's turn; absent: unless the final message goes on",
        extension=True,
    ),
    Field("continue_final_message", Boolean(), "go on with the last message", False, extension=True),
    Field("chat_template_kwargs", Opaque(), "variables for the chat template", extension=True),
)

_FUNCTION = Object(
    (
        Field("name", Text(1, 64, "[a-zA-Z0-9_-]+"), required=True),
        Field("description", Text()),
        Field("parameters", Opaque()),
        Field("strict", Boolean(), inert=True),
    )
)
TOOL = Tagged("type", (("function", Object((Field("function", _FUNCTION, required=True),))),))
NAMED_TOOL = Tagged(
    "type",
    (("function", Object((Field("function", Object((Field("name", Text(1, 64), required=True),)), required=True),))),),
)
TOOLS = Field("tools", ListOf(TOOL, high=128), "functions that the model may call; the chat template must support them")

CHAT = Object(
    (
        MODEL,
        Field("messages", CONVERSATION, "the conversation", required=True),
        Field(
            "max_completion_tokens",
            Integer(1, 2**31 - 1),
            "tokens to generate at most; absent: what the context has room for",
        ),
        Field("max_tokens", Integer(1, 2**31 - 1), "the older name of max_completion_tokens"),
        *SAMPLING,
        *ENDING,
        Field("logprobs", Boolean(), "log probabilities of the chosen tokens", False),
        Field("top_logprobs", Integer(0, MAX_TOP_LOGPROBS), "and of so many likeliest tokens; only with logprobs"),
        TOOLS,
        Field(
            "tool_choice",
            Either((Choice(("none", "auto", "required")), NAMED_TOOL)),
            "required and a named function constrain the output to one call; absent: auto where there are tools",
        ),
        *TEMPLATE,
        Field("add_special_tokens", Boolean(), "false: the chat template adds them", False, extension=True),
        *OUTPUT,
        *INERT,
        Field("modalities", ListOf(Choice(("text",))), "text", inert=True),
        Field("parallel_tool_calls", Boolean(), "the model decides", inert=True),
        Field("prediction", Opaque(), "a hint about the output", inert=True),
        Field("reasoning_effort", Text(), "set what the template knows in chat_template_kwargs", inert=True),
        Field("verbosity", Text(), "say it in a message", inert=True),
    ),
    name="ChatRequest",
    refused=(
        ("functions", "send them as tools"),
        ("function_call", "send tool_choice"),
        ("audio", "the model writes text only"),
        ("web_search_options", "the server has no search; send a tool"),
    ),
)

TOKENIZE = Object(
    (
        MODEL,
        Field("prompt", Text(), "text; this or messages"),
        Field("messages", CONVERSATION, "a conversation; this or prompt"),
        TOOLS,
        *TEMPLATE,
        Field("add_special_tokens", Boolean(), "absent: with a prompt, not with messages", extension=True),
        Field("return_token_strs", Boolean(), "the text of each token as well", False, extension=True),
    ),
    name="TokenizeRequest",
)

DETOKENIZE = Object((MODEL, Field("tokens", TokenIds(), "token ids", required=True)), name="DetokenizeRequest")
