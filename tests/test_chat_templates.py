"""Templates of the kinds that chat models come with, against transformers' own renderer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import kvgen
from kvgen import CheckpointError, Message, UsageError
from kvgen.tokenizer.chat import ChatTemplate
from tests.program import run

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER: Message = {"role": "user", "content": "  What is 2 + 2?\n"}
SYSTEM: Message = {"role": "system", "content": "Be brief. "}
TURNS: list[Message] = [
    USER,
    {"role": "assistant", "content": "<think>\neasy\n</think>\n\nFour: 4."},
    {"role": "user", "content": 'And "3 + 3"? 日本語 <b>&</b>'},
]
CONVERSATIONS = {"one turn": [USER], "several": TURNS, "with system": [SYSTEM, *TURNS]}

# In the style of, not copied from, the templates of well-known models.
STYLES = {
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- set date_string = strftime_now('%d %b %Y') %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] | trim %}\n    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n"
        "{%- if tools is not none %}\n    {{- 'Environment: ipython\\n' }}\n{%- endif %}\n"
        "{{- 'Today Date: ' + date_string + '\\n\\n' }}\n{{- system_message }}\n{{- '<|eot_id|>' }}\n"
        "{%- for message in messages %}\n    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}\n"
        "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
        "+ '<|eot_id|>' }}\n    {%- elif 'tool_calls' in message %}\n        {{- message.tool_calls[0] | tojson }}\n"
        "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}\n"
        "{%- set ns = namespace(index=0) %}\n{%- for message in loop_messages %}\n"
        "    {%- if not (message.role == 'tool' or message.tool_calls is defined) %}\n"
        "        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}\n"
        "            {{- raise_exception('After the optional system message, roles must alternate') }}\n"
        "        {%- endif %}\n        {%- set ns.index = ns.index + 1 %}\n    {%- endif %}\n{%- endfor %}\n"
        "{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if message['role'] == 'user' %}\n"
        "        {%- if tools is not none and (message == user_messages[-1]) %}\n"
        "            {{- '[AVAILABLE_TOOLS] ' }}\n        {%- endif %}\n"
        "        {%- if loop.last and system_message is defined %}\n"
        "            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}\n"
        "        {%- else %}\n            {{- '[INST] ' + message['content'] + '[/INST]' }}\n        {%- endif %}\n"
        "    {%- elif message['role'] == 'assistant' %}\n"
        "        {{- ' ' + message['content'] | trim + eos_token }}\n    {%- else %}\n"
        "        {{- raise_exception('Only user and assistant roles are supported') }}\n    {%- endif %}\n"
        "{%- endfor %}\n"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "qwen 2.5": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n"
        "        {{- tool | tojson }}\n    {%- endfor %}\n{%- else %}\n"
        "    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
        "        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n    {%- endif %}\n"
        "{%- endif %}\n{%- for message in messages %}\n"
        '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) '
        'or (message.role == "assistant" and not message.tool_calls) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
        "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "qwen 3": (
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not '
        "(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n"
        "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n"
        "    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n"
        "    {%- set content = message.content if message.content is string else '' %}\n"
        "    {%- if message.role == 'assistant' %}\n        {%- set reasoning_content = '' %}\n"
        "        {%- if message.reasoning_content is string %}\n"
        "            {%- set reasoning_content = message.reasoning_content %}\n        {%- else %}\n"
        "            {%- if '</think>' in content %}\n"
        "                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
        ".lstrip('\\n') %}\n"
        "                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n            {%- endif %}\n"
        "        {%- endif %}\n        {%- if loop.index0 > ns.last_query_index %}\n"
        "            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' "
        "+ content.lstrip('\\n') }}\n        {%- else %}\n"
        "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n        {%- endif %}\n"
        "        {{- '<|im_end|>\\n' }}\n    {%- else %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
    ),
    "phi 3": (
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "smollm 2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "smollm 3": (
        "{%- set system_message = '' -%}\n{%- if messages[0].role == 'system' -%}\n"
        "  {%- set system_message = messages[0].content.replace('/no_think', '').rstrip() -%}\n{%- endif -%}\n"
        '{{- "<|im_start|>system\\nToday Date: " ~ strftime_now("%d %B %Y") ~ "\\n\\n" ~ system_message -}}\n'
        "{%- for message in messages -%}\n    {%- if message.role == 'assistant' -%}\n        {% generation %}\n"
        "        {{- '<|im_start|>assistant\\n' + (message.content | string).lstrip('\\n') + '<|im_end|>\\n' -}}\n"
        "        {% endgeneration %}\n    {%- elif message.role == 'user' -%}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\n"
        "    {%- endif -%}\n{%- endfor -%}\n"
    ),
    "olmo 2": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
        "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "macros": (
        "{%- macro turn(role, text='') -%}\n<{{ role }}>{{ caller() if caller else text }}</{{ role }}>\n"
        "{%- endmacro -%}\n{% set parts %}{% for m in messages %}{{ turn(m.role, m.content | upper | e) }}{% endfor %}"
        "{% endset %}{{ parts | trim | indent(2) }}{% call turn('x') %}y{% endcall %}"
        "{% for key, value in messages[0] | dictsort %}{{ key }}={{ value | length }};{% endfor %}"
        "{{ ['a', 1, none, true] + [{'k': (1, 'b')}] }}{{ {'a': 'é', 'b': [1]} | tojson(indent=2) }}"
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}{{ '%s-%05.1f' | format('x', 2.5) }}"
        "{{ '{:>4}|{}'.format('ab', 3) }}{{ '%d%%' % 5 }}{{ 3 * 'ab' }}{{ 2 ** 10 * 3 }}{{ 'b' in 'abc' }}"
        "{{ messages | map(attribute='role') | join(', ') }}{{ '/'.join(['a', 'b']) }}{{ range(3) | sum }}"
    ),
}


def rendered_by_transformers(source: str, messages: list[Message]) -> Any:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **TOKENS)
    except TemplateError as error:
        return error
    return texts[0]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_templates_of_every_style_render_like_transformers(style: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    expected = rendered_by_transformers(STYLES[style], messages)
    template = ChatTemplate(STYLES[style], TOKENS)
    if isinstance(expected, Exception):
        with pytest.raises(UsageError, match=str(expected)):
            template.render(messages)
    else:
        assert len(expected) > 20
        assert template.render(messages) == expected


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("gemma", "macros")])
def test_a_system_message_with_a_place_is_left_in_it(style: str) -> None:
    template = ChatTemplate(STYLES[style], TOKENS)
    assert template.render_with_system([SYSTEM, USER]) == template.render([SYSTEM, USER])


IGNORING = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
QUOTING = "{{ messages[0].content | upper | tojson }}{{ messages[1].content }}"
ALTERNATING = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}" + (
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
)


@pytest.mark.parametrize("source", [STYLES["gemma"], ALTERNATING, IGNORING], ids=["refuses", "alternates", "ignores"])
@pytest.mark.parametrize("system", ["Be brief.", "e", "user", " "])
def test_a_system_message_without_a_place_goes_before_the_first_users(source: str, system: str) -> None:
    """`e` and `user` are in what the template writes anyway."""
    template = ChatTemplate(source, TOKENS)
    folded = template.render_with_system([{"role": "system", "content": system}, *TURNS])
    assert folded == template.render([{"role": "user", "content": f"{system}\n\n{USER['content']}"}, *TURNS[1:]])


def test_a_system_message_that_is_transformed_counts_as_written() -> None:
    text = ChatTemplate(QUOTING, {}).render_with_system([{"role": "system", "content": 'a "b"'}, USER])
    assert text == '"A \\"B\\""' + USER["content"]


def test_a_refusal_that_is_not_about_the_system_message_stays_a_refusal() -> None:
    with pytest.raises(UsageError, match="must alternate"):
        ChatTemplate(ALTERNATING, {}).render_with_system([SYSTEM, USER, USER])


def test_an_old_template_file_comes_last(tiny_llama) -> None:
    folder, _ = tiny_llama()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert kvgen.load(folder).tokenizer.chat_template.render([USER]) == "old"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "settings"}))
    assert kvgen.load(folder).tokenizer.chat_template.render([USER]) == "settings"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config.json", 5),
        ("tokenizer_config.json", [{"name": "default", "template": 1}]),
        ("tokenizer_config.json", [{"name": ["odd"]}, {"name": "default", "template": 1}]),
        ("chat_template.json", {"a": "b"}),
    ],
)
def test_what_is_no_template_is_refused_with_the_name_of_the_file(tiny_llama, name: str, value: Any) -> None:
    folder, _ = tiny_llama()
    (folder / name).write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=f"{name}: chat_template must be a string"):
        kvgen.load(folder)


# --- --chat-template ---------------------------------------------------------------------------------------------


def chat(folder: Path, template: str) -> subprocess.CompletedProcess[str]:
    arguments = ["-m", str(folder), "-n", "1", "-t", "0", "-p", "x", "--json", "--chat", "--chat-template", template]
    return run("generate", *arguments)


def test_a_template_file_is_taken_as_it_is(tiny_llama, tmp_path: Path) -> None:
    """Jinja drops the last line break of a file, once."""
    folder, _ = tiny_llama()
    template = tmp_path / "t.jinja"
    template.write_text("{{ bos_token }}Q: {{ messages[0].content }}\n\n")
    ids = json.loads(chat(folder, str(template)).stdout)["prompt_ids"]
    assert ids == kvgen.load(folder).tokenizer.encode("<s>Q: x\n", parse_special=True)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 1, "cannot be read"),
        (b"", 2, "the file is empty"),
        (b" \n", 2, "the file is empty"),
        (b"a\xff", 2, "not UTF-8"),
        (b"{% for %}", 1, "TemplateSyntaxError"),
    ],
    ids=str,
)
def test_a_template_file_that_is_none_is_one_line(
    tiny_llama, tmp_path: Path, content: bytes | None, code: int, message: str
) -> None:
    folder, _ = tiny_llama()
    template = tmp_path / "t.jinja"
    if content is not None:
        template.write_bytes(content)
    result = chat(folder, str(template))
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith("kvgen: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_template_does_not_come_from_stdin(tiny_llama) -> None:
    folder, _ = tiny_llama()
    result = chat(folder, "-")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--chat-template takes a file" in result.stderr
