"""Defects that are known, each with the tests that show it. When one is mended its tests come off this list."""

import pytest

KNOWN = {
    "test_the_warning_names_what_torn_layers_names": "the warning names homes, torn_layers names layers",
    "test_a_moment_of_another_shape_is_refused_before_anything_moves": "is refused when states have been moved",
    "test_a_checkpoint_brings_amsgrad_with_it": "a slab has no section for maxima that come later",
    "test_amsgrad_switched_in_the_middle[streamed-True]": "a slab has no section for maxima that come later",
    "test_amsgrad_switched_in_the_middle[resident-True]": "a slab has no section for maxima that come later",
    "test_a_model_cast_after_its_optimizer_was_made[streamed-torch.float32-torch.bfloat16-5-True]": "no new sections",
    "test_a_model_cast_after_its_optimizer_was_made[resident-torch.float32-torch.bfloat16-5-True]": "no new sections",
    "test_a_model_cast_after_its_optimizer_was_made[streamed-torch.float64-torch.float32-0-False]": "no new sections",
    "test_a_model_cast_after_its_optimizer_was_made[resident-torch.float64-torch.float32-0-False]": "no new sections",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in (item.name, item.name.split("[")[0]):
            if name in KNOWN:
                item.add_marker(pytest.mark.xfail(strict=True, reason=KNOWN[name]))
                break
