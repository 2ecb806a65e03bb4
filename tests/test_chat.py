"""Chat templates against transformers' apply_chat_template, and templates that should not be trusted."""

from __future__ import annotations

import json

import pytest

import kvgen
from kvgen import CheckpointError, UsageError
from kvgen.tokenizer.chat import ChatTemplate

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "hi" & <b>bye</b>\nnow'},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "日本語?"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trimming": "{% for m in messages -%}\n    {%- if m['role'] == 'user' %}\n[INST] {{ m['content'] | trim }} [/INST]"
    "\n    {%- endif %}\n{%- endfor %}",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set n = namespace(c=0) %}{% for m in messages %}{% set n.c = n.c + 1 %}{% endfor %}{{ n.c }}",
    "date": "{{ strftime_now('%Y') }}",
    "tools": "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_like_transformers(name: str, tiny_llama) -> None:
    from transformers import AutoTokenizer

    folder, _ = tiny_llama()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATES[name]}))
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    tokenizer = kvgen.load(folder).tokenizer
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render(CONVERSATION) == expected


def test_default_model_asks_like_transformers(smollm2, smollm2_reference) -> None:
    _, reference = smollm2_reference
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert smollm2.tokenizer.encode_chat(messages) == expected["input_ids"]


def test_default_model_answers_and_stops(smollm2) -> None:
    ids = smollm2.tokenizer.encode_chat([{"role": "user", "content": "What is the capital of Japan?"}])
    chunks = list(kvgen.stream(smollm2, ids, kvgen.Sampling(temperature=0)))
    assert "".join(chunk.text for chunk in chunks) == "The capital of Japan is Tokyo."
    assert chunks[-1].finish_reason == "eos"


def test_a_template_file_comes_before_the_settings(tiny_llama) -> None:
    folder, _ = tiny_llama()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "settings"}))
    (folder / "chat_template.jinja").write_text("file")
    assert kvgen.load(folder).tokenizer.chat_template.render(CONVERSATION) == "file"


def test_of_several_templates_the_default_one_is_taken(tiny_llama) -> None:
    folder, _ = tiny_llama()
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert kvgen.load(folder).tokenizer.chat_template.render(CONVERSATION) == "plain"


def test_a_checkpoint_without_template_says_so(tiny_llama) -> None:
    folder, _ = tiny_llama()
    with pytest.raises(UsageError, match="no chat template"):
        kvgen.load(folder).tokenizer.encode_chat(CONVERSATION)


def test_a_template_that_refuses_is_a_usage_error() -> None:
    template = ChatTemplate("{{ raise_exception('no system messages') }}", {})
    with pytest.raises(UsageError, match="no system messages"):
        template.render(CONVERSATION)


@pytest.mark.parametrize(
    "source",
    ["{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ messages[99].role.x }}", "{{ 'a' + 1 }}", "{{ strftime_now(3) }}"],
)
def test_a_template_that_fails_is_a_checkpoint_error(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source, {}).render(CONVERSATION)


def test_a_bad_template_does_not_keep_a_checkpoint_from_plain_text(tiny_llama) -> None:
    folder, _ = tiny_llama()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% unknown %}"}))
    assert kvgen.load(folder).tokenizer.encode("hello")


def test_bos_is_the_templates_business(tiny_llama) -> None:
    folder, _ = tiny_llama()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    processor = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": processor}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    loaded = kvgen.load(folder).tokenizer
    assert loaded.encode("abc")[0] == 0
    assert loaded.encode_chat([{"role": "user", "content": "abc"}]).count(0) == 1


def test_a_template_that_recurses_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}).render(CONVERSATION)


def test_a_template_that_is_not_jinja_is_refused() -> None:
    with pytest.raises(CheckpointError, match="TemplateSyntaxError"):
        ChatTemplate("{% for %}", {}).render(CONVERSATION)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(source: str) -> None:
    try:
        rendered = ChatTemplate(source, {}).render(CONVERSATION)
    except CheckpointError:
        return
    assert rendered == ""  # what the sandbox hides is undefined
