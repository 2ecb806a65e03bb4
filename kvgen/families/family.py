"""What a family is: a config reader, a table of tensor names, and tensor transforms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.model.config import DecoderConfig

NameTable = Mapping[str, str | None]
Transform = Callable[[Tensor], Tensor]

# llama.cpp gives the tensors of all families the same names.
GGUF_NAMES: NameTable = {
    "token_embd": "token_embd",
    "output_norm": "output_norm",
    "output": "output",
    "rope_freqs": None,  # read with the config
    "blk.{i}.attn_norm": "blk.{i}.attn_norm",
    "blk.{i}.attn_q": "blk.{i}.attn.q",
    "blk.{i}.attn_k": "blk.{i}.attn.k",
    "blk.{i}.attn_v": "blk.{i}.attn.v",
    "blk.{i}.attn_output": "blk.{i}.attn.output",
    "blk.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "blk.{i}.ffn_gate": "blk.{i}.ffn.gate",
    "blk.{i}.ffn_up": "blk.{i}.ffn.up",
    "blk.{i}.ffn_down": "blk.{i}.ffn.down",
}


@dataclass(frozen=True)
class Family:
    """One family of models, as data over the one decoder.

    hf_model_type, gguf_architecture: what its checkpoints call themselves.
    config: reads the decoder config from a checkpoint's metadata (and, for facts, its tensors).
    hf_names: the names in a Hugging Face folder, `{i}` for the layer and without `.weight` or `.bias`, to the
        decoder's names for them; None for a tensor that is known and not needed.
    gguf_transforms, hf_transforms: for each config, what to do with a parameter before it fits the decoder, by
        its name inside a block (`attn.q`, for weight and bias alike).
    """

    hf_model_type: str
    gguf_architecture: str
    config: Callable[[RawCheckpoint], DecoderConfig]
    hf_names: NameTable
    gguf_transforms: Callable[[DecoderConfig], Mapping[str, Transform]] = lambda config: {}
    hf_transforms: Callable[[DecoderConfig], Mapping[str, Transform]] = lambda config: {}

    def names(self, raw: RawCheckpoint) -> NameTable:
        return GGUF_NAMES if raw.format == "gguf" else self.hf_names

    def transforms(self, raw: RawCheckpoint, config: DecoderConfig) -> Mapping[str, Transform]:
        return self.gguf_transforms(config) if raw.format == "gguf" else self.hf_transforms(config)


def parameter_names(tensor_names: Iterable[str], table: NameTable) -> tuple[dict[str, str], list[str]]:
    """Apply a name table: decoder parameter -> tensor name, and the tensor names that the table does not have."""
    found, unknown = {}, []
    for name in tensor_names:
        stem, _, kind = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", stem)
        pattern = stem if layer is None else f"{stem[: layer.start()]}.{{i}}.{stem[layer.end() :]}"
        if pattern not in table or (table[pattern] is not None and kind not in ("weight", "bias")):
            unknown.append(name)
        elif (target := table[pattern]) is not None:
            found[f"{target.format(i=layer[1] if layer else '')}.{kind}"] = name
    return found, unknown


def block_part(parameter: str) -> str:
    """The name of a parameter's layer inside its block: `blk.3.attn.q.bias` is of `attn.q`."""
    return re.sub(r"^blk\.\d+\.", "", parameter).rpartition(".")[0]
