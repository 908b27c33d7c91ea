"""Variant ``standard`` through the conformance kit, in every layout."""

from ring_core.testing import Conformance


class TestStandard(Conformance):
    variant = "standard"
    layouts = ("auto", "zigzag", "striped")
    in_every_layout = (
        "odd",
        "shorter than the group",
        "packed batch",
        "padded",
        "more keys",
        "packed cross",
    )
