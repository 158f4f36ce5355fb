import pytest

from mmpeft import plugins
from mmpeft.errors import ConfigError


def test_every_built_in_can_be_loaded():
    for kind in plugins.kinds():
        for name in plugins.names(kind):
            assert plugins.get(kind, name).__name__


def test_a_stranger_uses_the_same_door():
    class Mine:
        pass

    plugins.register("method", "mine-for-this-test", Mine)
    assert plugins.get("method", "mine-for-this-test") is Mine
    assert "mine-for-this-test" in plugins.names("method")


def test_names_are_not_taken_twice():
    with pytest.raises(ConfigError, match="a method called 'lora' is already registered"):
        plugins.register("method", "lora", object)


def test_unknown_names_and_kinds_get_a_hint():
    with pytest.raises(ConfigError, match="no method is called 'lroa'; did you mean 'lora'"):
        plugins.get("method", "lroa")
    with pytest.raises(ConfigError, match="no plugin kind is called 'methods'; did you mean 'method'"):
        plugins.register("methods", "x", object)
