"""Jobs: each has one class of settings and one function, for library, command line and comparison alike."""

from glp_lens.pipeline.collect import CollectJob, collect, collect_again
from glp_lens.pipeline.compare import CompareJob, compare
from glp_lens.pipeline.density import DensityJob, density
from glp_lens.pipeline.fidelity import FidelityJob, fidelity
from glp_lens.pipeline.probe import ProbeJob, probe
from glp_lens.pipeline.report import ReportJob, report
from glp_lens.pipeline.steer import SteerJob, steer
from glp_lens.pipeline.train import TrainJob, train

__all__ = [
    "CollectJob",
    "CompareJob",
    "DensityJob",
    "FidelityJob",
    "ProbeJob",
    "ReportJob",
    "SteerJob",
    "TrainJob",
    "collect",
    "collect_again",
    "compare",
    "density",
    "fidelity",
    "probe",
    "report",
    "steer",
    "train",
]
