"""When requests arrive, how long they are, and who answers them: generated or from a trace.

Imports no jax.
"""

from flexjax.workload.arrivals import Arrival as Arrival
from flexjax.workload.arrivals import LengthScale as LengthScale
from flexjax.workload.arrivals import poisson_arrivals as poisson_arrivals
from flexjax.workload.arrivals import rebase as rebase
from flexjax.workload.arrivals import scale_lengths as scale_lengths
from flexjax.workload.labels import Popularity as Popularity
from flexjax.workload.labels import with_adapters as with_adapters
from flexjax.workload.labels import with_slo_classes as with_slo_classes
from flexjax.workload.lengths import ConstantLength as ConstantLength
from flexjax.workload.lengths import EmpiricalLength as EmpiricalLength
from flexjax.workload.lengths import IndependentLengths as IndependentLengths
from flexjax.workload.lengths import LengthDistribution as LengthDistribution
from flexjax.workload.lengths import LognormalLength as LognormalLength
from flexjax.workload.lengths import RequestLengths as RequestLengths
from flexjax.workload.lengths import TraceLengths as TraceLengths
from flexjax.workload.lengths import UniformLength as UniformLength
from flexjax.workload.lengths import draw_lengths as draw_lengths
from flexjax.workload.lengths import pick_by_length as pick_by_length
from flexjax.workload.lengths import with_lengths as with_lengths
from flexjax.workload.loads import FLEXLLM_RATES as FLEXLLM_RATES
from flexjax.workload.loads import LOQUETIER_BURST_MINUTES as LOQUETIER_BURST_MINUTES
from flexjax.workload.loads import LOQUETIER_CHANGING_PHASES as LOQUETIER_CHANGING_PHASES
from flexjax.workload.loads import fit_load as fit_load
from flexjax.workload.loads import flexllm_load as flexllm_load
from flexjax.workload.loads import loquetier_burst_load as loquetier_burst_load
from flexjax.workload.loads import loquetier_changing_load as loquetier_changing_load
from flexjax.workload.loads import loquetier_four_adapters as loquetier_four_adapters
from flexjax.workload.loads import loquetier_one_adapter as loquetier_one_adapter
from flexjax.workload.processes import Phase as Phase
from flexjax.workload.processes import Spacing as Spacing
from flexjax.workload.processes import burst_arrivals as burst_arrivals
from flexjax.workload.processes import gamma_arrivals as gamma_arrivals
from flexjax.workload.processes import merge_arrivals as merge_arrivals
from flexjax.workload.processes import phased_arrivals as phased_arrivals
from flexjax.workload.processes import ramp_arrivals as ramp_arrivals
from flexjax.workload.processes import uniform_arrivals as uniform_arrivals
from flexjax.workload.rescale import mean_rate as mean_rate
from flexjax.workload.rescale import random_slice as random_slice
from flexjax.workload.rescale import resample_rate as resample_rate
from flexjax.workload.rescale import rescale_rate as rescale_rate
from flexjax.workload.rescale import slice_time as slice_time
from flexjax.workload.trace import Trace as Trace
from flexjax.workload.trace import TraceFormat as TraceFormat
from flexjax.workload.trace import load_trace as load_trace
from flexjax.workload.trace import read_trace as read_trace
from flexjax.workload.workload import Workload as Workload
