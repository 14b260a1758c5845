"""Figures of served requests: percentiles, rates and summaries. Imports no jax."""

from flexjax.metrics.rates import RateCurve as RateCurve
from flexjax.metrics.rates import rate_of_events as rate_of_events
from flexjax.metrics.rates import rate_of_spans as rate_of_spans
from flexjax.metrics.summary import Distribution as Distribution
from flexjax.metrics.summary import ServingSummary as ServingSummary
from flexjax.metrics.summary import percentile as percentile
from flexjax.metrics.summary import slo_attainment as slo_attainment
from flexjax.metrics.summary import summarize as summarize
