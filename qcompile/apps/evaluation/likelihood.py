"""Log-likelihoods of continuations under a model, compiled or not, as lm_eval asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["LogLikelihoods"]

#: Lengths are padded to multiples of this, so that few shapes are compiled.
MULTIPLE = 8


class LogLikelihoods:
    """``model(input_ids=[rows, tokens])`` returns logits ``[rows, tokens, vocabulary]``, or something with ``logits``.

    Every batch has ``rows`` rows, of like lengths, padded at the end: tokens before do not see it, as long as attention
    is causal and a recipe has no scale that all tokens share. Inputs that are equal are computed once.

    ``tokenizer.encode(text, add_special_tokens=False)`` returns ids, as tokenizers of transformers do, or something
    with ``ids``, as those of ``tokenizers`` do. Raises ``ValueError`` for one that does not.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        tokenizer: Any,
        *,
        rows: int = 8,
        most_tokens: int = 2048,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if not callable(getattr(tokenizer, "encode", None)):
            msg = f"{type(tokenizer).__name__} is no tokenizer: it has no encode(text, add_special_tokens=False)"
            raise ValueError(msg)
        if rows < 1 or most_tokens < 1:
            msg = f"rows={rows} and most_tokens={most_tokens} are to be positive"
            raise ValueError(msg)
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.most_tokens = most_tokens
        self.device = torch.device(device)
        self.progress = progress

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of every context and continuation: Σ log p(token) in nats, and whether each token was the likeliest."""
        encoded = [self.encode(*pair) for pair in pairs]
        wanted: dict[tuple[int, ...], list[int]] = {}  # input → requests
        for request, (ids, count) in enumerate(encoded):
            wanted.setdefault((*ids[:-1], -count), []).append(request)
        # Longest first: what does not fit into the memory fails at once.
        order = sorted(wanted, key=lambda key: (-len(key), key))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            logits = self.logits([list(key[:-1]) for key in part])
            for row, key in zip(logits, part, strict=True):
                count, length = -key[-1], len(key) - 1
                table = row[length - count : length].float().log_softmax(-1)
                for request in wanted[key]:
                    targets = torch.tensor(encoded[request][0][-count:], device=table.device)
                    value = table.gather(1, targets[:, None]).sum().item()
                    found[request] = (value, bool((table.argmax(1) == targets).all()))
            self.progress(min(start + self.rows, len(order)), len(order))
        return found

    def encode(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both, the last ``most_tokens + 1``, and how many of them are the continuation's.

        Spaces that end the context go to the continuation. Raises ``ValueError`` where nothing is left of either.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        ids = self.ids(stripped + continuation)
        count = len(ids) - len(self.ids(stripped))
        if count < 1 or len(ids) == count:
            msg = f"{continuation!r} after {stripped[-40:]!r}: the tokens of one of the two are none"
            raise ValueError(msg)
        if count > self.most_tokens:
            msg = f"{continuation[:40]!r} has {count} tokens, more than the {self.most_tokens} of a sequence"
            raise ValueError(msg)
        return ids[-(self.most_tokens + 1) :], count

    def ids(self, text: str) -> list[int]:
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return list(getattr(encoded, "ids", encoded))

    @torch.no_grad()
    def logits(self, inputs: Sequence[list[int]]) -> Tensor:
        """``[len(inputs), tokens, vocabulary]``; of every row, what follows its own tokens means nothing."""
        length = min(-(-max(map(len, inputs)) // MULTIPLE) * MULTIPLE, max(self.most_tokens, max(map(len, inputs))))
        ids = torch.zeros(self.rows, length, dtype=torch.int64)
        for row in range(self.rows):
            tokens = inputs[min(row, len(inputs) - 1)]
            ids[row] = tokens[-1]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        output = self.model(input_ids=ids.to(self.device))
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
            what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            msg = f"model(input_ids) returned {what}; logits [{self.rows}, {length}, vocabulary] are needed"
            raise ValueError(msg)
        return logits[: len(inputs)]
