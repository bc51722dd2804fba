"""Token-level distribution shift: what a fine-tuning run changed, where, and whether it matters."""

from steelyard.fused import TokenShift
from steelyard.tokens._decoding import CachedNextToken
from steelyard.tokens._enumeration import ExactCrossSampling, exact_cross_sampling
from steelyard.tokens._language_models import (
    HiddenStates,
    hidden_states_and_head,
    model_logprobs,
    model_token_shift,
)
from steelyard.tokens._tables import (
    MassReallocation,
    PositionalProfile,
    RankTable,
    mass_reallocation,
    positional_profile,
    rank_table,
    response_means,
)
from steelyard.tokens.cross_sampling import (
    CrossSample,
    CrossSamplingTrace,
    SwitchRule,
    cross_sample,
    random_switch_positions,
    switch_above_entropy,
    switch_above_js,
    switch_at,
    switch_below_js,
    trace_cross_sampling,
)
from steelyard.tokens.plots import (
    CrossSamplingCurve,
    heat_map_html,
    heat_map_text,
    plot_cross_sampling,
    plot_js_percentiles,
)
from steelyard.tokens.shift import ShiftSummary, nucleus, shift_summary, token_shift

__all__ = [
    "CachedNextToken",
    "CrossSample",
    "CrossSamplingCurve",
    "CrossSamplingTrace",
    "ExactCrossSampling",
    "HiddenStates",
    "MassReallocation",
    "PositionalProfile",
    "RankTable",
    "ShiftSummary",
    "SwitchRule",
    "TokenShift",
    "cross_sample",
    "exact_cross_sampling",
    "heat_map_html",
    "heat_map_text",
    "hidden_states_and_head",
    "mass_reallocation",
    "model_logprobs",
    "model_token_shift",
    "nucleus",
    "plot_cross_sampling",
    "plot_js_percentiles",
    "positional_profile",
    "random_switch_positions",
    "rank_table",
    "response_means",
    "shift_summary",
    "switch_above_entropy",
    "switch_above_js",
    "switch_at",
    "switch_below_js",
    "token_shift",
    "trace_cross_sampling",
]
