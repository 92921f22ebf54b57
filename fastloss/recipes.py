"""Training objectives of papers, composed of the losses of this package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from fastloss._ops.checks import check_number, check_reduction, check_tensor, check_tensors
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.groups import Groups
from fastloss.losses.elementwise import huber_loss, mse_loss
from fastloss.losses.policy import policy_loss, value_loss
from fastloss.losses.token_statistics import sequence_log_probs

__all__ = [
    "InitialBalance",
    "cringe_hinge_loss",
    "cringe_loss",
    "deep_rag_calibration_loss",
    "deep_rag_imitation_loss",
    "l1_regularization",
    "l2_regularization",
    "multi_task_loss",
    "ppo_total_loss",
    "q_learning_loss",
    "reward_regression_loss",
    "rog_loss",
]


def _places(name: str, ids: Tensor, count: int) -> Tensor:
    """Return which of the numbers are in [0, count); on the CPU, where it costs nothing, raise for others."""
    check_tensor(name, ids)
    if ids.dtype != torch.int64:
        raise RuntimeError(f"{name}: expected int64, got {ids.dtype}")
    inside = (ids >= 0) & (ids < count)
    readable = ids.is_cpu and not torch.compiler.is_compiling() and not is_batchedtensor(ids)
    if readable and not bool(inside.all()):
        raise IndexError(f"{name}: expected numbers in [0, {count}), got {ids[~inside][0].item()}")
    return inside


def cringe_loss(
    logits: Tensor,
    negative_labels: Tensor,
    top_k: int = 1,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    detach_positive: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Compute the token loss of CRINGE for sequences that should not be generated.

    At each token a positive class is drawn from the softmax over the `top_k` largest logits that are not the negative
    label's, and the loss is :math:`\mathrm{softplus}(s^- - s^+)`, with :math:`s^-, s^+` the logits of the negative
    label and of the drawn class. Only these two logits have a gradient. Add it to the cross-entropy of sequences that
    should be generated, with weight 1.

    Args:
        logits: `[..., V]`, V > `top_k`; of tokens that do not count anything, even NaN.
        negative_labels: `[...]`, int64.
        top_k: how many logits compete for the positive. Default: 1.
        ignore_index: the label of tokens that do not count. Default: -100.
        reduction: `"none"`, `"sum"` or `"mean"`, over the tokens that count; 0 if there are none. Default: `"mean"`.
        detach_positive: no gradient for the drawn logit. Default: False.
        generator: of the draw.

    Raises:
        ValueError, RuntimeError: for labels of another shape, or a vocabulary that is too small.
        IndexError: on the CPU for a label out of bounds; on CUDA its loss is NaN.

    Source: Adolphs et al., https://arxiv.org/abs/2211.05826, and its code in ParlAI.
    """
    check_reduction(reduction)
    check_tensor("logits", logits)
    check_tensors(logits, negative_labels=negative_labels)
    if negative_labels.shape != logits.shape[:-1]:
        raise RuntimeError(
            f"negative_labels: expected shape {tuple(logits.shape[:-1])}, got {tuple(negative_labels.shape)}"
        )
    if not 1 <= top_k < logits.shape[-1]:
        raise ValueError(f"top_k: expected a number from 1 to {logits.shape[-1] - 1}, got {top_k}")
    valid = negative_labels != ignore_index
    label = torch.where(valid, negative_labels, 0)
    inside = _places("negative_labels", label, logits.shape[-1])
    label = torch.where(inside, label, 0).unsqueeze(-1)
    best, classes = logits.detach().topk(top_k + 1, -1)
    # drop the negative label, or else the last: sort it to the end and keep the first top_k
    keep = (classes == label).int().argsort(dim=-1, stable=True)[..., :top_k]
    best, classes = best.gather(-1, keep), classes.gather(-1, keep)
    acc_dtype = accumulation_dtype(logits.dtype)
    best = torch.where(valid.unsqueeze(-1), best.to(acc_dtype), 0.0)
    broken = best.isnan().any(-1) | ~inside
    top = best.amax(-1, keepdim=True)
    p = torch.where((best == top) | broken.unsqueeze(-1), 1.0, (best - top).exp()).reshape(-1, top_k)
    drawn = torch.multinomial(p, 1, generator=generator).view(label.shape) if p.numel() else label
    both = logits.gather(-1, torch.cat([label, classes.gather(-1, drawn)], -1))
    negative, positive = torch.where(valid.unsqueeze(-1), both, 0.0).to(acc_dtype).unbind(-1)
    if detach_positive:
        positive = positive.detach()
    loss = -F.logsigmoid(positive - negative)
    loss = torch.where(broken, torch.nan, torch.where(valid, loss, 0.0))
    if reduction != "none":
        loss = loss.sum() / (valid.sum().clamp(min=1) if reduction == "mean" else 1)
    return loss.to(logits.dtype)


