"""Attention of a packed row: several sequences one after another, without padding, each attending to itself only.

Shapes: S tokens of the row, N sequences, A attention heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_or_packed"  # for transformers
MIN_MAX_LENGTH = 4096


def has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for packed rows: flash attention, in 16 bit, on GPUs from Ampere on."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and is_half and torch.cuda.get_device_capability(device) >= (8, 0)


def max_length(longest: int) -> int:
    """The `max_length_q` of a row whose longest sequence has so many tokens.

    It only sizes the kernel's grid, whose blocks behind the end of a sequence return at once. A compiled layer takes it
    for a constant and would be compiled again for every other value. So it is the same for all usual rows, and a power
    of two for longer ones.
    """
    return max(MIN_MAX_LENGTH, 1 << (longest - 1).bit_length())


def let_rows_be_packed(model: PreTrainedModel) -> None:
    """Let the language model attend within the sequences of a row where it gets `cu_seq_lens_q`. All other calls are
    transformers' own "sdpa"."""
    AttentionInterface.register(NAME, sdpa_or_packed)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation({"text_config": NAME})


def sdpa_or_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers.

    Args:
        query, key, value: [1, A, S, D]; keys and values may have fewer heads.
        cu_seq_lens_q: where each sequence of the row begins, and S [N+1], int32. On the GPU if `has_varlen_kernel`,
            else on the CPU, so that its numbers can be read without waiting. None: no packed row.
        max_length_q: see `max_length`.

    Returns:
        [1, S, A, D], and None for the attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attend = by_kernel if cu_seq_lens_q.is_cuda else each_sequence
    return attend(query, key, value, cu_seq_lens_q, max_length_q, options["scaling"]), None


def by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Causal attention of all sequences in one kernel [1, S, A, D]."""
    query, key, value = (heads.squeeze(0).transpose(0, 1).contiguous() for heads in (query, key, value))  # [S, A, D]
    found = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True
    )
    assert isinstance(found, torch.Tensor)  # without auxiliary outputs
    return found[None]


@torch.compiler.disable  # lengths are read as numbers, and every set of them would be another graph
def each_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Causal attention of one sequence after another [1, S, A, D]."""
    lengths = ends.diff().tolist()
    found = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(found, 2).transpose(1, 2).contiguous()
