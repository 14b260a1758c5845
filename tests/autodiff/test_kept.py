"""Which activations are kept between forward and backward."""

import pytest

from flexjax.autodiff.kept import kept_names
from tests.helpers import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_backward_pass_never_reads_is_not_kept(family):
    config = tiny_config(family)
    expected = {"q_proj", "o_proj", "gate_proj", "up_proj", "attn", "lse"}
    if config.qk_norm:
        expected.add("k_proj")  # its norm's gradient reads it; without, only the pool's K is read
    assert set(kept_names(config, "full")) == expected
    assert kept_names(config, "inputs") == ()


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="`policy` must be 'inputs' or 'full'; got 'all'"):
        kept_names(tiny_config(), "all")
