"""The fused Attention operator in every form that its schema has, against torch autograd.

Its derivative is that of its schema's function body, so the forms are not in a rule but in the
standard: masks of numbers and of truths, causal, fewer heads of keys than of queries, keys and
values from before, a cap, and heads folded into channels (3 axes) or apart (4).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.contract.test_vjp_torch import Function, assert_as_torch
from tests.contract.vjp import Case, case

RNG = np.random.default_rng(8)
QUERY, KEYS = (5, 4, 3, 8), (5, 4, 6, 8)
FEWER, ONE = (5, 2, 6, 8), (5, 1, 6, 8)
BEFORE = (5, 4, 2, 8)

NUMBERS = RNG.standard_normal((3, 6)).astype(np.float32)
SQUARE = RNG.standard_normal((6, 6)).astype(np.float32)
TRUTHS = np.array([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]], bool)
LENGTHS = np.array([6, 5, 4, 1, 3])


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


def folded(
    queries: int, keys: int, mask: np.ndarray | None = None, causal: bool = False
) -> Function:
    """On ``(batch, tokens, heads * width)``."""

    def apart(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.unflatten(2, (count, -1)).transpose(1, 2)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        given = None if mask is None else torch.tensor(mask)
        q, k, v = apart(q, queries), apart(k, keys), apart(v, keys)
        return attention(q, k, v, given, causal=causal).transpose(1, 2).flatten(2)

    return function


def after(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pk: torch.Tensor, pv: torch.Tensor
) -> torch.Tensor:
    return attention(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2))


def after_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pk: torch.Tensor, pv: torch.Tensor
) -> torch.Tensor:
    seen = torch.ones(3, 8, dtype=torch.bool).tril(2)
    return attention(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), seen)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    return torch.softmax(2 * torch.tanh(scores / 2), -1) @ v


def above(mask: np.ndarray) -> torch.Tensor:
    """The mask, and nothing that comes later."""
    later = torch.triu(torch.full(mask.shape, float("-inf")), 1)
    return torch.tensor(mask) + later


def short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    real = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    return attention(q, k, v, real[:, None, None])


FORMS: list[tuple[str, Case, Function]] = [
    (f"{label}, opset {opset}", case("Attention", *inputs, opset=opset, **attributes), function)
    for opset in (23, 24)
    for label, inputs, attributes, function in [
        ("plain", (QUERY, KEYS, KEYS), {}, attention),
        ("scale", (QUERY, KEYS, KEYS), {"scale": 0.3},
         lambda q, k, v: attention(q, k, v, scale=0.3)),
        ("wider values", (QUERY, KEYS, (5, 4, 6, 10)), {}, attention),
        ("mask of numbers", (QUERY, KEYS, KEYS, NUMBERS), {},
         lambda q, k, v: attention(q, k, v, torch.tensor(NUMBERS))),
        ("mask of truths", (QUERY, KEYS, KEYS, TRUTHS), {},
         lambda q, k, v: attention(q, k, v, torch.tensor(TRUTHS))),
        ("mask that varies", (QUERY, KEYS, KEYS, (5, 4, 3, 6)), {}, attention),
        ("mask that varies and is broadcast", (QUERY, KEYS, KEYS, (3, 6)), {}, attention),
        ("causal", (KEYS, KEYS, KEYS), {"is_causal": 1},
         lambda q, k, v: attention(q, k, v, causal=True)),
        ("causal with fewer queries", (QUERY, KEYS, KEYS), {"is_causal": 1},
         lambda q, k, v: attention(q, k, v, causal=True)),
        ("causal and a mask", (KEYS, KEYS, KEYS, SQUARE), {"is_causal": 1},
         lambda q, k, v: attention(q, k, v, above(SQUARE))),
        ("two queries to a key", (QUERY, FEWER, FEWER), {}, attention),
        ("one key for all", (QUERY, ONE, ONE), {}, attention),
        ("one key for all and a mask", (QUERY, ONE, ONE, TRUTHS), {},
         lambda q, k, v: attention(q, k, v, torch.tensor(TRUTHS))),
        ("cap", (QUERY, KEYS, KEYS), {"softcap": 2.0}, capped),
        ("from before", (QUERY, KEYS, KEYS, None, BEFORE, BEFORE), {"outputs": 3}, after),
        ("from before, causal", (QUERY, KEYS, KEYS, None, BEFORE, BEFORE),
         {"outputs": 3, "is_causal": 1}, after_causal),
        ("folded", ((5, 3, 8), (5, 6, 8), (5, 6, 8)), {"q_num_heads": 2, "kv_num_heads": 2},
         folded(2, 2)),
        ("folded and a mask", ((5, 3, 8), (5, 6, 8), (5, 6, 8), TRUTHS),
         {"q_num_heads": 2, "kv_num_heads": 2}, folded(2, 2, TRUTHS)),
        ("folded, two queries to a key, causal", ((5, 6, 16), (5, 6, 8), (5, 6, 8)),
         {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}, folded(4, 2, causal=True)),
    ]
]  # fmt: skip
FORMS.append(
    ("some keys are padding, opset 24",
     case("Attention", QUERY, KEYS, KEYS, None, None, None, LENGTHS, opset=24), short),
)  # fmt: skip


@pytest.mark.parametrize(("item", "function"), [line[1:] for line in FORMS],
                         ids=[line[0] for line in FORMS])  # fmt: skip
def test_attention_has_the_derivative_of_autograd(item: Case, function: Function) -> None:
    assert_as_torch(item, function, item.feeds(np.float32))


def test_the_weights_that_attention_also_gives_have_their_derivative() -> None:
    values = RNG.standard_normal(KEYS).astype(np.float32)
    item = case("Attention", QUERY, KEYS, values, opset=23, outputs=4, used=3,
                qk_matmul_output_mode=3)  # fmt: skip

    def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1)

    assert_as_torch(item, weights, item.feeds(np.float32))


BLIND = np.where([[True], [False], [True]], TRUTHS, False)


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("mask", [BLIND, np.where(BLIND, NUMBERS, -np.inf).astype(np.float32)])
def test_a_query_that_may_see_nothing_hands_nothing_on(mask: np.ndarray, opset: int) -> None:
    item = case("Attention", QUERY, KEYS, KEYS, mask, opset=opset)

    def attending(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, torch.tensor(mask))

    assert_as_torch(item, attending, item.feeds(np.float32))
