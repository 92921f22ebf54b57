"""Other projects' losses as candidates for `python -m fastloss bench ... --peers benchmarks/peers.py`.

`peers(loss, device)` gives those that are installed; each takes the arguments of fastloss's function by name
and runs with its project's own settings. An option that a peer lacks raises, and `bench` then reports that it
was not timed, as it does for one whose result is another: nothing is compared on unequal terms. None of them
is a dependency of fastloss.

What is not here: Liger's losses of preferences, which multiply the reference model too, or start from hidden
states where fastloss starts from log-probabilities; pytorch-metric-learning's `NTXentLoss` for `nt_xent_loss`,
which makes a matrix of all positive by all negative pairs, 274 GB at that loss's own shape.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Tensor]


def averaged(rows: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Return the mean of row losses that are 0 where the row is ignored."""
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (target != ignore_index).sum()


def classes_only(target: Tensor) -> None:
    """Raise for probabilities, which the kernels would read as classes."""
    if target.is_floating_point():
        raise TypeError("target: only classes")


# ---- rows of logits


def liger_cross_entropy() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def call(input: Tensor, target: Tensor, z_loss: float = 0.0, **options: Any) -> Tensor:
        classes_only(target)
        return liger_cross_entropy(input, target, lse_square_scale=z_loss, **options)

    return call


