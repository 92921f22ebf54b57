"""The losses as modules: a class for every loss of `fastloss.functional`.

A module takes the options of its function in the constructor; a call takes the rest, tensors such as `input` and
`target`, and by keyword weights, masks and other tensors that belong to the call. A loss of `torch.nn` has its name,
constructor, attributes and state there, and is an instance of it; fastloss's own options are keyword-only. Options that
are tensors are buffers or, given as a `Parameter`, parameters.
"""

from fastloss.nn.aggregation import (
    Chi2DROLoss,
    CVaRLoss,
    FloodingLoss,
    SoftADLoss,
    TiltedLoss,
)
from fastloss.nn.angular_margin import (
    ArcFaceLoss,
    CosFaceLoss,
    HarmonicLoss,
)
from fastloss.nn.classification import (
    CrossEntropyLoss,
    Poly1CrossEntropyLoss,
    SoftmaxFocalLoss,
)
from fastloss.nn.contrastive import (
    ClipLoss,
    InfoNCELoss,
    SigLipLoss,
)
from fastloss.nn.ctc import (
    CTCLoss,
)
from fastloss.nn.distillation import (
    JSDivLogitsLoss,
    KLDivLogitsLoss,
)
from fastloss.nn.dpo import (
    DPOLoss,
    DPOLossFromLogits,
    LinearDPOLoss,
)
from fastloss.nn.elementwise import (
    BCELoss,
    BCEWithLogitsLoss,
    HingeLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    LogCoshLoss,
    MSELoss,
    RMSELoss,
    SigmoidFocalLoss,
    SmoothL1Loss,
)
from fastloss.nn.gflownet import (
    DetailedBalanceLoss,
)
from fastloss.nn.linear import (
    LinearCrossEntropyLoss,
)
from fastloss.nn.metric_learning import (
    BatchAllTripletLoss,
    BatchHardTripletLoss,
    ContrastiveLoss,
    CosineEmbeddingLoss,
    KELPRankingLoss,
    TripletMarginLoss,
)
from fastloss.nn.number_token import (
    CrossEntropyWithNumberTokenLoss,
    GaussianCrossEntropyLoss,
    NumberTokenLoss,
)
from fastloss.nn.policy import (
    PolicyLoss,
    ValueLoss,
)
from fastloss.nn.preference import (
    AlphaPOLoss,
    CPOLoss,
    KTOLoss,
    ORPOLoss,
    SimPOLoss,
)
from fastloss.nn.retrieval import (
    MultipleNegativesRankingLoss,
)
from fastloss.nn.reward_model import (
    BradleyTerryLoss,
    KWayRankingLoss,
)
from fastloss.nn.supervised_contrastive import (
    NTXentLoss,
    PairNTXentLoss,
    SupConLoss,
)
from fastloss.nn.survival import (
    CoxPHLoss,
    DARTLoss,
)
from fastloss.nn.token_statistics import (
    EntropyFromLogits,
    SelectiveLogSoftmax,
    SequenceLogProbs,
)

__all__ = [
    "AlphaPOLoss",
    "ArcFaceLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "BradleyTerryLoss",
    "CPOLoss",
    "CTCLoss",
    "CVaRLoss",
    "Chi2DROLoss",
    "ClipLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CosineEmbeddingLoss",
    "CoxPHLoss",
    "CrossEntropyLoss",
    "CrossEntropyWithNumberTokenLoss",
    "DARTLoss",
    "DPOLoss",
    "DPOLossFromLogits",
    "DetailedBalanceLoss",
    "EntropyFromLogits",
    "FloodingLoss",
    "GaussianCrossEntropyLoss",
    "HarmonicLoss",
    "HingeLoss",
    "HuberLoss",
    "InfoNCELoss",
    "JSDivLogitsLoss",
    "KELPRankingLoss",
    "KLDivLogitsLoss",
    "KLDivLoss",
    "KTOLoss",
    "KWayRankingLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LinearDPOLoss",
    "LogCoshLoss",
    "MSELoss",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "NumberTokenLoss",
    "ORPOLoss",
    "PairNTXentLoss",
    "PolicyLoss",
    "Poly1CrossEntropyLoss",
    "RMSELoss",
    "SelectiveLogSoftmax",
    "SequenceLogProbs",
    "SigLipLoss",
    "SigmoidFocalLoss",
    "SimPOLoss",
    "SmoothL1Loss",
    "SoftADLoss",
    "SoftmaxFocalLoss",
    "SupConLoss",
    "TiltedLoss",
    "TripletMarginLoss",
    "ValueLoss",
]
