"""gpt-oss: how the config.json of its first release states positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvgen
from tests.families import make_checkpoint

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_positions_are_those_of_transformers(tmp_path: Path) -> None:
    make_checkpoint("gpt_oss", 0, tmp_path)
    edit_config(tmp_path, {"rope_scaling": ROPE, "rope_theta": 150000})
    (rotary,) = kvgen.load(tmp_path, tokenizer="ids").config.rotaries
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    assert torch.equal(torch.tensor(rotary.inverse_frequencies), expected.inv_freq)
    assert rotary.scale == expected.attention_scaling


def test_without_positions_it_is_refused(tmp_path: Path) -> None:
    make_checkpoint("gpt_oss", 0, tmp_path)
    edit_config(tmp_path, {})
    with pytest.raises(kvgen.CheckpointError, match="rope_parameters is missing"):
        kvgen.load(tmp_path, tokenizer="ids")