def cringe_hinge_loss(chosen_log_probs: Tensor, rejected_log_probs: Tensor, margin: float = 1.0) -> Tensor:
    r"""Compute the CRINGE hinge loss of whole sequences, :math:`\max(0, \log\pi(y^-) - \log\pi(y^+) + \alpha)`.

    A different loss from `cringe_loss`. The log-probabilities are those of `sequence_log_probs`, `[B]`.

    Args:
        chosen_log_probs, rejected_log_probs: `[B]`.
        margin: :math:`\alpha`. Default: 1.
    """
    return F.relu(rejected_log_probs - chosen_log_probs + check_number("margin", margin)).mean()


def rog_loss(answer_log_probs: Tensor, path_log_probs: Tensor, path_question: Tensor) -> Tensor:
    r"""Compute the loss of reasoning on graphs (RoG): answer from the paths, and plan the paths.

    .. math:: \mathrm{mean}_b \left[-\log P(a_b \mid q_b, Z^*_b) - \frac{1}{|Z^*_b|} \sum_{z \in Z^*_b}
              \log P(z \mid q_b)\right]

    The second term is KL(Q || P) up to a constant, with Q uniform over the shortest paths. A question without paths
    has none.

    Args:
        answer_log_probs: `[B]`, of the answers, from `sequence_log_probs`.
        path_log_probs: `[P]`, of all paths.
        path_question: `[P]`, int64, the question in [0, B) that each path belongs to.

    Raises:
        RuntimeError, TypeError: for tensors of other shapes and types.
        IndexError: on the CPU for a question out of bounds; on CUDA the loss is NaN.

    Source: Luo et al., https://arxiv.org/abs/2310.01061.
    """
    check_tensor("answer_log_probs", answer_log_probs)
    check_tensors(answer_log_probs, path_log_probs=path_log_probs, path_question=path_question)
    if answer_log_probs.dim() != 1:
        raise RuntimeError(f"answer_log_probs: expected [B], got {tuple(answer_log_probs.shape)}")
    if path_log_probs.shape != path_question.shape:
        raise RuntimeError(
            f"path_question: expected shape {tuple(path_log_probs.shape)}, got {tuple(path_question.shape)}"
        )
    inside = _places("path_question", path_question, answer_log_probs.shape[0])
    questions = Groups(torch.where(inside, path_question, 0), answer_log_probs.shape[0])
    dtype = torch.promote_types(answer_log_probs.dtype, path_log_probs.dtype)
    answers, paths = (x.to(accumulation_dtype(dtype)) for x in (answer_log_probs, path_log_probs))
    loss = -(answers + questions.sums(paths) / questions.lengths.clamp(min=1)).mean()
    return torch.where(inside.all(), loss, torch.nan).to(dtype)


def deep_rag_imitation_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    r"""Compute the loss of DeepRAG's first stage, :math:`-\sum_t \log p(y_t)` over the model's own tokens.

    The mean is over sequences.

    Args:
        logits: `[B, T, V]`, aligned with the labels.
        labels: `[B, T]`, `ignore_index` at the question and at retrieved documents.
        ignore_index: Default: -100.

    Source: Guan et al., https://arxiv.org/abs/2502.01142.
    """
    return -sequence_log_probs(logits, labels, ignore_index).mean()


def deep_rag_calibration_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.4
) -> Tensor:
    r"""Compute the loss of DeepRAG's second stage: DPO on the decision to retrieve or to answer from memory.

    .. math:: -\log\sigma\left(\beta \left[(\log\pi - \log\pi_\mathrm{ref})(y^+) -
              (\log\pi - \log\pi_\mathrm{ref})(y^-)\right]\right)

    Args:
        chosen, rejected, reference_chosen, reference_rejected: `[B]`, log-probabilities of the decision at one state
            by the policy and by the reference, from `sequence_log_probs`.
        beta: Default: 0.4, as in the released configuration.

    Source: Guan et al., https://arxiv.org/abs/2502.01142.
    """
    gap = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -F.logsigmoid(check_number("beta", beta) * gap).mean()


