"""The pooler's attention with the key and value projections absorbed into its one query.

    out_h = sum_j softmax_j(query_h . n_j) n_j        n = LayerNorm(x) without weight or bias

A pooler has one query an image, so projecting that query through Wk (and the LayerNorm's weight)
costs 110 times fewer operations than projecting 257 tokens; key bias and LayerNorm bias add the
same to every score and cancel. The caller projects `out` through Wv. Statistics, softmax and sums
are in fp32 and nothing is rounded before the output. Source: AttentionPoolingBlock in
OpenGVLab/InternVL, and DESIGN's section on algebra for the rearrangement.

query is (B, H, C) with H = 16, x (B, N, C) with C = 3200 or 4096. Bound by memory: x is read twice.
The gradient differentiates the reference: the pooler is 0.3 % of an encode.
"""

from torch import Tensor

from internvl_engine import reference

from ._library import define, triton_launcher

_pooling_attention = define(
    "pooling_attention(Tensor query, Tensor x, float eps) -> Tensor",
    reference=reference.pooling_attention,
    fake=lambda query, x, eps: query.new_empty(query.shape),
    cuda={"triton": triton_launcher("pooling_attention")},
)


def pooling_attention(query: Tensor, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Softmax-weighted means of the layer-normalised tokens, for a few queries an image.

    Args:
        query: (B, H, C), already projected through the key weights and scaled.
        x: (B, N, C), any strides with C contiguous, else it is copied; N at least 1.
        eps: of the LayerNorm.

    Returns:
        (B, H, C), the dtype of query.

    Raises:
        ValueError: the shapes do not fit.
    """
    if query.dim() != 3 or x.dim() != 3 or query.shape[::2] != x.shape[::2] or x.shape[1] == 0:
        raise ValueError(
            "pooling_attention: query must be (B, H, C), x (B, N, C) with N at least 1, got "
            f"{tuple(query.shape)} and {tuple(x.shape)}"
        )
    return _pooling_attention(query, x, eps)
