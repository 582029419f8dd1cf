"""How pydantic's errors are told."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from pgchannels.web.validation import problems


def errors(count: int) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[int]).validate_python([""] * count)
    return caught.value


def test_the_first_ten_are_told() -> None:
    found = problems(errors(1000))
    assert [problem["loc"] for problem in found] == [[number] for number in range(10)]


def test_of_very_many_only_their_number_is_told() -> None:
    """Pydantic describes all or none, and a client's frame may have hundreds of thousands."""

    class Counted:
        def error_count(self) -> int:
            return 349_496

        def errors(self, **options: object) -> None:
            pytest.fail("all of them were described")

    told = [{"loc": [], "msg": "349496 values are not as expected"}]
    assert problems(Counted()) == told  # type: ignore[arg-type]
    assert problems(errors(1001)) == [{"loc": [], "msg": "1001 values are not as expected"}]
