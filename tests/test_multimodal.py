"""The text part of checkpoints with images: the logits of transformers' whole model, and a note."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

import kvgen
from kvgen import CheckpointError
from kvgen.loading.inspect import inspect
from tests import program
from tests.families import DELTA_NETS, EXPERTS, GEMMA4, GEMMA4_EXPERTS, SIZES, growing, make_checkpoint

LENGTH = 40
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
NOTE = "this is the text part of a '{}' checkpoint; images are left out"


def make_gemma3(**more: Any) -> Any:
    text = SIZES | {"head_dim": 12, "sliding_window": 9, "num_hidden_layers": 7} | more
    vision = VISION | {"model_type": "siglip_vision_model"}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def make_mistral3(kind: str, tied: bool, **more: Any) -> Any:
    text = SIZES | {"head_dim": 12, "model_type": kind, "tie_word_embeddings": False} | more  # the whole model's counts
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return Mistral3ForConditionalGeneration(config)


def make_qwen3_5(kind: Any, config: Any, **more: Any) -> Any:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    text = SIZES | DELTA_NETS | {"rope_parameters": PICTURE_ROPE} | more
    return kind(config(text_config=text, vision_config=vision | {"num_position_embeddings": 16}))


PICTURE_ROPE = {  # positions of rows and columns, which are those of time in a text
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}


def make_gemma4(**more: Any) -> Any:
    text = SIZES | GEMMA4 | {"num_kv_shared_layers": 2, "use_bidirectional_attention": "vision"} | more
    vision = VISION | {"model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8}
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, audio_config=None))


MODELS: dict[str, Callable[[], Any]] = {
    "gemma4": make_gemma4,
    "gemma4-with-experts": lambda: make_gemma4(**GEMMA4_EXPERTS, attention_k_eq_v=True, num_kv_shared_layers=0),
    "gemma3": make_gemma3,
    "mistral3": lambda: make_mistral3("ministral3", False, **growing()),
    "mistral3-of-mistral": lambda: make_mistral3("mistral", True, sliding_window=7),
    "qwen3_5": lambda: make_qwen3_5(Qwen3_5ForConditionalGeneration, Qwen3_5Config),
    "qwen3_5_moe": lambda: make_qwen3_5(
        Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig, **EXPERTS, shared_expert_intermediate_size=28
    ),
}


def write(folder: Path, name: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
        elif "embed" in key:
            parameter.data = parameter.data * 10
    model.save_pretrained(folder)
    return model


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("layout", ["old names", "new names"])
@pytest.mark.parametrize("name", MODELS)
def test_the_text_part_has_the_logits_of_the_whole_model(name: str, layout: str, tmp_path: Path) -> None:
    reference = write(tmp_path, name)
    if layout == "new names":
        rename(
            tmp_path,
            lambda key: (
                key.replace("language_model.model.", "model.language_model.")
                .replace("language_model.lm_head", "lm_head")
                .replace("vision_tower.", "model.vision_tower.")
                .replace("model.model.", "model.")
            ),
        )
    loaded = kvgen.load(tmp_path, tokenizer="ids")
    ids = torch.randint(12, 96, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(input_ids=ids).logits
    assert expected.abs().max() > 0.1
    assert (loaded.model.all_logits(ids) - expected).abs().max() < 1e-4
    assert loaded.note == NOTE.format(name.split("-")[0])


def test_the_text_part_of_gemma_3n(tmp_path: Path) -> None:
    """transformers makes the whole model only with a library of image models, so its parts are added by hand."""
    reference = make_checkpoint("gemma3n_text", 0, tmp_path)
    path = tmp_path / "config.json"
    text = json.loads(path.read_text())
    whole = {"model_type": "gemma3n", "text_config": text, "vision_config": {"a": 1}, "audio_config": {"a": 1}}
    path.write_text(json.dumps(whole))
    rename(tmp_path, lambda key: key.replace("model.", "model.language_model.", 1))
    path = tmp_path / "model.safetensors"
    parts = ("vision_tower.timm_model.stem", "audio_tower.conformer.0", "embed_vision.projection", "embed_audio.norm")
    others = {f"model.{part}.weight": torch.ones(2) for part in parts}
    save_file(load_file(path) | others, path, {"format": "pt"})
    loaded = kvgen.load(tmp_path, tokenizer="ids")
    ids = torch.randint(12, 96, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(input_ids=ids).logits
    assert (loaded.model.all_logits(ids) - expected).abs().max() < 1e-4
    assert loaded.note == "this is the text part of a 'gemma3n' checkpoint; images and audio are left out"


def test_values_that_a_config_with_images_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    write(tmp_path, "gemma3")
    whole = kvgen.load(tmp_path, tokenizer="ids").config
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("hidden_activation", "rms_norm_eps", "query_pre_attn_scalar"):
        del config["text_config"][name]
    path.write_text(json.dumps(config))
    assert kvgen.load(tmp_path, tokenizer="ids").config == whole


def test_the_note_is_said_once_and_by_inspect(tmp_path: Path) -> None:
    write(tmp_path, "gemma3")
    arguments = (str(tmp_path), "--ids", "-n", "2", "--prompt", "5 6 7")
    assert program.run("generate", "--model", *arguments).stderr.count(NOTE.format("gemma3")) == 1
    assert "left out" not in program.run("generate", "--quiet", "--model", *arguments).stderr
    assert inspect(tmp_path).note == NOTE.format("gemma3")
    lines = dict(line.split(maxsplit=1) for line in program.run("inspect", str(tmp_path)).stdout.splitlines())
    assert lines["note"] == NOTE.format("gemma3")
    assert lines["kind"] == "gemma3_text (hf)"


def test_a_tensor_of_no_known_part_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "gemma3")
    rename(tmp_path, lambda key: key.replace("multi_modal_projector.mm_soft", "smell_tower.mm_soft"))
    with pytest.raises(CheckpointError, match=r"smell_tower\.mm_soft_emb_norm\.weight' is not part"):
        kvgen.load(tmp_path, tokenizer="ids")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "gemma3")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"] + 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="under two names"):
        kvgen.load(tmp_path, tokenizer="ids")
