import pytest

import mmpeft


def test_public_names_are_these():
    assert mmpeft.__all__ == [
        "Adapter",
        "AdapterBank",
        "AdapterCard",
        "BakeReport",
        "MmpeftError",
        "Recipe",
        "TrainResult",
        "attach",
        "bake",
        "compose",
        "export",
        "interference",
        "load_adapter",
        "plan",
        "train",
    ]


@pytest.mark.parametrize("name", mmpeft.__all__)
def test_public_name_can_be_imported_and_is_documented(name):
    assert getattr(mmpeft, name).__doc__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = mmpeft.trian
