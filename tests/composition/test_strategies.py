import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft import plugins
from mmpeft.delta import Dense, Gain, LowRank, add
from mmpeft.errors import ConfigError, MethodError
from mmpeft.testing import check_strategy

NAMES = ["dare", "dare_ties", "knots", "magnitude", "orthogonal", "slerp", "sum", "svd", "ties", "zip"]
LOW_RANK = ["knots", "orthogonal", "slerp", "sum", "svd", "zip"]
SHAPES = [(4, 3), (3, 2, 3, 3), (5, 2, 1, 1), (6,), (3, 20)]


def compose(name, terms, **settings):
    strategy = plugins.get("strategy", name)
    if "generator" in inspect.signature(strategy).parameters:
        settings["generator"] = torch.Generator().manual_seed(0)
    return strategy(terms, **settings)


def test_these_are_the_strategies_and_each_says_what_its_settings_mean():
    assert [name for name in plugins.names("strategy") if "test" not in name] == NAMES
    for name in NAMES:
        strategy = plugins.get("strategy", name)
        _, *settings = inspect.signature(strategy).parameters.values()
        assert all(p.kind is p.KEYWORD_ONLY for p in settings)
        for setting in settings:
            assert f"\n        {setting.name}: " in strategy.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_built_in_strategies_keep_the_laws(name):
    check_strategy(plugins.get("strategy", name), order_matters=name == "orthogonal")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("svd", {"rank": 2}),
        ("svd", {"error": 0.3}),
        ("svd", {"energy": 0.5}),
        ("ties", {"density": 0.2}),
        ("ties", {"density": 1.0, "normalize": False}),
        ("dare_ties", {"density": 0.9, "normalize": False}),
        ("knots", {"density": 0.8, "normalize": False}),
        ("zip", {"stiffness": 2.0, "overlap": 0.5}),
    ],
)
def test_the_laws_hold_at_other_settings(name, settings):
    check_strategy(plugins.get("strategy", name), **settings)


@given(
    st.sampled_from(NAMES),
    st.sampled_from(SHAPES),
    st.lists(
        st.tuples(st.integers(1, 4), st.floats(-3, 3).filter(lambda weight: abs(weight) > 0.01)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_ranks_weights_shapes_and_dtypes_compose(low_rank, name, shape, parts, dtype):
    terms = [(low_rank(shape, rank, seed, dtype), weight) for seed, (rank, weight) in enumerate(parts)]
    result = compose(name, terms)
    change = result.dense()
    assert change.shape == shape
    assert change.dtype == torch.float32
    assert torch.isfinite(change).all()
    assert isinstance(result, LowRank if name in LOW_RANK else Dense)
    # the same numbers, rounded to the type but held in float32, give the same: half precision is never computed in
    held = []
    for seed, (rank, weight) in enumerate(parts):
        exact = low_rank(shape, rank, seed)
        B, A = exact.lora_B.to(dtype).float(), exact.lora_A.to(dtype).float()
        held.append((LowRank(B, A, shape), weight))
    assert torch.equal(compose(name, held).dense(), change)


@pytest.mark.parametrize("name", NAMES)
def test_changes_of_different_kinds_compose_as_the_matrices_that_they_are(low_rank, name):
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    kinds = [
        low_rank((4, 3), 2, 0),
        Dense(low_rank((4, 3), 3, 1).dense()),
        add([low_rank((4, 3), 1, 2), Gain(torch.tensor([0.5, -0.2, 0.0, 0.1]), "output", weight)]),
        Gain(torch.tensor([0.3, -0.5, 0.2]), "input", weight),
    ]
    terms = [(kind, 1.0 - 0.3 * i) for i, kind in enumerate(kinds)]
    matrices = [(Dense(kind.dense()), weight) for kind, weight in terms]
    expected = compose(name, matrices).dense()
    # zip's solver stops when it is near
    torch.testing.assert_close(compose(name, terms).dense(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_changes_that_are_all_zero_compose(low_rank, name):
    some, nothing = low_rank((4, 3), 2, 0), low_rank((4, 3), 1, 1).scaled(0.0)
    assert compose(name, [(nothing, 1.0), (nothing, 0.5)]).norm() == 0
    assert torch.isfinite(compose(name, [(nothing, 1.0), (some, 0.5)]).dense()).all()
    assert torch.isfinite(compose(name, [(some, 1.0), (nothing, -0.5)]).dense()).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_composed_is_refused_in_a_sentence(low_rank, name):
    good = low_rank((4, 3), 2, 0)
    broken = good.lora_A.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(MethodError, match="not finite numbers"):
        compose(name, [(good, 1.0), (LowRank(good.lora_B, broken, (4, 3)), 0.5)])
    with pytest.raises(ConfigError, match="weight must be a finite number; got inf"):
        compose(name, [(good, float("inf"))])
    with pytest.raises(ValueError, match="must have one shape"):
        compose(name, [(good, 1.0), (low_rank((3, 4), 2, 0), 1.0)])
    with pytest.raises(ValueError, match="nothing to add"):
        compose(name, [])


@pytest.mark.parametrize("name", ["dare", "dare_ties", "knots", "magnitude", "ties"])
@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, float("nan")])
def test_a_density_that_is_no_share_is_refused(low_rank, name, density):
    with pytest.raises(ConfigError, match=f"density: must be a share above 0 and at most 1; got {density}"):
        compose(name, [(low_rank((4, 3), 1, 0), 1.0)], density=density)
