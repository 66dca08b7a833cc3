"""How far apart two computations of one function may be, from what is known beforehand: dtype,
lengths of sums, sizes.

Another CPU, another number of threads or another library adds the same numbers in another order.
What that changes has a size:

* A number of u = eps / 2 relative precision is off by up to u after each addition. Of a sum of n
  products the roundings are independent, so their variances add: the sum is off by about sqrt(n) u
  of its size, one standard deviation (the worst case, n u, would need all of them to point the same
  way; Higham and Mary 2019, "A new approach to probabilistic rounding error analysis").
* The sums of a network follow each other, and each passes on what it was given about as large as it
  was, relative to its size, because norms and the residual stream set that size. Their roundings
  are independent too: n is the length of all of them.
* Two computations differ by up to twice what one is off: 2 u = eps.
* Compared is the largest of up to a million elements: 5 standard deviations. Steep functions on the
  way (softmax of scores, gates) make an error up to about 3 times larger. 5 x 3 is about MARGIN.

So a difference is at most MARGIN eps sqrt(n) of the root mean square of what is compared. Near ties
are another matter: a router or an argmax that meets two equal scores may choose either, and no
bound on rounding covers what follows from that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from config_model import ModelConfig

MARGIN = 16.0


def rounding(dtype: torch.dtype, *lengths: float) -> float:
    """The largest difference that rounding explains after sums of these lengths, one after the
    other, relative to the result's size.
    """
    return MARGIN * torch.finfo(dtype).eps * math.sqrt(sum(lengths))


def length_of_sums(config: ModelConfig, tokens: int) -> float:
    """The lengths of all sums between a token's id and its logits, added up. `tokens`: keys that it
    attends to.
    """
    c, D = config, config.attention_head_dim
    # Norm; q, k, v; their norms, scores; softmax, values; output.
    attention = c.d_model + 3 * c.d_model + 3 * D + 2 * tokens + c.num_heads * D
    # Norm; router; softmax; gate and up; down; weighted sum.
    experts = c.d_model + c.d_model + c.num_experts + 2 * c.d_model + c.d_ff + c.top_k
    # Rotations, activations, products, residuals.
    elementwise = 16
    blocks = c.transformer_blocks * (attention + experts + elementwise)
    # The last norm and the head.
    return blocks + 2 * c.d_model


def logits_bound(config: ModelConfig, tokens: int, dtype: torch.dtype = torch.float32) -> float:
    """`rounding` of a model's logits for texts of this many tokens, relative to the logits' root
    mean square.
    """
    return rounding(dtype, length_of_sums(config, tokens))


def gradients_bound(
    config: ModelConfig, tokens: int, rows: int, dtype: torch.dtype = torch.float32
) -> float:
    """`rounding` of a loss's gradients. The backward pass has two products for each of the forward
    pass's, and sums over words and tokens.
    """
    return rounding(
        dtype, 3 * length_of_sums(config, tokens), config.vocabulary_size, rows * tokens
    )


def size_of(tensor: Tensor) -> float:
    """Root mean square, computed in float64."""
    return tensor.detach().double().square().mean().sqrt().item()
