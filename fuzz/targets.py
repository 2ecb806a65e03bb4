"""What strangers can hand to kvgen, as functions of bytes: each reads its input, or refuses it with a KvgenError.

`fuzz.py` drives them with inputs that it invents; tests/test_fuzz.py with seeds and a few thousand mutations.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from safetensors.torch import save

from kvgen.backends.blueprint import draw_blueprint
from kvgen.checkpoint import RawCheckpoint, read_checkpoint
from kvgen.errors import KvgenError
from kvgen.generation.conversation import Conversation
from kvgen.generation.prompt_cache import describe_prompt_cache, digest
from kvgen.generation.settings import Request
from kvgen.pipeline.results import ResultsFile
from kvgen.pipeline.rows import read_rows
from kvgen.tokenizer import read_tokenizer
from kvgen.tokenizer.chat import ChatTemplate

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m.content | trim }}{% if loop.last %}!{% endif %}"
    "{% endfor %}"
    "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n * 'a' }}"
    "{% macro f(x) %}{{ x | tojson }}{% endmacro %}{{ f({'a': [1, 2]}) }}{{ raise_exception('no') if not messages }}"
)
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
ROW = {"id": "a", "prompt": "x", "temperature": 0.5, "stop": ["y"], "logit_bias": {"3": 1}, "json_schema": {}}


@contextmanager
def file_of(data: bytes, name: str, **others: str) -> Iterator[Path]:
    """A file in a folder of its own, with the other files beside it."""
    with tempfile.TemporaryDirectory() as folder:
        for other, text in others.items():
            (Path(folder) / other.replace("__", ".")).write_text(text)
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def _use(raw: RawCheckpoint) -> None:
    """As far as loading goes before numbers are computed with: the plan of the decoder, and the vocabulary."""
    for tensor in list(raw.tensors.values())[:4]:
        if tensor.nbytes < 1 << 20:
            tensor.read()
            tensor.release()
    draw_blueprint(raw)
    read_tokenizer(raw)


def gguf(data: bytes) -> None:
    with file_of(data, "model.gguf") as path:
        raw = read_checkpoint(path)
        try:
            _use(raw)
        except KvgenError:
            read_tokenizer(raw)


def safetensors(data: bytes) -> None:
    with file_of(data, "model.safetensors", config__json=json.dumps(CONFIG)) as path:
        raw = read_checkpoint(path.parent)
        for tensor in raw.tensors.values():
            tensor.read()


def config(data: bytes) -> None:
    with file_of(data, "config.json") as path:
        (path.parent / "model.safetensors").write_bytes(SAFETENSORS)
        draw_blueprint(read_checkpoint(path.parent))


def index(data: bytes) -> None:
    with file_of(data, "model.safetensors.index.json", config__json=json.dumps(CONFIG)) as path:
        (path.parent / "a.safetensors").write_bytes(SAFETENSORS)
        read_checkpoint(path.parent)


def tokenizer(data: bytes) -> None:
    with file_of(data, "tokenizer.json") as path:
        found = read_tokenizer(RawCheckpoint(path.parent, "hf", CONFIG, {}))
        found.decode(found.encode("hello <|x|> wörld"))


def template(data: bytes) -> None:
    ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>"}).render_with_system(MESSAGES)


def rows(data: bytes) -> None:
    for row in read_rows(data.splitlines(keepends=True)):
        if row.error is None:
            row.request(Request(()))


def results(data: bytes) -> None:
    with file_of(data, "out.jsonl") as path:
        ResultsFile(path, resume=True).close()


def prompt_cache(data: bytes) -> None:
    with file_of(data, "x.cache") as path:
        describe_prompt_cache(path)


def conversation(data: bytes) -> None:
    with file_of(data, "talk.json") as path:
        Conversation(None, Request(())).load(path)  # type: ignore[arg-type]  # no model is asked


def _gguf_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(32)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(32)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab", "<end>"])
        writer.add_token_types([1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
        writer.add_chat_template("{{ messages[0].content }}")
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        return path.read_bytes()


def _llama_seed() -> bytes:
    shapes = {
        "model.embed_tokens": (16, 8),
        "model.norm": (8,),
        **{f"model.layers.0.{name}": (8,) for name in ("input_layernorm", "post_attention_layernorm")},
        **{f"model.layers.0.self_attn.{name}_proj": (8, 8) for name in ("q", "o")},
        **{f"model.layers.0.self_attn.{name}_proj": (4, 8) for name in ("k", "v")},
        **{f"model.layers.0.mlp.{name}_proj": (8, 8) for name in ("gate", "up", "down")},
    }
    return save({f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()})


def _prompt_cache_seed() -> bytes:
    tensors = {"tokens": torch.tensor([[3, 4]]), "keys.0": torch.zeros(1, 1, 2, 4), "values.0": torch.zeros(1, 1, 2, 4)}
    metadata = dict.fromkeys(("identity", "model", "numerics"), "x")
    metadata |= {"kvgen-prompt-cache": "2", "variant": "0", "sha256": digest(tensors)}
    return save(tensors, metadata)


SAFETENSORS = _llama_seed()
_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<|x|>", "special": True, "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"h": 0, "e": 1, "he": 2}, "merges": [["h", "e"]]},
}  # fmt: skip
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "gguf": (gguf, [_gguf_seed(), b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)]),
    "safetensors": (safetensors, [SAFETENSORS, struct.pack("<Q", 2**62) + b"{}"]),
    "config": (config, [json.dumps(CONFIG).encode()]),
    "index": (index, [json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}).encode()]),
    "tokenizer": (tokenizer, [json.dumps(_TOKENIZER).encode()]),
    "template": (template, [TEMPLATE.encode()]),
    "rows": (rows, [json.dumps(ROW).encode(), b'"text"\n{"messages": [{"role": "user", "content": "x"}]}\n']),
    "results": (results, [b'{"index": 0, "digest": "a"}\n{"index": 1, "digest": "b"}\n{"ind']),
    "prompt_cache": (prompt_cache, [_prompt_cache_seed()]),
    "conversation": (conversation, [json.dumps({"messages": MESSAGES}).encode()]),
}


def refuses_or_reads(target: Callable[[bytes], None], data: bytes) -> bool:
    """Whether an input was read. Anything but a KvgenError is a fault, and passes through."""
    try:
        target(data)
    except KvgenError:
        return False
    return True
