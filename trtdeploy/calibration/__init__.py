"""Finding the range of a tensor from the values that pass: one exact histogram, and methods."""

from trtdeploy.calibration.amax import METHODS as METHODS
from trtdeploy.calibration.amax import Method as Method
from trtdeploy.calibration.amax import amax_of as amax_of
from trtdeploy.calibration.histogram import AbsHistogram as AbsHistogram
from trtdeploy.calibration.maximum import AbsMaximum as AbsMaximum
