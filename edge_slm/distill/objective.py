"""The loss of training: cross-entropy of response tokens, and optional terms.

- KL from a teacher, of which the k likeliest next tokens are known (`sparse_kl`), mixed with
  the cross-entropy;
- KL to the model before the round, and an entropy bonus (Quark, Lu et al., arXiv
  2205.13636), per response token;
- the *confidence* that an answer has the highest level: behind `<|end|>`, the probability of that
  level's control token among those of all levels (binary cross-entropy). A model that judges its
  own answers can tell the best of several (cf. Cobbe et al., arXiv 2110.14168, and the P(True) of
  Kadavath et al., arXiv 2207.05221). Where sentences at fault are known, it is also taught at the
  ends of the sentences before the last one, up to the one at fault (process supervision, Lightman
  et al., arXiv 2305.20050). Of a pair, the better response is also trained to have the higher
  confidence (Bradley-Terry);
- the *preference* for responses of the highest level over others to the same request (DPO,
  Rafailov et al., arXiv 2305.18290): what the cross-entropy, which sees good responses alone,
  cannot teach is which of the model's own are bad. Of these, the sentence at fault alone becomes
  less likely, where it is known (cf. Step-DPO, Lai et al., arXiv 2406.18629, which has such pairs
  part at that very sentence);
- the *countdown*: two linear heads predict, from the hidden state, how many words have begun
  and how many remain. `<|end|>` teaches length once per record, the countdown at every
  token. The heads are not part of the checkpoint. (Our own.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from edge_slm.distill.packing import IGNORED, Batch
from edge_slm.distill.recipe import DistillationRecipe
from edge_slm_runtime.command import WORD_EDGES

_LEAST = 1e-6  # of a probability that is 1 - a sum
_BETA = 0.1  # of the preference: how far it may move the model from the reference
_BUCKETS = len(WORD_EDGES) + 1  # the buckets of WORD_EDGES, with one below and one above


def attention_mask(segment: torch.Tensor) -> torch.Tensor:
    """[rows, 1, length, length] from segments [rows, length]: causal, within a record."""
    same = segment[:, :, None] == segment[:, None, :]
    return same.tril()[:, None]


def predictions(
    lm: Any, body: Any, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states [rows, length, width], those of the labels [labels, width], logits [labels,
    vocabulary]): only labelled positions reach the LM head. body: the base model of `lm`,
    compiled or not."""
    outputs = body(
        input_ids=batch["ids"],
        position_ids=batch["positions"],
        attention_mask=attention_mask(batch["segment"]),
        use_cache=False,
    )
    states = outputs.last_hidden_state
    hidden = states[batch["labels"] != IGNORED]
    return states, hidden, lm.get_output_embeddings()(hidden).float()


class LogProbabilities(torch.autograd.Function):  # type: ignore[misc]
    """`logits.log_softmax(-1).gather(-1, ids)`, [labels, k], in half of the passes over memory:
    on a CPU those over [labels, vocabulary] take as long as the layers of a small model.

    Its gradient is g - softmax · sum(g), made in the place of the log-softmax; so it can be
    asked for once.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.log_q, ctx.ids = logits.log_softmax(-1), ids
        return ctx.log_q.gather(-1, ids)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        softmax = ctx.__dict__.pop("log_q").exp_()
        return softmax.mul_(-gradient.sum(-1, keepdim=True)).scatter_add_(
            -1, ctx.ids, gradient
        ), None


def sparse_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) over k tokens and one bucket for all others, summed over the labels.

    log_q, log_p [labels, k]: log probabilities by the student and by the teacher of the teacher's
    likeliest tokens. Without the bucket the teacher's k probabilities would be taken for all of its
    mass, and the student would learn to be too sure (Anshumann et al., arXiv 2503.16870, on top-k
    alone); how the student shares the bucket's mass is left to the cross-entropy. With k =
    vocabulary it is the exact KL.
    """
    p = log_p.exp()
    rest_p = (1 - p.sum(-1)).clamp(min=0)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=_LEAST)
    rest = torch.xlogy(rest_p, rest_p) - rest_p * rest_q.log()
    return (p * (log_p - log_q)).sum() + rest.sum()


