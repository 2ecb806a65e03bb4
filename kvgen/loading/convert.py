"""Convert a native model to a folder that the x-transformers library runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvgen.backends.xtransformers import build_net
from kvgen.checkpoint.xtransformers import LIBRARY
from kvgen.errors import KvgenError, UnsupportedError, UsageError
from kvgen.model.config import DecoderConfig
from kvgen.model.decoder import Decoder
from kvgen.model.ffns import MLP
from kvgen.tokenizer import Tokenizer

_MAX_SHOWN = 60  # characters of a value in an error message


def convert_to_xtransformers(decoder: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and its settings to `folder`, which must not exist.

    The folder appears complete or not at all. The library's RMS norm has no epsilon, so logits differ by about norm_eps
    divided by the mean square of the normalized values: a relative 1e-5 for SmolLM2.

    Raises UsageError if the folder exists, UnsupportedError for a mechanism that the library lacks, KvgenError if the
    folder cannot be written.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists; choose a new folder")
    config = library_config(decoder.config)
    state = library_state(decoder)
    expected = build_net(config, str(folder)).state_dict()
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in expected.items()}:
        raise UnsupportedError("the installed x-transformers has parameters that kvgen does not know; try version 2.31")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
            written = Path(scratch) / folder.name
            written.mkdir()
            (written / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(state, written / "model.safetensors")
            _write_tokenizer(tokenizer, written)
            written.rename(folder)
    except OSError as error:
        raise KvgenError(f"{folder}: cannot be written ({error.strerror})") from error


def _obstacles(config: DecoderConfig) -> Iterator[str]:
    """Yield the mechanisms that the library lacks: all that are not the default, except sizes and biases."""
    layer = config.layers[0]
    if config.recurrences:
        yield "it has recurrent layers"
        return
    if not config.attentions:
        yield "it has latent attention"
        return
    if not isinstance(layer.ffn, MLP):
        yield "it is a mixture of experts"
        return
    rotary = config.attention.rotary
    if missing := config.biases - {"ffn.down"}:
        yield f"biases of {', '.join(sorted(missing))}"
    if any(config.windows):
        yield "its layers have sliding windows"
    if len(set(config.layers)) > 1:
        yield "its layers have different rotary positions"
    sizes = {"norm_eps", "tied_head", "biases", "rotary"}
    for part in (*layer.mixers, layer.ffn, config):
        for field in fields(part):
            value = getattr(part, field.name)
            if field.name not in sizes and field.default is not MISSING and value != field.default:
                shown = repr(value)
                yield f"{field.name} is {shown}" if len(shown) <= _MAX_SHOWN else f"{field.name} is not supported"
    if rotary is None or len(rotary.inverse_frequencies) * 2 != config.attention.head_dim or rotary.long_frequencies:
        yield "it does not rotate whole heads by the same frequencies at all lengths"
    elif rotary.scale != 1:
        yield "it scales rotated queries and keys"


def library_config(config: DecoderConfig) -> dict[str, Any]:
    """Return the library's arguments for a decoder. Raises UnsupportedError for mechanisms that it lacks."""
    for obstacle in _obstacles(config):
        raise UnsupportedError(f"cannot be converted to x-transformers: {obstacle}")
    attention = config.attention
    wrapper: dict[str, Any] = {
        "num_tokens": config.vocab_size,
        "max_seq_len": config.context_length or 0,
        "use_abs_pos_emb": False,
        "tie_embedding": config.tied_head,
    }
    if config.tied_head:
        wrapper["tie_embedding_scale"] = 1.0
    decoder = {
        "dim": config.dim,
        "depth": len(config.layers),
        "heads": attention.heads,
        "attn_dim_head": attention.head_dim,
        "attn_kv_heads": attention.kv_heads,
        "rotary_pos_emb": True,
        "rotary_emb_dim": attention.head_dim,
        "use_rmsnorm": True,
        "ff_glu": True,
        "ff_swish": True,
        "ff_mult": config.mlp.width / config.dim,
        "verbose": False,
    }
    return {"library": LIBRARY, "wrapper": wrapper, "decoder": decoder}


def library_state(decoder: Decoder) -> dict[str, Tensor]:
    """Return the decoder's parameters with the library's names and layouts, contiguous.

    The library adds 1 to norm weights, stores up and gate in one matrix with a bias, and rotates interleaved pairs
    instead of halves. Its query head h reads key-value head h % kv_heads, kvgen's h // (heads / kv_heads), so query
    heads are reordered. Rotary frequencies are a buffer, so context scaling is included.
    """
    config, weights = decoder.config, decoder.state_dict()
    heads, kv_heads, head_dim = config.attention.heads, config.attention.kv_heads, config.attention.head_dim
    groups = torch.arange(heads).view(kv_heads, -1).T.reshape(-1)  # library head -> kvgen head
    state = {
        "token_emb.emb.weight": weights["token_embd.weight"],
        "attn_layers.rotary_pos_emb.inv_freq": decoder.get_buffer("rotaries.0.frequencies"),
        "attn_layers.final_norm.g": weights["output_norm.weight"] - 1,
    }
    if decoder.output is not None:
        state["to_logits.weight"] = weights["output.weight"]
    for index in range(len(config.layers)):
        prefix = f"blk.{index}."
        block = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        attention, feed_forward = f"attn_layers.layers.{2 * index}", f"attn_layers.layers.{2 * index + 1}"
        q = block["attn.q.weight"].view(heads, head_dim, config.dim)[groups]  # (H, D, dim)
        k = block["attn.k.weight"].view(kv_heads, head_dim, config.dim)  # (H_kv, D, dim)
        out = block["attn.output.weight"].view(config.dim, heads, head_dim)[:, groups]  # (dim, H, D)
        state |= {
            f"{attention}.0.0.g": block["attn_norm.weight"] - 1,
            f"{attention}.1.to_q.weight": interleave(q).reshape(-1, config.dim),
            f"{attention}.1.to_k.weight": interleave(k).reshape(-1, config.dim),
            f"{attention}.1.to_v.weight": block["attn.v.weight"],
            f"{attention}.1.to_out.weight": out.reshape(config.dim, -1),
            f"{feed_forward}.0.0.g": block["ffn_norm.weight"] - 1,
            f"{feed_forward}.1.ff.0.proj.weight": torch.cat((block["ffn.up.weight"], block["ffn.gate.weight"])),
            f"{feed_forward}.1.ff.0.proj.bias": q.new_zeros(2 * config.mlp.width),
            f"{feed_forward}.1.ff.2.weight": block["ffn.down.weight"],
            f"{feed_forward}.1.ff.2.bias": block.get("ffn.down.bias", q.new_zeros(config.dim)),
        }
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def interleave(rows: Tensor) -> Tensor:
    """Reorder the rows of each head, (H, D, ...): pairs (i, i + D / 2) become (2i, 2i + 1)."""
    heads, size = rows.shape[:2]
    return rows.view(heads, 2, size // 2, *rows.shape[2:]).transpose(1, 2).reshape(rows.shape)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(tokenizer.eos_ids)}) + "\n")
    if (template := tokenizer.chat_template) is not None:
        settings = {**template.special_tokens, "chat_template": template.source}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False) + "\n")
