"""Load on a served model: closed loop, open loop, and the highest rate that keeps a latency promise."""

from trtdeploy.load.arrivals import Arrivals, ClosedLoop, OpenLoop
from trtdeploy.load.measurement import LoadPoint, WindowOptions, measure
from trtdeploy.load.slo import SloResult, search_rate

__all__ = ["Arrivals", "ClosedLoop", "LoadPoint", "OpenLoop", "SloResult", "WindowOptions", "measure", "search_rate"]
