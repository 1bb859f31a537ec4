"""Ids of texts that are embedded: where each ends, and a warning where that is the wrong place.

An embedding is the state of the last token. Ids without `</s>`, cut behind it or padded on the left
give plausible wrong embeddings and no error: LLaMA tokenizers of transformers 5 pad left.

    B texts, L tokens
"""

import warnings
from typing import Any

import torch
from torch import Tensor


def last_tokens(
    ids: Tensor, attention_mask: Tensor | None, eos_token_id: Any
) -> tuple[Tensor, Tensor]:
    """Which tokens count, and the place of the last one of every text.

    Args:
        ids: (B, L), padded on the right with 0.
        attention_mask: (B, L), 1 for tokens; the last token is then the last 1, whatever the
            padding. None takes ids > 0 and, as published, their count for the place of the last.
        eos_token_id: what every text must end in, one id or several of which one will do; else
            there is a warning. None asks for none.

    Returns:
        attention_mask (B, L) and places (B,), on the device of ids.
    """
    if attention_mask is None:
        mask = (ids > 0).long()
        last = mask.sum(1) - 1
    else:
        mask = attention_mask.to(ids.device)
        last = (mask * torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)).argmax(1)
    if not (torch.compiler.is_compiling() or ids.is_meta or _is_captured(ids)) and ids.numel():
        _warn(ids, mask, last, attention_mask is None, eos_token_id)
    return mask, last


def _is_captured(ids: Tensor) -> bool:
    """Whether a CUDA graph is recorded, which must not look at values."""
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()


def _warn(ids: Tensor, mask: Tensor, last: Tensor, guessed: bool, eos_token_id: Any) -> None:
    if guessed and bool((mask[:, 1:] > mask[:, :-1]).any()):
        warnings.warn(
            "encode_text: an id 0 stands before another token (left padding, or an unknown piece); "
            "without an attention_mask the published rule then pools the wrong token",
            stacklevel=4,
        )
        return
    if eos_token_id is None:
        return
    ends = ids.gather(1, last.clamp_min(0)[:, None].long())[:, 0]
    wrong = ~torch.isin(ends, torch.as_tensor(eos_token_id, dtype=torch.int64, device=ids.device))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        warnings.warn(
            f"encode_text: text {row} ends in id {int(ends[row])} at position {int(last[row])}, "
            f"not in the end of a sentence, id {eos_token_id}, whose state is the embedding; "
            "encode it with InternVLTokenizer.encode_for_embedding, or with add_eos_token",
            stacklevel=4,
        )
