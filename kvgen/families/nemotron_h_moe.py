"""llama.cpp's name for Nemotron-H with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from kvgen.families import nemotron_h

FAMILY = replace(nemotron_h.FAMILY, hf_model_type="", gguf_architecture="nemotron_h_moe")
