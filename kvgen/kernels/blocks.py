"""The operations of whole blocks and of the output head: what `kvgen.model.block` does, in the same order."""

from __future__ import annotations

from functools import partial

from kvgen.kernels.ffns import write_ffn
from kvgen.kernels.mixers import MIXERS
from kvgen.kernels.program import ACCUMULATE, ProgramBuilder, Project
from kvgen.kernels.slots import Buffer, Slot
from kvgen.model.mixers import Parallel, Recurrent


class BlockWriter:
    """Writes the blocks of a decoder, one after another, into a program."""

    def __init__(self, program: ProgramBuilder) -> None:
        self.program, self.config = program, program.config
        self.x, self.normed = (Slot(buffer, self.config.dim) for buffer in (Buffer.X, Buffer.NORMED))
        self.attentions = self.recurrences = 0  # written so far

    def write_block(self, i: int) -> None:
        layer, parallel, norms = self.config.layers[i], self.config.parallel, self.config.norms
        read = self._normed(i, "attn_norm")
        if layer.mixer is None:
            self._add(i, write_ffn(self.program, f"blk.{i}.ffn", layer.ffn, read), "post_ffw_norm")
            return
        mixed = self._write_mixers(i, read)
        if layer.ffn is None:
            self._add(i, mixed, "post_attention_norm")
            return
        if not parallel:
            self._add(i, mixed, "post_attention_norm")
        if not parallel or "ffn_norm" in norms:
            read = self._normed(i, "ffn_norm")
        output = write_ffn(self.program, f"blk.{i}.ffn", layer.ffn, read)
        if parallel:  # the feed-forward layer reads x before attention is added
            self._add(i, mixed, "post_attention_norm")
        self._add(i, output, "post_ffw_norm")

    def _write_mixers(self, i: int, read: Slot) -> Project:
        mixer = self.config.layers[i].mixer
        if not isinstance(mixer, Parallel):
            return self._write_mixer(f"blk.{i}.attn", mixer, read)
        total = Slot(Buffer.PARALLEL, self.config.dim)
        for j, part in enumerate(mixer.mixers):
            project = self._write_mixer(f"blk.{i}.attn.{j}", part, read)
            project(total, 1, ACCUMULATE if j else 0)
        return partial(self.program.add, total)

    def _write_mixer(self, name: str, spec: object, read: Slot) -> Project:
        recurrent = isinstance(spec, Recurrent)
        number = self.recurrences if recurrent else self.attentions
        self.recurrences, self.attentions = self.recurrences + recurrent, self.attentions + (not recurrent)
        return MIXERS[type(spec)](self.program, name, spec, read, number)

    def _add(self, i: int, project: Project, norm: str) -> None:
        """Project the output of mixer or MLP, normalize it if the block has the norm, and add it to x."""
        scale = self.config.residual_scale
        if norm not in self.config.norms:
            project(self.x, scale, ACCUMULATE)
            return
        out = Slot(Buffer.OUT, self.config.dim)
        project(out, 1, 0)
        self.program.norm(f"blk.{i}.{norm}", out, out, self.config.dim)
        self.program.add(out, self.x, scale, ACCUMULATE)

    def _normed(self, i: int, norm: str) -> Slot:
        """Normalize x if the block has the norm; return the slot of the result."""
        if norm not in self.config.norms:
            return self.x
        self.program.norm(f"blk.{i}.{norm}", self.x, self.normed, self.config.dim)
        return self.normed


def write_head(program: ProgramBuilder) -> None:
    config = program.config
    x, normed, logits = (
        Slot(Buffer.X, config.dim),
        Slot(Buffer.NORMED, config.dim),
        Slot(Buffer.LOGITS, config.vocab_size),
    )
    program.norm("output_norm", x, normed, config.dim)
    program.linear("token_embd" if config.tied_head else "output", normed, logits)
