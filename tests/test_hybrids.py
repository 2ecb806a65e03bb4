"""Hybrids of attention and Mamba 2: what configs of older checkpoints say, and how a hybrid is described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvgen
from kvgen import CheckpointError, UnsupportedError
from kvgen.backends.blueprint import draw_blueprint
from kvgen.checkpoint import RawCheckpoint, read_checkpoint
from kvgen.generation.prompt_cache import load_prompt_cache, save_prompt_cache
from kvgen.kernels.lacking import lacking
from kvgen.loading.inspect import as_data, inspect
from tests.families import make_checkpoint


def checkpoint(kind: str, number: int, folder: Path) -> RawCheckpoint:
    make_checkpoint(kind, number, folder)
    return read_checkpoint(folder)


def changed(raw: RawCheckpoint, **metadata: Any) -> RawCheckpoint:
    return raw.with_metadata(metadata)


def test_older_words_for_layers_mean_the_same(tmp_path: Path) -> None:
    raw = checkpoint("granitemoehybrid", 0, tmp_path)
    older = changed(raw, layer_types=["mamba", "attention", "mamba"])
    assert draw_blueprint(older).decoder.config == draw_blueprint(raw).decoder.config


def test_letters_for_layers_mean_the_same(tmp_path: Path) -> None:
    raw = checkpoint("nemotron_h", 2, tmp_path)
    older = changed(raw, layers_block_type=None, hybrid_override_pattern="M*EM-", num_hidden_layers=5)
    assert draw_blueprint(older).decoder.config == draw_blueprint(raw).decoder.config
    with pytest.raises(CheckpointError, match="for each of 6 layers"):
        draw_blueprint(changed(older, num_hidden_layers=6))
    with pytest.raises(CheckpointError, match="layers_block_type must have one of"):
        draw_blueprint(changed(older, hybrid_override_pattern="M*XM-"))


def test_older_names_of_sizes_come_first(tmp_path: Path) -> None:
    raw = checkpoint("nemotron_h", 0, tmp_path)
    older = changed(raw, mamba_n_groups=raw.metadata["n_groups"], n_groups=4, mamba_d_conv=4, conv_kernel=3)
    assert draw_blueprint(older).decoder.config == draw_blueprint(raw).decoder.config


def test_layers_that_predict_further_tokens_are_ignored(tmp_path: Path) -> None:
    raw = checkpoint("nemotron_h", 1, tmp_path)
    further = {"mtp.layers.0.norm.weight": raw.tensors["backbone.layers.0.norm.weight"]}
    draw_blueprint(replace(raw, tensors={**raw.tensors, **further}))


def test_half_of_each_head_is_rotated_if_the_file_does_not_say(tmp_path: Path) -> None:
    raw = checkpoint("bamba", 0, tmp_path)
    older = changed(raw, rope_parameters=None, rope_theta=10000.0)
    assert draw_blueprint(older).decoder.config == draw_blueprint(raw).decoder.config


def test_other_positions_are_refused(tmp_path: Path) -> None:
    raw = checkpoint("granitemoehybrid", 0, tmp_path)
    with pytest.raises(UnsupportedError, match="position_embedding_type is 'alibi'"):
        draw_blueprint(changed(raw, position_embedding_type="alibi"))


def test_mixers_side_by_side_are_described(tmp_path: Path) -> None:
    checkpoint("falcon_h1", 0, tmp_path)
    inspection = inspect(tmp_path)
    assert inspection.mechanisms["layers"] == "3 of width 32, mixers in parallel"
    assert inspection.mechanisms["Mamba 2"] == "8 heads of size 8 in 2 groups, states of size 12"
    assert inspection.mechanisms["attention"] == "4 heads of size 8, 2 key-value heads"
    assert as_data(inspection)["windows"] == [None] * 3
    assert inspection.config is not None
    assert lacking(inspection.config) is None


@pytest.mark.parametrize("kind", ["falcon_h1", "nemotron_h"])
def test_a_prompt_cache_holds_one_state_for_each_mixer(kind: str, tmp_path: Path) -> None:
    make_checkpoint(kind, 0, tmp_path)
    loaded = kvgen.load(tmp_path, tokenizer="ids")
    ids = torch.arange(2, 90)[None]
    _, cache = loaded.model(ids, None)
    save_prompt_cache(tmp_path / "x", cache, loaded)
    restored = load_prompt_cache(tmp_path / "x", loaded)
    assert len(restored.states) == len(loaded.model.decoder.config.mixers)
    logits, restored = loaded.model(torch.cat((ids, ids[:, :2]), dim=1), restored)
    assert restored.reused == 88
    assert (logits - loaded.model(torch.cat((ids, ids[:, :2]), dim=1), None)[0]).abs().max() < 1e-4


def test_layers_of_one_part_are_described(tmp_path: Path) -> None:
    checkpoint("nemotron_h", 0, tmp_path)
    inspection = inspect(tmp_path)
    assert inspection.mechanisms["MLP"] == "relu2, not gated, width 48, in 2 of 4 layers"
    assert inspection.mechanisms["attention"] == "4 heads of size 12, 2 key-value heads, in 1 of 4 layers"
    assert inspection.mechanisms["norms"] == "RMS norm before each layer"
    assert inspection.config is not None
    assert len(inspection.config.mixers) == 2
    assert lacking(inspection.config) is None
