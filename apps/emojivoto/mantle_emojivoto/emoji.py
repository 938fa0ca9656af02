"""emoji-svc: which emojis there are. gRPC on GRPC_PORT, metrics on PROM_PORT."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from mantle_emojivoto.emojis import EMOJIS
from mantle_emojivoto.gen.emojivoto.v1.emoji_pb2 import (
    Emoji,
    FindByShortcodeRequest,
    FindByShortcodeResponse,
    ListAllEmojiRequest,
    ListAllEmojiResponse,
)
from mantle_emojivoto.rpc import Method, serve


def list_all(_: ListAllEmojiRequest) -> ListAllEmojiResponse:
    return ListAllEmojiResponse(list=[Emoji(unicode=text, shortcode=code) for code, text in EMOJIS.items()])


def find_by_shortcode(request: FindByShortcodeRequest) -> FindByShortcodeResponse:
    """An unknown short code is an answer without an emoji, not an error."""
    text = EMOJIS.get(request.Shortcode)
    return FindByShortcodeResponse(emoji=Emoji(unicode=text, shortcode=request.Shortcode) if text else None)


def main(environment: Mapping[str, str]) -> None:
    methods: dict[str, Method] = {
        "ListAll": (list_all, ListAllEmojiRequest),
        "FindByShortcode": (find_by_shortcode, FindByShortcodeRequest),
    }
    asyncio.run(serve("emojivoto.v1.EmojiService", methods, environment))