def ppo_total_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    entropies: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    value_coef: float = 0.5,
    entropy_coef: float = 0.01,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    value_clip: float | None = 0.2,
    loss_agg_mode: str = "token-mean",
) -> Tensor:
    r"""Compute PPO's total loss: clipped policy loss, plus the value loss, minus the entropy.

    .. math:: L_\mathrm{clip} + c_1 L_V - c_2 H

    with `policy_loss`, `value_loss` (which includes the factor 1/2) and the mean of the entropies. The signs are those
    of a loss to be minimised: the value loss is added, the entropy taken off.

    Args:
        logps, old_logps, advantages: `[..., T]`, as for `policy_loss`; advantages also `[...]`.
        values, returns, old_values: `[..., T]`, as for `value_loss`.
        entropies: `[..., T]`, with gradient, for example of `entropy_from_logits`. Default: none, no such term.
        mask: flags or weights of tokens, `[..., T]`. Default: all.
        value_coef: :math:`c_1`. Default: 0.5.
        entropy_coef: :math:`c_2`. Default: 0.01.
        clip_low, clip_high: of the ratio. Default: 0.2.
        value_clip: of the values, around `old_values`; None: not. Default: 0.2.
        loss_agg_mode: of all three terms, as for `policy_loss`. Default: `"token-mean"`.

    Source: Schulman et al., https://arxiv.org/abs/1707.06347, equation 9, and its released code.
    """
    policy = policy_loss(
        logps, old_logps, advantages, mask, "ppo", loss_agg_mode, clip_low=clip_low, clip_high=clip_high,
        entropies=entropies, entropy_coef=entropy_coef,
    )  # fmt: skip
    value = value_loss(values, returns, old_values, mask, value_clip, loss_agg_mode)
    return policy + check_number("value_coef", value_coef) * value  # type: ignore[operator]  # no metrics


