"""Figures of served requests and measured runs. Imports no jax.

`figures` draws them and is imported by name, for it needs matplotlib.
"""

from flexjax.metrics.compare import CompareRow as CompareRow
from flexjax.metrics.compare import all_gaps_s as all_gaps_s
from flexjax.metrics.compare import compare_table as compare_table
from flexjax.metrics.compare import interference_ratio as interference_ratio
from flexjax.metrics.compare import markdown_table as markdown_table
from flexjax.metrics.compare import retention as retention
from flexjax.metrics.rates import RateCurve as RateCurve
from flexjax.metrics.rates import rate_of_events as rate_of_events
from flexjax.metrics.rates import rate_of_spans as rate_of_spans
from flexjax.metrics.records import RequestRecord as RequestRecord
from flexjax.metrics.records import StepRecord as StepRecord
from flexjax.metrics.records import TrainRecord as TrainRecord
from flexjax.metrics.report import RunSummary as RunSummary
from flexjax.metrics.report import measured_window as measured_window
from flexjax.metrics.report import summarize_run as summarize_run
from flexjax.metrics.run import RunRecord as RunRecord
from flexjax.metrics.run import load_runs as load_runs
from flexjax.metrics.slo import DEFAULT_TIERS as DEFAULT_TIERS
from flexjax.metrics.slo import RequestsSummary as RequestsSummary
from flexjax.metrics.slo import Tier as Tier
from flexjax.metrics.slo import TierSummary as TierSummary
from flexjax.metrics.slo import meets as meets
from flexjax.metrics.slo import summarize_requests as summarize_requests
from flexjax.metrics.summary import Distribution as Distribution
from flexjax.metrics.summary import ServingSummary as ServingSummary
from flexjax.metrics.summary import percentile as percentile
from flexjax.metrics.summary import slo_attainment as slo_attainment
from flexjax.metrics.summary import summarize as summarize
from flexjax.metrics.work import DeviceSummary as DeviceSummary
from flexjax.metrics.work import FinetuningSummary as FinetuningSummary
from flexjax.metrics.work import ModelError as ModelError
