"""The real scheduler on a virtual clock: hours of a load in seconds, without a device.

Imports no jax.
"""

from flexjax.simulator.recorded import RecordedDevice as RecordedDevice
from flexjax.simulator.recorded import RecordedStep as RecordedStep
from flexjax.simulator.recorded import recorded_host as recorded_host
from flexjax.simulator.recorded import recorded_profile as recorded_profile
from flexjax.simulator.recording import Totals as Totals
from flexjax.simulator.runs import ROUTERS as ROUTERS
from flexjax.simulator.runs import ReplicaRuns as ReplicaRuns
from flexjax.simulator.runs import simulate as simulate
from flexjax.simulator.runs import simulate_replicas as simulate_replicas
from flexjax.simulator.setup import DeviceTimes as DeviceTimes
from flexjax.simulator.setup import HostTimes as HostTimes
from flexjax.simulator.setup import SimulatedEngine as SimulatedEngine
from flexjax.simulator.setup import SimulatedJob as SimulatedJob
from flexjax.simulator.setup import SimulationOptions as SimulationOptions
from flexjax.simulator.simulator import Simulator as Simulator