def quack_cross_entropy() -> Function:
    from quack.cross_entropy import cross_entropy

    def call(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        classes_only(target)
        return cross_entropy(input, target, **options)

    return call


def flash_attn_cross_entropy() -> Function:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def call(
        input: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean",
        z_loss: float = 0.0, **options: float,
    ) -> Tensor:  # fmt: skip
        classes_only(target)
        rows, _ = cross_entropy_loss(
            input, target, ignore_index=ignore_index, lse_square_scale=z_loss, **options
        )
        return averaged(rows, target, ignore_index, reduction)

    return call


def apex_cross_entropy() -> Function:
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    def call(
        input: Tensor, target: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        classes_only(target)
        half = input.dtype in (torch.float16, torch.bfloat16)
        rows = SoftmaxCrossEntropyLoss.apply(input, target, label_smoothing, ignore_index, half)
        return averaged(rows, target, ignore_index, reduction)

    return call


def kornia_softmax_focal() -> Function:
    from kornia.losses import focal_loss

    def call(
        input: Tensor, target: Tensor, gamma: float = 2.0, alpha: float | Tensor | None = None,
        ignore_index: int = -100, reduction: str = "mean", background_class: int | None = None,
    ) -> Tensor:  # fmt: skip
        number = alpha is not None and not isinstance(alpha, Tensor)
        if number and background_class != 0:
            raise TypeError("alpha: a number weighs class 0 by 1 - alpha")
        weights = {"alpha": alpha if number else None, "weight": None if number else alpha}
        whole = "none" if reduction == "none" else "sum"  # its mean is over rows and classes
        loss = focal_loss(input, target, gamma=gamma, ignore_index=ignore_index, reduction=whole, **weights)
        return averaged(loss.sum(1) if whole == "none" else loss, target, ignore_index, reduction)

    return call


def trl_selective_log_softmax() -> Function:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def trl_entropy() -> Function:
    from trl.trainer.utils import entropy_from_logits

    return entropy_from_logits


# ---- number tokens


class NumberTokens:
    """The part of a tokenizer that ntloss needs: which tokens are numbers."""

    def __init__(self, ids: list[int], values: list[float], size: int) -> None:
        self.size = size
        self.vocabulary = {str(value): i for i, value in zip(ids, values, strict=True)}

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def ntloss_number_token() -> Function:
    from ntloss import NTLoss, NTLossDotProduct

    made: dict[Any, Any] = {}

    def call(
        logits: Tensor, labels: Tensor, token_ids: Tensor, token_values: Tensor, kind: str = "wasserstein",
        ignore_index: int = -100, reduction: str = "mean", reweigh: bool = False,
        squash_factor: float | None = None,
    ) -> Tensor:  # fmt: skip
        classes_only(labels)
        key = (id(token_ids), id(token_values), logits.shape[-1], kind, reweigh, squash_factor)
        if key not in made:  # once, as a training script would
            tokens = NumberTokens(token_ids.tolist(), token_values.tolist(), logits.shape[-1])
            if kind == "wasserstein":
                loss = NTLoss(tokens, digit_level=False, reweigh=reweigh, squash_factor=squash_factor)
            else:
                loss = NTLossDotProduct(tokens, digit_level=False, reweigh=reweigh, loss_function=F.mse_loss)
            made[key] = loss, token_ids, token_values  # kept, so that no other tensor gets their ids
        rows = logits.reshape(1, -1, logits.shape[-1]), labels.reshape(1, -1)
        loss = made[key][0](*rows, reduction=reduction, ignore_index=ignore_index)
        return loss.reshape(labels.shape) if reduction == "none" else loss

    return call


def ntloss_with_cross_entropy() -> Function:
    number_token = ntloss_number_token()

    def call(
        logits: Tensor, labels: Tensor, token_ids: Tensor, token_values: Tensor, ntl_weight: float = 0.3,
        ignore_index: int = -100, reduction: str = "mean", **options: Any,
    ) -> Tensor:  # fmt: skip
        shared = {"ignore_index": ignore_index, "reduction": reduction}
        plain = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **shared)
        plain = plain.reshape(labels.shape) if reduction == "none" else plain
        return plain + ntl_weight * number_token(logits, labels, token_ids, token_values, **shared, **options)

    return call


# ---- a linear layer and cross-entropy


def torch_linear_in_chunks() -> Function:
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()

    def call(**arguments: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it warns where it takes the way without chunks
            return F.linear_cross_entropy(**arguments, options=options)

    return call


def liger_linear() -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(
        input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None,
        weight: Tensor | None = None, z_loss: float = 0.0, **options: Any,
    ) -> Tensor:  # fmt: skip
        classes_only(target)
        return liger_fused_linear_cross_entropy(
            input, linear_weight, target, linear_bias, weight, lse_square_scale=z_loss, **options
        )

    return call


def quack_linear() -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        classes_only(target)
        return chunked_linear_cross_entropy(input, linear_weight, target, **options)

    return call


def cut_cross_entropy() -> Function:
    from cut_cross_entropy import linear_cross_entropy

    def call(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        classes_only(target)
        return linear_cross_entropy(input, linear_weight, target, **options)

    return call


# ---- elements


def torchvision_sigmoid_focal() -> Function:
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss


# kornia and MONAI have another formula for targets between 0 and 1: the same loss of hard targets, but another
# gradient of the targets, where that is asked for.


def kornia_sigmoid_focal() -> Function:
    from kornia.losses import binary_focal_loss_with_logits

    def call(
        inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"
    ) -> Tensor:
        return binary_focal_loss_with_logits(inputs, targets, alpha if alpha >= 0 else None, gamma, reduction)

    return call


def monai_sigmoid_focal() -> Function:
    from monai.losses.focal_loss import sigmoid_focal_loss

    def call(
        inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"
    ) -> Tensor:
        loss = sigmoid_focal_loss(inputs, targets, gamma, alpha if alpha >= 0 else None)
        return loss if reduction == "none" else getattr(loss, reduction)()

    return call


def apex_sigmoid_focal() -> Function:
    from apex.contrib.focal_loss.focal_loss import focal_loss

    def call(
        inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none",
        num_positives: Tensor | None = None, ignore_index: int = -2, background_index: int = -1,
    ) -> Tensor:  # fmt: skip
        if targets.is_floating_point() or num_positives is None or reduction == "none":
            raise TypeError("only classes, summed up and divided by num_positives")
        if (ignore_index, background_index) != (-2, -1):
            raise TypeError("ignored is -2, background -1")
        return focal_loss(inputs, targets, num_positives, inputs.shape[-1], alpha, gamma)

    return call


# ---- similarities


def open_clip_losses() -> ModuleType:
    """Load the file of its losses, which needs torch alone; the package also needs a matching torchvision."""
    path = Path(find_spec("open_clip").origin).with_name("loss.py")
    spec = spec_from_file_location("open_clip_losses", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip_clip() -> Function:
    return open_clip_losses().ClipLoss()


def open_clip_siglip() -> Function:
    loss = open_clip_losses().SigLipLoss()
    return lambda logit_bias=None, **arguments: loss(logit_bias=logit_bias, **arguments)


def memeff_clip() -> Function:
    from memeff import MemoryEfficientCLIPLoss

    def call(image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
        if isinstance(logit_scale, Tensor):
            raise TypeError("logit_scale: only a number, which gets no gradient")
        # "stable" gradients are another multiple
        loss = MemoryEfficientCLIPLoss(1 / logit_scale, normalized_inputs=True, stable=False)
        return loss(image_features, text_features)

    return call


def inf_cl_rows(queries: Tensor, keys: Tensor, scale: float | Tensor) -> Tensor:
    """Compute one direction; its kernels iterate over features in pieces of `head_dim`."""
    from inf_cl import cal_flash_loss

    return cal_flash_loss(queries, keys, scale=scale, head_dim=math.gcd(queries.shape[1], 256))


def inf_cl_clip() -> Function:
    def call(image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
        rows = inf_cl_rows(image_features, text_features, logit_scale)
        return (rows.mean() + inf_cl_rows(text_features, image_features, logit_scale).mean()) / 2

    return call


def inf_cl_info_nce() -> Function:
    def call(
        query: Tensor, positive_key: Tensor, temperature: float | Tensor = 0.1, reduction: str = "mean",
        normalize: bool = True,
    ) -> Tensor:  # fmt: skip
        if normalize:
            query, positive_key = F.normalize(query), F.normalize(positive_key)
        rows = inf_cl_rows(query, positive_key, 1 / temperature)
        return rows if reduction == "none" else getattr(rows, reduction)()

    return call


def info_nce_pytorch() -> Function:
    from info_nce import info_nce

    return info_nce


def sentence_transformers_ranking() -> Function:
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim, dot_score

    def call(
        anchor: Tensor, positive: Tensor, negatives: Tensor | None = None, scale: float | Tensor = 20.0,
        normalize: bool = True, **options: Any,
    ) -> Tensor:  # fmt: skip
        similarity = cos_sim if normalize else dot_score
        loss = MultipleNegativesRankingLoss(None, scale, similarity_fct=similarity, **options)
        hard = () if negatives is None else negatives.reshape(-1, *anchor.shape)
        return loss.compute_loss_from_embeddings([anchor, positive, *hard], None)

    return call


def metric_learning_sup_con() -> Function:
    from pytorch_metric_learning.losses import SupConLoss

    return lambda features, labels, temperature=0.1: SupConLoss(temperature)(features, labels)


def metric_learning_nt_xent() -> Function:
    from pytorch_metric_learning.losses import NTXentLoss

    return lambda embeddings, labels, temperature=0.07: NTXentLoss(temperature)(embeddings, labels)


# ---- distances


def sentence_transformers_batch_hard() -> Function:
    from sentence_transformers.losses import BatchHardSoftMarginTripletLoss, BatchHardTripletLoss
    from sentence_transformers.losses import BatchHardTripletLossDistanceFunction as Distance

    distances = {
        "euclidean": Distance.euclidean_distance,
        "squared": lambda x: Distance.euclidean_distance(x, squared=True),
        "cosine": Distance.cosine_distance,
    }

    def call(
        embeddings: Tensor, labels: Tensor, margin: float | None = 5.0, distance: str = "euclidean"
    ) -> Tensor:
        if (labels.unique(return_counts=True)[1] == 1).any():
            raise ValueError("a row that is alone in its class counts there, its positive at distance 0")
        if margin is None:
            loss = BatchHardSoftMarginTripletLoss(None, distances[distance])
        else:
            loss = BatchHardTripletLoss(None, distances[distance], margin)
        return loss.compute_loss_from_embeddings([embeddings], labels)

    return call


def metric_learning_batch_hard() -> Function:
    from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer, SumReducer

    distances = {
        "euclidean": LpDistance(normalize_embeddings=False),
        "squared": LpDistance(normalize_embeddings=False, power=2),
        "cosine": CosineSimilarity(),
    }
    reducers = {"mean": MeanReducer, "sum": SumReducer}

    def call(
        embeddings: Tensor, labels: Tensor, margin: float | None = 5.0, distance: str = "euclidean",
        reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        if reduction not in reducers:
            raise TypeError("reduction: only of the rows that have a triplet")
        metric, reducer = distances[distance], reducers[reduction]()
        loss = TripletMarginLoss(margin or 0.0, smooth_loss=margin is None, distance=metric, reducer=reducer)
        return loss(embeddings, labels, BatchHardMiner(distance=metric)(embeddings, labels))

    return call


def sentence_transformers_contrastive() -> Function:
    from sentence_transformers.losses import ContrastiveLoss, SiameseDistanceMetric

    def call(input1: Tensor, input2: Tensor, label: Tensor, margin: float = 1.0) -> Tensor:
        loss = ContrastiveLoss(None, SiameseDistanceMetric.EUCLIDEAN, margin)
        return loss.compute_loss_from_embeddings([input1, input2], 1 - label)

    return call


def metric_learning_margin(name: str, default: float, margin_of: Callable[[float], float]) -> Function:
    from pytorch_metric_learning import losses

    def call(input: Tensor, weight: Tensor, target: Tensor, s: float = 64.0, m: float = default) -> Tensor:
        with torch.device("meta"):
            loss = getattr(losses, name)(len(weight), weight.shape[1], scale=s, margin=margin_of(m))
        del loss.W  # a parameter of its own
        loss.W = weight.t()
        return loss(input, target)

    return call


def metric_learning_arcface() -> Function:
    return metric_learning_margin("ArcFaceLoss", 0.5, math.degrees)


def metric_learning_cosface() -> Function:
    return metric_learning_margin("CosFaceLoss", 0.35, float)


BOTH, CUDA = ("cpu", "cuda"), ("cuda",)

# loss -> label -> (module that must be there, where it runs, how to get it)
PROVIDERS: dict[str, dict[str, tuple[str, tuple[str, ...], Callable[[], Function]]]] = {
    "cross_entropy": {
        "Liger": ("liger_kernel", CUDA, liger_cross_entropy),
        "QuACK": ("quack", CUDA, quack_cross_entropy),
        "flash-attn": ("flash_attn", CUDA, flash_attn_cross_entropy),
        "apex": ("apex.contrib.xentropy", CUDA, apex_cross_entropy),
    },
    "softmax_focal_loss": {"kornia": ("kornia", BOTH, kornia_softmax_focal)},
    "selective_log_softmax": {"TRL": ("trl", BOTH, trl_selective_log_softmax)},
    "entropy_from_logits": {"TRL": ("trl", BOTH, trl_entropy)},
    "number_token_loss": {"ntloss": ("ntloss", BOTH, ntloss_number_token)},
    "cross_entropy_with_number_token_loss": {"torch + ntloss": ("ntloss", BOTH, ntloss_with_cross_entropy)},
    "linear_cross_entropy": {
        "torch in chunks": ("torch", BOTH, torch_linear_in_chunks),
        "Liger": ("liger_kernel", CUDA, liger_linear),
        "QuACK": ("quack", CUDA, quack_linear),
        "cut-cross-entropy": ("cut_cross_entropy", CUDA, cut_cross_entropy),
    },
    "sigmoid_focal_loss": {
        "torchvision": ("torchvision", BOTH, torchvision_sigmoid_focal),
        "kornia": ("kornia", BOTH, kornia_sigmoid_focal),
        "MONAI": ("monai", BOTH, monai_sigmoid_focal),
        "apex": ("apex.contrib.focal_loss", CUDA, apex_sigmoid_focal),
    },
    "clip_loss": {
        "open_clip": ("open_clip", BOTH, open_clip_clip),
        "memeff": ("memeff", CUDA, memeff_clip),
        "Inf-CL": ("inf_cl", CUDA, inf_cl_clip),
    },
    "siglip_loss": {"open_clip": ("open_clip", BOTH, open_clip_siglip)},
    "info_nce": {
        "info-nce-pytorch": ("info_nce", BOTH, info_nce_pytorch),
        "Inf-CL": ("inf_cl", CUDA, inf_cl_info_nce),
    },
    "multiple_negatives_ranking_loss": {
        "sentence-transformers": ("sentence_transformers", BOTH, sentence_transformers_ranking),
    },
    "sup_con_loss": {"metric-learning": ("pytorch_metric_learning", BOTH, metric_learning_sup_con)},
    "pair_nt_xent_loss": {"metric-learning": ("pytorch_metric_learning", BOTH, metric_learning_nt_xent)},
    "batch_hard_triplet_loss": {
        "metric-learning": ("pytorch_metric_learning", BOTH, metric_learning_batch_hard),
        "sentence-transformers": ("sentence_transformers", BOTH, sentence_transformers_batch_hard),
    },
    "contrastive_loss": {
        "sentence-transformers": ("sentence_transformers", BOTH, sentence_transformers_contrastive),
    },
    "arcface_loss": {"metric-learning": ("pytorch_metric_learning", BOTH, metric_learning_arcface)},
    "cosface_loss": {"metric-learning": ("pytorch_metric_learning", BOTH, metric_learning_cosface)},
}


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be part of is not there, or is another one
        return False


def when_called(module: str, load: Callable[[], Function]) -> Function:
    """Return the peer, imported with its first call: one that cannot be imported is skipped, the others go on."""

    @cache
    def function() -> Function:
        try:
            return load()
        except Exception as error:
            raise ImportError(f"{module} cannot be imported here: {error}") from error

    return lambda **arguments: function()(**arguments)


def peers(loss: str, device: str) -> dict[str, Function]:
    """Return the installed peers of a loss by label."""
    return {
        label: when_called(module, load)
        for label, (module, where, load) in PROVIDERS.get(loss, {}).items()
        if device in where and installed(module)
    }
