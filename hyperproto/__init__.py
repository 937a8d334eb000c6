"""Classifiers whose last layer does not train: fixed prototypes on the unit hypersphere, dynamically assigned."""

import torch.serialization

from hyperproto import functional
from hyperproto.assigner import DynamicAssigner
from hyperproto.assignment_step import AssignmentStep
from hyperproto.bank import PrototypeBank
from hyperproto.class_names import check_class_names
from hyperproto.conversion.convert import convert_model
from hyperproto.conversion.describe import describe
from hyperproto.conversion.fold import to_linear
from hyperproto.conversion.restore import restore_model
from hyperproto.errors import (
    AlreadyConvertedError,
    ArgumentError,
    AssignmentError,
    BankError,
    CheckpointError,
    HeadNotFoundError,
    HyperprotoError,
    HyperprotoWarning,
    LabelError,
    NotLinearError,
    RankError,
    ShapeError,
)
from hyperproto.fitting.compress_head import compress_head
from hyperproto.fitting.fit_head import fit_head
from hyperproto.fitting.fit_logit_scale import fit_logit_scale
from hyperproto.fitting.refit_head import refit_head
from hyperproto.fitting.report import HeadFit, HeldOut
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads
from hyperproto.losses import BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss
from hyperproto.matching.solve import AssignmentSolution
from hyperproto.pretrained.load import load_model
from hyperproto.pretrained.whole import load_pretrained, save_pretrained
from hyperproto.separation import BankReport

__version__ = "0.1.0"

__all__ = [
    "AlreadyConvertedError",
    "ArgumentError",
    "AssignmentError",
    "AssignmentSolution",
    "AssignmentStep",
    "BalancedLoss",
    "BankError",
    "BankReport",
    "CheckpointError",
    "DynamicAssigner",
    "HeadFit",
    "HeadNotFoundError",
    "HeldOut",
    "HyperprotoError",
    "HyperprotoWarning",
    "HypersphericalHead",
    "LabelError",
    "LongTailLoss",
    "NotLinearError",
    "PrototypeBank",
    "PrototypeCrossEntropyLoss",
    "RankError",
    "ShapeError",
    "check_class_names",
    "compress_head",
    "convert_model",
    "describe",
    "fit_head",
    "fit_logit_scale",
    "functional",
    "get_heads",
    "load_model",
    "load_pretrained",
    "refit_head",
    "restore_model",
    "save_pretrained",
    "to_linear",
]

# Reports may lie beside the weights in a checkpoint, which `torch.load` reads with `weights_only=True`.
# Bytes are what empty ones are written as by the protocol that it takes.
torch.serialization.add_safe_globals([AssignmentSolution, AssignmentStep, BankReport, HeadFit, HeldOut, bytes])
