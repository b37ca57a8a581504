from __future__ import annotations

import torch
from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

from arkor_ray.training.portable_state import BLOCK, _quantise


def quantised(values: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codebook = create_dynamic_map(signed=signed)
    codes, state = quantize_blockwise(values, code=codebook, blocksize=BLOCK)
    return codes, state.absmax, codebook


def test_the_same_layout_gets_the_same_bits_back() -> None:
    torch.manual_seed(0)
    for signed in (True, False):
        values = torch.randn(1000) if signed else torch.rand(1000)
        values[256:512] = 0.0
        codes, absmax, codebook = quantised(values, signed)
        scales = absmax.repeat_interleave(BLOCK)[:1000]
        again, again_absmax = _quantise(codebook[codes.long()] * scales, scales, codebook)
        live = torch.ones(1000, dtype=torch.bool)
        live[256:512] = False  # nothing is there to have a code
        assert torch.equal(again[live], codes[live])
        assert torch.equal(again_absmax, absmax)


def test_another_layout_is_within_the_quantisation_error() -> None:
    torch.manual_seed(0)
    values = torch.randn(1024)
    codes, absmax, codebook = quantised(values, True)
    scales = absmax.repeat_interleave(BLOCK)
    stored = codebook[codes.long()] * scales
    moved, moved_absmax = _quantise(stored[100:900], scales[100:900], codebook)
    restored = codebook[moved.long()] * moved_absmax.repeat_interleave(BLOCK)[:800]
    assert (restored - stored[100:900]).abs().max() < 0.05 * values.abs().max()
    assert not torch.equal(restored, torch.zeros(800))


def test_values_that_were_kept_in_32_bits_find_a_scale() -> None:
    codebook = create_dynamic_map(signed=True)
    values = torch.linspace(-2, 2, 300)
    codes, absmax = _quantise(values, torch.zeros(300), codebook)
    restored = codebook[codes.long()] * absmax.repeat_interleave(BLOCK)[:300]
    assert (restored - values).abs().max() < 0.05