def q_learning_loss(
    q_values: Tensor,
    actions: Tensor,
    rewards: Tensor,
    next_q_values: Tensor,
    terminated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    next_q_online: Tensor | None = None,
    huber_delta: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the Q-learning loss: squared difference of the current estimate from its target.

    .. math:: \delta = r + \gamma (1 - \mathrm{terminated}) \max_a Q^-(s', a) - Q(s, a), \qquad \tfrac12 \delta^2

    or Huber's loss of it. With the online network's values of the next state, the action is chosen by these and
    valued by the target network (double DQN). The target has no gradient.

    Args:
        q_values: `[..., A]`, of the state.
        actions: int64 `[...]`, taken in it.
        rewards: `[...]`.
        next_q_values: :math:`Q^-`, `[..., A]`, of the next state by the target network.
        terminated: flags `[...]`: nothing follows. Default: nowhere.
        gamma: :math:`\gamma`. Default: 0.99.
        next_q_online: `[..., A]`, of the next state by the online network. Default: none, no double DQN.
        huber_delta: where Huber's loss turns linear. Default: none, the square.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.

    Source: Mnih et al., Nature 518, 2015; van Hasselt et al., https://arxiv.org/abs/1509.06461.
    """
    check_reduction(reduction)
    check_tensor("q_values", q_values)
    check_tensors(
        q_values, actions=actions, rewards=rewards, next_q_values=next_q_values, terminated=terminated
    )
    if actions.dtype != torch.int64 or actions.shape != q_values.shape[:-1]:
        raise RuntimeError(
            f"actions: expected int64 {tuple(q_values.shape[:-1])}, got {actions.dtype} {tuple(actions.shape)}"
        )
    for name, t in (("next_q_values", next_q_values), ("next_q_online", next_q_online)):
        if t is not None and t.shape != q_values.shape:
            raise RuntimeError(f"{name}: expected shape {tuple(q_values.shape)}, got {tuple(t.shape)}")
    for name, t in (("rewards", rewards), ("terminated", terminated)):
        if t is not None and t.shape != actions.shape:
            raise RuntimeError(f"{name}: expected shape {tuple(actions.shape)}, got {tuple(t.shape)}")
    with torch.no_grad():
        if next_q_online is None:
            best = next_q_values.amax(-1)
        else:
            best = next_q_values.gather(-1, next_q_online.argmax(-1, keepdim=True)).squeeze(-1)
        if check_number("gamma", gamma, 0.0, 1.0) == 0:
            best = torch.zeros_like(best)
        best = gamma * best
        target = rewards + (best if terminated is None else torch.where(terminated.bool(), 0.0, best))
    inside = _places("actions", actions, q_values.shape[-1])
    value = q_values.gather(-1, torch.where(inside, actions, 0).unsqueeze(-1)).squeeze(-1)
    value = torch.where(inside, value, torch.nan)
    target = target.to(value.dtype)
    if huber_delta is not None:
        return huber_loss(value, target, reduction=reduction, delta=huber_delta)
    return 0.5 * mse_loss(value, target, reduction=reduction)


def reward_regression_loss(
    rewards: Tensor, scores: Tensor, center: float = 0.0, scale: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""Compute the regression loss of rewards on scaled scores, :math:`(r - (s - c) / d)^2`.

    Scores of different annotators seldom have a common scale, which pairwise losses such as `bradley_terry_loss` do not
    need.

    Args:
        rewards: of any shape.
        scores: same shape, without gradient.
        center, scale: :math:`c` and :math:`d`, such as mean and deviation of the scores in the data. Default: 0 and 1.
        reduction: `"none"`, `"mean"` or `"sum"`. Default: `"mean"`.
    """
    if scores.shape != rewards.shape:
        raise RuntimeError(f"scores: expected shape {tuple(rewards.shape)}, got {tuple(scores.shape)}")
    normal = (scores.detach() - check_number("center", center)) / check_number("scale", scale)
    return mse_loss(rewards, normal.to(rewards.dtype), reduction=reduction)


def multi_task_loss(
    losses: Tensor | Sequence[Tensor], weights: Tensor | Sequence[float] | None = None
) -> Tensor:
    r"""Compute the weighted sum of the losses of several tasks, :math:`\sum_k w_k L_k`.

    Args:
        losses: `[K]`, or K scalars.
        weights: `[K]`, or K numbers. Default: 1.
    """
    total = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
    if weights is None:
        return total.sum()
    w = torch.as_tensor(weights, dtype=total.dtype, device=total.device)
    if w.shape != total.shape or w.dim() != 1:
        raise RuntimeError(
            f"weights: expected one for each of {tuple(total.shape)} losses, got {tuple(w.shape)}"
        )
    return (w * total).sum()


class InitialBalance(torch.nn.Module):
    r"""Sum of two losses with equal weight at the first call: :math:`L_a + \alpha L_b`.

    :math:`\alpha = L_a / L_b` of the first call, or of the first at which it is finite, is a constant from then on; it
    has no gradient, and is part of the state that is saved. There is no synchronisation if the module is on the device
    of the losses.
    """

    alpha: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(torch.nan))

    def forward(self, main: Tensor, auxiliary: Tensor) -> Tensor:
        with torch.no_grad():
            ratio = (main / auxiliary).to(self.alpha)
            ratio = torch.where(ratio.isfinite(), ratio, torch.nan)
            self.alpha.copy_(torch.where(self.alpha.isnan(), ratio, self.alpha))
            alpha = self.alpha.nan_to_num(1.0).to(auxiliary.dtype)
        return main + alpha * auxiliary


def _norms(parameters: Iterable[Tensor], order: int) -> Tensor:
    """Return the norm of each parameter, in the accumulation type of the widest."""
    given = list(parameters)
    dtype = reduce(torch.promote_types, (accumulation_dtype(p.dtype) for p in given))
    return torch.stack(torch._foreach_norm(given, order, dtype=dtype))


def l1_regularization(parameters: Iterable[Tensor], strength: float) -> Tensor:
    r"""Compute :math:`\lambda \sum |w|` over all elements of all parameters, in one call.

    Args:
        parameters: such as `model.parameters()`; at least one. Norms of half types are float32.
        strength: :math:`\lambda`.
    """
    return check_number("strength", strength) * _norms(parameters, 1).sum()


def l2_regularization(parameters: Iterable[Tensor], strength: float) -> Tensor:
    r"""Compute :math:`\lambda \sum w^2` over all elements of all parameters, in one call.

    For plain SGD equivalent to a weight decay of :math:`2 \lambda`, which costs less; for Adam it is not.

    Args:
        parameters: such as `model.parameters()`; at least one. Norms of half types are float32.
        strength: :math:`\lambda`.
    """
    return check_number("strength", strength) * _norms(parameters, 2).square().sum()
