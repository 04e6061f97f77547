from __future__ import annotations

import re

from edge_slm_runtime import errors


def classes() -> list[type[errors.EdgeSlmError]]:
    return [getattr(errors, name) for name in errors.__all__]


def test_every_error_has_its_own_code() -> None:
    codes = [cls.code for cls in classes()]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


def test_every_class_is_exported() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.EdgeSlmError)
    }
    assert defined == set(errors.__all__)


def test_exit_codes_belong_to_a_family() -> None:
    for cls in classes():
        assert 1 <= cls.exit_code < 64
        parent = cls.__mro__[1]
        if parent not in (errors.EdgeSlmError, Exception):
            assert cls.exit_code == parent.exit_code  # type: ignore[attr-defined]


def test_text_is_problem_then_hint() -> None:
    assert str(errors.EmptyRequest("it is empty", "write something")) == (
        "it is empty (write something)"
    )
    assert str(errors.EmptyRequest("it is empty")) == "it is empty"


def test_text_is_one_line_of_bounded_length() -> None:
    error = errors.ManifestInvalid("first\nsecond\u2028third " + "x" * 10**6, "get it again")
    assert str(error).startswith("first second third xxx")
    assert "xxx...xxx" in str(error)
    assert str(error).endswith("xxx (get it again)")
    assert len(str(error)) < 1100
