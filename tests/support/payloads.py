"""Random payloads, for properties."""

from __future__ import annotations

from hypothesis import strategies as st

# What orjson and the standard library read and write alike: 64-bit integers, finite floats, text
# that UTF-8 can carry.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**63), max_value=2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
payloads = st.dictionaries(texts, values, max_size=4)

# Names that JSON pointers have to escape are as likely as others.
_keys = texts | st.text("~/01", max_size=4)
_values_with_bytes = st.recursive(
    scalars | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
)
payloads_with_bytes = st.dictionaries(_keys, _values_with_bytes, max_size=4)
