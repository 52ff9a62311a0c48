"""The route table, and the handlers that need no generation."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from aiohttp import web

from pagedserve_engine.errors import InvalidParameterError
from pagedserve_engine.server import health
from pagedserve_engine.server.bodies import json_response
from pagedserve_engine.server.chat import create_chat_completion, encode_conversation
from pagedserve_engine.server.completions import create_completion
from pagedserve_engine.server.generation import check_model
from pagedserve_engine.server.keys import ENGINE, OPENAPI
from pagedserve_engine.server.schema import parse_detokenize, parse_tokenize

_LONG = 4096
"""Tokens from which on they are turned into text on another thread."""


def add_routes(app: web.Application) -> None:
    """Everything that the server answers."""
    app.router.add_post("/v1/completions", create_completion)
    app.router.add_post("/v1/chat/completions", create_chat_completion)
    app.router.add_get("/v1/models", list_models)
    # A model's name may hold slashes.
    app.router.add_get("/v1/models/{model:.+}", show_model)
    app.router.add_post("/tokenize", tokenize)
    app.router.add_post("/detokenize", detokenize)
    app.router.add_get("/health/live", health.live)
    app.router.add_get("/health/ready", health.ready)
    app.router.add_get("/metrics", health.metrics)
    app.router.add_get("/openapi.json", openapi)


async def list_models(request: web.Request) -> web.Response:
    """The one model."""
    return json_response(orjson.dumps({"object": "list", "data": [_model(request)]}))


async def show_model(request: web.Request) -> web.Response:
    """The model, where the path names it."""
    check_model(request.app[ENGINE], request.match_info["model"])
    return json_response(orjson.dumps(_model(request)))


async def tokenize(request: web.Request) -> web.Response:
    """Token ids of a text or a conversation."""
    engine = request.app[ENGINE]
    asked = parse_tokenize(await request.read())
    check_model(engine, asked.model)
    if asked.template is not None:
        tokens = await encode_conversation(engine, asked.template)
    else:
        tokens = await engine.encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens)
    body: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens}
    if asked.return_token_strs and engine.tokenizer is not None:
        body["token_strs"] = [engine.tokenizer.token_text(token) for token in tokens]
    return json_response(orjson.dumps(body))


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids."""
    engine = request.app[ENGINE]
    asked = parse_detokenize(await request.read(), engine.vocab_size)
    check_model(engine, asked.model)
    if engine.tokenizer is None:
        raise InvalidParameterError("this model has no tokenizer: its tokens have no text", param="tokens")
    decode = engine.tokenizer.decode
    if len(asked.tokens) < _LONG:
        text = decode(asked.tokens, skip_special_tokens=False)
    else:
        text = await asyncio.to_thread(decode, asked.tokens, skip_special_tokens=False)
    return json_response(orjson.dumps({"prompt": text}))


async def openapi(request: web.Request) -> web.Response:
    """The OpenAPI document."""
    return json_response(request.app[OPENAPI])


def _model(request: web.Request) -> dict[str, Any]:
    engine = request.app[ENGINE]
    return {
        "id": engine.name,
        "object": "model",
        "created": engine.created,
        "owned_by": "pagedserve",
        "root": engine.name,
        "parent": None,
        "max_model_len": engine.max_model_len,
    }
