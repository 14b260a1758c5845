"""When requests arrive and how long they are: generated or from a trace. Imports no jax."""

from flexjax.workload.arrivals import Arrival as Arrival
from flexjax.workload.arrivals import LengthScale as LengthScale
from flexjax.workload.arrivals import poisson_arrivals as poisson_arrivals
from flexjax.workload.arrivals import rebase as rebase
from flexjax.workload.arrivals import scale_lengths as scale_lengths
from flexjax.workload.trace import load_trace as load_trace
