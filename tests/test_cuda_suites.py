"""The suites that every backend passes, on both kinds of CUDA forward kernels in the emulator.

But for second derivatives of every option: they are the reference's, whatever the backend.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import ALL, Place
from cuda_calls import needs_x86
from cuda_emulated import FUSED, TILED, emulated, settings
from test_budget import (  # noqa: F401
    test_double_precision_agrees_with_the_reference,
    test_every_option,
    test_loss_in_every_regime,
    test_spectrum_in_every_regime,
)
from test_collapse import (  # noqa: F401
    test_cmi_and_its_gradient,
    test_confident_clusters,
    test_gradient_of_every_temperature,
    test_half_precision_logits_lose_only_their_own_rounding,
    test_rows_with_their_own_upstream_gradient,
)
from test_cross_entropy import (  # noqa: F401
    test_a_masked_target_costs_infinity,
    test_equals_cross_entropy,
    test_label_smoothing_of_logits_far_from_zero,
    test_other_dtypes,
    test_weights_of_the_terms_add_up,
)
from test_degenerate import (  # noqa: F401
    test_a_centroid_that_all_but_vanishes,
    test_a_term_of_weight_zero_is_left_out,
    test_absent_classes_have_zero_centroids,
    test_clusters_of_one_row_cost_nothing,
    test_extreme_logits,
    test_given_centroids_make_single_rows_count,
    test_large_labels_to_ignore,
    test_masked_classes,
    test_no_number_beside_given_centroids,
    test_no_number_gives_no_number,
    test_no_number_in_a_cluster_of_one,
    test_no_number_in_an_ignored_row_is_not_seen,
    test_no_row_is_kept,
    test_one_class,
    test_rows_of_a_collapsed_cluster_mask_a_class,
    test_rows_with_their_own_upstream_gradient_where_a_mean_is_subnormal,
    test_the_batchs_own_centroids_given_back_change_nothing,
    test_unnormalised_centroids_get_the_generalised_divergence,
    test_zero_centroid_of_a_class_without_probability,
    test_zero_centroid_of_a_masked_class,
)
from test_determinism import (  # noqa: F401
    test_permuting_classes_permutes_the_gradient,
    test_permuting_rows_permutes_the_gradient,
    test_splitting_off_other_classes_changes_nothing,
)
from test_extreme_temperatures import (  # noqa: F401
    test_cold_temperatures_do_not_see_how_large_the_logits_are,
    test_divergence_of_every_temperature,
    test_loss_and_its_gradient,
    test_the_cross_entropy_does_not_see_the_temperatures,
)
from test_gradients import (  # noqa: F401
    test_gradcheck,
    test_gradcheck_of_the_spectrum,
    test_gradient_penalty,
)
from test_module import test_same_as_the_function  # noqa: F401
from test_random_batches import test_large_random_batches, test_random_batches  # noqa: F401
from test_untouched import (  # noqa: F401
    TestTheGradientHasOneOwner,
    test_expanded_inputs,
    test_half_precision_gradients_are_scaled_before_they_are_rounded,
    test_inputs_stay_byte_identical,
    test_strides_change_nothing,
)

from cmim_kernels import dispatch

pytestmark = needs_x86


@pytest.fixture(params=[FUSED, TILED], ids=["fused", "tiled"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setitem(dispatch._modules, "cuda", emulated())
    processors = 60 if request.param == FUSED else 5  # enough for clusters of blocks, or few
    with settings(request.param, processors=processors):
        yield Place("cuda", "cpu", ALL)