def margins_of(values: torch.Tensor, preferred: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """[pairs]: the summed `values` of the preferred response less those of the other one.

    values [positions]: at each of the positions `at`. preferred, at [rows, length]:
    `Batch.preferred`, and which positions they are.
    """
    most = int(preferred.max())  # pairs of a row
    rows = torch.arange(len(preferred), device=preferred.device)[:, None]
    number = torch.where(preferred != 0, rows * most + preferred.abs(), 0)[at]
    sums = values.new_zeros(len(preferred) * most + 1).index_add(
        0, number, values * preferred[at].sign()
    )
    return sums[number[number > 0].unique()]


class Learner(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A causal language model of transformers with its loss.

    countdown: weight of the countdown's loss. confidence: weight of the loss of `achieved`.
    preference: weight of the loss of `preferred`. levels: token ids of the levels, the highest
    last. distillation: of batches with soft labels. compile: of the layers, by torch.compile.
    """

    def __init__(
        self,
        lm: Any,
        *,
        countdown: float = 0.0,
        confidence: float = 0.0,
        preference: float = 0.0,
        levels: Sequence[int] = (),
        distillation: DistillationRecipe | None = None,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__()
        self.lm = lm
        self.countdown, self.confidence, self.levels = countdown, confidence, list(levels)
        self.preference = preference
        self.distillation = distillation or DistillationRecipe()
        self.kl = self.entropy = 0.0
        self._before: list[Any] = []  # model, body; in a list, so that they are no submodules
        if countdown:
            width = lm.config.hidden_size
            self.so_far = torch.nn.Linear(width, _BUCKETS)
            self.remaining = torch.nn.Linear(width, _BUCKETS)
        self._compiled = torch.compile if compile else lambda body: body
        self._body = [self._compiled(lm.base_model)]

    def begin_stage(self, *, kl: float, entropy: float) -> None:
        """kl, entropy: weights of the KL to the model as it is now, which is the reference of the
        preference, too, and of the entropy bonus."""
        self.kl, self.entropy = kl, entropy
        self._before = []
        if kl or self.preference:
            lm = copy.deepcopy(self.lm).eval().requires_grad_(False)
            self._before = [lm, self._compiled(lm.base_model)]

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the tokens to imitate: `loss` (weighted), `cross_entropy` and the terms in use.

        batch: the arrays of `tensors`, [rows, length].
        """
        labelled = batch["labels"] != IGNORED
        states, hidden, logits = predictions(self.lm, self._body[0], batch)
        ids, log_p = batch["soft_ids"][labelled], batch["soft_log_p"][labelled]
        wanted = torch.cat([batch["labels"][labelled][:, None], ids], -1)
        log_q = LogProbabilities.apply(logits, wanted)
        imitated = batch["preferred"][labelled] >= 0
        parts = {"cross_entropy": -log_q[imitated, 0].sum()}
        loss = parts["cross_entropy"]
        pairs = self.preference > 0 and bool(batch["preferred"].any())
        if self.kl or pairs:
            with torch.no_grad():
                reference, body = self._before
                *_, before = predictions(reference, body, batch)
                before = before.log_softmax(-1)
        if ids.shape[-1]:
            weight, temperature = self.distillation.weight, self.distillation.temperature
            of_teacher = log_q[:, 1:]
            if temperature != 1:
                of_teacher = LogProbabilities.apply(logits / temperature, ids)
            # Gradients keep their size: × temperature² (Hinton et al., arXiv 1503.02531).
            parts["teacher_kl"] = temperature**2 * sparse_kl(of_teacher[imitated], log_p[imitated])
            loss = (1 - weight) * loss + weight * parts["teacher_kl"]
        if self.kl or self.entropy:
            every = logits[imitated].log_softmax(-1)
            if self.kl:
                parts["kl"] = (every.exp() * (every - before[imitated])).sum()
                loss = loss + self.kl * parts["kl"]
            parts["entropy"] = -(every.exp() * every).sum()
            loss = loss - self.entropy * parts["entropy"]
        if self.confidence:
            parts["confidence"] = self._unsure(states, batch)
            loss = loss + self.confidence * parts["confidence"]
        if self.preference:
            margins = logits.new_zeros(0)
            if pairs:
                ratio = log_q[:, 0] - before.gather(-1, wanted[:, :1])[:, 0]
                margins = margins_of(ratio, batch["preferred"], labelled)
            parts["preference"] = -functional.logsigmoid(_BETA * margins).sum()
            parts["pairs"] = margins.new_tensor(len(margins))
            parts["pairs_right"] = (margins > 0).sum().to(margins.dtype)
            loss = loss + self.preference * parts["preference"]
        if self.countdown:
            counted = [
                functional.cross_entropy(
                    head(hidden[imitated]).float(),
                    batch[name][labelled][imitated],
                    ignore_index=IGNORED,
                    reduction="sum",
                )
                for name, head in (("so_far", self.so_far), ("remaining", self.remaining))
            ]
            parts["countdown"] = counted[0] + counted[1]
            loss = loss + self.countdown * parts["countdown"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _unsure(self, states: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The binary cross-entropy of the highest level, summed over where it is known, and of
        pairs that of the preferred response's being the likelier one to have it."""
        achieved = batch["achieved"]
        known = achieved != IGNORED
        head = self.lm.get_output_embeddings().weight[self.levels]
        log_p = (states[known] @ head.T.to(states.dtype)).float().log_softmax(-1)
        best, others = log_p[:, -1], log_p[:, :-1].logsumexp(-1)
        unsure = -torch.where(achieved[known] == 1, best, others).sum()
        at_end = known & (batch["preferred"] != 0) & (batch["labels"] == IGNORED)
        margins = margins_of((best - others)[at_end[known]], batch["preferred"], at_end)
        return unsure - functional.logsigmoid(margins).sum()


def tensors(batch: Batch, device: Any) -> dict[str, torch.Tensor]:
    """The batch on the device, with word counts as buckets of WORD_EDGES."""
    arrays = {name: getattr(batch, name) for name in batch.__slots__}
    for name in ("so_far", "remaining"):
        counts = arrays[name]
        buckets = np.searchsorted(WORD_EDGES, counts, side="right")
        arrays[name] = np.where(counts == IGNORED, IGNORED, buckets)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
