"""Messages and tools of OpenAI's chat API for a chat template, and tool calls back from the text of an answer."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from kvgen.errors import UsageError
from kvgen.tokenizer import Tokenizer
from kvgen.tokenizer.chat import Message

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal"}


def template_messages(value: Any) -> list[Message]:
    """Return messages as chat templates expect them: content as one text, arguments of calls as objects.

    Raises UsageError for what is no message, and for images and sounds.
    """
    if not isinstance(value, list) or not value:
        raise UsageError("`messages` must be a list of messages")
    messages: list[Any] = [_message(message) for message in value]
    return messages


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UsageError("`messages`: each must be an object with `role` and `content`")
    if unknown := sorted(message.keys() - _MESSAGE_FIELDS):
        raise UsageError(f"`messages`: unknown field `{unknown[0]}` of a message")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in _ROLES:
        raise UsageError(f"`messages`: the `role` of a message must be one of {', '.join(_ROLES)}")
    if calls is not None and not isinstance(calls, list):
        raise UsageError("`messages`: the `tool_calls` of a message must be a list")
    if content is None and not (calls and role == "assistant"):
        raise UsageError(f"`messages`: the `content` of a message of role {role} is missing")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": _text(content)}
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if not isinstance(value, str | None):
            raise UsageError(f"`messages`: the `{name}` of a message must be a string")
        if value is not None:
            made[name] = value
    if calls:
        made["tool_calls"] = [_template_call(call) for call in calls]
    return made


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) != len(parts):
        raise UsageError("`messages`: the content of a message must be text")
    return "".join(texts)


def _template_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError("`messages`: each of `tool_calls` must have a function with a name")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, TypeError):
        raise UsageError("`messages`: the arguments of a tool call must be JSON in a string") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def check_tools(body: Mapping[str, Any], tokenizer: Tokenizer) -> list[Any] | None:
    """Return the tools of a request for the template, or None. Raises UsageError if the template has no tools."""
    choice, tools = body.get("tool_choice", "auto"), body.get("tools")
    if choice not in ("auto", "none"):
        raise UsageError("`tool_choice` must be auto or none")
    if tools is None or choice == "none":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and "function" in tool for tool in tools):
        raise UsageError("`tools` must be a list of functions")
    if tokenizer.chat_template is None or "tools" not in tokenizer.chat_template.source:
        raise UsageError("`tools`: the chat template of this model has none")
    return tools or None


def tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text and its tool calls, as OpenAI's API returns them.

    Calls are JSON objects with `name` and `arguments` between <tool_call> tags, as Hermes and Qwen write them.
    """
    calls = []
    for match in _CALL.finditer(text):
        try:
            call = json.loads(match[1])
        except ValueError:
            return text, []
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return text, []
        arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return (_CALL.sub("", text).strip(), calls) if calls else (text, [])
