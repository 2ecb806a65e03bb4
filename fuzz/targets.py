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

from kvgen.backends.adapted import adapt
from kvgen.backends.adapter import read_adapter
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
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*v_.*": 1}}
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


def quantization_config(data: bytes) -> None:
    _read_quantized(data, QUANTIZED_TENSORS)


def quantized_tensors(data: bytes) -> None:
    for settings in QUANTIZATIONS:
        _read_quantized(json.dumps(CONFIG | {"quantization_config": settings}).encode(), data)


def _read_quantized(config: bytes, tensors: bytes) -> None:
    with file_of(config, "config.json") as path:
        (path.parent / "model.safetensors").write_bytes(tensors)
        for tensor in read_checkpoint(path.parent).tensors.values():
            tensor.read()
            tensor.read_grouped()


def index(data: bytes) -> None:
    with file_of(data, "model.safetensors.index.json", config__json=json.dumps(CONFIG)) as path:
        (path.parent / "a.safetensors").write_bytes(SAFETENSORS)
        read_checkpoint(path.parent)


def adapter_config(data: bytes) -> None:
    _adapt(data, ADAPTER_TENSORS)


def adapter_tensors(data: bytes) -> None:
    _adapt(json.dumps(ADAPTER).encode(), data)


def _adapt(adapter: bytes, tensors: bytes) -> None:
    with file_of(SAFETENSORS, "model.safetensors", config__json=json.dumps(CONFIG)) as path:
        (path.parent / "adapter_config.json").write_bytes(adapter)
        (path.parent / "adapter_model.safetensors").write_bytes(tensors)
        adapt(read_checkpoint(path.parent), read_adapter(path.parent))


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


def _quantized_seed() -> bytes:
    """A matrix as GPTQ stores it, and one of compressed-tensors."""
    words, scales = torch.zeros(4, 8, dtype=torch.int32), torch.ones(2, 8).half()
    return save(
        {
            "a.qweight": words,
            "a.qzeros": words[:2, :1].clone(),
            "a.scales": scales,
            "a.g_idx": torch.arange(32).int() % 2,
            "b.weight_packed": words.clone(),
            "b.weight_shape": torch.tensor([4, 64]),
            "b.weight_scale": scales[:, :4].T.contiguous(),
        }
    )


def _prompt_cache_seed() -> bytes:
    tensors = {"tokens": torch.tensor([[3, 4]]), "keys.0": torch.zeros(1, 1, 2, 4), "values.0": torch.zeros(1, 1, 2, 4)}
    metadata = dict.fromkeys(("identity", "model", "numerics"), "x")
    metadata |= {"kvgen-prompt-cache": "2", "variant": "0", "sha256": digest(tensors)}
    return save(tensors, metadata)


def _adapter_seed() -> bytes:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    return save({f"{prefix}.lora_A.weight": torch.zeros(2, 8), f"{prefix}.lora_B.weight": torch.zeros(8, 2)})


SAFETENSORS, ADAPTER_TENSORS, QUANTIZED_TENSORS = _llama_seed(), _adapter_seed(), _quantized_seed()
_SCHEME = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
QUANTIZATIONS: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "dynamic": {"-:head": {}}},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": _SCHEME}},
]
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
    "quantization_config": (
        quantization_config,
        [json.dumps(CONFIG | {"quantization_config": settings}).encode() for settings in QUANTIZATIONS],
    ),
    "quantized_tensors": (quantized_tensors, [QUANTIZED_TENSORS]),
    "index": (index, [json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}).encode()]),
    "adapter_config": (adapter_config, [json.dumps(ADAPTER).encode()]),
    "adapter_tensors": (adapter_tensors, [ADAPTER_TENSORS]),
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
