"""The accuracy ledger: the same samples and the same metric at every stage from the float model to the served one.

``ledger.json`` holds one record per stage; beside it, ``ledger.<stage>.npz`` holds that stage's outputs per sample, so
that any two stages can be compared sample by sample.
"""

from trtdeploy.ledger.ledger import STAGES, Ledger, Stage, StageRecord
from trtdeploy.ledger.outputs import Divergence, StageOutputs, top1_of

__all__ = ["STAGES", "Divergence", "Ledger", "Stage", "StageOutputs", "StageRecord", "top1_of"]
